"""The start of a process: how many there are, what they may use, and who owns the run's folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from .config import Config
from .precision import Precision, settle

A_MONTH = timedelta(days=30)


def start(
    config: Config, saved: Precision | None = None, measure: Callable[[int, torch.device], Precision] = lambda ranks, device: "no"
) -> Accelerator:
    """Create the Accelerator, on the CPU where there is no GPU.

    Args:
        config: of the run.
        saved: the precision that it began in, if it goes on.
        measure: for `train.mixed_precision: auto`: the faster precision, for so many ranks, on this one's device.

    Raises:
        ValueError: another number of processes runs than the launcher was asked for.
    """
    group = join(config.train.cpu_threads or _share())
    precision = settle(config.train.mixed_precision, saved, partial(measure, group.num_processes, group.device))
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def join(threads: int = 0, patience: timedelta | None = None) -> PartialState:
    """Meet the other processes of this launch, on GPUs where there are some; a process alone goes on alone.

    Args:
        threads: of this process on a CPU; 0 for torch's own number, or among several processes for its share of the processors.
        patience: how long one may wait for another; by default torch's 10 to 30 minutes.

    Raises:
        ValueError: another number of processes runs than the launcher was asked for.
    """
    check_launcher()
    if not torch.cuda.is_available() and (threads or "WORLD_SIZE" in os.environ):
        torch.set_num_threads(threads or _share())
    group = PartialState(cpu=not torch.cuda.is_available(), **({"timeout": patience} if patience else {}))
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if group.num_processes != asked:
        raise ValueError(
            f"WORLD_SIZE={asked} but {group.num_processes} process runs as one job: on CPUs start them with "
            f"`accelerate launch --config_file configs/accelerate/cpu2.yaml` or torchrun."
        )
    return group


def _share() -> int:
    """Processors for each process of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def alone(what: str) -> None:
    """Raises ValueError where several processes were started for the work of one."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ValueError(f"{what} is the work of one process, and {ranks} were started: run it with plain `python`.")


def check_launcher() -> None:
    """Refuse the launch that asks for several processes and silently starts one.

    `accelerate launch --cpu --num_processes 2` names a meeting point for its
    processes but starts one, without a rank.

    Raises:
        ValueError: that happened.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "several processes were asked for and one was started: on CPUs `accelerate launch --num_processes N` starts no second one. "
            "Use `accelerate launch --config_file configs/accelerate/cpu2.yaml "
            "train.py ...`, or `torchrun --standalone --nproc_per_node N train.py ...`."
        )


def agree(name: str, fingerprint: str) -> None:
    """Refuse to begin where ranks see different data, as they may while a folder is being written; all ranks together.

    Raises:
        ValueError: they do.
    """
    found = gather_object([fingerprint])
    if len(set(found)) > 1:
        which = next(rank for rank, other in enumerate(found) if other != found[0])
        raise ValueError(
            f"{name} is {found[0][:12]} on rank 0 and {found[which][:12]} on rank {which}: every rank must see the same finished folder. "
            f"Wait until it is written everywhere, and start again."
        )


def lock(folder: Path, name: str = "output_dir") -> IO[str]:
    """Own a folder until the process ends.

    Args:
        folder: of a run, or of images.
        name: how messages call it.

    Returns:
        The open file that holds the lock; keep it.

    Raises:
        ValueError: another run owns the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise ValueError(f"{name}={str(folder)!r} cannot be written ({error.strerror}): give a folder of yours.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{name}={str(folder)!r} is in use by another run: wait for it, or give another folder.") from error
    return file
