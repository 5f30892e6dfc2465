"""The way back after steps that went wrong: to the last good checkpoint, and past the data since."""

from __future__ import annotations

from ..ema.snapshots import remove_later_snapshots
from .run import Run


class TrainingDiverged(Exception):
    """A run that was led back too often, or could not be."""


def roll_back(run: Run, reason: str) -> None:
    """Return to the last good checkpoint, and pass over the data since.

    Raises:
        TrainingDiverged: done too often, or there is none.
    """
    run.wait_for_checkpoint()
    allowed, done = run.config.guard.rollbacks, len(run.incidents.rollbacks)
    folder = run.checkpoints.latest() if done < allowed else None
    if folder is None:
        why = f"after {done} rollback(s), guard.rollbacks={allowed}" if done >= allowed else "and there is no good checkpoint to return to"
        kept = f"{run.incidents.rollback_file.path} and {run.incidents.bad_step_file.path}"
        raise TrainingDiverged(
            f"training diverged at step {run.step}, {why}: {reason}. The evidence is in {kept}. Lower train.learning_rate="
            f"{run.config.train.learning_rate}, or look at those samples; raise guard.rollbacks to go on all the same."
        )
    left, cursor = run.step, run.cursor
    run.step_reducer.clear()
    run.load(folder)
    line = {"from_step": left, "to_step": run.step, "reason": reason, "positions": [run.cursor, cursor], "cursor": cursor}
    run.incidents.record_rollback(line | {"metrics": run.log.rewind(run.step)[-20:], "bad_steps": run.incidents.bad_steps_since(run.step)})
    run.incidents.drop_since(run.step)
    if run.accelerator.is_main_process:
        run.best_effort("forgetting the snapshots of steps that are done again", lambda: remove_later_snapshots(run.snapshots, run.step))
    run.cursor = cursor  # where the stream is already
    run.log.say(f"back from step {left} to {folder}, past the data of positions {line['positions']}: {reason}.")
