"""One folder of shards, wherever it lies: its manifest, and its files as files of this machine."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from braceexpand import braceexpand

from condot.core.errors import summarize_list
from condot.core.hashing import sha256_of_file
from condot.core.printable import redact, redact_url

from ..format.index_record import index_path
from ..format.manifest import Manifest, check_foreign, read_manifest
from ..format.shard_table import AT_ONCE, Shard, ShardTable
from .retry import TRANSIENT_ERRNOS

PREPARE = "condot prepare imagefolder IMAGES --output"
LARGE = 1_000_000_000
"""Bytes to hash of which a user is told."""
LOOKS = 16
"""Threads that look whether a folder's shards are there."""


class ShardFolder(Protocol):
    """What a folder of shards offers, local or remote."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def retry_seconds(self) -> float:
        """Return how long a disk that stalls is waited for."""
        ...

    def file(self, shard: Shard) -> Path:
        """The tar as a file of this machine; its index lies beside it.

        Raises:
            ValueError: it is not there, or not what the manifest says.
            OSError: the disk stalls.
        """
        ...

    def index(self, shard: Shard) -> Path:
        """The index of a tar, which may be here before the tar is."""
        ...

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """These will be wanted soon, in this order; returns at once."""
        ...


class LocalFolder:
    """A folder on a file system.

    Args:
        path: of the folder.
        retry_seconds: how long a disk that stalls is waited for.

    Raises:
        ValueError: no such folder, no manifest, a shard missing or of another length.
    """

    def __init__(self, path: str | Path, retry_seconds: float = 300.0) -> None:
        self.path, self.retry_seconds = Path(path), retry_seconds
        self.name = str(path)
        if not self.path.is_dir():
            raise ValueError(f"data.shards={self.name!r} is no folder: make it with `{PREPARE} {self.name}`.")
        try:
            with open(self.path / "manifest.json", "rb") as file:
                self.manifest = read_manifest(file, f"{self.name}/manifest.json")
                indexed = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name} has no manifest.json, so packing never finished: run `condot prepare` again; "
                f"tars from elsewhere get one from `condot prepare webdataset {self.name}`."
            ) from error
        check_foreign(self.manifest, self.name, remote=False)
        self._newer: list[str] = []
        """Tars that were written after the manifest."""
        for number in self._suspect_shards(indexed):
            self.file(self.manifest.shards[number])

    def _suspect_shards(self, indexed: int) -> Iterator[int]:
        """Shards that `file` may refuse, by number: a quick look, many at a time since network disks answer slowly."""
        shards, folder = self.manifest.shards, os.open(self.path, os.O_RDONLY)

        def look(first: int) -> list[int]:
            part, amiss = shards[first : first + AT_ONCE], list[int]()
            for number, (name, size) in enumerate(zip(part.names, part.bytes.tolist(), strict=True), first):
                written = _written(folder, name, size)
                if written < 0:
                    amiss.append(number)
                elif written > indexed:
                    self._newer.append(name)
            return amiss

        try:
            with ThreadPoolExecutor(LOOKS) as pool:
                for found in pool.map(look, range(0, len(shards), AT_ONCE)):
                    yield from found
        finally:
            os.close(folder)

    def file(self, shard: Shard) -> Path:
        tar = self.path / shard.name
        found = self._size(tar)
        if found != shard.bytes:
            raise ValueError(
                f"{tar}: {'missing' if found is None else f'{found} bytes'}, the manifest says {shard.bytes}. Copy or pack it again."
            )
        if self._size(index_path(tar)) is None:
            raise ValueError(f"{index_path(tar)} is missing: copy it beside its tar, or pack the folder again.")
        return tar

    def _size(self, path: Path) -> int | None:
        """Return the bytes of a file, None where it is not there.

        Raises:
            OSError: the disk stalls, or the whole folder is not there, as when a mount is gone for a while.
        """
        try:
            return path.stat().st_size
        except OSError as error:
            if error.errno in TRANSIENT_ERRNOS:
                raise
        if not os.access(self.path / "manifest.json", os.F_OK):
            raise OSError(errno.ENOTCONN, "the folder is not there, nor its manifest", self.name)
        return None

    def index(self, shard: Shard) -> Path:
        path = index_path(self.path / shard.name)
        self._size(path)
        return path

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Nothing to do: the files are here."""

    def check_rewritten(self, shards: ShardTable) -> None:
        """Hash those tars that were written after the manifest, for whoever trains on what was made of them and never reads them.

        A gigabyte takes about half a second of a processor. Where all are what the manifest says, it is given the time
        of this look, so that the next one is free.

        Args:
            shards: those that matter.

        Raises:
            ValueError: tars that are not what the manifest says.
        """
        began = time.time_ns()
        newer, missing = shards.select_names(self._newer)
        if not newer:
            return
        if newer.bytes.sum() > LARGE:
            print(f"{self.name}: {len(newer)} tars are newer than their manifest; comparing {newer.bytes.sum():,} bytes", flush=True)
        with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
            same = pool.map(lambda shard: sha256_of_file(self.path / shard.name) == shard.sha256, newer)
            changed = [shard.name for shard, right in zip(newer, same, strict=True) if not right]
        if changed:
            raise ValueError(
                f"{self.name}: {summarize_list(changed, 3)} changed after they were indexed, "
                f"and what was encoded from them is of what they "
                "were. Run the `condot prepare` of this folder again, then `condot encode`."
            )
        self._newer = missing
        if not missing:
            with suppress(OSError):  # a folder of somebody else's: it is looked at again
                os.utime(self.path / "manifest.json", ns=(began, began))


def _written(folder: int, name: str, size: int) -> int:
    """When a tar of an open folder was last written, in nanoseconds; -1 where it is not there, not so large, or without its index."""
    try:
        status = os.stat(name, dir_fd=folder)
        whole = status.st_size == size and os.access(name.removesuffix(".tar") + ".npy", os.F_OK, dir_fd=folder)
        return status.st_mtime_ns if whole else -1
    except (OSError, ValueError):
        return -1


def expand_braces(pattern: str) -> list[str]:
    """What a brace pattern stands for, in order: `{000..009}` counts, `{a,b}` lists; a pattern without braces is itself.

    Raises:
        ValueError: braces that do not pair; an empty pattern; a wildcard.
    """
    if not pattern.strip():
        raise ValueError("data.shards holds an empty name: name a folder that `condot prepare` made, or a URL of one.")
    if "*" in pattern:
        raise ValueError(
            f"data.shards={redact_url(pattern)!r}: wildcards are not expanded. Write the numbers, as in train-{{000000..000009}}.tar."
        )
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ValueError(
            f"data.shards={redact_url(pattern)!r}: {redact(str(error))}. Write a range as {{000000..000009}}, a choice as {{a,b}}."
        ) from error
