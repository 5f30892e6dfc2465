"""What a source of samples offers the packer: how many there are and how large, and parts of them for worker processes to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from condot.core.printable import printable

from ..format.file_stamps import hash64
from .splits import splits_in_name


class RawSample(NamedTuple):
    """One sample as it was read."""

    name: str
    """Where it comes from, kept in its `.json`."""
    image: bytes
    extension: str = ""
    """Of the image; empty where its bytes must tell."""
    label: int | None = None
    caption: str | None = None
    more: dict[str, Any] = {}
    """Further fields of its `.json`."""


class UnreadableSample(NamedTuple):
    """One sample that cannot be read, and why."""

    name: str
    why: str

    def __str__(self) -> str:
        return printable(f"{self.name} ({self.why})")


class SourceSubset(Protocol):
    """Some samples of a source; goes to another process by pickle, so it holds names and numbers, never images."""

    def read(self, scratch: Path) -> Iterator[RawSample | UnreadableSample]:
        """Each sample, in the order in which the part was asked for.

        Args:
            scratch: a folder for temporary files.
        """
        ...


@dataclass(frozen=True)
class ImageSource:
    """Samples 0 to n - 1, in groups that are best read together: a file, a row group."""

    subset: Callable[[np.ndarray], SourceSubset]
    """The samples with these numbers, (N,) int64."""
    name: Callable[[int], str]
    rows: np.ndarray
    """(G,), int64: samples of each group; groups follow one another."""
    bytes: np.ndarray
    """(G,), int64: of each group's images, known or estimated."""
    identity: str
    """A hash of what there is to read: the same source has the same."""
    splits: tuple[str, ...] = ("train",)
    split_of: np.ndarray | None = None
    """(G,), int: the split of each group; all the first where absent."""
    class_names: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    """What was found beside samples, for the report."""
    stamps: np.ndarray | None = None
    """(G,), uint64: of each group, `stamps.stamp_of` all that decides its samples, without reading them; 0 where nothing tells.
    The identity stands for all of them where absent."""
    settings: str = ""
    """What of the identity the user chose, beside the source itself: columns, say."""
    place: str = ""
    """Where the source lies."""
    legacy_identity: Callable[[], str] | None = None
    """The identity as the release 85bd0c6 computed it; as today's where absent."""

    @property
    def samples(self) -> int:
        return int(self.rows.sum())

    @property
    def sample_stamps(self) -> np.ndarray:
        """(N,), uint64: the stamp of each sample."""
        each = np.full(len(self.rows), hash64(self.identity.encode()), np.uint64) if self.stamps is None else self.stamps
        return np.repeat(each, self.rows)


class RawRepr(str):
    """What prints as itself, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def digest(*what: object) -> str:
    """A hash of values by what they print."""
    total = hashlib.sha256()
    for value in what:
        if isinstance(value, np.ndarray):
            total.update(np.ascontiguousarray(value).data)
        elif isinstance(value, list):
            for item in value:
                total.update(repr(item).encode())
        else:
            total.update(repr(value).encode())
        total.update(b"\0")
    return total.hexdigest()


def split_from_name(name: str) -> str | None:
    """Return the split that a file's name says: `data/train-00001.parquet` is `train`; None where it says none, or several."""
    kinds = splits_in_name(Path(name).name)
    return kinds.pop() if len(kinds) == 1 else None


def ordered_splits(splits: Iterable[str]) -> list[str]:
    """Return the splits that occur, `train` first."""
    return sorted(set(splits), key=lambda split: (split != "train", split))


def to_utf8(name: str) -> str:
    r"""Return a file's name as text that can be stored: bytes of it that are no UTF-8 become `\xe9`."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair of surrogates, as JSON may hold
        return name.encode("utf-8", "backslashreplace").decode()
