"""The start of a process: how many there are, and what they may use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import AORecipeKwargs, DistributedDataParallelKwargs, KwargsHandler, gather_object, is_torchao_available

from condot.core.process import available_cpus

from ..config.schema import Config
from .launcher_env import check_launcher_matches_recipe, consume_launcher_env
from .launcher_env import resolve_sharding as resolve_sharding
from .precision import Precision, resolve_precision
from .rendezvous import Rendezvous, next_rendezvous

A_MONTH = timedelta(days=30)
FP8_MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply fp8: Ada; 9.0 is Hopper."""
_rendezvous: Rendezvous | None = None


def init_distributed(config: Config) -> PartialState:
    """Meet the other processes of this launch, if the launcher and this machine give what the recipe asks for.

    Raises:
        ValueError: another number of processes runs than the launcher was asked for; the launcher contradicts the recipe;
            a precision that this hardware does not have.
    """
    check_launcher_matches_recipe(config)
    check_precision(_requested_precision(config), resolve_sharding(config))
    return join_process_group(config.train.cpu_threads or _threads_per_process(), _collective_timeout(config.guard.hang_seconds))


def _requested_precision(config: Config) -> str:
    """Return the precision that the recipe names, or else the launcher."""
    return config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def create_accelerator(
    config: Config, group: PartialState, saved: Precision | None, pick_precision: Callable[[int, torch.device], Precision]
) -> Accelerator:
    """Create the Accelerator, on the CPU where there is no GPU.

    Args:
        config: of the run.
        group: returned by `init_distributed`.
        saved: the precision that it began in, if it goes on.
        pick_precision: for `train.mixed_precision: auto`: the faster precision, for so many ranks, on this one's device.
    """
    precision = resolve_precision(config.train.mixed_precision, saved, partial(pick_precision, group.num_processes, group.device))
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # torch 2.13's new name for it is not in Accelerate 1.15
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if _requested_precision(config) == "fp8":
        handlers.append(AORecipeKwargs(enable_fsdp_float8_all_gather=False))  # else weights are a tensor class of torchao's own
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        project_dir=config.output_dir,
        kwargs_handlers=handlers,
    )


def _collective_timeout(hang_seconds: float) -> timedelta:
    """How long a rank waits for another before torch gives up: longer than the watch, which can say who stands where."""
    return timedelta(seconds=1.5 * hang_seconds + 120) if hang_seconds else A_MONTH


def check_precision(precision: str, layout: str = "none") -> None:
    """Refuse a precision that this process's device does not compute in, or not with weights that lie so.

    Args:
        precision: of `train.mixed_precision`, or as launched.
        layout: as `resolve_sharding` says.

    Raises:
        ValueError: fp16 or fp8 without the hardware, fp8 without its library or with sharded weights.
    """
    check_hardware(precision)
    check_precision_sharding(precision, layout)


def check_precision_sharding(precision: str, layout: str) -> None:
    """Raises ValueError for fp8 with sharded weights."""
    if precision == "fp8" and layout != "none":
        raise ValueError(
            f"mixed_precision=fp8 and train.sharding={layout}: fp8 is for whole weights on each rank. Use bf16, or sharding none."
        )


def check_hardware(precision: str) -> None:
    """Raises ValueError for fp16 or fp8 without the hardware, and fp8 without its library."""
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise ValueError("mixed_precision=fp16 on a CPU: its gradients are scaled on GPUs only. Use bf16, which needs no scaling.")
    if precision != "fp8":
        return
    capability = torch.cuda.get_device_capability() if gpu else None
    if capability is None or capability < FP8_MIN_CAPABILITY:
        has = f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}" if capability else "this machine has no GPU"
        raise ValueError(f"mixed_precision=fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or higher, and {has}. Use bf16.")
    if not is_torchao_available():
        raise ValueError("mixed_precision=fp8 needs torchao, which is not installed: `pip install torchao`, or use bf16.")


def join_process_group(num_threads: int = 0, timeout: timedelta | None = None) -> PartialState:
    """Meet the other processes of this launch, on GPUs where there are some; a process alone goes on alone.

    Args:
        num_threads: of this process on a CPU; 0 for torch's own number, or among several processes for its share of the processors.
        timeout: how long one may wait for another once all have met; by default torch's 10 to 30 minutes.

    Raises:
        ValueError: another number of processes runs than the launcher was asked for, or some did not come.
    """
    check_launcher()
    consume_launcher_env()
    if not dist.is_initialized():
        _init_process_group(timeout)
    gpu = torch.cuda.is_available()
    group = PartialState(cpu=not gpu)
    if not gpu and (num_threads or "WORLD_SIZE" in os.environ):
        torch.set_num_threads(num_threads or _threads_per_process())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if group.num_processes != world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} but {group.num_processes} process runs as one job: on CPUs start them with "
            f"`accelerate launch --config_file configs/accelerate/cpu2.yaml` or torchrun."
        )
    return group


def _init_process_group(timeout: timedelta | None) -> None:
    """Create torch's process group below the keys of this attempt, before Accelerate would create one that a restart breaks."""
    global _rendezvous
    device = _local_device()
    _rendezvous = next_rendezvous()
    if _rendezvous is None:
        return
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device is not None else "gloo",
        store=_rendezvous.attempt_store,
        rank=_rendezvous.rank,
        world_size=_rendezvous.world_size,
        timeout=timeout,
    )


def _local_device() -> torch.device | None:
    """This process's GPU, one for each process of the machine; None on a CPU.

    Raises:
        ValueError: torchrun or `accelerate launch` started more processes than the machine has GPUs.
    """
    if not torch.cuda.is_available():
        return None
    found, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > found and "TORCHELASTIC_RUN_ID" in os.environ:  # SLURM may show each process its own GPU only
        raise ValueError(
            f"{here} processes were started on a machine that shows {found} GPU(s), and each needs its own: "
            f"start {found}, or train on the CPU with CUDA_VISIBLE_DEVICES=''."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % found)


def rendezvous_info() -> Rendezvous | None:
    """Where the processes that `join_process_group` brought together find each other's keys; None for a process alone."""
    return _rendezvous


def _threads_per_process() -> int:
    """Processors for each process of this machine."""
    return max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def require_single_process(what: str) -> None:
    """Raises ValueError where several processes were started for the work of one."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ValueError(f"{what} is the work of one process, and {ranks} were started: run it with plain `python`.")


def check_launcher() -> None:
    """Refuse the launch that asks for several processes and silently starts one.

    `accelerate launch --cpu --num_processes 2` names a meeting point for its
    processes but starts one, without a rank.

    Nor does `srun` give its tasks a rank: each would train alone.

    Raises:
        ValueError: that happened.
    """
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched_by_accelerate and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "several processes were asked for and one was started: on CPUs `accelerate launch --num_processes N` starts no second one. "
            "Use `accelerate launch --config_file configs/accelerate/cpu2.yaml "
            "train.py ...`, or `torchrun --standalone --nproc_per_node N train.py ...`."
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={tasks}: srun started {tasks} processes that do not know each other. "
            f"Let it start one torchrun a machine: `srun --ntasks-per-node=1 torchrun ... train.py ...`, docs/cluster.md."
        )


def check_same_data(name: str, fingerprint: str) -> None:
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
