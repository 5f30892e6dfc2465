"""What falls due after a step: a list of callbacks, each of which says when it is due and then acts, on all ranks together.

In this order: a line of the log, a snapshot of the power averages, a checkpoint, a grid of samples;
then those that a user's own file registered. The log is first, so that its rates hold no time of the
others; the snapshot goes before the checkpoint, so that none is missing after a kill between the two;
what only looks at the run comes last, when its state is safe.

    @CALLBACKS.register("weight_norm")
    class WeightNorm:
        needs_checked_step = True

        def due(self, run):
            return run.step % 100 == 0

        def act(self, run):
            run.log.say(f"{sum(w.norm() for w in run.network.parameters()):.4g}")
"""

from __future__ import annotations

from collections.abc import Callable

from condot.core.registry import Registry

from ..ema.snapshots import snapshot_due, write_snapshot
from .optimizer import learning_rate
from .run import Callback, Interrupted, Run


class WriteLogLine:
    """A line of metrics.jsonl: the means since the last one, of all ranks; and how the run stands."""

    needs_checked_step = True

    def due(self, run: Run) -> bool:
        """Every `log.every` steps, and after the last."""
        return run.step % run.config.log.every == 0 or run.is_done

    def act(self, run: Run) -> None:
        """Write the line; DataError where too many samples were bad."""
        train = run.config.train
        faults = run.stream.take_faults()
        values = run.meter.read(train.batch_size, len(faults))
        any_rank = bool(values["bad_samples"])
        values["bad_samples"] = run.bad_samples.report(faults, run.images, any_rank=any_rank)
        more = {"skipped_steps": run.guard.skipped, "lr": learning_rate(run.step - 1, train)}
        run.log.write(run.step, run.images, {**values, **more})
        run.status.write("running", step=run.step, images=run.images)
        run.bad_samples.check(run.images)


class TakeSnapshot:
    """The power averages as they are now; a disk that is full costs this snapshot alone."""

    needs_checked_step = False

    def due(self, run: Run) -> bool:
        """Return whether `ema.snapshot_every` images were seen since the last snapshot."""
        size, ema = run.config.train.batch_size, run.config.ema
        return snapshot_due(run.images, size, ema, run.config.train.max_steps * size)

    def act(self, run: Run) -> None:
        """Write the snapshots of the power averages."""
        with run.meter.paused(), run.watchdog.phase("saving a snapshot"):
            if run.accelerator.num_processes > 1:
                # what befalls one of several ranks they say to one another
                errors: list[str] | None = write_snapshot(run)
            else:
                errors = run.best_effort("the snapshot", lambda: write_snapshot(run))
                if errors is None:
                    errors = run.snapshots.finish()  # of what was begun
        if errors:
            run.log.say(f"snapshot of step {run.step} failed: {'; '.join(errors)}. Free some space.")


class SaveCheckpoint:
    """The whole state, copied now and written while training goes on."""

    needs_checked_step = True

    def due(self, run: Run) -> bool:
        """Every `checkpoint.every` steps, and where a save that failed is tried again; the last is saved when training has ended."""
        return run.step % run.config.checkpoint.every == 0 or run.step == run.retry_save_at

    def act(self, run: Run) -> None:
        """Begin to save, unless the last steps were bad."""
        with run.meter.paused():
            if run.guard.consecutive_bad:
                # the weights may be those that made the last steps bad: a rollback must not return to them
                run.retry_save_at = run.step + 1
            else:
                run.save()


class DrawPreview:
    """A grid of samples; given up when a signal comes, and whatever else it raises ends nothing."""

    needs_checked_step = False

    def due(self, run: Run) -> bool:
        """Every `log.sample_every` steps, and after the last; never where that is 0."""
        every = run.config.log.sample_every
        return every > 0 and (run.step % every == 0 or run.is_done)

    def act(self, run: Run) -> None:
        """Commit the save under way, so that what kills the process while it draws costs no checkpoint; then draw."""
        with run.meter.paused():
            with run.watchdog.phase("saving"):
                run.wait_for_checkpoint()
            with run.watchdog.phase("sampling"):
                try:
                    if run.sharded or run.accelerator.is_main_process:
                        run.best_effort("the preview", lambda: run.preview(run), reraise=(Interrupted,))
                except Interrupted:
                    run.log.say(f"no samples of step {run.step}: a signal came.")
                run.accelerator.wait_for_everyone()


class BestEffortCallback:
    """A callback of a user's own: what it raises is told once for each cause, and training goes on.

    Args:
        name: by which it is registered.
        callback: what acts.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self.name, self.callback = name, callback
        self.needs_checked_step = getattr(callback, "needs_checked_step", True)

    def due(self, run: Run) -> bool:
        """Whether it says so; one that cannot say is not."""
        return bool(run.best_effort(f"the callback {self.name}", lambda: self.callback.due(run)))

    def act(self, run: Run) -> None:
        """Act, and wait for the other ranks, under the watchdog's eyes; given up where it hears of a signal (`run.check_interrupt()`)."""
        with run.meter.paused(), run.watchdog.phase(self.name):
            try:
                run.best_effort(f"the callback {self.name}", lambda: self.callback.act(run), reraise=(Interrupted,))
            except Interrupted:
                run.log.say(f"the callback {self.name} of step {run.step} was given up: a signal came.")
            run.accelerator.wait_for_everyone()


CALLBACKS: Registry[Callable[[], Callback]] = Registry(
    "callback",
    {
        "log": WriteLogLine,
        "snapshot": TakeSnapshot,
        "checkpoint": SaveCheckpoint,
        "preview": DrawPreview,
    },
)
"""Every callback, in the order in which they act; what makes one takes no arguments."""
BUILT_IN = tuple(CALLBACKS)
"""Those of the house, whose errors are the run's own where they say so."""


def build_callbacks() -> list[Callback]:
    """Return every callback that is registered now, in order."""
    built = [(name, make()) for name, make in CALLBACKS.items()]
    return [one if name in BUILT_IN else BestEffortCallback(name, one) for name, one in built]


def needs_checked_step(run: Run) -> bool:
    """Return whether something is due after this step that must know that the step was good."""
    return any(one.needs_checked_step and one.due(run) for one in run.callbacks)


def run_callbacks(run: Run) -> None:
    """Do what is due after a step, one callback after the other, all ranks together."""
    if needs_checked_step(run) or run.is_done:
        run.checkpoints.check_lock()
    for callback in run.callbacks:
        if callback.due(run):
            callback.act(run)
