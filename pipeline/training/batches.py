"""The next micro-batch, or why there is none, known between two steps by every rank: so that all can save the last whole one and end.

A process alone meets the error where it reads. A rank of several that met it in
the middle of a step would leave the others waiting for its gradients: so each
step's reduction says whether every rank holds the data of the next.
"""

from __future__ import annotations

from accelerate.utils import gather_object

from condot.core.process import DataError

from .conditioning import MicroBatch
from .run import Run


def next_batch(run: Run) -> MicroBatch:
    """Return the next micro-batch.

    Raises:
        DataError: whatever kept it from being read.
    """
    run.watchdog.heartbeat(run.step, "reading data")
    try:
        with run.meter.data_wait():
            return next(run.stream)
    except (Exception, SystemExit) as error:
        raise DataError(describe_data_error(error)) from error


def lacks_data(run: Run) -> bool:
    """Return whether this rank, of several, cannot have the data of the steps behind this one that it promises by now."""
    if run.accelerator.num_processes == 1:
        return False  # it can stop where it meets the error
    run.watchdog.heartbeat(run.step, "reading data")
    wanted = min(promised_batches(run), (run.config.train.max_steps - 1 - run.step) * run.config.train.gradient_accumulation_steps)
    with run.meter.data_wait():
        return run.stream.ready(wanted) is not None


def require_data_on_all_ranks(run: Run) -> None:
    """See that every rank has the data of the steps that it does before it hears of the others again; all ranks together.

    A rank that met an error in the middle of a step would leave the others waiting for its gradients.

    Raises:
        DataError: some rank has not; the same on all.
    """
    if run.accelerator.num_processes == 1:
        return
    error = run.stream.ready(promised_batches(run))
    texts = gather_object([f"rank {run.accelerator.process_index}: {describe_data_error(error)}" if error else ""])
    if any(texts):
        raise DataError(next(filter(None, texts)))


def promised_batches(run: Run) -> int:
    """Micro-batches that a rank must have before it says that it can go on: on a GPU it is heard a step later."""
    steps = 2 if run.accelerator.device.type == "cuda" else 1
    return max(0, min(steps, run.config.train.max_steps - run.step)) * run.config.train.gradient_accumulation_steps


def describe_data_error(error: BaseException) -> str:
    """Return what an error of the data says; of one that is no message to a user, where to look."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"the data of the next step cannot be read ({type(error).__name__}: {error}). CONDOT_DEBUG=1 shows where."
