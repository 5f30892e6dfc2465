"""Which sample comes when: a pure function of (seed, epoch, position).

Each epoch permutes the shards; blocks of shards in that order are shuffled
through and through. Keys of a fixed integer hash are sorted, so that no
library's generator, rank, worker or restart has a say. A position costs the
same whether it is the first or the billionth.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Protocol

import numpy as np


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over unsigned 64-bit integers."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = x ^ (x >> np.uint64(31))
        return mixed


GOLDEN = 0x9E3779B97F4A7C15


def _start(name: tuple[int, ...]) -> int:
    """Where the sequence that whole numbers name begins."""
    start = 0
    for part in name:
        start = int(splitmix64(np.array([((start ^ part) + GOLDEN) & (2**64 - 1)], np.uint64))[0])
    return start


def hash_keys(count: int, *name: int) -> np.ndarray:
    """`count` hashed integers of the sequence that whole numbers name."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        return splitmix64(counter + np.uint64(_start(name)))


def hash_at(positions: np.ndarray, *name: int) -> np.ndarray:
    """One hashed integer for each position: `keys(1, *name, position)` of all of them at once."""
    with np.errstate(over="ignore"):
        start = splitmix64((positions.astype(np.uint64) ^ np.uint64(_start(name))) + np.uint64(GOLDEN))
        return splitmix64(start + np.uint64(GOLDEN))


def uniform_at(positions: np.ndarray, *name: int) -> np.ndarray:
    """A number from 0 to 1 for each position, float64."""
    return (hash_at(positions, *name) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *name: int) -> np.ndarray:
    """A permutation of range(count) that whole numbers name; no two keys are equal, so any way of sorting gives the same."""
    return np.argsort(hash_keys(count, *name))


class SampleOrder(Protocol):
    """From positions in an endless stream to samples."""

    @property
    def epoch(self) -> int:
        """Positions after which every sample came once; 0 where sources of different lengths are mixed."""
        ...

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards that a position and those soon after it come from, the nearest first."""
        ...


class ShuffledOrder:
    """One set of shards, each sample once an epoch.

    Args:
        counts: samples in each shard.
        seed: of the shuffle.
        block: shards mixed with one another. More mixes better and holds 8
            bytes a sample of so many shards in memory.

    Raises:
        ValueError: no sample at all.
    """

    def __init__(self, counts: List[int] | np.ndarray, seed: int, block: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = self.epoch = int(self.counts.sum())
        if self.samples == 0:
            raise ValueError(f"{len(counts)} shards hold no sample: pack a folder that has images.")
        self.seed, self.block = seed, block
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._mixed: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at some positions; position n of epoch e is e * samples + n.

        Args:
            positions: (B,), int64, >= 0.

        Returns:
            Shard and number within it, each (B,), int64.
        """
        shards, numbers = np.empty_like(positions), np.empty_like(positions)
        epochs, within = np.divmod(positions, self.samples)
        for epoch in np.unique(epochs):
            order, starts = self._plan(int(epoch))
            which = np.searchsorted(starts, within, side="right") - 1
            for b in np.unique(which[epochs == epoch]):
                here = (epochs == epoch) & (which == b)
                mixed = order[b * self.block : (b + 1) * self.block]
                local = self._block(int(epoch), int(b), mixed)[within[here] - starts[b]]
                ends = np.cumsum(self.counts[mixed])
                s = np.searchsorted(ends, local, side="right")
                shards[here], numbers[here] = mixed[s], local - ends[s] + self.counts[mixed[s]]
        return shards, numbers

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the position's block and of the next one, in the order of their epochs."""
        epoch, within = divmod(position, self.samples)
        order, starts = self._plan(epoch)
        b = int(np.searchsorted(starts, within, side="right")) - 1
        near: list[int] = order[b * self.block : (b + 2) * self.block].tolist()
        return near if b + 2 < len(starts) else near + self._plan(epoch + 1)[0][: self.block].tolist()

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the position at which each block of them begins; the last two are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            shards = permutation(len(self.counts), self.seed, 1, epoch)
            sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.block))
            self._epochs[epoch] = (shards, np.concatenate([[0], np.cumsum(sizes)]))
        return self._epochs[epoch]

    def _block(self, epoch: int, number: int, shards: np.ndarray) -> np.ndarray:
        """The shuffle of one block; the last two are kept, since a batch may straddle them."""
        if (epoch, number) not in self._mixed:
            while len(self._mixed) > 1:
                self._mixed.pop(next(iter(self._mixed)))
            self._mixed[epoch, number] = permutation(int(self.counts[shards].sum()), self.seed, 2, epoch, number)
        return self._mixed[epoch, number]


SLOTS = 10_000
"""Positions over which a mixture keeps its proportions exactly."""


class WeightedMixture:
    """Several sequences, mixed in exact proportions: so many of every SLOTS positions belong to each, shuffled among them.

    Args:
        parts: the sequences, each with its own epochs, and the number of its
            first shard among all shards.
        weights: the share of each; they sum to 1.
        seed: of the shuffle of slots.

    Raises:
        ValueError: a weight too small to have a slot.
    """

    epoch = 0

    def __init__(self, parts: List[tuple[ShuffledOrder, int]], weights: List[float], seed: int) -> None:
        self.parts, self.seed = parts, seed
        exact = np.asarray(weights) * SLOTS
        self.quota = np.floor(exact + 1e-6).astype(np.int64)
        for i in np.argsort(self.quota - exact, kind="stable")[: SLOTS - int(self.quota.sum())]:
            self.quota[i] += 1
        if self.quota.min() == 0:
            raise ValueError(f"data.weights: {min(weights)} is less than 1 / {SLOTS} and would never come. Leave that source out.")
        self._table: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at some positions: shard, counted over all parts, and number within it, each (B,), int64."""
        which, within = self.locate(positions)
        shards, numbers = np.empty_like(positions), np.empty_like(positions)
        for i, (part, first) in enumerate(self.parts):
            here = which == i
            if here.any():
                shards[here], numbers[here] = part(within[here])
                shards[here] += first
        return shards, numbers

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each position, and the position within that part."""
        which, within = np.empty_like(positions), np.empty_like(positions)
        cycles, slots = np.divmod(positions, SLOTS)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            owner, rank = self._cycle(int(cycle))
            which[here] = owner[slots[here]]
            within[here] = cycle * self.quota[which[here]] + rank[slots[here]]
        return which, within

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards that come soon, of all parts."""
        cycle = position // SLOTS
        return [first + s for i, (part, first) in enumerate(self.parts) for s in part.upcoming_shards(cycle * int(self.quota[i]))]

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each slot and its rank among that part's slots."""
        if self._table is None or self._table[0] != cycle:
            owner = np.repeat(np.arange(len(self.quota)), self.quota)[permutation(SLOTS, self.seed, 4, cycle)]
            rank = np.empty(SLOTS, np.int64)
            for i, quota in enumerate(self.quota):
                rank[owner == i] = np.arange(quota)
            self._table = (cycle, owner, rank)
        return self._table[1], self._table[2]
