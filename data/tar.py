"""The tar format, read strictly: where Python's `tarfile` takes a damaged header for the end, this is an error.

Files that share a name up to the first dot of its last part are one sample and
lie next to one another, as webdataset has it. Only regular files count; a name
that would leave its folder is refused, though nothing here ever unpacks one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
"""Bytes; headers lie at multiples of it."""
EMPTY = bytes(BLOCK)


class Member(NamedTuple):
    """One file inside a tar: its name, where its header and its bytes begin, how many there are, and where the next header is."""

    name: str
    header: int
    offset: int
    size: int
    end: int


class Span(NamedTuple):
    """One sample inside a tar: its key, and its files by extension."""

    key: str
    files: dict[str, Member]

    @property
    def start(self) -> int:
        """Where its first header lies."""
        return next(iter(self.files.values())).header  # they lie in the order in which they were walked

    @property
    def end(self) -> int:
        """Where the next sample begins."""
        return next(reversed(self.files.values())).end


def members(path: Path) -> Iterator[Member]:
    """Walk the headers of a tar.

    Raises:
        ValueError: a damaged header, a file that is cut, no end-of-archive
            block, or a name that leads out of the folder.
    """
    size, at, long_name = path.stat().st_size, 0, None
    with open(path, "rb") as file:
        while True:
            head = os.pread(file.fileno(), BLOCK, at)
            if len(head) < BLOCK:
                raise ValueError(f"{path}: cut at byte {at}, the end-of-archive block is missing. Pack or copy this shard again.")
            if head == EMPTY:
                return
            name, length, kind = _checked(head, path, at)
            end = at + BLOCK + -(-length // BLOCK) * BLOCK
            if end > size:
                raise ValueError(f"{path}: cut inside {name!r} at byte {at}. Pack or copy this shard again.")
            if kind in (b"L", b"x"):
                long_name = _long_name(kind, os.pread(file.fileno(), length, at + BLOCK)) or long_name
            elif kind in (b"0", b"\0"):
                yield Member(_inside(long_name or name, path), at, at + BLOCK, length, end)
                long_name = None
            at = end


def samples(path: Path) -> Iterator[Span]:
    """Walk the samples of a tar, in order.

    Raises:
        ValueError: as `members`, or a sample with two files of one extension.
    """
    key, files = None, dict[str, Member]()
    for member in members(path):
        name, extension = key_and_extension(member.name)
        if key is not None and name != key:
            yield Span(key, files)
            files = {}
        if extension in files:
            raise ValueError(f"{path}: {member.name!r} is there twice. Pack this shard again with one file of each kind a sample.")
        key = name
        files[extension] = member
    if key is not None:
        yield Span(key, files)


def files_of(span: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and files of one sample from the bytes that it spans in its tar.

    Args:
        span: from its first header to the end of its last file's block, as
            `members` walked it or as its crc32 vouches for it.
    """
    at, key, files, long_name = 0, "", {}, None
    while at < len(span):
        name, length, kind = _header(span[at : at + BLOCK])
        body = span[at + BLOCK : at + BLOCK + length]
        if kind in (b"L", b"x"):
            long_name = _long_name(kind, body) or long_name
        elif kind in (b"0", b"\0"):
            key, extension = key_and_extension(long_name or name)
            files[extension] = body
            long_name = None
        at += BLOCK + -(-length // BLOCK) * BLOCK
    return key, files


def key_and_extension(name: str) -> tuple[str, str]:
    """`a/b.seg.png` is the file `seg.png` of the sample `a/b`: the name is split at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _checked(head: bytes, path: Path, at: int) -> tuple[str, int, bytes]:
    """What a header says, if its checksum is right: the sum of its bytes, those of the checksum itself counted as blanks."""
    try:
        if int(head[148:156].strip(b" \0"), 8) == sum(head) - sum(head[148:156]) + 256:
            return _header(head)
    except ValueError:
        pass
    raise ValueError(f"{path}: damaged tar header at byte {at}. Pack or copy this shard again.")


def _inside(name: str, path: Path) -> str:
    """The name, if it stays inside the folder it would be unpacked into."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{path}: the name {name!r} leads out of its folder. Pack this shard again with plain names.")
    return name


def _header(head: bytes) -> tuple[str, int, bytes]:
    """Name, length and kind of a tar member; a ValueError where the length is no number."""
    base256 = head[124] & 0x80
    length = int.from_bytes(head[125:136], "big") if base256 else int(head[124:136].strip(b" \0") or b"0", 8)
    ustar = head[257:262] == b"ustar" and head[262:263] == b"\0"
    prefix = head[345:500].rstrip(b"\0").decode(errors="replace") if ustar else ""
    name = head[:100].partition(b"\0")[0].decode(errors="replace")
    return (f"{prefix}/{name}" if prefix else name), length, head[156:157]


def _long_name(kind: bytes, body: bytes) -> str | None:
    """A name too long for its header, in GNU's (L) or POSIX's (x) form."""
    if kind == b"L":
        return body.rstrip(b"\0").decode(errors="replace")
    while body:
        length = int(body[: body.index(b" ")])
        key, _, value = body[body.index(b" ") + 1 : length - 1].partition(b"=")
        if key == b"path":
            return value.decode(errors="replace")
        body = body[length:]
    return None
