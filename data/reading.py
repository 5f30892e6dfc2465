"""Samples of a split by number, whole and in order, for what compares models with them: no shuffling, no substitutes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .beside import caption_of
from .shards import Shards
from .stream import to_unit


def places_of(shards: Shards, numbers: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Shard and number in it of samples counted through all shards; all of them by default."""
    first = [0, *np.cumsum(shards.samples).tolist()]
    chosen = range(first[-1]) if numbers is None else numbers
    found = [(i, bisect(first, i) - 1) for i in chosen]
    return [(shard, i - first[shard]) for i, shard in found]


def read_images(
    shards: Shards, channels: int, resolution: int, numbers: Sequence[int] | None = None, *, bit_depth: int = 8
) -> tuple[Tensor, Tensor]:
    """Images, (N, C, H, W) in -1..1, cropped at the centre, and their classes, (N,).

    Raises:
        BadSample: one that cannot be decoded.
    """
    pairs = [shards.pixels(shard, number, channels, resolution, bit_depth=bit_depth) for shard, number in places_of(shards, numbers)]
    return to_unit(torch.from_numpy(np.stack([pixels for pixels, _ in pairs]))), torch.tensor([label for _, label in pairs])


def read_captions(shards: Shards, field: str, numbers: Sequence[int] | None = None) -> list[str]:
    """Captions; `field` as `data.caption` in a recipe, "" where a sample has none."""
    return [caption_of(shards.read(shard, number).files, field) for shard, number in places_of(shards, numbers)]
