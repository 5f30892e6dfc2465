"""How weights begin: each a function of (seed, name), whoever holds which part of it.

So a network that is built on the meta device and sharded afterwards begins as
one that is built whole, on any number of ranks, and adding an option leaves
the other weights as they were.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

InitMethod = Literal["zero", "one", "xavier", "normal", "torch"]
"""xavier: uniform, over fan-in and fan-out; normal: of deviation 0.02; torch: as torch's own layers begin."""
InitRule = Callable[[str], InitMethod]
"""How a parameter begins, by its name as in `named_parameters`."""


@torch.no_grad()
def initialise(network: nn.Module, rule: InitRule, seed: int | None = None) -> None:
    """Give every parameter its first value; frozen and sharded ones too.

    Args:
        network: on any device but meta.
        rule: how a parameter begins, by its name.
        seed: None draws one from torch's own generator.
    """
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    for owner, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{leaf}" if owner else leaf
            values = _initial_values(rule(name), module, parameter, _generator(seed, name))
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(values)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _initial_values(method: InitMethod, module: nn.Module, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """First values, float32, on the CPU, of the whole parameter."""
    values = torch.empty(parameter.shape, dtype=torch.float32)
    if method == "zero":
        return values.zero_()
    if method == "one":
        return values.fill_(1.0)
    if method == "normal":
        return values.normal_(std=0.02, generator=generator)
    if method == "xavier":
        flat = values.flatten(1)
        bound = math.sqrt(6 / sum(flat.shape))
        return values.uniform_(-bound, bound, generator=generator)
    if isinstance(module, nn.Embedding):
        return values.normal_(generator=generator)
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:  # a norm
        return values.fill_(0.0 if parameter is getattr(module, "bias", None) else 1.0)
    bound = 1 / math.sqrt(weight[0].numel())
    return values.uniform_(-bound, bound, generator=generator)
