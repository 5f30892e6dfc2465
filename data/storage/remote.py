"""A folder of shards that lies elsewhere, read through the cache of this machine, with the next shards on their way."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..format.index_record import RECORD, index_path
from ..format.manifest import check_foreign, parse_manifest
from ..format.shard_table import Shard
from .cache import Cache, CacheItem
from .download import ExpectedFile, Origin

MANIFEST_BYTES = 1 << 30
"""A larger manifest is refused; 100,000 shards have one of about 30 MB."""
HEADER_BYTES = 4096
"""What an index may have beyond its records."""
THREADS = 4
"""Downloads at one time that were asked for ahead."""
PLAIN = re.compile(r"\w[\w.+=@ -]*")
STEM_BYTES = 150
"""Of a tar's name in the name of its copy, whose hashes and size take a hundred more of the 255 that a file system knows."""
MOST_AHEAD = 64
"""Shards that are kept in mind of those asked for ahead."""


class RemoteFolder:
    """A folder behind `s3://`, `gs://`, `hf://`, `https://`, `http://`, `file://` or `memory://`.

    Args:
        url: of the folder.
        cache: where its files are kept; several folders share one.
        retry_seconds: how long a file may bring nothing new before it is given up.

    Raises:
        ValueError: no such folder, no manifest, a manifest that cannot be right.
    """

    def __init__(self, url: str, *, cache: Cache, retry_seconds: float) -> None:
        self.cache, self.retry_seconds = cache, retry_seconds
        self._origin = Origin(url, retry_seconds)
        self.name = self._origin.name
        try:
            text = self._origin.text("manifest.json", MANIFEST_BYTES)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name} has no manifest.json: it is no folder of shards, or was not uploaded whole. "
                f"Make one with `condot prepare`, and upload the manifest last."
            ) from error
        self.manifest = parse_manifest(text, f"{self.name}/manifest.json")
        check_foreign(self.manifest, self.name, remote=True)
        self._lock = threading.Lock()
        self._pending: list[Shard] = []
        self._threads = 0
        self._failed: dict[str, tuple[float, ValueError]] = {}

    def file(self, shard: Shard) -> Path:
        with self._lock:
            self._pending = [other for other in self._pending if other.name != shard.name]
        path = self._tar(shard)
        assert path is not None, "None is for those who do not wait"
        return path

    def index(self, shard: Shard) -> Path:
        return self._index(shard)

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """These will be wanted soon, in this order; what was asked for before and has not begun is forgotten.

        No more is fetched than half of the cache holds. A failure is kept for
        `file`, which raises it once.
        """
        room, wanted = self.cache.limit_bytes / 2, list[Shard]()
        for shard in shards[:MOST_AHEAD]:
            room -= shard.bytes
            if room < 0:
                break
            wanted.append(shard)
        with self._lock:
            self._pending = wanted[::-1]
            new = min(THREADS, len(wanted)) - self._threads
            self._threads += max(0, new)
        for _ in range(new):
            threading.Thread(target=self._work, name=f"ahead of {self.name}", daemon=True).start()

    def _work(self) -> None:
        """Download what is pending, and end when nothing is."""
        while True:
            with self._lock:
                if not self._pending:
                    self._threads -= 1
                    return
                shard = self._pending.pop()
            with suppress(ValueError, OSError):  # of a download: kept for `file`; of this machine's disk: it will meet it itself
                self._tar(shard, ahead=True)

    def _tar(self, shard: Shard, ahead: bool = False) -> Path | None:
        """A tar with its index beside it; None where it is fetched ahead and another process is at it."""
        while True:
            self._index(shard, ahead)
            path = self._fetch(CacheItem(_cached(shard), shard.bytes, shard.bytes), shard.name, shard.sha256, ahead)
            if path is None or self.cache.get(_index_item(shard)):  # room for the tar may have cost the index
                return path

    def _index(self, shard: Shard, ahead: bool = False) -> Path:
        path = self._fetch(_index_item(shard), index_path(Path(shard.name)).name, shard.index_sha256, ahead, wait=True)
        assert path is not None, "None is for those who do not wait"
        return path

    def _fetch(self, item: CacheItem, name: str, sha256: str, ahead: bool, wait: bool = False) -> Path | None:
        def write(file: BinaryIO) -> None:
            if not ahead and (error := self._kept(item.name)):
                raise error  # once: asking again means trying again
            try:
                self._origin.download(name, ExpectedFile(sha256, item.min_bytes, item.max_bytes), file)
            except ValueError as error:
                if ahead:
                    with self._lock:
                        self._failed[item.name] = (time.monotonic(), error)
                raise

        return self.cache.fetch(item, write, patience=2 * self._origin.retry_seconds, wait=wait or not ahead)

    def _kept(self, name: str) -> ValueError | None:
        """Why a download ahead failed, if that is not long ago."""
        with self._lock:
            when, error = self._failed.pop(name, (0.0, None))
        return error if time.monotonic() < when + self._origin.retry_seconds else None


def _cached(shard: Shard) -> str:
    """The name of a tar in the cache: another content has another name, and so has another index of the same content.

    The tar's own name stands before the hashes for people alone, and only where it is short and plain.
    """
    stem = shard.name.removesuffix(".tar")
    if not PLAIN.fullmatch(stem) or len(stem.encode()) > STEM_BYTES:
        stem = "shard"
    return f"{stem}.{shard.sha256[:32]}.{shard.index_sha256[:16]}.tar"


def _index_item(shard: Shard) -> CacheItem:
    records = shard.samples * RECORD.itemsize
    return CacheItem(index_path(Path(_cached(shard))).name, records, records + HEADER_BYTES)
