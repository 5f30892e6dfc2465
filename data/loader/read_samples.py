"""Samples of a split by number, whole and in order, for what compares models with them: no shuffling, no substitutes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from condot.core.caption_fields import CAPTION_PURPOSE, draw_caption

from ..storage.shard_reader import BadSample, Shards
from .shuffle import uniform_at
from .stream import to_unit


def locate_samples(shards: Shards, numbers: Sequence[int] | None = None) -> list[tuple[int, int]]:
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
    pairs = [shards.pixels(shard, number, channels, resolution, bit_depth=bit_depth) for shard, number in locate_samples(shards, numbers)]
    return to_unit(torch.from_numpy(np.stack([pixels for pixels, _ in pairs]))), torch.tensor([label for _, label in pairs])


def read_captions(shards: Shards, caption: str, numbers: Sequence[int] | None = None, seed: int = 0) -> list[str]:
    """Return captions, "" where a sample has none.

    Args:
        shards: of the samples.
        caption: as `data.caption` has it; of several each sample draws one, a function of (seed, number).
        numbers: as in `locate_samples`.
        seed: of that draw.

    Raises:
        BadSample: one whose text cannot be read.
    """
    chosen = range(int(shards.samples.sum())) if numbers is None else numbers
    drawn = uniform_at(np.array(chosen, np.int64), seed, CAPTION_PURPOSE).tolist()
    return [_caption(shards, *place, caption, uniform) for place, uniform in zip(locate_samples(shards, chosen), drawn, strict=True)]


def _caption(shards: Shards, shard: int, number: int, caption: str, uniform: float) -> str:
    sample = shards.read(shard, number)
    try:
        return draw_caption(sample.files, caption, uniform)
    except ValueError as error:
        raise BadSample(
            f"{shards.name(shard)}: the caption of {sample.key!r} cannot be read ({error}). Mend that text and pack the folder again."
        ) from error
