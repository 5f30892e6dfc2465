"""One folder of shards, wherever it lies: its manifest, and its files as files of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from .index import Manifest, Shard, index_path, parse_manifest

PREPARE = "python -m data.prepare imagefolder IMAGES --output"


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

    def prefetch(self, shards: list[Shard]) -> None:
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
            text = (self.path / "manifest.json").read_bytes()
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name} has no manifest.json, so packing never finished: run `python -m data.prepare` again; "
                f"tars from elsewhere get one from `python -m data.prepare webdataset {self.name}`."
            ) from error
        self.manifest = parse_manifest(text, f"{self.name}/manifest.json")
        for shard in self.manifest.shards:
            self.file(shard)

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

    def prefetch(self, shards: list[Shard]) -> None:
        """Nothing to do: the files are here."""
