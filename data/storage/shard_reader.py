"""Random access to samples: the shards of one split, of one folder or several, by number."""

from __future__ import annotations

import os
import threading
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from isal.isal_zlib import crc32 as crc32_of  # zlib's, several times as fast

from condot.core.printable import printable

from ..format.index_record import RECORD, index_payload, is_unchanged, open_index, sample_span, slice_image
from ..format.manifest import DECODER, Manifest
from ..format.sample_files import NO_LABEL
from ..format.shard_table import Shard, ShardTable
from ..format.tar_headers import BLOCK
from ..format.tar_reader import parse_sample_files
from ..images.decode import DECODE_ERRORS, decode_image
from .local import LocalFolder, ShardFolder
from .retry import DiskRetry

OPEN_FILES = 64
OPEN_INDEXES = 1024
"""So many are kept open; opening one costs about 0.1 ms."""
INDEX_BYTES = 1 << 28
"""Of memory for indexes: fewer are kept where they are large."""
CHANGED = "its bytes changed since it was packed. Copy or pack the shard again"
LOST = np.array([(0, 0, 1, 0, 0, 0, NO_LABEL, 1, 1)], RECORD)
"""Stands for a sample of a lost shard until it is read: no bytes, which cannot have this crc32."""
T = TypeVar("T")


class StoredSample(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    files: dict[str, bytes]
    label: int
    """-1 where it has none."""
    body: bytes
    """All that it spans in its shard."""
    before: int
    """Of its RECORD: the blocks of BLOCK bytes before its image."""
    size: int
    """Of its image, bytes."""

    @property
    def image(self) -> bytes:
        """The file that its index points at."""
        return slice_image(self.body, self.before, self.size)


class BadSample(ValueError):
    """A sample whose bytes are not what was packed, or no image."""


class LostShard(ValueError):
    """A shard that is not there, not what the manifest says, or cannot be read."""


class Shards:
    """The shards of one split.

    Args:
        folders: the path of one folder, or opened ones with the same classes.
        split: which of the manifests' splits.
        chosen: for each folder, the shards wanted, in order, or their names; None for all of the split.

    Raises:
        ValueError: a folder that is missing, not whole, or without the split;
            folders whose classes differ.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[ShardFolder],
        split: str = "train",
        chosen: Sequence[ShardTable | tuple[str, ...] | None] | None = None,
    ) -> None:
        if isinstance(folders, (str, Path)):
            folders = [LocalFolder(folders)]
        self.folders: list[ShardFolder] = list(folders)
        self.split = split
        self.parts: list[ShardTable] = []
        """Of each folder."""
        for folder, wanted in zip(self.folders, chosen or [None] * len(self.folders), strict=True):
            if not wanted:
                wanted = folder.manifest.split(split)
            elif not isinstance(wanted, ShardTable):
                wanted, missing = folder.manifest.shards.select_names(wanted)
                if missing:
                    raise ValueError(f"{folder.name} has no {missing[0]}: its manifest does not list it. Name others.")
            self.parts.append(wanted)
        self._ends = list(accumulate(map(len, self.parts)))
        self._know_plain = np.array([folder.manifest.decoder >= DECODER for folder in self.folders])
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._disks = DiskRetry()
        self._lock = threading.Lock()
        self._check_classes()

    def _check_classes(self) -> None:
        names = self.manifest.class_names
        for folder in self.folders:
            theirs = folder.manifest.class_names
            if theirs != names:
                at = next((i for i, (a, b) in enumerate(zip(names, theirs, strict=False)) if a != b), min(len(names), len(theirs)))
                pair = [repr(n[at]) if at < len(n) else "missing" for n in (names, theirs)]
                raise ValueError(
                    f"data.shards: class {at} is {pair[0]} in {self.folders[0].name} and {pair[1]} in {folder.name}. "
                    f"Pack both with the same classes."
                )
            top = max((int(label) for label in folder.manifest.tally.labels), default=-1)
            if top >= len(names):
                raise ValueError(
                    f"{folder.name} holds class {top}, its manifest names {len(names)}: index it again with names for all, "
                    f"`condot prepare webdataset {folder.name} --class_names FILE`."
                )

    @property
    def manifest(self) -> Manifest:
        """The first folder's manifest."""
        return self.folders[0].manifest

    @property
    def fingerprint(self) -> str:
        """Return a hash of the content and order of the shards, wherever they lie."""
        if len(self.folders) == 1 and self.parts[0] == self.manifest.split(self.split):
            return self.manifest.fingerprint
        return "+".join(folder.manifest.fingerprint_of(part) for folder, part in zip(self.folders, self.parts, strict=True))

    @property
    def samples(self) -> np.ndarray:
        """(N,), int64: samples in each shard."""
        return np.concatenate([part.samples for part in self.parts])

    @property
    def counts(self) -> list[int]:
        """`samples` as a list."""
        counts: list[int] = self.samples.tolist()
        return counts

    @property
    def shards(self) -> list[Shard]:
        """All of them, for few: a million take 700 MB."""
        return [shard for part in self.parts for shard in part]

    def _place(self, shard: int) -> tuple[ShardFolder, Shard]:
        """Where a shard lies, and its line of the manifest."""
        part = bisect(self._ends, shard)
        return self.folders[part], self.parts[part][shard - self._ends[part]]  # the same counted from the part's end

    def name(self, shard: int) -> str:
        """How messages call a shard."""
        folder, line = self._place(shard)
        return f"{folder.name.rstrip('/')}/{line.name}"

    def prefetch(self, shards: Sequence[int]) -> None:
        """These will be read soon."""
        for folder, part, end in zip(self.folders, self.parts, self._ends, strict=True):
            first = end - len(part)
            folder.prefetch(part.take([shard - first for shard in shards if first <= shard < end]))

    def records(self, shard: int) -> np.ndarray:
        """Return the index of a shard, one RECORD a sample; hashed and compared with the manifest when it is opened.

        Raises:
            LostShard: an index that is not there, or not what the manifest says.
        """
        found = self._indexes.get(shard)
        if found is None:
            folder, line = self._place(shard)
            classes = len(folder.manifest.class_names)
            found = self._with_retry(shard, lambda: open_index(folder.index(line), line, classes), f"{self.name(shard)}: ")
            self._keep(self._indexes, shard, found, min(OPEN_INDEXES, 1 + INDEX_BYTES // max(1, found.nbytes)))
        return found

    def knows_plain(self, shards: np.ndarray) -> np.ndarray:
        """Return whether indexes were made by the present rule of `decode.is_plain`, (N,), bool; older ones said it of too many."""
        return self._know_plain[np.searchsorted(self._ends, shards, side="right")]

    def gather(self, shards: np.ndarray, numbers: np.ndarray, lost: bool = False) -> np.ndarray:
        """Return the records of many samples, (N,).

        Args:
            shards, numbers: of each sample, (N,).
            lost: give LOST for the samples of a lost shard, whose `payload` then raises, instead of raising here.

        Raises:
            LostShard: as `records`.
        """
        sort = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[sort], prepend=-1)).tolist()
        sorted_numbers, found = numbers[sort], np.empty((len(shards), 3), np.uint64)  # a record as three words: numpy copies those faster
        for first, last, shard in zip(starts, [*starts[1:], len(sort)], shards[sort[starts]].tolist(), strict=True):
            try:
                found[first:last] = self.records(shard).view(np.uint64).reshape(-1, 3)[sorted_numbers[first:last]]
            except LostShard:
                if not lost:
                    raise
                found[first:last] = LOST.view(np.uint64)
        out = np.empty_like(found)
        out[sort] = found
        return out.view(RECORD)[:, 0]

    def _open(self, shard: int) -> FileIO:
        folder, line = self._place(shard)
        self.records(shard)  # a tar is of no use without its index, and a record of `gather` may be none
        return self._keep(self._files, shard, self._with_retry(shard, lambda: FileIO(folder.file(line))), OPEN_FILES)

    def payload(self, shard: int, block: int, size: int, crc32: int) -> bytes:
        """The image (or array) of a sample, from the first three fields of its record.

        Raises:
            BadSample: its bytes changed since they were indexed.
            LostShard: the shard cannot be read.
        """
        file = self._files.get(shard) or self._open(shard)  # held while it is read, for else it may be closed
        try:
            body = os.pread(file.fileno(), size, block * BLOCK)
        except OSError:
            body = self._reread(shard, block * BLOCK, size)
        if crc32_of(body) != crc32:
            raise BadSample(CHANGED)
        return body

    def read(self, shard: int, number: int) -> StoredSample:
        """One sample with all its files, checked against what was indexed.

        Raises:
            BadSample: its bytes changed.
            LostShard: the shard cannot be read.
        """
        record = self.records(shard)[number].item()
        block, size, _, before, _, _, label, _, _ = record
        start, length = sample_span(record)
        file = self._files.get(shard) or self._open(shard)
        try:
            body = os.pread(file.fileno(), length, start)
        except OSError:
            body = self._reread(shard, start, length)
        if len(body) != length or not is_unchanged(index_payload(body, block * BLOCK, size, start), record):
            raise BadSample(f"{self.name(shard)}, sample {number}: {CHANGED}.")
        key, files = parse_sample_files(body)
        return StoredSample(key, files, -1 if label == NO_LABEL else label, body, before, size)

    def key(self, shard: int, number: int) -> str:
        """Return the name of a sample for messages, as far as it can still be read."""
        try:
            block, _, _, before, *_ = self.records(shard)[number].item()
            file = self._files.get(shard) or self._open(shard)
            key = parse_sample_files(os.pread(file.fileno(), (before + 1) * BLOCK, (block - before) * BLOCK))[0]
            return printable(key) or f"sample {number}"
        except (ValueError, OSError):
            return f"sample {number}"

    def _reread(self, shard: int, start: int, length: int) -> bytes:
        """Return bytes of a file whose reading failed: opened and read again, for as long as its disk is waited for."""
        folder, line = self._place(shard)

        def attempt() -> bytes:
            self._files.pop(shard, None)
            file = self._keep(self._files, shard, FileIO(folder.file(line)), OPEN_FILES)
            return os.pread(file.fileno(), length, start)

        return self._with_retry(shard, attempt, f"{self.name(shard)} cannot be read at byte {start}: ")

    def _with_retry(self, shard: int, attempt: Callable[[], T], where: str = "") -> T:
        """Return what an attempt at a file gives, tried again while its disk stalls; LostShard where it cannot be had."""
        folder = bisect(self._ends, shard)
        try:
            return self._disks.read(attempt, folder, self.name(shard), self.folders[folder].retry_seconds)
        except (ValueError, OSError) as error:
            raise LostShard(f"{where}{error}") from error

    def pixels(
        self, shard: int, number: int, channels: int, resolution: int, mirror: bool = False, bit_depth: int = 8
    ) -> tuple[np.ndarray, int]:
        """One sample's image, (C, H, W), uint8 or uint16, cropped at its centre, and its class.

        Raises:
            BadSample: it cannot be decoded.
        """
        sample = self.read(shard, number)
        try:
            return decode_image(sample.image, channels, resolution, mirror, bit_depth), sample.label
        except DECODE_ERRORS as error:
            raise BadSample(
                f"{self.name(shard)}: image {sample.key!r} cannot be decoded ({error}). Pack the folder again without it."
            ) from error

    def _keep(self, kept: OrderedDict[int, T], key: int, value: T, most: int) -> T:
        """Keep a bounded number of opened things; what falls out closes when its last reader lets go."""
        with self._lock:
            kept[key] = value
            while len(kept) > most:
                kept.popitem(last=False)
        return value
