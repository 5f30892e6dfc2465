"""Shards to batches, on any number of ranks and worker threads, from any position at once.

Optimiser step k takes positions k * batch_size to (k + 1) * batch_size of the
endless order; rank r of R takes the r-th of R equal shares, in micro-batches.
So every rank has a full batch at every step, an epoch's end falls anywhere
(the batch across it wraps into the next epoch), and the cursor is one number:
positions consumed. With several shapes the positions of a window of steps are
dealt to its steps by shape, and all else stays as it is.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..format.index_record import PLAIN
from ..storage.shard_reader import Shards
from .batch import Augmentation, Batch, BatchLoader, BatchPlan, ReplacedSample, read_labels, size_conditioning
from .buckets import Buckets, Windows
from .shuffle import SampleOrder

AHEAD = 4096
"""Positions of this rank that are looked up at once, which costs about 50 microseconds however few they are."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every global batch a rank takes, and in what portions.

    Raises:
        ValueError: a batch that ranks and accumulation do not divide.
    """

    batch_size: int
    """Images per optimiser step, all ranks together."""
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        unit = self.ranks * self.accumulation
        if self.batch_size % unit:
            lower = self.batch_size // unit * unit
            raise ValueError(
                f"train.batch_size={self.batch_size} is not a multiple of "
                f"ranks x accumulation = {self.ranks} x {self.accumulation} = {unit}. "
                f"Use {lower + unit}{f' or {lower}' if lower else ''}, or change train.gradient_accumulation_steps."
            )

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass."""
        return self.batch_size // (self.ranks * self.accumulation)

    def indices(self, micro_index: int) -> range:
        """Places in the global batch of this rank's `micro_index`-th micro-batch, counted without end."""
        start = self.rank * self.batch_size // self.ranks + micro_index % self.accumulation * self.micro_batch
        return range(start, start + self.micro_batch)


class BatchPlanner:
    """Says which samples make up this rank's n-th micro-batch.

    Args:
        shards, order, buckets, share, augmentation: the parts of the recipe.
        start: positions consumed so far.

    Raises:
        ValueError: with several shapes, a start that is no multiple of the batch size.
    """

    def __init__(self, shards: Shards, order: SampleOrder, buckets: Buckets, share: Share, augmentation: Augmentation, start: int) -> None:
        self.shards, self.order, self.buckets, self.share, self.augmentation, self.start = (
            shards,
            order,
            buckets,
            share,
            augmentation,
            start,
        )
        self.windows = None
        if len(buckets.shapes) > 1:
            if start % share.batch_size:
                raise ValueError(
                    f"{start} images were seen, which is no multiple of train.batch_size={share.batch_size}: with data.aspect_ratios "
                    f"a run goes on with the batch size it began with."
                )
            size = share.batch_size
            self.windows = Windows(self._bucket_of, epoch=order.epoch, batch_size=size, seed=augmentation.seed, whole=buckets.whole)
        self._ahead: deque[BatchPlan] = deque()
        self._portion = 0

    def next(self) -> BatchPlan:
        """The plan of the next micro-batch."""
        if not self._ahead:
            count = min(max(1, self._portion), max(1, AHEAD // self.share.micro_batch))  # the first soon, then more at once
            self._ahead.extend(self._plan_batches(range(self._portion, self._portion + count)))
            self._portion += count
        return self._ahead.popleft()

    def _plan_batches(self, micro_indices: range) -> list[BatchPlan]:
        """Several micro-batches, looked up together."""
        batch_indices = np.stack([np.arange(r.start, r.stop) for r in map(self.share.indices, micro_indices)])
        chosen = [self._positions(micro_index, row) for micro_index, row in zip(micro_indices, batch_indices, strict=True)]
        positions = np.stack([p for p, _ in chosen])
        self.shards.prefetch(self.order.upcoming_shards(int(positions.min())))
        shards, numbers = self.order(positions.ravel())
        records = self.shards.gather(shards, numbers, lost=True)  # who reads them says what becomes of a lost shard
        corners, shapes = self.augmentation.corners(positions.ravel()), [self.buckets.shapes[bucket] for _, bucket in chosen]
        wanted = np.repeat(shapes, batch_indices.shape[1], axis=0)
        plain = (records["rest"] >= PLAIN) & (records["height"] == wanted[:, 0]) & (records["width"] == wanted[:, 1])
        plain &= self.shards.knows_plain(shards)
        samples, mirrored = np.stack([shards, numbers], axis=1), self.augmentation.mirrored(positions.ravel())
        columns = samples, records, read_labels(records), size_conditioning(records, corners, wanted), mirrored, corners, plain
        rows = zip(
            batch_indices, positions, *(column.reshape(*batch_indices.shape, *column.shape[1:]) for column in columns), shapes, strict=True
        )
        return [BatchPlan(*row) for row in rows]

    def _positions(self, micro_index: int, batch_indices: np.ndarray) -> tuple[np.ndarray, int]:
        """The positions at some places of the global batch of a portion, and their bucket."""
        steps = micro_index // self.share.accumulation
        if self.windows is None:
            return self.start + steps * self.share.batch_size + batch_indices, 0
        positions, bucket = self.windows.batch(self.start // self.share.batch_size + steps)
        return positions[batch_indices], bucket

    def _bucket_of(self, positions: np.ndarray) -> np.ndarray:
        records = self.shards.gather(*self.order(positions))
        return self.buckets.nearest(records["width"], records["height"])


class BatchStream:
    """An endless iterator of this rank's micro-batches; `data.build` makes one.

    Args:
        planner: which samples come.
        loader: reads them.
        workers: threads that read ahead; 0 reads when asked.
    """

    def __init__(self, planner: BatchPlanner, loader: BatchLoader, workers: int) -> None:
        self.planner, self.loader = planner, loader
        self.shards, self.order = planner.shards, planner.order
        self.faults: list[ReplacedSample] = []
        """What was replaced in the batches given out so far; `take_faults` empties it."""
        self._pool = ThreadPoolExecutor(workers, "stream") if workers else None
        self._ahead: deque[Future[Batch]] = deque()
        self._depth = max(1, 2 * workers)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            ValueError: a lost shard, or too many bad samples in a row.
        """
        self._read_ahead(self._depth)
        batch = self._ahead.popleft().result()
        self.faults += batch.faults
        return batch

    def ready(self, count: int) -> BaseException | None:
        """Wait until the next `count` micro-batches are read, which `__next__` gives later; why the first that cannot be had cannot."""
        self._read_ahead(count)
        errors = (future.exception() for future in islice(self._ahead, count))
        return next((error for error in errors if error), None)

    def _read_ahead(self, count: int) -> None:
        """Begin to read until so many are under way."""
        while len(self._ahead) < count:
            self._ahead.append(self._submit_next())

    def _submit_next(self) -> Future[Batch]:
        """Return the next micro-batch, on its way; where it cannot even be planned, or there are no threads, at its end."""
        done = Future[Batch]()
        try:
            plan = self.planner.next()
            if self._pool is not None:
                return self._pool.submit(self.loader.load, plan)
            done.set_result(self.loader.load(plan))
        except Exception as error:
            done.set_exception(error)
        return done

    def take_faults(self) -> list[ReplacedSample]:
        """The samples replaced since this was last asked."""
        taken, self.faults = self.faults, []
        return taken

    def keys(self, batch: Batch) -> list[str]:
        """The names of a batch's samples in their shards; read again from there."""
        return [self.shards.key(shard, number) for shard, number in batch.samples.tolist()]

    def close(self) -> None:
        """Stop reading ahead; the threads end when what they hold is done."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels 0..255, uint8, or 0..65535, uint16, to -1..1, float32, contiguous; any shape.

    A value of 8 bits, and the same widened to 16 (times 257), give the same float.
    """
    half = 32767.5 if pixels.dtype == torch.uint16 else 127.5
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / half - 1
