"""Before the first step of a launch: there is data and room, a checkpoint to come back to, and sums in the order of any other step."""

from __future__ import annotations

from .batches import require_data_on_all_ranks
from .loss import compute_loss
from .run import Run


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
    run.accelerator.backward(compute_loss(run, next(run.stream)).loss.mean())
    run.optimizer.zero_grad()
    reopen_stream(run)


def reopen_stream(run: Run) -> None:
    """Begin the stream at the cursor again."""
    run.stream.close()
    run.stream = run.open_stream(run.cursor)
