"""Which sample goes into which shard: worked out from sizes before anything is read, a pure function of source and seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..loader.shuffle import hash_keys, permutation
from .source import ImageSource

OVERHEAD = 512 + 3 * 1024
"""Bytes that a sample takes in a tar beside its image: four headers, three small files."""
HOLDOUT_SPREAD = 4
"""Held-out samples come from groups that hold at least so many times more; reading all groups for a few samples would cost a pass."""


@dataclass(frozen=True)
class Packing:
    """How a folder is packed; part of what decides whether a folder is already packed."""

    shard_bytes: int
    holdout: float = 0.0
    seed: int = 0
    max_side: int = 0
    """Larger images are made smaller; 0 keeps every file as it is."""
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout {self.holdout}: the share of images kept from training is at least 0 and below 1. Use 0.1.")
        if self.shard_bytes < 10_000:
            raise ValueError(f"--shard_size {self.shard_bytes}: a shard holds at least 10kB. Use 256MB to 1GB, less for a small set.")
        if self.max_side < 0 or 0 < self.max_side < 8:
            raise ValueError(f"--max_side {self.max_side}: the longer side in pixels, at least 8. Leave it out to keep files as they are.")


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write."""

    name: str
    split: str
    first_key: int
    numbers: np.ndarray
    """(N,), int64: its samples, in the order in which they are stored."""


def plan_shards(source: ImageSource, packing: Packing) -> list[PlannedShard]:
    """Shuffle the groups, cut them into shards, shuffle each shard.

    Where a group is one sample (files) this is one shuffle of all; where
    samples are read in groups (row groups of a table) a shard mixes those
    groups that chance gave it.

    Raises:
        ValueError: no sample, or none left to train on.
    """
    count, groups = source.samples, len(source.rows)
    group_of = np.repeat(np.arange(groups), source.rows)
    rank = np.empty(groups, np.int64)
    rank[permutation(groups, packing.seed, 0)] = np.arange(groups)
    order = np.lexsort((hash_keys(count, packing.seed, 1), rank[group_of]))
    cost = np.ceil(source.bytes / np.maximum(source.rows, 1) / 512).astype(np.int64) * 512 + OVERHEAD
    splits = list(source.splits)
    split_of = np.zeros(count, np.int8) if source.split_of is None else source.split_of.astype(np.int8)[group_of]
    if packing.holdout:
        if "val" in splits:
            raise ValueError(f"--holdout {packing.holdout}: the source has a split `val` of its own. Leave --holdout out.")
        if "train" not in splits:
            raise ValueError(
                f"--holdout {packing.holdout}: the source has no training data, only {', '.join(splits)}. Leave --holdout out."
            )
        splits.append("val")
        split_of[_held_out(group_of, split_of == splits.index("train"), packing)] = len(splits) - 1
    shards = []
    for which, split in sorted(enumerate(splits), key=lambda item: (item[1] != "train", item[1])):
        chosen = order[split_of[order] == which]
        before = np.cumsum(cost[group_of[chosen]]) - cost[group_of[chosen]]
        cuts = np.flatnonzero(np.diff(before // packing.shard_bytes)) + 1
        for number, (start, numbers) in enumerate(zip([0, *cuts.tolist()], np.split(chosen, cuts), strict=True)):
            if len(numbers):
                mixed = numbers[permutation(len(numbers), packing.seed, 2, which, number)]
                shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, start, mixed))
    return shards


def _held_out(group_of: np.ndarray, training: np.ndarray, packing: Packing) -> np.ndarray:
    """Numbers of the samples kept from training.

    Raises:
        ValueError: none would be left.
    """
    count = int(training.sum())
    held = round(packing.holdout * count)
    if held == count:
        raise ValueError(f"--holdout {packing.holdout} of {count} images leaves none to train on: lower it.")
    groups = np.unique(group_of[training])
    mixed = groups[permutation(len(groups), packing.seed, 3)]
    sizes = np.bincount(group_of[training], minlength=int(groups.max()) + 1)[mixed]
    enough = max(64, int(np.searchsorted(np.cumsum(sizes), HOLDOUT_SPREAD * held)) + 1)
    drawn = np.zeros(int(group_of.max()) + 1, bool)
    drawn[mixed[:enough]] = True
    candidates = np.flatnonzero(training & drawn[group_of])
    chosen: np.ndarray = candidates[permutation(len(candidates), packing.seed, 4)[:held]]
    return chosen
