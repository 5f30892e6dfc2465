"""The shards of a folder in columns: a million of them take 110 MB, where as many objects would take 700 MB.

A list is columns, which several lists may share, with the numbers of the
lines that are in it. A `Shard` is made when one is asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import eq
from typing import Any, overload

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a folder and what it must be."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


KEYS = {field.name for field in fields(Shard)}
HASH = re.compile("[0-9a-f]*")
AT_ONCE = 4096
"""Shards that are made objects together."""


class ShardColumns:
    """Lines of a manifest, one after the other; they grow until they are first read."""

    def __init__(self) -> None:
        self.splits: dict[str, int] = {}
        """The number of each split, as `split` holds it."""
        self._held = {key: bytearray() for key in ("name", "ends", "split", "samples", "bytes", "sha256", "index_sha256")}

    def extend(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append the lines of shards to the table.

        Args:
            lines: each with the fields of a `Shard`.

        Raises:
            TypeError: a line with other fields.
            ValueError: one whose fields cannot be right.
        """
        for line in lines:
            if not isinstance(line, dict) or line.keys() != KEYS:
                Shard(**line)  # says which field
        column = {key: [line[key] for line in lines] for key in KEYS}
        if not _are_valid(column):
            wrong = next(line for line in lines if not _are_valid({key: [line[key]] for key in KEYS}))
            raise ValueError(f"{Shard(**wrong)} is no shard: a name, a split, two sha256 and two counts are needed")
        names = [name.encode("utf-8", "surrogatepass") for name in column["name"]]
        ends = len(self._held["name"]) + np.cumsum([len(name) for name in names], dtype=np.int64)
        self._held["name"] += b"".join(names)
        self._held["ends"] += ends.tobytes()
        self._held["split"] += np.array([self.splits.setdefault(name, len(self.splits)) for name in column["split"]], np.int32).tobytes()
        for key in ("samples", "bytes"):
            self._held[key] += np.array(column[key], np.int64).tobytes()
        for key in ("sha256", "index_sha256"):
            self._held[key] += bytes.fromhex("".join(column[key]))

    def __len__(self) -> int:
        return len(self._held["ends"]) // 8

    def numbers(self, key: str) -> np.ndarray:
        """A column of numbers, (N,): `samples` or `bytes`, int64; `split`, int32. It shares the memory."""
        return np.frombuffer(self._held[key], np.int32 if key == "split" else np.int64)

    def names(self, rows: np.ndarray) -> list[bytes]:
        """The names of some lines, in UTF-8."""
        ends, names = np.frombuffer(self._held["ends"], np.int64), self._held["name"]
        starts = np.where(rows > 0, ends[rows - 1], 0) if len(rows) else rows
        return [bytes(names[start:end]) for start, end in zip(starts.tolist(), ends[rows].tolist(), strict=True)]

    def hashes(self, key: str, rows: np.ndarray) -> list[str]:
        """`sha256` or `index_sha256` of some lines, in hexadecimal."""
        text = np.frombuffer(self._held[key], np.uint8).reshape(-1, 32)[rows].tobytes().hex()
        return [text[i : i + 64] for i in range(0, len(text), 64)]


def _are_valid(column: dict[str, list[Any]]) -> bool:
    """Whether the fields of some lines are what those of a shard are: texts, counts, hashes in lower case."""
    counts, hashes = column["samples"] + column["bytes"], column["sha256"] + column["index_sha256"]
    return (
        set(map(type, chain(column["name"], column["split"], hashes))) <= {str}
        and set(map(type, counts)) <= {int}
        and all(0 <= extreme < 2**63 for extreme in (min(counts, default=0), max(counts, default=0)))
        and set(map(len, hashes)) <= {64}
        and HASH.fullmatch("".join(hashes)) is not None
    )


class ShardTable(Sequence[Shard]):
    """Shards in order.

    Args:
        columns: where their lines are.
        rows: (N,), int32: which lines, in which order; all where absent.
    """

    def __init__(self, columns: ShardColumns, rows: np.ndarray | None = None) -> None:
        self._columns = columns
        self._rows = np.arange(len(columns), dtype=np.int32) if rows is None else rows

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> ShardTable:
        """A list of these shards.

        Raises:
            ValueError: one whose fields cannot be right.
        """
        columns = ShardColumns()
        for first in range(0, len(shards), AT_ONCE):
            columns.extend([vars(shard) for shard in shards[first : first + AT_ONCE]])
        return cls(columns)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, which: int) -> Shard: ...
    @overload
    def __getitem__(self, which: slice) -> ShardTable: ...
    def __getitem__(self, which: int | slice) -> Shard | ShardTable:
        if isinstance(which, slice):
            return ShardTable(self._columns, self._rows[which])
        return next(self._shards_at(self._rows[which, None]))

    def __iter__(self) -> Iterator[Shard]:
        for first in range(0, len(self), AT_ONCE):
            yield from self._shards_at(self._rows[first : first + AT_ONCE])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        if self._columns is other._columns:
            return np.array_equal(self._rows, other._rows)
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def _shards_at(self, rows: np.ndarray) -> Iterator[Shard]:
        """Some lines as objects."""
        columns, splits = self._columns, list(self._columns.splits)
        names = columns.names(rows)
        numbers = [columns.numbers(key)[rows].tolist() for key in ("split", "samples", "bytes")]
        hashes = [columns.hashes(key, rows) for key in ("sha256", "index_sha256")]
        for name, split, samples, size, sha256, index in zip(names, *numbers, *hashes, strict=True):
            text = name.decode("utf-8", "surrogatepass")
            yield Shard(name=text, split=splits[split], samples=samples, bytes=size, sha256=sha256, index_sha256=index)

    @property
    def samples(self) -> np.ndarray:
        """(N,), int64, of each."""
        samples: np.ndarray = self._columns.numbers("samples")[self._rows]
        return samples

    @property
    def bytes(self) -> np.ndarray:
        """(N,), int64, of each tar."""
        sizes: np.ndarray = self._columns.numbers("bytes")[self._rows]
        return sizes

    @property
    def names(self) -> Iterator[str]:
        """Return the name of each shard, in order."""
        for first in range(0, len(self), AT_ONCE):
            for name in self._columns.names(self._rows[first : first + AT_ONCE]):
                yield name.decode("utf-8", "surrogatepass")

    @property
    def splits(self) -> list[str]:
        """Those that a shard has, sorted."""
        names = list(self._columns.splits)
        return sorted(names[code] for code in np.unique(self._columns.numbers("split")[self._rows]).tolist())

    def split(self, name: str) -> ShardTable:
        """The shards of one split; maybe none."""
        here = np.flatnonzero(self._columns.numbers("split")[self._rows] == self._columns.splits.get(name, -1))
        return self if len(here) == len(self) else self.take(here)

    def take(self, numbers: np.ndarray | Sequence[int]) -> ShardTable:
        """The shards with these numbers, in their order."""
        return ShardTable(self._columns, self._rows[np.asarray(numbers, np.int64)])

    def select_names(self, names: Iterable[str]) -> tuple[ShardTable, list[str]]:
        """The shards with these names, in the order of the names, and the names that no shard has."""
        wanted = list(names)
        here = dict(zip(self.names, range(len(self)), strict=True))
        return self.take([here[name] for name in wanted if name in here]), [name for name in wanted if name not in here]

    def has_same_names(self, other: ShardTable) -> bool:
        """Whether both have the same names in the same order."""
        return len(self) == len(other) and all(map(eq, self.names, other.names))

    @property
    def fingerprint(self) -> str:
        """A hash of every shard's split and content, in order."""
        total, splits = hashlib.sha256(), list(self._columns.splits)
        for first in range(0, len(self), AT_ONCE):
            rows = self._rows[first : first + AT_ONCE]
            codes = self._columns.numbers("split")[rows].tolist()
            pairs = zip(codes, self._columns.hashes("sha256", rows), strict=True)
            total.update("".join(f"{splits[code]}:{sha256};" for code, sha256 in pairs).encode())
        return total.hexdigest()
