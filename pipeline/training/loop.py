"""The training loop: one optimiser step, what falls due after it, and the way back when it went wrong.

Noise, time and dropped label of a sample are functions of (seed, step, place in
the global batch), the learning rate is one of the step, the order one of the
positions consumed: so a resumed run is the uninterrupted one, and the number of
ranks changes only the order in which gradients are summed.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from condot.core.process import EXIT_DATA_ERROR, EXIT_DIVERGED, EXIT_USER_ERROR, DataError

from ..ema.snapshots import remove_later_snapshots, snapshot_due, write_snapshot
from ..launch.parallel import gather_full
from .batches import lacks_data, next_batch, require_data_on_all_ranks
from .conditioning import MicroBatch
from .guard import TrainingDiverged
from .optimizer import learning_rate, step_unless
from .run import Interrupted, Run
from .step_stats import StepStats

Recent = deque[tuple[int, list[MicroBatch]]]
"""Steps that may still be judged, and what they saw."""


def run_training(run: Run) -> int:
    """Train to the end, to a signal, or to where nothing helps; the exit status, which status.json tells too.

    Raises:
        ValueError, OSError: as `fit`; told in status.json too.
    """
    stop, outcome = (
        run.config.train.max_steps,
        dict[str, Any](state="failed", reason="it was ended from within", exit_status=EXIT_USER_ERROR),
    )
    try:
        run.status.write("running", step=run.step, of=stop, images=run.images)
        fit(run, stop)
        outcome = {"state": "finished", "exit_status": 0}
        if run.interrupt.requested:
            outcome = {"state": "stopped", "signal": run.interrupt.received, "exit_status": run.interrupt.exit_status}
            run.log.say(f"stopped at step {run.step}; the same command goes on from there.")
    except DataError as error:
        outcome = {"state": "failed", "reason": str(error), "exit_status": EXIT_DATA_ERROR}
        raise
    except TrainingDiverged as error:
        outcome = {"state": "diverged", "reason": str(error), "exit_status": EXIT_DIVERGED}
        run.log.say(f"error: {error}")
    except Exception as error:
        outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}", "exit_status": EXIT_USER_ERROR}
        raise
    finally:
        run.watchdog.close()
        run.status.write(**outcome, step=run.step, images=run.images)
        for what, times in run.best_effort.failures.items():
            run.log.say(f"{times} times: {what}" if times > 1 else "")
        run.log.close()
        run.stream.close()
    exit_status: int = outcome["exit_status"]
    return exit_status


def fit(run: Run, stop: int) -> None:
    """Advance to optimiser step `stop`, or to the step at which a signal came; saved either way.

    Raises:
        TrainingDiverged: bad steps that rollbacks did not cure.
        DataError: data that cannot be read, or too many bad samples; the last whole step is saved.
        ValueError: a last state that could not be saved.
    """
    recent: Recent = deque(maxlen=2)
    try:
        prepare_first_step(run)
        stopping = run_steps(run, stop, recent)
    except DataError as error:
        raise DataError(f"{error} {save_before_exit(run, recent)}") from error
    if stopping and not run.interrupt.requested:
        run.interrupt.received = 15
    run.save(wait=True)
    if run.last_saved_step != run.step:
        raise ValueError(
            f"the state of step {run.step} could not be saved in {run.checkpoints.root}: "
            f"free some space; the same command goes on from step {run.last_saved_step}."
        )
    with run.watchdog.phase("saving"):
        run.checkpoints.wait_for_cleanup()  # a process that ends takes its threads along, and what they had not yet removed would stay


def run_steps(run: Run, stop: int, recent: Recent) -> bool:
    """Do one step after the other; returns whether a signal ended it. Errors as `fit`."""
    stopping = data_missing = False
    while run.step < stop and not stopping:
        recent.append((run.step, train_step(run)))
        reason = ""
        for stats in run.step_reducer.read(all=run.step == stop or log_or_save_due(run)):
            stopping |= stats.stop
            data_missing |= stats.data_missing
            reason = reason or check_step(run, stats, recent)
            if run.checkpoints.pending is not None and stats.step >= run.checkpoints.pending and not stats.writing:
                run.wait_for_checkpoint()  # every rank has written its part
        if reason:
            roll_back(run, reason)
            recent.clear()  # its steps are done again, with other samples
        else:
            run_callbacks(run, stop)
        if data_missing and run.step < stop:
            require_data_on_all_ranks(run)
        stopping |= run.accelerator.num_processes == 1 and run.interrupt.requested  # several ask one another, in the next step
    return stopping


def save_before_exit(run: Run, recent: Recent) -> str:
    """Save the last whole step before the run ends for want of data, all ranks together; what is to be said of it."""
    reasons = [check_step(run, stats, recent) for stats in run.step_reducer.read(all=True)]
    if not any(reasons):
        run.save(wait=True)
    if run.last_saved_step == run.step:
        return f"The state of step {run.step} is saved: mend that, and the same command goes on from there."
    where = f"from step {run.last_saved_step}" if run.last_saved_step >= 0 else "from the beginning"
    return f"The state of step {run.step} could not be saved: mend that, and the same command goes on {where}."


def prepare_first_step(run: Run) -> None:
    """Make the first step of this launch like any other, and see that there is something to come back to."""
    with run.meter.paused():
        _prepare_first_step(run)


def _prepare_first_step(run: Run) -> None:
    require_data_on_all_ranks(run)
    if run.accelerator.num_processes > 2 and not run.sharded:
        warm_up_ddp_buckets(run)
        require_data_on_all_ranks(run)
    left = run.config.train.max_steps - run.step
    run.checkpoints.check_disk_space(run.tensors(), -(-left // run.config.checkpoint.every) + (run.last_saved_step < 0))
    if run.last_saved_step < 0:
        run.save(wait=True)
    else:
        run.checkpoints.reserve_memory(run.tensors())
    if run.last_saved_step != run.step:
        raise ValueError(
            f"output_dir={str(run.checkpoints.root)!r}: the first checkpoint could not be written, as said above, and nothing was trained. "
            f"Free some space, or give another --output_dir."
        )


def warm_up_ddp_buckets(run: Run) -> None:
    """A pass whose gradients are thrown away: after its first, DDP lays out its sums anew, and a resumed run must add up alike."""
    run.accelerator.backward(compute_loss(run, next(run.stream)).mean())
    run.optimizer.zero_grad()
    reopen_stream(run)


def reopen_stream(run: Run) -> None:
    """Begin the stream at the cursor again."""
    run.stream.close()
    run.stream = run.open_stream(run.cursor)


def train_step(run: Run) -> list[MicroBatch]:
    """One optimiser step; what it saw."""
    train, batches = run.config.train, []
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train)
    loss = torch.zeros((), device=run.accelerator.device)
    for _ in range(train.gradient_accumulation_steps):
        batch = next_batch(run)
        batches.append(batch)
        run.log.say(run.meter.count(partial(example_inputs, run, batch)))
        run.watchdog.heartbeat(run.step, "computing")
        with run.accelerator.accumulate(run.model):
            losses = compute_loss(run, batch)
            run.accelerator.backward(losses.mean())
            loss += losses.detach().mean() / train.gradient_accumulation_steps
            if run.accelerator.sync_gradients:
                optimizer_step(run, loss)
            run.optimizer.zero_grad()
    run.step += 1
    run.images += train.batch_size
    run.cursor += train.batch_size
    run.ema.update(run.network, run.images, train.batch_size)
    run.log.advance()
    return batches


def optimizer_step(run: Run, loss: Tensor) -> None:
    """Move the weights by the gradients, unless this step is bad on any rank."""
    norm, data_missing = clip_gradients(run), lacks_data(run)
    run.watchdog.heartbeat(run.step, "reducing")
    bad = run.step_reducer.reduce(
        run.step, loss, norm, stop=run.interrupt.requested, writing=run.checkpoints.is_writing(), data_missing=data_missing
    )
    step_unless(run.optimizer, bad)
    run.meter.add_step(loss, norm, bad)


def compute_loss(run: Run, batch: MicroBatch) -> Tensor:
    """The objective on a micro-batch, (B,)."""
    device = run.accelerator.device
    data = run.encode(batch, run.step)
    draws = run.objective.draw_random_inputs(
        run.config.seed, run.step, batch.batch_indices.to(device, non_blocking=True), tuple(data.shape[1:])
    )
    losses = run.objective.losses(run.model, torch.nan_to_num(data), draws, *run.condition(batch, run.step, draws.drop))
    # a sample that is not finite has a loss that is not: the step is skipped, and training goes on
    return losses + 0 * data.flatten(1).sum(1)


def example_inputs(run: Run, batch: MicroBatch) -> tuple[Any, ...]:
    """What the network sees of a micro-batch beside the time, nothing dropped: data, (B, *S), and what else it takes."""
    data = run.encode(batch, run.step)
    return data, *run.condition(batch, run.step, torch.ones(len(data), device=run.accelerator.device))


def clip_gradients(run: Run) -> Tensor:
    """Shorten the gradients; their norm before, of all ranks, on the device."""
    longest = run.config.train.max_grad_norm or float("inf")
    return gather_full(run.accelerator.clip_grad_norm_(run.model.parameters(), longest).detach())


def check_step(run: Run, stats: StepStats, recent: Recent) -> str:
    """Take note of a step that all ranks know of; why it must be undone, or ""."""
    reason = run.guard.check(stats)
    if stats.bad:
        batches = next((batches for step, batches in recent if step == stats.step), [])
        keys = gather_object([key for batch in batches for key in run.stream.keys(batch)])
        run.incidents.record_bad_step(stats, keys)
        run.log.say(
            f"step {stats.step} was not applied: loss {stats.loss}, gradient's norm {stats.norm}; "
            f"its samples are in {run.incidents.bad_step_file.path}"
        )
    return reason


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


def log_or_save_due(run: Run) -> bool:
    """Whether something is to be done after this step that must know it was good."""
    return run.step % run.config.log.every == 0 or _save_due(run)


def _save_due(run: Run) -> bool:
    return run.step % run.config.checkpoint.every == 0 or run.step == run.retry_save_at


def run_callbacks(run: Run, stop: int) -> None:
    """Whatever is due after a step: a log line, a checkpoint, a snapshot of the averages, a sample grid."""
    config = run.config
    if log_or_save_due(run) or run.step == stop:
        run.checkpoints.check_lock()
    if run.step % config.log.every == 0 or run.step == stop:
        faults = run.stream.take_faults()
        values = run.meter.read(config.train.batch_size, len(faults))
        values["bad_samples"] = run.bad_samples.report(faults, run.images, any_rank=bool(values["bad_samples"]))
        more = {"skipped_steps": run.guard.skipped, "lr": learning_rate(run.step - 1, config.train)}
        run.log.write(run.step, run.images, {**values, **more})
        run.status.write("running", step=run.step, images=run.images)
        run.bad_samples.check(run.images)
    with run.meter.paused():
        if snapshot_due(run.images, config.train.batch_size, config.ema, config.train.max_steps * config.train.batch_size):
            take_snapshot(run)  # before the checkpoint, so that none is missing after a kill between the two
        if _save_due(run) and run.guard.consecutive_bad:
            run.retry_save_at = run.step + 1  # the weights may be those that made the last steps bad: a rollback must not return to them
        elif _save_due(run):
            run.save()
        if config.log.sample_every and (run.step % config.log.sample_every == 0 or run.step == stop):
            draw_preview(run)


def take_snapshot(run: Run) -> None:
    """Keep the power averages as they are now; a disk that is full costs this snapshot alone."""
    with run.watchdog.phase("saving a snapshot"):
        if run.accelerator.num_processes > 1:
            errors: list[str] | None = write_snapshot(run)  # what befalls one of several ranks they say to one another
        else:
            errors = run.best_effort("the snapshot", lambda: write_snapshot(run))
            if errors is None:
                errors = run.snapshots.finish()  # of what was begun
    if errors:
        run.log.say(f"snapshot of step {run.step} failed: {'; '.join(errors)}. Free some space.")


def draw_preview(run: Run) -> None:
    """Write a grid of samples; given up when a signal comes, and whatever else it raises ends nothing.

    The save under way is committed before: what kills the process while it draws costs no checkpoint.
    """
    with run.watchdog.phase("saving"):
        run.wait_for_checkpoint()
    with run.watchdog.phase("sampling"):
        try:
            if run.sharded or run.accelerator.is_main_process:
                run.best_effort("the preview", lambda: run.preview(run), reraise=(Interrupted,))
        except Interrupted:
            run.log.say(f"no samples of step {run.step}: a signal came.")
        run.accelerator.wait_for_everyone()
