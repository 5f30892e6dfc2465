"""Shards to batches, on any number of ranks and worker threads, from any position at once.

Optimiser step k takes positions k * batch_size to (k + 1) * batch_size of the
endless order; rank r of R takes the r-th of R equal shares, in micro-batches.
So every rank has a full batch at every step, an epoch's end falls anywhere,
and the cursor is one number: positions consumed.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decode import DECODE_ERRORS, decode_image
from .index import IMAGE_EXTENSIONS, index_path, read_manifest, sample_files
from .order import Order, keys


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    pixels: Tensor
    """(B, C, H, W), uint8."""
    labels: Tensor
    """(B,), int64; -1 where a sample has no class."""
    places: Tensor
    """(B,), int64: place of each sample in its global batch, which names its noise and time."""
    positions: Tensor
    """(B,), int64: place of each sample in the endless order."""


class Sample(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    files: dict[str, bytes]
    label: int


class Shards:
    """Random access to the samples of one split.

    Raises:
        ValueError: a folder that is missing, not whole, or without the split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shards = self.manifest.split(split)
        self._records: dict[int, np.ndarray] = {}

    @property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self.shards]

    def records(self, shard: int) -> np.ndarray:
        """The memory-mapped index of a shard."""
        if shard not in self._records:
            self._records[shard] = np.load(index_path(self.folder / self.shards[shard].name), mmap_mode="r", allow_pickle=False)
        return self._records[shard]

    def read(self, shard: int, number: int) -> Sample:
        """One sample, checked against its crc32.

        Raises:
            ValueError: bytes that changed since they were indexed, or a class
                that the manifest does not name.
        """
        record = self.records(shard)[number]
        name = self.shards[shard].name
        with open(self.folder / name, "rb", buffering=0) as file:
            span = os.pread(file.fileno(), int(record["bytes"]), int(record["offset"]))
        if zlib.crc32(span) != record["crc32"]:
            raise ValueError(f"{self.folder / name}, sample {number}: its bytes changed since it was packed. Copy or pack the shard again.")
        if record["label"] >= len(self.manifest.class_names):
            raise ValueError(
                f"{self.folder / name}, sample {number}: class {record['label']} "
                f"of {len(self.manifest.class_names)} that the manifest names. Pack it again."
            )
        key, files = sample_files(span)
        return Sample(key, files, int(record["label"]))

    def pixels(self, shard: int, number: int, channels: int, resolution: int, mirror: bool = False) -> tuple[np.ndarray, int]:
        """One sample's image, (C, H, W) uint8, and its class.

        Raises:
            ValueError: a sample that cannot be decoded, named.
        """
        sample = self.read(shard, number)
        image = next(sample.files[e] for e in IMAGE_EXTENSIONS if e in sample.files)
        try:
            return decode_image(image, channels, resolution, mirror), sample.label
        except DECODE_ERRORS as error:
            name = self.folder / self.shards[shard].name
            raise ValueError(f"{name}: image {sample.key!r} cannot be decoded ({error}). Pack the folder again without it.") from error


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

    def indices(self, portion: int) -> range:
        """Places in the global batch of this rank's `portion`-th micro-batch, counted without end."""
        start = self.rank * self.batch_size // self.ranks + portion % self.accumulation * self.micro_batch
        return range(start, start + self.micro_batch)


class Stream:
    """An endless iterator of this rank's micro-batches.

    Args:
        shards: the split to stream.
        channels, resolution: of the images.
        seed: of the order and the mirroring.
        share: this rank's part.
        block: shards mixed with one another.
        flip: mirror half of the images.
        workers: threads that decode ahead; 0 decodes when asked.
        start: positions consumed so far by all ranks, a multiple of the batch size or not.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        channels: int,
        resolution: int,
        seed: int,
        share: Share,
        block: int = 16,
        flip: bool = False,
        workers: int = 0,
        start: int = 0,
    ) -> None:
        self.shards, self.channels, self.resolution = shards, channels, resolution
        self.seed, self.share, self.flip, self.start = seed, share, flip, start
        self.order = Order(shards.counts, seed, block)
        self._portion = 0
        self._pool = ThreadPoolExecutor(workers, "stream") if workers else None
        self._ahead: deque[Future[Batch]] = deque()
        self._depth = 2 * workers

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            ValueError: a sample that is damaged, named.
        """
        if self._pool is None:
            return self._decode(*self._next_places())
        while len(self._ahead) < self._depth:
            self._ahead.append(self._pool.submit(self._decode, *self._next_places()))
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop reading ahead; the threads end when what they hold is done."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _next_places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the next micro-batch comes from; the order is worked out here alone, by one thread."""
        indices = np.array(self.share.indices(self._portion), np.int64)
        positions = self.start + self._portion // self.share.accumulation * self.share.batch_size + indices
        self._portion += 1
        return indices, positions, *self.order(positions)

    def _decode(self, indices: np.ndarray, positions: np.ndarray, shards: np.ndarray, numbers: np.ndarray) -> Batch:
        pixels = np.empty((len(indices), self.channels, self.resolution, self.resolution), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for i, (position, shard, number) in enumerate(zip(positions.tolist(), shards.tolist(), numbers.tolist(), strict=True)):
            mirror = self.flip and bool(keys(1, self.seed, 3, position)[0] & np.uint64(1))
            pixels[i], labels[i] = self.shards.pixels(shard, number, self.channels, self.resolution, mirror)
        return Batch(*map(torch.from_numpy, (pixels, labels, indices, positions)))


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels 0..255, uint8, to -1..1, float32; any shape."""
    return pixels.float() / 127.5 - 1
