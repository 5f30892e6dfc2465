"""What a folder of shards says of itself: `manifest.json` lists its shards with their hashes, and what they hold together.

A folder without it is not whole. It has a line a shard, so that a million of
them are read a few thousand at a time.
"""

from __future__ import annotations

import io
import json
import operator
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from condot.core.file_lock import open_new

from .shard_table import AT_ONCE, ShardColumns, ShardTable

SIZES_KEPT = 10_000
VERSION = 2
DECODER = 2
"""The rule of `decode.is_plain` now: since 2 it also knows colour profiles, XMP, and EXIF behind fill bytes."""
LISTED = ' "shards": [\n'
"""The line of the file after which each line is a shard."""
INSIDE = re.compile(r"(?:(?!/|(?:[^\0]*/)?\.\.[/\0])[^\0]+\0)*")
"""Names, each with a NUL behind it, of files below one folder: others would lead out of it, and what encodes them writes there."""
PLAIN = re.compile(r"(?:[^\0-\x1f/\\\x7f-\x9f]*\.tar\0)*")
"""Those that also can stand in a URL, and in a folder of whatever system."""
NAME_BYTES = 255
"""A file system knows no longer name."""
SIZE, CLASS = re.compile(r"\d{1,9}x\d{1,9}|other"), re.compile(r"\d{1,9}")
READ_BYTES = 1 << 20
"""Of the file, at once."""
FAULTS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading text that is no manifest ends in."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What a shard, or a folder, holds; tallies add up."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Images of each upright "width x height", the most common first; "other" sums what is beyond SIZES_KEPT."""
    labels: dict[str, int] = field(default_factory=dict)
    """Samples of each class number."""
    captions: int = 0
    """Samples with a `.txt`."""

    def __add__(self, other: Tally) -> Tally:
        sizes, labels = Counter(self.sizes), Counter(self.labels)
        sizes.update(other.sizes)
        labels.update(other.labels)
        rest = sizes.pop("other", 0)
        kept = dict(sizes.most_common(SIZES_KEPT))
        rest += sizes.total() - sum(kept.values())
        ordered = {key: labels[key] for key in sorted(labels, key=int)}
        return Tally(sizes=kept | ({"other": rest} if rest else {}), labels=ordered, captions=self.captions + other.captions)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A folder of shards: all of it, or the folder is refused."""

    shards: ShardTable
    """Any sequence of shards becomes one."""
    class_names: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)
    source: str = ""
    """A hash of what was asked for when it was packed."""
    encoding: dict[str, Any] = field(default_factory=dict)
    """For encoded shards: what they were made from and how; empty for images."""
    image_extension: str = ""
    """Of the image, where samples have several that could be."""
    decoder: int = DECODER
    """Which rule of `decode.is_plain` the indexes were made by; 1 where a manifest does not say."""
    version: int = VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.shards, ShardTable):
            object.__setattr__(self, "shards", ShardTable.of(self.shards))

    def split(self, name: str) -> ShardTable:
        """The shards of one split.

        Raises:
            ValueError: no shard has it.
        """
        chosen = self.shards.split(name)
        if not chosen:
            raise ValueError(f"split {name!r} has no shard: the manifest has {', '.join(self.shards.splits)}.")
        return chosen

    @property
    def fingerprint(self) -> str:
        """A hash of every shard's content and order, independent of where the folder lies."""
        return self.fingerprint_of(self.shards)

    def fingerprint_of(self, shards: ShardTable) -> str:
        """Return the `fingerprint` of some of the shards; which image of a sample is meant is part of it."""
        return shards.fingerprint + (f":{self.image_extension}" if self.image_extension else "")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` under a temporary name and rename it: it is there whole or not at all."""
    raw = asdict(replace(manifest, shards=ShardTable.of(())))
    del raw["shards"]
    if not manifest.image_extension:  # a file that releases of before the field can read
        del raw["image_extension"]
    temporary = folder / f".manifest.json.{os.getpid()}"
    with io.TextIOWrapper(open_new(temporary), encoding="utf-8") as file:
        file.write(json.dumps(raw, indent=1)[:-2] + ",\n" + LISTED)
        for number, shard in enumerate(manifest.shards):
            file.write((",\n  " if number else "  ") + json.dumps(vars(shard)))
        file.write(("" if manifest.shards else "  ") + "\n ]\n}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "manifest.json")


def parse_manifest(text: bytes, where: str) -> Manifest:
    """A manifest from its text; see `read_manifest`."""
    return read_manifest(io.BytesIO(text), where)


def read_manifest(file: BinaryIO, where: str) -> Manifest:
    """A manifest from a file, which is at its beginning and can go back there.

    Raises:
        ValueError: text that is no manifest of this version; `where` is how the message calls it.
    """
    try:
        return _by_lines(file)
    except FAULTS:
        file.seek(0)  # damaged, or laid out in another way: the whole of it will tell
    try:
        return _manifest(json.loads(file.read()), ShardColumns())
    except FAULTS as error:
        why = " ".join(str(error).split())[:1000]
        raise ValueError(f"{where} cannot be read ({why}): run `condot prepare` again.") from error


def _by_lines(file: BinaryIO) -> Manifest:
    """A manifest as `write_manifest` has it: shards go into columns as they come; what is left, with the last of them, is a manifest."""
    left, end, columns = list[bytes](), list[bytes](), ShardColumns()
    for line in file:
        left.append(line)
        if line == LISTED.encode():
            break
    while lines := file.readlines(READ_BYTES):
        end += lines
        if body := b"".join(end[:-3]):
            if not body.endswith(b",\n"):
                raise ValueError("a shard's line that ends without a comma")
            columns.extend(json.loads(b"[%b]" % body[:-2]))
        end = end[-3:]
    raw = json.loads(b"".join(left + end))
    if len(columns) and not raw["shards"]:
        raise ValueError("a comma behind the last shard")
    return _manifest(raw, columns)


def _manifest(raw: dict[str, Any], columns: ShardColumns) -> Manifest:
    """From a manifest's JSON; its shards come after those that the columns hold already."""
    if raw["version"] != VERSION:
        raise ValueError(f"version {raw['version']}, this release reads {VERSION}")
    shards = raw.pop("shards")
    for first in range(0, len(shards), AT_ONCE):
        columns.extend(shards[first : first + AT_ONCE])
    listed = raw.pop("class_names")
    if isinstance(listed, str):
        raise ValueError("class_names is a text, a list of them is needed")
    names, tally = tuple(listed), Tally(**raw.pop("tally"))
    raw["decoder"] = operator.index(raw.get("decoder", 1))
    return Manifest(**raw, shards=ShardTable(columns), class_names=names, tally=tally)


def check_foreign(manifest: Manifest, where: str, *, remote: bool) -> None:
    """Refuse what a stranger's manifest may hold and none of ours does; of a few thousand shards at a time.

    Raises:
        ValueError: a name that is no file's of the folder itself, or of a remote one no tar's; counts that are none.
    """
    names = list(manifest.shards.names)
    for first in range(0, len(names), AT_ONCE):
        part = names[first : first + AT_ONCE]
        if not _are_names(part, remote):
            wrong = next(name for name in part if not _are_names([name], remote))
            raise ValueError(
                f"{where}/manifest.json: {wrong!r} is no shard: a plain name that ends in .tar is needed. "
                f"Index the folder again with `condot prepare webdataset`."
            )
    tally = manifest.tally
    texts = (manifest.source, *manifest.class_names)
    if not (_are_counts(tally.sizes, SIZE) and _are_counts(tally.labels, CLASS) and type(tally.captions) is int):
        raise ValueError(f"{where}/manifest.json: its tally is no list of counts. Index the folder again.")
    if set(map(type, texts)) != {str} or not isinstance(manifest.encoding, dict):
        raise ValueError(f"{where}/manifest.json: its class names are no texts, or its encoding is no mapping. Index the folder again.")


def _are_names(names: list[str], remote: bool) -> bool:
    rule, longest = (PLAIN, NAME_BYTES) if remote else (INSIDE, 4096)
    fits = all("\0" not in name and len(name.encode("utf-8", "surrogatepass")) <= longest for name in names)
    return fits and rule.fullmatch("".join(f"{name}\0" for name in names)) is not None


def _are_counts(counts: Any, rule: re.Pattern[str]) -> bool:
    return isinstance(counts, dict) and all(rule.fullmatch(name) and type(n) is int and 0 <= n < 2**63 for name, n in counts.items())
