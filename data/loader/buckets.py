"""Aspect-ratio buckets without a pre-scan: every batch holds one shape, and no sample is lost for it.

The order's positions are taken in windows of many batches. Within a window
samples are sorted by bucket, cut into batches, and the batches shuffled. A
batch that straddles two buckets takes the shape of the larger part. So a
batch is a function of its number, and what is read to know it is the index of
one window. Latents, which were encoded in one shape each, need whole batches
of a bucket: then a few samples are left to another epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .shuffle import hash_at, permutation, uniform_at

WINDOW_POSITIONS = 65_536
WINDOW_BATCHES = 64
"""A window holds at least so many batches, and about so many positions: larger ones straddle less, and cost more to begin in."""


class Buckets:
    """The shapes that batches have.

    Args:
        ratios: width / height of each; none for squares only.
        resolution: pixels; each shape has about resolution^2 of them.
        step: pixels of which every side is a multiple; squares only are of the resolution itself.
        whole: a batch holds samples of its own bucket alone, as latents need that were encoded in one shape each.

    Raises:
        ValueError: two ratios that come to the same shape.
    """

    def __init__(self, ratios: tuple[float, ...], resolution: int, step: int, whole: bool = False) -> None:
        self.whole = whole
        self.shapes = [(resolution, resolution)]
        if ratios:
            self.shapes = sorted((_side(resolution / r**0.5, step), _side(resolution * r**0.5, step)) for r in ratios)
            self.shapes.sort(key=lambda shape: shape[1] / shape[0])
        for a, b in zip(self.shapes, self.shapes[1:], strict=False):
            if a == b:
                raise ValueError(
                    f"data.aspect_ratios={ratios}: two of them are {a[0]} x {a[1]} pixels when sides are multiples of "
                    f"data.bucket_step={step}. Leave one out, or lower the step."
                )
        self._logs = np.log([w / h for h, w in self.shapes])

    def nearest(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """The bucket of images: the one nearest in the logarithm of width / height, so that least is cropped.

        Args:
            width, height: (N,), pixels of the upright images.

        Returns:
            (N,), numbers of `shapes`.
        """
        if len(self.shapes) == 1:
            return np.zeros(len(width), np.int64)
        middles = (self._logs[1:] + self._logs[:-1]) / 2
        nearest: np.ndarray = np.searchsorted(middles, np.log(np.maximum(width, 1) / np.maximum(height, 1)))
        return nearest

    def check(self, sizes: dict[str, int]) -> None:
        """Raises ValueError for a bucket that no image fits, as far as the manifest lists sizes ("width x height": count)."""
        listed = np.array([[int(side) for side in size.split("x")] for size in sizes if size != "other"]).reshape(-1, 2)
        used = set(self.nearest(listed[:, 0], listed[:, 1]).tolist())
        empty = [f"{w / h:.3g} ({h} x {w})" for i, (h, w) in enumerate(self.shapes) if i not in used]
        if empty and "other" not in sizes and len(self.shapes) > 1:
            raise ValueError(
                f"data.aspect_ratios: no image is nearest to {', '.join(empty)}. Leave {'it' if len(empty) == 1 else 'them'} out."
            )


def _side(length: float, step: int) -> int:
    return max(step, round(length / step) * step)


class Windows:
    """Which positions make up batch n, and in which bucket.

    Args:
        bucket_of: from positions, (N,), to buckets, (N,); pure.
        epoch: positions of an epoch; 0 where there is none. A window never
            crosses an epoch's end; the batch that does is a window of its own.
        batch_size: images of all ranks together.
        seed: of the shuffles.
        whole: no batch straddles: a bucket has as many batches of a window as
            its share says, rounded up or down by chance, so that no share is
            off on average; samples too many are left out of this epoch, and
            where they are too few some come twice.
    """

    def __init__(
        self, bucket_of: Callable[[np.ndarray], np.ndarray], *, epoch: int, batch_size: int, seed: int, whole: bool = False
    ) -> None:
        self.whole = whole
        self.bucket_of, self.epoch, self.batch_size, self.seed = bucket_of, epoch, batch_size, seed
        self.length = max(WINDOW_BATCHES, WINDOW_POSITIONS // batch_size)
        self._last: tuple[range, np.ndarray, np.ndarray] | None = None

    def batch(self, number: int) -> tuple[np.ndarray, int]:
        """The positions of a batch, (batch_size,), and its bucket."""
        if self._last is None or number not in self._last[0]:
            self._last = self._arrange(self.window(number))
        batches, positions, buckets = self._last
        return positions[number - batches.start], int(buckets[number - batches.start])

    def window(self, number: int) -> range:
        """The batches of the window that a batch lies in."""
        size, epoch = self.batch_size, self.epoch
        if not epoch:
            start = number // self.length * self.length
            return range(start, start + self.length)
        whole = number * size // epoch
        first, last = -(-whole * epoch // size), (whole + 1) * epoch // size
        if not first <= number < last:
            return range(number, number + 1)
        start = first + (number - first) // self.length * self.length
        return range(start, min(start + self.length, last))

    def _arrange(self, batches: range) -> tuple[range, np.ndarray, np.ndarray]:
        size = self.batch_size
        positions = np.arange(batches.start * size, batches.stop * size)
        buckets = self.bucket_of(positions)
        sort = np.lexsort((hash_at(positions, self.seed, 5), buckets))
        if self.whole:
            sort = self._whole(sort, buckets, batches.start)
        largest = np.array([np.bincount(row).argmax() for row in buckets[sort].reshape(-1, size)])
        shuffle = permutation(len(batches), self.seed, 6, batches.start)
        return batches, positions[sort].reshape(-1, size)[shuffle], largest[shuffle]

    def _whole(self, sort: np.ndarray, buckets: np.ndarray, first: int) -> np.ndarray:
        """Return a window's positions by bucket, in whole batches of each: shares are counted along one line with a random start."""
        counts = np.bincount(buckets)
        ends = (np.cumsum(counts) + int(uniform_at(np.array([first]), self.seed, 9, 0)[0] * self.batch_size)) // self.batch_size
        parts = zip(np.split(sort, np.cumsum(counts)[:-1]), np.diff(ends, prepend=0), strict=True)
        return np.concatenate([np.resize(part, batches * self.batch_size) for part, batches in parts if batches])
