"""How a network lies on the ranks: whole on each, or in shares by FSDP2; and its blocks compiled one by one.

Accelerate's own FSDP is silently left out on a CPU, so sharding is done here, alike on
CPUs and GPUs: the network and the copy that holds its average are shared out
in the same way, and an average is moved without a word between ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

Sharding = Literal["none", "full", "hybrid"]


def build_mesh(sharding: Sharding, device: torch.device) -> DeviceMesh:
    """The ranks among which a network is shared out: all, or (machines, ranks of each) with a replica on each machine.

    Raises:
        ValueError: machines with different numbers of ranks.
    """
    ranks = dist.get_world_size()
    if sharding == "full":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % per_machine:
        raise ValueError(
            f"train.sharding=hybrid: {ranks} ranks in machines of {per_machine} are no whole machines. Start as many on each, or use full."
        )
    return init_device_mesh(device.type, (ranks // per_machine, per_machine), mesh_dim_names=("replica", "shard"))


def shard_model(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, precision: str = "no") -> None:
    """Share out a network's parameters in place, block by block; the whole is gathered a block at a time when it is computed.

    Args:
        network: on meta, or with its values, the same on every rank.
        blocks: its parts that are gathered at once.
        mesh: of `build_mesh`.
        precision: bf16 and fp16 gather the weights in that; sums of gradients and the weights themselves stay float32.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # which nobody writes to
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def prepare_model(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, sharding: Sharding
) -> tuple[nn.Module, Any]:
    """The network and the optimiser as Accelerate wraps them; a sharded network gets mixed precision only."""
    if sharding == "none":
        wrapped, stepper = accelerator.prepare(network, optimizer)
        return wrapped, stepper
    return accelerator.prepare_model(network, evaluation_mode=True), accelerator.prepare(optimizer)


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; all ranks together where it is shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def finish_gathers_on_error(network: nn.Module) -> Iterator[None]:
    """Around a forward pass of a network that is shared out: where it breaks off on this rank, gather what the others still gather.

    They would wait for this rank's shares for ever. What was raised is raised
    behind it; before the next pass all ranks call `reset_fsdp_state`.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    gathered = set[nn.Module]()
    hooks = [part.register_forward_hook(lambda module, *_: gathered.add(module)) for part in parts]
    try:
        yield
    except Exception:
        gathered |= {part for part in parts if _is_unsharded(part)}  # those in the middle of their pass
        reset_fsdp_state(network)
        for part in parts:
            if part not in gathered:
                part.unshard()
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _is_unsharded(part: nn.Module) -> bool:
    """Return whether a part's own weights, without those of parts in it, lie here whole."""
    inner = {weight for other in part.modules() if other is not part and isinstance(other, FSDPModule) for weight in other.parameters()}
    return any(not isinstance(weight, DTensor) for weight in part.parameters() if weight not in inner)


def reset_fsdp_state(network: nn.Module) -> None:
    """Forget a forward pass that broke off, and have every part of the network in shares; on all ranks, which say nothing for it."""
    if isinstance(network, FSDPModule):
        network.reset_iter_state()


@torch.no_grad()
def copy_values(source: nn.Module, target: nn.Module) -> None:
    """Give a copy of a network, shared out alike, its parameters' values."""
    for mine, its in zip(target.parameters(), source.parameters(), strict=True):
        local_shard(mine).copy_(local_shard(its))
