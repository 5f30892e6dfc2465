"""What a folder of shards remembers of what it was made from, so that the same command sees what changed since.

`.packed/inputs.npz` has 41 bytes a sample: hashes of its name, of its image
and of what goes with it, and a stamp (size and times of its files) that says
whether they must be read to be compared. Beside them it has the journal of
each shard, so that those whose samples did not change stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from condot.core.atomic_files import commit
from condot.core.file_lock import make_folder, open_new

from ..format.file_stamps import hash64, name_hash
from .source import RawSample, UnreadableSample

INPUT = np.dtype([("name", "<u8"), ("stamp", "<u8"), ("text", "<u8"), ("image", "<u8", (2,)), ("packed", "?")])
"""One sample that was read: hashes of its name, stamp, label with caption and other fields, image; and whether it is in the shard."""
FOLDER = ".packed"


class PackRequest(NamedTuple):
    """What a command asks for."""

    request: str
    """A hash of all that decides the shards but the content of files: names, sizes, settings."""
    settings: str
    """A hash of the settings alone."""
    place: str
    """Where the source lies."""
    legacy_identity: str = ""
    """The request as the release 85bd0c6 hashed it, which remembered nothing else; only for folders without a memory, never stored."""

    def continues(self, there: PackRequest) -> bool:
        """Whether a folder that was begun for `there` is to be brought to what is asked for now."""
        same = there.request in {self.request, self.legacy_identity} - {""}
        return same or (self.settings, self.place) == (there.settings, there.place)


class PackedShard(NamedTuple):
    """One whole shard: its journal, and an INPUT for each of its samples and faults, in the order in which they were read; none for a shard
    that is one file of the source, whose stamp and sha256 (`content`) its journal has."""

    journal: dict[str, Any]
    inputs: np.ndarray = np.zeros(0, INPUT)


@dataclass
class PackState:
    """What a finished folder was made from."""

    request: PackRequest
    shards: dict[str, PackedShard] = field(default_factory=dict)


def blank_inputs(names: Iterable[str], stamps: np.ndarray) -> np.ndarray:
    """Return the inputs of samples that are not read yet, by their names and stamps."""
    inputs = np.zeros(len(stamps), INPUT)
    inputs["name"], inputs["stamp"] = [name_hash(name) for name in names], stamps
    return inputs


def hash_sample(found: RawSample | UnreadableSample) -> tuple[int, tuple[int, int], bool]:
    """Return the fields `text`, `image` and `packed` of a sample as it was read; one that could not be has no content."""
    if isinstance(found, UnreadableSample):
        return 0, (0, 0), False
    image = hashlib.sha256(found.image).digest()
    text = hash64(repr((found.name, found.extension, found.label, found.caption, found.more)).encode())
    return text, (int.from_bytes(image[:8], "little"), int.from_bytes(image[8:16], "little")), True


def inputs_path(tar: Path) -> Path:
    """Where the inputs of a shard lie while its folder is not finished."""
    return tar.with_suffix(".inputs")


def write_pack_state(output: Path, request: PackRequest, shards: dict[str, PackedShard]) -> None:
    """Remember what a folder was made from; before its manifest is written."""
    folder = output / FOLDER
    make_folder(folder)
    journals = {name: {**entry.journal, "inputs": len(entry.inputs)} for name, entry in shards.items()}
    text = np.frombuffer(json.dumps({"version": 1, "asked": request[:3], "shards": journals}).encode(), np.uint8)
    rows = np.concatenate([np.zeros(0, INPUT), *(entry.inputs for entry in shards.values())])
    temporary = folder / f"tmp-{os.getpid()}.npz"
    with open_new(temporary) as file:
        np.savez_compressed(file, inputs=rows, journals=text)
    commit(temporary, folder / "inputs.npz")


def read_pack_state(output: Path) -> PackState | None:
    """Return what a folder was made from; None where that is not known."""
    try:
        with np.load(output / FOLDER / "inputs.npz", allow_pickle=False) as held:
            rows, raw = held["inputs"], json.loads(held["journals"].tobytes())
        if raw["version"] != 1 or rows.dtype != INPUT:
            return None
        packed, at = PackState(PackRequest(*raw["asked"])), 0
        for name, journal in raw["shards"].items():
            count = journal.pop("inputs")
            packed.shards[name] = PackedShard(journal, rows[at : at + count])
            at += count
        return packed
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None  # packed by an earlier release, or damaged: what it held is found by packing again
