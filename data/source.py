"""One folder of shards, wherever it lies: its manifest, and its files as files of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from braceexpand import braceexpand

from .index import index_path
from .locators import redact, redact_url
from .manifest import Manifest, check_foreign, read_manifest
from .shardlist import AT_ONCE, Shard

PREPARE = "python -m data.prepare imagefolder IMAGES --output"
LOOKS = 16
"""Threads that look whether a folder's shards are there."""


class Folder(Protocol):
    """What a folder of shards offers, local or remote."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def manifest(self) -> Manifest: ...

    def file(self, shard: Shard) -> Path:
        """The tar as a file of this machine; its index lies beside it.

        Raises:
            ValueError: it is not there, or not what the manifest says.
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

    Raises:
        ValueError: no such folder, no manifest, a shard missing or of another length.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        if not self.path.is_dir():
            raise ValueError(f"data.shards={self.name!r} is no folder: make it with `{PREPARE} {self.name}`.")
        try:
            with open(self.path / "manifest.json", "rb") as file:
                self.manifest = read_manifest(file, f"{self.name}/manifest.json")
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name} has no manifest.json, so packing never finished: run `python -m data.prepare` again; "
                f"tars from elsewhere get one from `python -m data.prepare webdataset {self.name}`."
            ) from error
        check_foreign(self.manifest, self.name, remote=False)
        for number in self._amiss():
            self.file(self.manifest.shards[number])

    def _amiss(self) -> Iterator[int]:
        """Shards that `file` may refuse, by number: a quick look, many at a time since network disks answer slowly."""
        shards, folder = self.manifest.shards, os.open(self.path, os.O_RDONLY)

        def look(first: int) -> list[int]:
            part = shards[first : first + AT_ONCE]
            facts = zip(part.names, part.bytes.tolist(), strict=True)
            return [number for number, (name, size) in enumerate(facts, first) if not _whole(folder, name, size)]

        try:
            with ThreadPoolExecutor(LOOKS) as pool:
                for found in pool.map(look, range(0, len(shards), AT_ONCE)):
                    yield from found
        finally:
            os.close(folder)

    def file(self, shard: Shard) -> Path:
        tar = self.path / shard.name
        try:
            found = tar.stat().st_size
        except OSError:
            found = None
        if found != shard.bytes:
            raise ValueError(
                f"{tar}: {'missing' if found is None else f'{found} bytes'}, the manifest says {shard.bytes}. Copy or pack it again."
            )
        if not index_path(tar).exists():
            raise ValueError(f"{index_path(tar)} is missing: copy it beside its tar, or pack the folder again.")
        return tar

    def index(self, shard: Shard) -> Path:
        return index_path(self.path / shard.name)

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Nothing to do: the files are here."""


def _whole(folder: int, name: str, size: int) -> bool:
    """Whether a tar is in an open folder, so large, with its index."""
    try:
        return os.stat(name, dir_fd=folder).st_size == size and os.access(name.removesuffix(".tar") + ".npy", os.F_OK, dir_fd=folder)
    except (OSError, ValueError):
        return False


def expand(pattern: str) -> list[str]:
    """What a brace pattern stands for, in order: `{000..009}` counts, `{a,b}` lists; a pattern without braces is itself.

    Raises:
        ValueError: braces that do not pair; an empty pattern; a wildcard.
    """
    if not pattern.strip():
        raise ValueError("data.shards holds an empty name: name a folder that `python -m data.prepare` made, or a URL of one.")
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
