"""Which sample comes when: a pure function of (seed, epoch, position).

Each epoch permutes the shards; blocks of shards in that order are shuffled
through and through. Keys of a fixed integer hash are sorted, so that no
library's generator, rank, worker or restart has a say. A position costs the
same whether it is the first or the billionth.
"""

from __future__ import annotations

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over unsigned 64-bit integers."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keys(count: int, *name: int) -> np.ndarray:
    """`count` hashed integers of the sequence that whole numbers name."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = 0
    for part in name:
        start = int(mix(np.array([((start ^ part) + golden) & mask], np.uint64))[0])
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(golden)
        return mix(counter + np.uint64(start))


def permutation(count: int, *name: int) -> np.ndarray:
    """A permutation of range(count) that whole numbers name."""
    return np.argsort(keys(count, *name), kind="stable")


class Order:
    """From positions in an endless stream to samples.

    Args:
        counts: samples in each shard.
        seed: of the shuffle.
        block: shards mixed with one another. More mixes better and holds 8
            bytes a sample of so many shards in memory.

    Raises:
        ValueError: no sample at all.
    """

    def __init__(self, counts: list[int], seed: int, block: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        if self.samples == 0:
            raise ValueError(f"{len(counts)} shards hold no sample: pack a folder that has images.")
        self.seed, self.block = seed, block
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] | None = None
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
            _, blocks, starts = self._plan(int(epoch))
            which = np.searchsorted(starts, within, side="right") - 1
            for b in np.unique(which[epochs == epoch]):
                here = (epochs == epoch) & (which == b)
                local = self._block(int(epoch), int(b), blocks[b])[within[here] - starts[b]]
                ends = np.cumsum(self.counts[blocks[b]])
                s = np.searchsorted(ends, local, side="right")
                shards[here], numbers[here] = blocks[b][s], local - ends[s] + self.counts[blocks[b][s]]
        return shards, numbers

    def _plan(self, epoch: int) -> tuple[int, list[np.ndarray], np.ndarray]:
        """The epoch's blocks of shards and where each begins; only the last asked for is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(len(self.counts), self.seed, 1, epoch)
            blocks = [shards[i : i + self.block] for i in range(0, len(shards), self.block)]
            starts = np.concatenate([[0], np.cumsum([self.counts[b].sum() for b in blocks])])
            self._epoch = (epoch, blocks, starts)
        return self._epoch

    def _block(self, epoch: int, number: int, shards: np.ndarray) -> np.ndarray:
        """The shuffle of one block; the last two are kept, since a batch may straddle them."""
        if (epoch, number) not in self._mixed:
            while len(self._mixed) > 1:
                self._mixed.pop(next(iter(self._mixed)))
            self._mixed[epoch, number] = permutation(int(self.counts[shards].sum()), self.seed, 2, epoch, number)
        return self._mixed[epoch, number]
