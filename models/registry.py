"""The networks: each a constructor whose arguments are the schema, and `forward(x, t, condition, sizes)`.

`x` is (B, C, H, W), `t` (B,) from 0 (noise) to 1 (data). The condition is
labels, (B,) whole numbers where `num_classes` stands for no class, or
`TextStates`. Nothing here knows a loss, a path or a data set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .common.init import initialise
from .common.kernels import use_fast_gelu
from .cross_dit.model import CrossDiT
from .dit.model import DiT
from .dit.presets import resolve_options
from .mmdit.model import MMDiT
from .unet.model import UNet

KINDS: dict[str, type[nn.Module]] = {"dit": DiT, "mmdit": MMDiT, "cross_dit": CrossDiT, "unet": UNet}


def build(kind: str, *, seed: int | None = None, device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    """Construct a network by name.

    Args:
        kind: a key of KINDS.
        seed: of the first weights; None draws one from torch's own generator.
        device: where to; `meta` for a network without values, to be sharded,
            given memory by `to_empty` and values by `initialise`.
        options: of its constructor; for kinds with presets, what differs from `preset` and `style`.

    Raises:
        ValueError: an unknown kind, or sizes that do not fit one another.
    """
    if kind not in KINDS:
        raise ValueError(f"model.kind={kind!r} is unknown: choose one of {', '.join(KINDS)}.")
    with torch.device("meta"):
        network = use_fast_gelu(KINDS[kind](**resolve_options(kind, options)))
    if torch.device(device).type == "meta":
        return network
    network = network.to_empty(device=device)
    initialise(network, seed)
    return network


__all__ = ["KINDS", "CrossDiT", "DiT", "MMDiT", "UNet", "build", "initialise"]
