"""Shards of images that were made here, not found: written one by one by any number of processes, and the folder may grow.

A shard grows in `.making` inside the folder and is whole once its journal is
there. When the last one is, one process moves them to their places and writes
the manifest; until then the folder holds what it held before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from condot.core.file_lock import make_folder, open_new

from ..format.index_record import index_path
from ..format.manifest import Manifest, Tally, write_manifest
from ..format.shard_table import Shard, ShardTable
from ..format.tar_writer import TarWriter
from .shard_writer import commit_shard, journal_path

SPLIT = "train"


class GeneratedShards:
    """The shards of one folder, `train-000000.tar` and on; sample i has the key i, and lies in shard i // size.

    Args:
        folder: where to.
        size: samples in a shard, the last one's fewer.
        class_names: name of each class number.
    """

    def __init__(self, folder: Path, size: int, class_names: tuple[str, ...] = ()) -> None:
        self._folder, self._size, self._making = folder, size, folder / ".making"
        self._class_names = class_names
        make_folder(self._making)
        self._file: BinaryIO | None = None
        self._writer: TarWriter | None = None
        self.there = sum(shard.samples for shard, _ in self._whole())

    def missing(self, unit: range) -> Sequence[int]:
        """None of a shard that holds as many already, or all of one that does not."""
        found = self._read(self._name(unit[0]))
        return () if found and found[0].samples >= len(unit) else unit

    def put(self, number: int, files: Mapping[str, bytes]) -> None:
        """The next sample of a shard: its files by extension, the image first."""
        if self._writer is None:
            self._file = open_new(self._temporary(number))
            self._writer = TarWriter(self._file)
        self._writer.add(f"{number:09d}", dict(files))

    def close(self, unit: range) -> None:
        """A shard's last sample was put."""
        assert self._writer is not None and self._file is not None
        self._writer.finish()
        self._file.close()
        self._writer = self._file = None
        final = self._making / self._name(unit[0])
        journal_path(final).unlink(missing_ok=True)  # a shard that grows: the journal of the shorter one must not vouch for this one
        commit_shard(self._temporary(unit[0]), final, SPLIT, {})

    def drop(self) -> None:
        """Forget the shard at hand."""
        if self._file is not None:
            with suppress(OSError):  # what it could not write is of no use any more
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
        self._writer = self._file = None

    def finish(self) -> None:
        """Bring the shards to their places and say what they are; for one process, after all have ended."""
        whole = self._whole()
        moved = [shard for shard, _ in whole if (self._making / shard.name).exists()]
        if moved:
            (self._folder / "manifest.json").unlink(missing_ok=True)  # it may tell of a shard that has grown since
        for shard in moved:
            for path in (index_path(self._making / shard.name), self._making / shard.name):
                if path.exists():  # else it was moved before a kill
                    os.replace(path, self._folder / path.name)
        tally = sum((tally for _, tally in whole), Tally())
        write_manifest(
            self._folder, Manifest(shards=ShardTable.of([shard for shard, _ in whole]), class_names=self._class_names, tally=tally)
        )

    def _whole(self) -> list[tuple[Shard, Tally]]:
        """What the journals say of all shards that are whole, in order."""
        names = sorted(path.with_suffix(".tar").name for path in self._making.glob(f"{SPLIT}-*.json"))
        return [found for name in names if (found := self._read(name))]

    def _read(self, name: str) -> tuple[Shard, Tally] | None:
        journal = journal_path(self._making / name)
        if not journal.exists() or not ((self._making / name).exists() or (self._folder / name).exists()):
            return None
        raw = json.loads(journal.read_text())
        return Shard(**raw["shard"]), Tally(**raw["tally"])

    def _name(self, number: int) -> str:
        return f"{SPLIT}-{number // self._size:06d}.tar"

    def _temporary(self, number: int) -> Path:
        return self._making / f".tmp-{self._name(number)}"
