"""One micro-batch: where its samples lie, and how they become arrays, with substitutes for those that cannot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from condot.core.text_states import TextStates

from ..format.sample_files import NO_LABEL
from ..images.decode import DECODE_ERRORS, decode_into
from ..storage.shard_reader import LostShard, Shards
from .buckets import Buckets
from .captions import NO_CAPTIONS, CaptionBatch, CaptionReader
from .shuffle import SampleOrder, hash_at, uniform_at

MAX_SUBSTITUTES = 8
"""Samples tried for one position before the data are called unusable."""
CENTRE = (0.5, 0.5)
SUBSTITUTE_RANGE = 4096
"""A substitute comes from among so many positions, so that its shard is probably open."""


class ReplacedSample(NamedTuple):
    """A sample that could not be used, and where it would have stood."""

    position: int
    shard: str
    key: str
    error: str


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    images: Tensor
    """(B, C, H, W), uint8 or uint16, pixels; or (B, K, h, w), float16, the moments of latents."""
    labels: Tensor
    """(B,), int64; -1 where a sample has no class."""
    batch_indices: Tensor
    """(B,), int64: place of each sample in its global batch, which names its noise and time."""
    positions: Tensor
    """(B,), int64: place of each sample in the endless order."""
    samples: Tensor
    """(B, 2), int64: shard and number of each sample, where a substitute stands the substitute's."""
    sizes: Tensor
    """(B, 4), int32, pixels, for micro-conditioning: height and width of the upright original, and top and left of the crop
    in the resized image."""
    captions: tuple[str, ...] = ()
    """As asked for; "" where a sample has none."""
    text: tuple[TextStates, ...] = ()
    """Encoded captions, float16, of each encoder; padded to a length that this micro-batch names, see `join.length_of`."""
    faults: tuple[ReplacedSample, ...] = ()
    """Samples that were replaced."""


class BatchPlan(NamedTuple):
    """The samples of a micro-batch before they are read; arrays of (B, ...), as in Batch."""

    batch_indices: np.ndarray
    positions: np.ndarray
    samples: np.ndarray
    """Shard and number."""
    records: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    mirrored: np.ndarray
    corners: np.ndarray
    plain: np.ndarray
    """Those that `decode.is_plain` and have the wanted shape."""
    shape: tuple[int, int]
    """Height and width of all images, pixels."""


@dataclass(frozen=True)
class Augmentation:
    """How images are varied: functions of (seed, position)."""

    seed: int
    flip: bool
    random_crop: bool

    def mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Which are mirrored, (B,), bool."""
        return (hash_at(positions, self.seed, 3) & np.uint64(1)).astype(bool) if self.flip else np.zeros(len(positions), bool)

    def corners(self, positions: np.ndarray) -> np.ndarray:
        """Where they are cropped, (B, 2), from the top and from the left, 0 to 1."""
        if not self.random_crop:
            return np.full((len(positions), 2), CENTRE)
        return np.stack([uniform_at(positions, self.seed, 7, side) for side in (0, 1)], axis=1)


class PayloadReader(Protocol):
    """What makes an array of a sample's bytes."""

    def empty(self, count: int, shape: tuple[int, int]) -> np.ndarray:
        """The array of a micro-batch of images of (height, width) pixels, to be filled."""
        ...

    def fill(self, out: np.ndarray, payload: bytes, mirror: bool, corner: np.ndarray | tuple[float, float], plain: bool, /) -> None:
        """Make a row of that array of a sample's payload.

        Raises:
            One of DECODE_ERRORS.
        """
        ...

    def tensor(self, array: np.ndarray) -> Tensor:
        """The filled array as `Batch.images`."""
        ...


class BatchLoader:
    """Reads plans.

    Args:
        shards: where samples lie.
        order: which says what stands in for a bad sample.
        reader: of the payload.
        augmentation: of the images.
        buckets: the shapes of batches.
        caption_reader: reads what goes with an image, if anything is wanted.
        skip_lost: replace the samples of a lost shard, instead of an error.
    """

    def __init__(
        self,
        shards: Shards,
        order: SampleOrder,
        reader: PayloadReader,
        augmentation: Augmentation,
        buckets: Buckets,
        caption_reader: CaptionReader | None,
        skip_lost: bool,
    ) -> None:
        self.shards, self.order, self.reader, self.augmentation = shards, order, reader, augmentation
        self.buckets, self.caption_reader, self.skip_lost = buckets, caption_reader, skip_lost

    def load(self, plan: BatchPlan) -> Batch:
        """Read a micro-batch; samples that are replaced are replaced in the plan's arrays.

        Raises:
            ValueError: too many bad samples in a row, or a lost shard.
        """
        array = self.reader.empty(len(plan.positions), plan.shape)
        caption_batch = self.caption_reader.empty(plan.positions) if self.caption_reader else NO_CAPTIONS
        faults, payload, fill, caption_reader = list[ReplacedSample](), self.shards.payload, self.reader.fill, self.caption_reader
        where = (plan.records[name].tolist() for name in ("payload", "bytes", "crc32"))
        corners = plan.corners if self.augmentation.random_crop else repeat(CENTRE, len(array))
        looks = plan.mirrored.tolist(), corners, plan.plain.tolist()
        rows = zip(range(len(array)), array, plan.samples[:, 0].tolist(), *where, *looks, strict=True)
        for i, out, shard, block, size, crc32, mirror, corner, plain in rows:  # names, not stars: they cost a microsecond
            try:
                fill(out, payload(shard, block, size, crc32), mirror, corner, plain)
                if caption_reader:
                    caption_reader.fill(caption_batch, i, shard, int(plan.samples[i, 1]))
            except (LostShard, *DECODE_ERRORS) as error:
                self._substitute(plan, i, out, caption_batch, faults, error)
        labels, batch_indices, positions, samples, sizes = map(
            torch.from_numpy, (plan.labels, plan.batch_indices, plan.positions, plan.samples, plan.sizes)
        )
        text = self.caption_reader.text(caption_batch) if self.caption_reader else ()
        images = self.reader.tensor(array)
        return Batch(images, labels, batch_indices, positions, samples, sizes, tuple(caption_batch.captions), text, tuple(faults))

    def _substitute(
        self, plan: BatchPlan, i: int, out: np.ndarray, caption_batch: CaptionBatch, faults: list[ReplacedSample], error: Exception
    ) -> None:
        """Put another sample, which (seed, position, try) names, in the place of a bad one."""
        position = int(plan.positions[i])
        for attempt in range(MAX_SUBSTITUTES):
            shard, number = plan.samples[i].tolist()
            if isinstance(error, LostShard) and not self.skip_lost:
                raise LostShard(f"{error} The same command goes on once it is back; data.lost_shards=skip goes on without.") from error
            text = " ".join(str(error).split()) or type(error).__name__
            faults.append(ReplacedSample(position, self.shards.name(shard), self.shards.key(shard, number), text))
            try:
                self._read_substitute(plan, i, out, caption_batch, self._substitute_position(plan, position, attempt))
                return
            except (LostShard, *DECODE_ERRORS) as problem:
                error = problem
        listed = "; ".join(f"{f.shard}: {f.key} ({f.error})" for f in faults[-MAX_SUBSTITUTES:])
        raise ValueError(
            f"{MAX_SUBSTITUTES} bad samples in a row at position {position}: {listed}. Check the shards with `condot inspect`."
        )

    def _substitute_position(self, plan: BatchPlan, position: int, attempt: int) -> int:
        """Where a substitute comes from; where batches are of one bucket each, the next from there on that is of it."""
        start = position // SUBSTITUTE_RANGE * SUBSTITUTE_RANGE
        first = int(hash_at(np.array([position]), self.augmentation.seed, 8, attempt)[0] % np.uint64(SUBSTITUTE_RANGE))
        if not self.buckets.whole:
            return start + first
        for chunk in np.split((first + np.arange(SUBSTITUTE_RANGE)) % SUBSTITUTE_RANGE + start, SUBSTITUTE_RANGE // 64):
            records = self.shards.gather(*self.order(chunk), lost=True)
            fits = [self.buckets.shapes[b] == plan.shape for b in self.buckets.nearest(records["width"], records["height"]).tolist()]
            if any(fits):
                return int(chunk[fits.index(True)])
        return start + first

    def _read_substitute(self, plan: BatchPlan, i: int, out: np.ndarray, caption_batch: CaptionBatch, position: int) -> None:
        """Read the sample of another position into row i of a plan."""
        (shard,), (number,) = self.order(np.array([position]))
        plan.samples[i] = shard, number
        plan.records[i : i + 1] = self.shards.gather(np.array([shard]), np.array([number]), lost=True)
        plan.labels[i : i + 1] = read_labels(plan.records[i : i + 1])
        plan.sizes[i : i + 1] = size_conditioning(plan.records[i : i + 1], plan.corners[i : i + 1], np.array([plan.shape]))
        payload = self.shards.payload(int(shard), *plan.records[i].item()[:3])
        self.reader.fill(out, payload, bool(plan.mirrored[i]), plan.corners[i], False)
        if self.caption_reader:
            self.caption_reader.fill(caption_batch, i, int(shard), int(number))


def read_labels(records: np.ndarray) -> np.ndarray:
    """The classes of samples, int64; -1 where there is none."""
    labels = records["label"].astype(np.int64)
    labels[labels == NO_LABEL] = -1
    return labels


def size_conditioning(records: np.ndarray, corners: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Height and width of the originals, top and left of the crops in the resized images: (B, 4), int32, pixels."""
    size = np.stack([records["height"], records["width"]], axis=1).astype(np.float64)
    scale = (shapes / np.maximum(size, 1)).max(axis=1, keepdims=True)
    return np.concatenate([size, np.round(corners * (size * scale - shapes))], axis=1).astype(np.int32)


class PixelReader:
    """Image files as pixels.

    Args:
        channels: as `data.channels` has them.
        bit_depth: of the values: 8 gives uint8, 16 uint16.
    """

    def __init__(self, channels: int, bit_depth: int = 8) -> None:
        self.channels, self.dtype = channels, np.dtype(f"uint{bit_depth}")
        self.fill = decode_into if (channels, bit_depth) == (3, 8) else _decode_any

    def empty(self, count: int, shape: tuple[int, int]) -> np.ndarray:
        return np.empty((count, *shape, self.channels), self.dtype)

    def tensor(self, array: np.ndarray) -> Tensor:
        """(B, C, H, W) over the memory of (B, H, W, C)."""
        return torch.from_numpy(array).permute(0, 3, 1, 2)


def _decode_any(out: np.ndarray, data: bytes, mirror: bool, corner: np.ndarray | tuple[float, float], plain: bool, /) -> None:
    """Decode as `decode_into`, into what no file is plainly: other channels than three, or other bits than eight."""
    decode_into(out, data, mirror, corner)
