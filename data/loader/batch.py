"""One micro-batch: where its samples lie, and how they become arrays, with substitutes for those that cannot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..encoders.text_states import TextStates
from ..format.index import NO_LABEL
from ..images.decode import DECODE_ERRORS, decode_into
from ..storage.shard_reader import LostShard, Shards
from .buckets import Buckets
from .captions import ALONE, Beside, Company
from .shuffle import Sequence, key_at, share_at

TRIES = 8
"""Samples tried for one position before the data are called unusable."""
CENTRE = (0.5, 0.5)
NEARBY = 4096
"""A substitute comes from among so many positions, so that its shard is probably open."""


class Fault(NamedTuple):
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
    places: Tensor
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
    faults: tuple[Fault, ...] = ()
    """Samples that were replaced."""


class Plan(NamedTuple):
    """The samples of a micro-batch before they are read; arrays of (B, ...), as in Batch."""

    places: np.ndarray
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
class Look:
    """How images are varied: functions of (seed, position)."""

    seed: int
    flip: bool
    random_crop: bool

    def mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Which are mirrored, (B,), bool."""
        return (key_at(positions, self.seed, 3) & np.uint64(1)).astype(bool) if self.flip else np.zeros(len(positions), bool)

    def corners(self, positions: np.ndarray) -> np.ndarray:
        """Where they are cropped, (B, 2), from the top and from the left, 0 to 1."""
        if not self.random_crop:
            return np.full((len(positions), 2), CENTRE)
        return np.stack([share_at(positions, self.seed, 7, side) for side in (0, 1)], axis=1)


class Reader(Protocol):
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


class Loader:
    """Reads plans.

    Args:
        shards: where samples lie.
        order: which says what stands in for a bad sample.
        reader: of the payload.
        look: of the images.
        buckets: the shapes of batches.
        beside: reads what goes with an image, if anything is wanted.
        skip_lost: replace the samples of a lost shard, instead of an error.
    """

    def __init__(
        self, shards: Shards, order: Sequence, reader: Reader, look: Look, buckets: Buckets, beside: Beside | None, skip_lost: bool
    ) -> None:
        self.shards, self.order, self.reader, self.look = shards, order, reader, look
        self.buckets, self.beside, self.skip_lost = buckets, beside, skip_lost

    def load(self, plan: Plan) -> Batch:
        """Read a micro-batch; samples that are replaced are replaced in the plan's arrays.

        Raises:
            ValueError: too many bad samples in a row, or a lost shard.
        """
        array = self.reader.empty(len(plan.positions), plan.shape)
        company = self.beside.empty(plan.positions) if self.beside else ALONE
        faults, payload, fill, beside = list[Fault](), self.shards.payload, self.reader.fill, self.beside
        where = (plan.records[name].tolist() for name in ("payload", "bytes", "crc32"))
        corners = plan.corners if self.look.random_crop else repeat(CENTRE, len(array))
        looks = plan.mirrored.tolist(), corners, plan.plain.tolist()
        rows = zip(range(len(array)), array, plan.samples[:, 0].tolist(), *where, *looks, strict=True)
        for i, out, shard, block, size, crc32, mirror, corner, plain in rows:  # names, not stars: they cost a microsecond
            try:
                fill(out, payload(shard, block, size, crc32), mirror, corner, plain)
                if beside:
                    beside.fill(company, i, shard, int(plan.samples[i, 1]))
            except (LostShard, *DECODE_ERRORS) as error:
                self._substitute(plan, i, out, company, faults, error)
        labels, places, positions, samples, sizes = map(
            torch.from_numpy, (plan.labels, plan.places, plan.positions, plan.samples, plan.sizes)
        )
        text = self.beside.text(company) if self.beside else ()
        images = self.reader.tensor(array)
        return Batch(images, labels, places, positions, samples, sizes, tuple(company.captions), text, tuple(faults))

    def _substitute(self, plan: Plan, i: int, out: np.ndarray, company: Company, faults: list[Fault], error: Exception) -> None:
        """Put another sample, which (seed, position, try) names, in the place of a bad one."""
        position = int(plan.positions[i])
        for attempt in range(TRIES):
            shard, number = plan.samples[i].tolist()
            if isinstance(error, LostShard) and not self.skip_lost:
                raise LostShard(f"{error} The same command goes on once it is back; data.lost_shards=skip goes on without.") from error
            text = " ".join(str(error).split()) or type(error).__name__
            faults.append(Fault(position, self.shards.name(shard), self.shards.key(shard, number), text))
            try:
                self._replace(plan, i, out, company, self._nearby(plan, position, attempt))
                return
            except (LostShard, *DECODE_ERRORS) as problem:
                error = problem
        listed = "; ".join(f"{f.shard}: {f.key} ({f.error})" for f in faults[-TRIES:])
        raise ValueError(f"{TRIES} bad samples in a row at position {position}: {listed}. Check the shards with `python -m data.inspect`.")

    def _nearby(self, plan: Plan, position: int, attempt: int) -> int:
        """Where a substitute comes from; where batches are of one bucket each, the next from there on that is of it."""
        start = position // NEARBY * NEARBY
        first = int(key_at(np.array([position]), self.look.seed, 8, attempt)[0] % np.uint64(NEARBY))
        if not self.buckets.whole:
            return start + first
        for chunk in np.split((first + np.arange(NEARBY)) % NEARBY + start, NEARBY // 64):
            records = self.shards.gather(*self.order(chunk), lost=True)
            fits = [self.buckets.shapes[b] == plan.shape for b in self.buckets.nearest(records["width"], records["height"]).tolist()]
            if any(fits):
                return int(chunk[fits.index(True)])
        return start + first

    def _replace(self, plan: Plan, i: int, out: np.ndarray, company: Company, position: int) -> None:
        """Read the sample of another position into row i of a plan."""
        (shard,), (number,) = self.order(np.array([position]))
        plan.samples[i] = shard, number
        plan.records[i : i + 1] = self.shards.gather(np.array([shard]), np.array([number]), lost=True)
        plan.labels[i : i + 1] = labels_of(plan.records[i : i + 1])
        plan.sizes[i : i + 1] = crops(plan.records[i : i + 1], plan.corners[i : i + 1], np.array([plan.shape]))
        payload = self.shards.payload(int(shard), *plan.records[i].item()[:3])
        self.reader.fill(out, payload, bool(plan.mirrored[i]), plan.corners[i], False)
        if self.beside:
            self.beside.fill(company, i, int(shard), int(number))


def labels_of(records: np.ndarray) -> np.ndarray:
    """The classes of samples, int64; -1 where there is none."""
    labels = records["label"].astype(np.int64)
    labels[labels == NO_LABEL] = -1
    return labels


def crops(records: np.ndarray, corners: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Height and width of the originals, top and left of the crops in the resized images: (B, 4), int32, pixels."""
    size = np.stack([records["height"], records["width"]], axis=1).astype(np.float64)
    scale = (shapes / np.maximum(size, 1)).max(axis=1, keepdims=True)
    return np.concatenate([size, np.round(corners * (size * scale - shapes))], axis=1).astype(np.int32)


class Pixels:
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
