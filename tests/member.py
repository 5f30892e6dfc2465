"""A process of a launch that only meets, counts steps and stops as a run does: what launchers and signals are tried with."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from condot.core.process import InterruptHandler, exit_if_distributed

INTERRUPT = InterruptHandler("nothing was to be lost")

import torch
import torch.distributed as dist

from condot.pipeline.config.schema import Config
from condot.pipeline.launch import distributed
from condot.pipeline.training.status import Status
from condot.pipeline.training.watchdog import Watchdog


def fault(how: str, rank: int, step: int) -> None:
    """`how` is WHAT:RANK:STEP, what befalls one rank at one step; `die` befalls it in each attempt before the third number."""
    what, which, when = how.split(":")
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if what == "die" and rank == int(which) and attempt < int(when):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == int(which) and step == int(when):
        if what == "sleep":
            time.sleep(1000)
        if what == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fault", default="none:0:0")
    parser.add_argument("--hang", type=float, default=0)
    given = parser.parse_args()
    group = distributed.join_process_group(1)
    rank = group.process_index
    status, watchdog = Status(given.folder, rank == 0), None
    watchdog = Watchdog(given.hang, status)
    if dist.is_initialized():  # the first reduction meets whatever a dead attempt left
        ranks = torch.tensor([1.0, float(rank)])
        dist.all_reduce(ranks)
        assert ranks.tolist() == [group.num_processes, group.num_processes * (group.num_processes - 1) / 2]
    status.write("running", step=0, of=given.steps)
    (given.folder / f"pid-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    INTERRUPT.defer()
    step = 0
    while step < given.steps:
        watchdog.heartbeat(step, "reading data")
        fault(given.fault, rank, step)
        time.sleep(0.1)
        watchdog.heartbeat(step, "reducing gradients")
        stop = torch.tensor([float(INTERRUPT.requested)])
        if dist.is_initialized():
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        step += 1
        if stop.item():
            break
    with watchdog.phase("saving"):
        time.sleep(1)
        with open(given.folder / f"saved-{rank}", "a") as file:
            file.write(f"{step}\n")
    if dist.is_initialized():
        dist.barrier()
    number = distributed.rendezvous_info().attempt if distributed.rendezvous_info() else 0
    (given.folder / f"done-{rank}").write_text(f"{group.num_processes} {number} {distributed.resolve_sharding(Config())}")
    status.write("finished" if step == given.steps else "stopped", step=step, signal=INTERRUPT.received, exit_status=INTERRUPT.exit_status)
    watchdog.close()
    exit_if_distributed(INTERRUPT.exit_status)
    return INTERRUPT.exit_status


if __name__ == "__main__":
    sys.exit(main())
