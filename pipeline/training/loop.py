"""The story of training: one optimiser step, what falls due after it, and the way back when it went wrong.

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

from condot.core.process import DIVERGED, MISTAKE, NO_DATA, DataError

from ..ema.snapshots import due as snapshot_due
from ..ema.snapshots import forget, snapshot
from ..launch.parallel import whole
from .batches import agree_on_data, lacks_data, read
from .conditioning import MicroBatch
from .guard import Diverged
from .optimizer import learning_rate, step_unless
from .run import Run, Told
from .step_stats import Beat

Recent = deque[tuple[int, list[MicroBatch]]]
"""Steps that may still be judged, and what they saw."""


def story(run: Run) -> int:
    """Train to the end, to a signal, or to where nothing helps; the exit status, which status.json tells too.

    Raises:
        ValueError, OSError: as `fit`; told in status.json too.
    """
    stop, said = run.config.train.max_steps, dict[str, Any](state="failed", reason="it was ended from within", exit_status=MISTAKE)
    try:
        run.status.write("running", step=run.step, of=stop, images=run.images)
        fit(run, stop)
        said = {"state": "finished", "exit_status": 0}
        if run.stopper.requested:
            said = {"state": "stopped", "signal": run.stopper.received, "exit_status": run.stopper.exit_status}
            run.log.say(f"stopped at step {run.step}; the same command goes on from there.")
    except DataError as error:
        said = {"state": "failed", "reason": str(error), "exit_status": NO_DATA}
        raise
    except Diverged as error:
        said = {"state": "diverged", "reason": str(error), "exit_status": DIVERGED}
        run.log.say(f"error: {error}")
    except Exception as error:
        said = {"state": "failed", "reason": f"{type(error).__name__}: {error}", "exit_status": MISTAKE}
        raise
    finally:
        run.watch.close()
        run.status.write(**said, step=run.step, images=run.images)
        for what, times in run.side.failures.items():
            run.log.say(f"{times} times: {what}" if times > 1 else "")
        run.log.close()
        run.stream.close()
    return said["exit_status"]


def fit(run: Run, stop: int) -> None:
    """Advance to optimiser step `stop`, or to the step at which a signal came; saved either way.

    Raises:
        Diverged: bad steps that rollbacks did not cure.
        DataError: data that cannot be read, or too many bad samples; the last whole step is saved.
        ValueError: a last state that could not be saved.
    """
    recent: Recent = deque(maxlen=2)
    try:
        begin(run)
        stopping = go_on(run, stop, recent)
    except DataError as error:
        raise DataError(f"{error} {keep(run, recent)}") from error
    if stopping and not run.stopper.requested:
        run.stopper.received = 15
    run.save(wait=True)
    if run.saved != run.step:
        raise ValueError(
            f"the state of step {run.step} could not be saved in {run.store.root}: "
            f"free some space; the same command goes on from step {run.saved}."
        )
    with run.watch.at("saving"):
        run.store.settle()  # a process that ends takes its threads along, and what they had not yet removed would stay


def go_on(run: Run, stop: int, recent: Recent) -> bool:
    """Do one step after the other; returns whether a signal ended it. Errors as `fit`."""
    stopping = lost = False
    while run.step < stop and not stopping:
        recent.append((run.step, advance(run)))
        reason = ""
        for beat in run.pulse.read(all=run.step == stop or due(run)):
            stopping |= beat.stop
            lost |= beat.lost
            reason = reason or judge(run, beat, recent)
            if run.store.pending is not None and beat.step >= run.store.pending and not beat.writing:
                run.settle()  # every rank has written its part
        if reason:
            roll_back(run, reason)
            recent.clear()  # its steps are done again, with other samples
        else:
            notify(run, stop)
        if lost and run.step < stop:
            agree_on_data(run)
        stopping |= run.accelerator.num_processes == 1 and run.stopper.requested  # several ask one another, in the next step
    return stopping


def keep(run: Run, recent: Recent) -> str:
    """Save the last whole step before the run ends for want of data, all ranks together; what is to be said of it."""
    reasons = [judge(run, beat, recent) for beat in run.pulse.read(all=True)]
    if not any(reasons):
        run.save(wait=True)
    if run.saved == run.step:
        return f"The state of step {run.step} is saved: mend that, and the same command goes on from there."
    where = f"from step {run.saved}" if run.saved >= 0 else "from the beginning"
    return f"The state of step {run.step} could not be saved: mend that, and the same command goes on {where}."


def begin(run: Run) -> None:
    """Make the first step of this launch like any other, and see that there is something to come back to."""
    with run.meter.paused():
        _begin(run)


def _begin(run: Run) -> None:
    agree_on_data(run)
    if run.accelerator.num_processes > 2 and not run.sharded:
        settle_sums(run)
        agree_on_data(run)
    left = run.config.train.max_steps - run.step
    run.store.check_room(run.tensors(), -(-left // run.config.checkpoint.every) + (run.saved < 0))
    if run.saved < 0:
        run.save(wait=True)
    else:
        run.store.reserve(run.tensors())
    if run.saved != run.step:
        raise ValueError(
            f"output_dir={str(run.store.root)!r}: the first checkpoint could not be written, as said above, and nothing was trained. Free "
            f"some space, or give another --output_dir."
        )


def settle_sums(run: Run) -> None:
    """A pass whose gradients are thrown away: after its first, DDP lays out its sums anew, and a resumed run must add up alike."""
    run.accelerator.backward(loss_of(run, next(run.stream)).mean())
    run.optimizer.zero_grad()
    reopen(run)


def reopen(run: Run) -> None:
    """Begin the stream at the cursor again."""
    run.stream.close()
    run.stream = run.open(run.cursor)


def advance(run: Run) -> list[MicroBatch]:
    """One optimiser step; what it saw."""
    train, seen = run.config.train, []
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train)
    loss = torch.zeros((), device=run.accelerator.device)
    for _ in range(train.gradient_accumulation_steps):
        batch = read(run)
        seen.append(batch)
        run.log.say(run.meter.count(partial(told, run, batch)))
        run.watch.beat(run.step, "computing")
        with run.accelerator.accumulate(run.model):
            losses = loss_of(run, batch)
            run.accelerator.backward(losses.mean())
            loss += losses.detach().mean() / train.gradient_accumulation_steps
            if run.accelerator.sync_gradients:
                apply(run, loss)
            run.optimizer.zero_grad()
    run.step += 1
    run.images += train.batch_size
    run.cursor += train.batch_size
    run.ema.update(run.network, run.images, train.batch_size)
    run.log.advance()
    return seen


def apply(run: Run, loss: Tensor) -> None:
    """Move the weights by the gradients, unless this step is bad on any rank."""
    norm, lost = clip(run), lacks_data(run)
    run.watch.beat(run.step, "reducing")
    bad = run.pulse.beat(run.step, loss, norm, stop=run.stopper.requested, writing=run.store.busy(), lost=lost)
    step_unless(run.optimizer, bad)
    run.meter.add_step(loss, norm, bad)


def loss_of(run: Run, batch: MicroBatch) -> Tensor:
    """The objective on a micro-batch, (B,)."""
    device = run.accelerator.device
    data = run.encode(batch, run.step)
    draws = run.method.draw(run.config.seed, run.step, batch.places.to(device, non_blocking=True), tuple(data.shape[1:]))
    losses = run.method.losses(run.model, torch.nan_to_num(data), draws, *run.condition(batch, run.step, draws.drop))
    # a sample that is not finite has a loss that is not: the step is skipped, and training goes on
    return losses + 0 * data.flatten(1).sum(1)


def told(run: Run, batch: MicroBatch) -> tuple[Any, ...]:
    """What the network sees of a micro-batch beside the time, nothing dropped: data, (B, *S), and what else it takes."""
    data = run.encode(batch, run.step)
    return data, *run.condition(batch, run.step, torch.ones(len(data), device=run.accelerator.device))


def clip(run: Run) -> Tensor:
    """Shorten the gradients; their norm before, of all ranks, on the device."""
    longest = run.config.train.max_grad_norm or float("inf")
    return whole(run.accelerator.clip_grad_norm_(run.model.parameters(), longest).detach())


def judge(run: Run, beat: Beat, recent: Recent) -> str:
    """Take note of a step that all ranks know of; why it must be undone, or ""."""
    reason = run.guard.judge(beat)
    if beat.bad:
        batches = next((batches for step, batches in recent if step == beat.step), [])
        keys = gather_object([key for batch in batches for key in run.stream.keys(batch)])
        run.evidence.skipped(beat, keys)
        run.log.say(
            f"step {beat.step} was not applied: loss {beat.loss}, gradient's norm {beat.norm}; its samples are in {run.evidence.bad.path}"
        )
    return reason


def roll_back(run: Run, reason: str) -> None:
    """Return to the last good checkpoint, and pass over the data since.

    Raises:
        Diverged: done too often, or there is none.
    """
    run.settle()
    allowed, done = run.config.guard.rollbacks, len(run.evidence.rollbacks)
    folder = run.store.latest() if done < allowed else None
    if folder is None:
        why = f"after {done} rollback(s), guard.rollbacks={allowed}" if done >= allowed else "and there is no good checkpoint to return to"
        kept = f"{run.evidence.undone.path} and {run.evidence.bad.path}"
        raise Diverged(
            f"training diverged at step {run.step}, {why}: {reason}. The evidence is in {kept}. Lower train.learning_rate="
            f"{run.config.train.learning_rate}, or look at those samples; raise guard.rollbacks to go on all the same."
        )
    left, cursor = run.step, run.cursor
    run.pulse.forget()
    run.load(folder)
    line = {"from_step": left, "to_step": run.step, "reason": reason, "positions": [run.cursor, cursor], "cursor": cursor}
    run.evidence.rolled_back(line | {"metrics": run.log.back(run.step)[-20:], "bad_steps": run.evidence.after(run.step)})
    run.evidence.drop_after(run.step)
    if run.accelerator.is_main_process:
        run.side("forgetting the snapshots of steps that are done again", lambda: forget(run.snapshots, run.step))
    run.cursor = cursor  # where the stream is already
    run.log.say(f"back from step {left} to {folder}, past the data of positions {line['positions']}: {reason}.")


def due(run: Run) -> bool:
    """Whether something is to be done after this step that must know it was good."""
    return run.step % run.config.log.every == 0 or _save_due(run)


def _save_due(run: Run) -> bool:
    return run.step % run.config.checkpoint.every == 0 or run.step == run.again


def notify(run: Run, stop: int) -> None:
    """Whatever is due after a step: a log line, a checkpoint, a snapshot of the averages, a sample grid."""
    config = run.config
    if due(run) or run.step == stop:
        run.store.check_owned()
    if run.step % config.log.every == 0 or run.step == stop:
        faults = run.stream.take_faults()
        values = run.meter.read(config.train.batch_size, len(faults))
        values["bad_samples"] = run.bad.report(faults, run.images, any_rank=bool(values["bad_samples"]))
        more = {"skipped_steps": run.guard.skipped, "lr": learning_rate(run.step - 1, config.train)}
        run.log.write(run.step, run.images, {**values, **more})
        run.status.write("running", step=run.step, images=run.images)
        run.bad.check(run.images)
    with run.meter.paused():
        if snapshot_due(run.images, config.train.batch_size, config.ema, config.train.max_steps * config.train.batch_size):
            snap(run)  # before the checkpoint, so that none is missing after a kill between the two
        if _save_due(run) and run.guard.row:
            run.again = run.step + 1  # the weights may be those that made the last steps bad: a rollback must not return to them
        elif _save_due(run):
            run.save()
        if config.log.sample_every and (run.step % config.log.sample_every == 0 or run.step == stop):
            sample(run)


def snap(run: Run) -> None:
    """Keep the power averages as they are now; a disk that is full costs this snapshot alone."""
    with run.watch.at("saving a snapshot"):
        if run.accelerator.num_processes > 1:
            errors: list[str] | None = snapshot(run)  # what befalls one of several ranks they say to one another
        else:
            errors = run.side("the snapshot", lambda: snapshot(run))
            if errors is None:
                errors = run.snapshots.finish()  # of what was begun
    if errors:
        run.log.say(f"snapshot of step {run.step} failed: {'; '.join(errors)}. Free some space.")


def sample(run: Run) -> None:
    """Write a grid of samples; given up when a signal comes, and whatever else it raises ends nothing.

    The save under way is committed before: what kills the process while it draws costs no checkpoint.
    """
    with run.watch.at("saving"):
        run.settle()
    with run.watch.at("sampling"):
        try:
            if run.sharded or run.accelerator.is_main_process:
                run.side("the preview", lambda: run.sample(run), passed=(Told,))
        except Told:
            run.log.say(f"no samples of step {run.step}: a signal came.")
        run.accelerator.wait_for_everyone()
