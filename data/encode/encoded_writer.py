"""A folder of encoded shards while it is made: one shard at a time, each whole or not there, by any number of processes.

What is being made is written into `.work` of the folder and renamed: the tar,
its index, then a note that it is done. The manifest comes last, from the notes.
"""

from __future__ import annotations

import io
import json
import math
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from condot.core.atomic_files import commit, commit_json, write_once
from condot.core.file_lock import make_folder

from ..format.index import index_tar
from ..format.index_record import index_path
from ..format.manifest import Manifest, Tally, parse_manifest, write_manifest
from ..format.shard_table import Shard, ShardTable
from ..loader.encoded_cache import encoding_differences
from .work_claims import Claim, claim_work

Sums = dict[str, Any]
"""What was counted while a shard was made: numbers, or lists of them, that add up; and lists of texts, that join."""


class ArrayTarWriter:
    """A tar that grows array by array."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.samples = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """One member, in numpy's format 1.0."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        info = tarfile.TarInfo(name)
        info.size = buffer.tell()
        buffer.seek(0)
        self._tar.addfile(info, buffer)
        self.samples += 1


class EncodedWriter:
    """The encoded shards of one folder of images.

    Args:
        folder: where they go; made if need be.
        facts: what they are made from and how; a folder begun with other facts is refused.
        images: the manifest of the images.

    Raises:
        ValueError: other facts, named; or a folder that holds something else.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], images: Manifest) -> None:
        self.folder, self.facts, self.images, self.work = folder, facts, images, folder / ".work"
        if folder.is_dir() and any(folder.glob("*.tar")) and not (self.work / "request.json").exists():
            raise ValueError(f"{folder} holds tars that were not encoded here: give another --output.")
        make_folder(self.work)
        write_once(self.work / "request.json", json.dumps(facts).encode())
        begun = json.loads((self.work / "request.json").read_text())
        found = encoding_differences(begun, {key: value for key, value in facts.items() if key != "flips"})
        if begun.get("flips") != facts.get("flips"):
            found.append(f"flips are {begun.get('flips')} there and {facts.get('flips')} here")
        if found:
            raise ValueError(f"{folder} was encoded otherwise: {'; '.join(found)}. Give another --output, or the settings of then.")

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard is encoded, and its files are still there."""
        if not self._note(shard.name).exists():
            return False
        tar, size = self.folder / shard.name, self.read_note(shard)["shard"]["bytes"]
        return tar.exists() and tar.stat().st_size == size and index_path(tar).exists()

    def read_note(self, shard: Shard) -> dict[str, Any]:
        """What is known of an encoded shard: its line of the manifest, its tally and its sums."""
        return dict(json.loads(self._note(shard.name).read_text()))

    def claim(self, shard: Shard) -> Claim | None:
        """The right to encode a shard, or None where another does."""
        return claim_work(self.work / f"claim-{shard.name}")

    @contextmanager
    def open_shard(self, shard: Shard, claim: Claim, records: np.ndarray, sums: Callable[[], Sums]) -> Iterator[ArrayTarWriter]:
        """Write a shard's tar; at the end it is indexed like the images' `records` and put in its place.

        Raises:
            ValueError: another number of samples than the images.
        """
        for left in self.work.glob(f"{shard.name}.*"):
            left.unlink(missing_ok=True)
        temporary = self.work / f"{shard.name}.{secrets.token_hex(4)}.tar"
        try:
            with open(temporary, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                yield ArrayTarWriter(tar)
            line, tally = index_tar(temporary, shard.split, like=records)
            note = {"shard": asdict(replace(line, name=shard.name)), "tally": asdict(tally), "sums": sums()}
            if not claim.is_held:
                return  # another took it over while this process slept, and has written it, or will
            commit(index_path(temporary), index_path(self.folder / shard.name))
            commit(temporary, self.folder / shard.name)
            commit_json(note, self._note(shard.name))
        except FileNotFoundError:
            if claim.is_held:
                raise
        finally:
            temporary.unlink(missing_ok=True)
            index_path(temporary).unlink(missing_ok=True)

    def finish(self, describe_sums: Callable[[Sums], dict[str, Any]]) -> Manifest:
        """Write the manifest of all that is encoded; the same from whoever does it, and however often.

        Args:
            describe_sums: from the sums of all shards to facts for the manifest.
        """
        notes = [self.read_note(shard) for shard in self.images.shards if self.is_done(shard)]
        shards = ShardTable.of([Shard(**note["shard"]) for note in notes])
        tally = sum((Tally(**note["tally"]) for note in notes), Tally())
        encoding = {**self.facts, **describe_sums(add_sums([note["sums"] for note in notes]))}
        manifest = Manifest(shards=shards, class_names=self.images.class_names, tally=tally, encoding=encoding)
        write_manifest(self.folder, manifest)
        return manifest

    def manifest(self) -> Manifest | None:
        """What `finish` wrote, if it did."""
        path = self.folder / "manifest.json"
        return parse_manifest(path.read_bytes(), str(path)) if path.exists() else None

    def _note(self, name: str) -> Path:
        return self.work / f"done-{name}.json"


def add_sums(parts: list[Sums]) -> Sums:
    """Sums of several shards; exact, so that the order does not matter."""
    total: Sums = {}
    for key in parts[0] if parts else ():
        values = [part[key] for part in parts]
        if not isinstance(values[0], list):
            total[key] = sum(values)
        elif key == "bad":
            total[key] = [text for value in values for text in value]
        else:
            total[key] = [math.fsum(column) for column in zip(*[value for value in values if value], strict=True)]
    return total
