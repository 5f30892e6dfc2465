"""The networks: each a constructor whose arguments are the schema, and `forward(x, t, labels)`.

`x` is (B, C, H, W), `t` (B,) from 0 (noise) to 1 (data), `labels` (B,) whole
numbers where `num_classes` stands for no class. Nothing here knows a loss, a
path or a data set.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .dit import DiT
from .unet import UNet

KINDS: dict[str, type[DiT] | type[UNet]] = {"dit": DiT, "unet": UNet}


def build(kind: str, **options: Any) -> nn.Module:
    """Construct a network by name.

    Args:
        kind: a key of KINDS.
        options: of its constructor.

    Raises:
        ValueError: an unknown kind, or sizes that do not fit one another.
    """
    if kind not in KINDS:
        raise ValueError(f"model.kind={kind!r} is unknown: choose one of {', '.join(KINDS)}.")
    return KINDS[kind](**options)


__all__ = ["KINDS", "DiT", "UNet", "build"]
