"""The training loop: one optimiser step, what falls due after it, and the way back when it went wrong.

Noise, time and dropped label of a sample are functions of (seed, step, place in
the global batch), the learning rate is one of the step, the order one of the
positions consumed: so a resumed run is the uninterrupted one, and the number of
ranks changes only the order in which gradients are summed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from condot.core.process import EXIT_DATA_ERROR, EXIT_DIVERGED, EXIT_USER_ERROR, DataError

from ..launch.parallel import gather_full
from .batches import lacks_data, next_batch, require_data_on_all_ranks
from .callbacks import needs_checked_step, run_callbacks
from .conditioning import MicroBatch
from .first_step import prepare_first_step
from .loss import compute_loss, example_inputs
from .optimizer import learning_rate, step_unless
from .rollback import TrainingDiverged, roll_back
from .run import Run
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
        for stats in run.step_reducer.read(all=run.step == stop or needs_checked_step(run)):
            stopping |= stats.stop
            data_missing |= stats.data_missing
            reason = reason or check_step(run, stats, recent)
            if run.checkpoints.pending is not None and stats.step >= run.checkpoints.pending and not stats.writing:
                run.wait_for_checkpoint()  # every rank has written its part
        if reason:
            roll_back(run, reason)
            recent.clear()  # its steps are done again, with other samples
        else:
            run_callbacks(run)
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


def train_step(run: Run) -> list[MicroBatch]:
    """One optimiser step; what it saw."""
    train, batches = run.config.train, []
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train)
    loss, extras = torch.zeros((), device=run.accelerator.device), dict[str, Tensor]()
    for _ in range(train.gradient_accumulation_steps):
        batch = next_batch(run)
        batches.append(batch)
        run.log.say(run.meter.count(partial(example_inputs, run, batch)))
        run.watchdog.heartbeat(run.step, "computing")
        with run.accelerator.accumulate(run.model):
            step_loss = compute_loss(run, batch)
            run.accelerator.backward(step_loss.loss.mean())
            loss += step_loss.loss.detach().mean() / train.gradient_accumulation_steps
            for name, value in step_loss.extras.items():
                extras[name] = extras.get(name, 0) + value.detach().mean() / train.gradient_accumulation_steps
            if run.accelerator.sync_gradients:
                optimizer_step(run, loss, extras)
            run.optimizer.zero_grad()
    run.step += 1
    run.images += train.batch_size
    run.cursor += train.batch_size
    run.ema.update(run.network, run.images, train.batch_size)
    run.log.advance()
    return batches


def optimizer_step(run: Run, loss: Tensor, extras: Mapping[str, Tensor]) -> None:
    """Move the weights by the gradients, unless this step is bad on any rank."""
    norm, data_missing = clip_gradients(run), lacks_data(run)
    run.watchdog.heartbeat(run.step, "reducing")
    bad = run.step_reducer.reduce(
        run.step, loss, norm, stop=run.interrupt.requested, writing=run.checkpoints.is_writing(), data_missing=data_missing
    )
    step_unless(run.optimizer, bad)
    run.meter.add_step(loss, norm, bad, extras)


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
