"""The tar format, read strictly: where Python's `tarfile` takes a damaged header for the end, this is an error.

Files that share a name up to the first dot of its last part are one sample and
lie next to one another, as webdataset has it. A name that would leave its
folder is refused, though nothing here ever unpacks one. One walk serves whole
tars and single samples in memory.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from condot.core.printable import printable

from .tar_headers import BLOCK, EXTENSIONS, MAX_EXTENSION_BYTES, NO_EXTENSION, Extension, extended, parse_header

EMPTY = bytes(BLOCK)
ZEROS = bytes(1 << 20)
"""So many are read at once behind the end, and compared, a hundred times as fast as they are counted."""
REGULAR = frozenset((b"0", b"\0", b"7"))
LINKS, DEVICES, SPARSE, FOREIGN = "that are links", "that are devices or pipes", "stored sparse", "of a tar type that is not known"
REMEDIES = {
    LINKS: "is a link: pack with `tar --dereference --hard-dereference`",
    DEVICES: "is a device or a pipe, and no file: pack without it",
    SPARSE: "is stored sparse: pack without `tar --sparse`",
    FOREIGN: "is of a tar type that is not known: pack with `tar --format=pax`",
}
"""What stands where a file's bytes should be, and what helps."""
WITHOUT_DATA = {b"1": LINKS, b"2": LINKS, b"3": DEVICES, b"4": DEVICES, b"6": DEVICES}
"""Types that have no bytes, whatever size they state."""
HIDDEN, META, BARE = "that are hidden (._*, .DS_Store, __MACOSX)", "named __*__", "without extension"
"""Files that are no part of a sample; webdataset leaves them out as well."""


PLAIN_HEADER = re.compile(
    rb"([0-9A-Za-z][0-9A-Za-z-]*)\.([0-9a-z][0-9a-z.]*)\0+[0-9]{7}\0(?:[0-9]{7}\0){2}([0-7]{11})\0[0-9]{11}\0.{8}0\0{100}ustar\x0000.{80}\0{155}",
    re.DOTALL,
)
"""A file with a short plain name and nothing else to say: name, mode, owners, size, time, checksum, type, ustar, no prefix."""


class Member(NamedTuple):
    """One file inside a tar: its name, where its headers and its bytes begin, how many there are, and where the next header is."""

    name: str
    header: int
    """Of the first: a long name has a header of its own, before the file's."""
    offset: int
    size: int
    end: int
    archive: int = 0
    """How many end-of-archive marks lie before it: tars can be joined end to end."""
    special: str = ""
    """One of REMEDIES where it is no regular file, whose bytes can be read."""


class Span(NamedTuple):
    """One sample inside a tar: its key, its files by extension, where its first header lies and where the next sample begins."""

    key: str
    files: dict[str, Member]
    start: int
    end: int
    fault: str = ""
    """Why it cannot be read as it lies."""


@dataclass
class TarRemarks:
    """What a walk through a tar finds beside samples."""

    unknown: Counter[str] = field(default_factory=Counter)
    """Files that are no part of a sample, by kind."""
    joined: int = 0
    """Tars that follow the first within one file."""


def members(path: Path) -> Iterator[Member]:
    """Walk the headers of a tar, in order; folders are passed over.

    Raises:
        ValueError: a damaged header, a file that is cut, no end-of-archive
            mark, anything but zeros and further tars behind it, or a name
            that leads out of the folder.
    """
    with open(path, "rb", buffering=0) as file:
        number = file.fileno()
        yield from _walk(lambda at, length: os.pread(number, length, at), os.fstat(number).st_size, printable(str(path)))


def _walk(read: Callable[[int, int], bytes], size: int, where: str = "") -> Iterator[Member]:
    """Walk headers.

    Args:
        read: gives so many bytes from there, fewer at the end.
        size: bytes that there are.
        where: how messages call the tar; "" for a sample in memory, whose crc32 vouches for it, which has no end-of-archive
            mark and may be cut.
    """
    at, archive, begins, known = 0, 0, -1, NO_EXTENSION
    while at < size or where:
        head = read(at, BLOCK)
        if not where and (len(head) < BLOCK or head == EMPTY):
            return
        if len(head) < BLOCK:
            raise ValueError(f"{where}: cut at byte {at}, the end-of-archive block is missing. Pack or copy this shard again.")
        if head == EMPTY:
            if begins >= 0:
                raise ValueError(f"{where}: the long name at byte {begins} has no file. Pack or copy this shard again.")
            following = _behind_mark(read, at, size, where)
            if following is None:
                return
            at, archive = following, archive + 1
            continue
        try:
            name, length, kind = parse_header(head, checked=not where)
            if kind in EXTENSIONS:
                if begins < 0 and kind != b"g":
                    begins = at
                known = extended(known, kind, _body(read, at, length))
                at += BLOCK + -(-length // BLOCK) * BLOCK
                continue
        except ValueError as error:
            raise ValueError(f"{where}: damaged tar header at byte {at} ({error}). Pack or copy this shard again.") from error
        first, offset, special = (at if begins < 0 else begins), at + BLOCK, ""
        if kind != b"0" or known is not NO_EXTENSION:
            name, length = name if known.name is None else known.name, length if known.size is None else known.size
            length, special = _described(kind, name, length, known)
            offset += _map_of_holes(read, at) if kind == b"S" else 0
        end = offset + -(-length // BLOCK) * BLOCK
        if end > size and where:
            raise ValueError(f"{where}: cut inside {name!r} at byte {at}. Pack or copy this shard again.")
        if kind != b"5" and not (name.endswith("/") and kind in REGULAR):  # no folder
            if name.startswith("/") or (".." in name and ".." in name.split("/")):
                raise ValueError(f"{where}: the name {name!r} leads out of its folder. Pack this shard again with plain names.")
            yield Member(name, first, offset, length, end, archive, special)
        at, begins, known = end, -1, NO_EXTENSION


def _body(read: Callable[[int, int], bytes], at: int, size: int) -> bytes:
    """Return what an extension header at this byte holds."""
    if size > MAX_EXTENSION_BYTES:
        raise ValueError(f"{size} bytes of names or records, at most {MAX_EXTENSION_BYTES} are read")
    body = read(at + BLOCK, size)
    if len(body) < size:
        raise ValueError("cut inside a long name")
    return body


def _described(kind: bytes, name: str, length: int, known: Extension) -> tuple[int, str]:
    """Return how many bytes of data lie behind a header, and which of REMEDIES it needs where it is no regular file's."""
    if kind in REGULAR:
        folder = kind == b"\0" and name.endswith("/")  # as tars of before POSIX have it
        return 0 if folder else length, SPARSE if known.sparse else ""
    if kind == b"S":
        return length, SPARSE
    return 0 if kind in WITHOUT_DATA or kind == b"5" else length, WITHOUT_DATA.get(kind, FOREIGN)


def _map_of_holes(read: Callable[[int, int], bytes], at: int) -> int:
    """Return the bytes between the header of an old GNU sparse file and its data: the map of its holes may need further blocks."""
    length, block, more = 0, read(at, BLOCK), 482
    while len(block) == BLOCK and block[more]:
        length += BLOCK
        block, more = read(at + length, BLOCK), 504
    return length


def _behind_mark(read: Callable[[int, int], bytes], mark: int, size: int, where: str) -> int | None:
    """Return where another tar begins behind an end-of-archive mark, None where nothing but zeros follows.

    Raises:
        ValueError: something else follows, or the mark is a single block, as a header is that was overwritten.
    """
    at, found = mark, -1
    while at < size and found < 0:
        piece = read(at, len(ZEROS))
        if not piece:
            return None
        if piece != ZEROS[: len(piece)]:
            found = at + len(piece) - len(piece.lstrip(b"\0"))
        at += len(piece)
    if found < 0:
        return None
    following = found // BLOCK * BLOCK
    if following - mark < 2 * BLOCK:
        raise ValueError(
            f"{where}: the tar header at byte {mark} is all zeros, one block where an end-of-archive mark has two, and bytes follow at "
            f"{found}. Pack or copy this shard again."
        )
    try:
        parse_header(read(following, BLOCK).ljust(BLOCK, b"\0"))
    except ValueError as error:
        raise ValueError(
            f"{where}: byte {found}, behind the end-of-archive mark at byte {mark}, belongs to no tar. Pack or copy this shard again."
        ) from error
    return following


# --- samples


def samples(path: Path, *, remarks: TarRemarks | None = None, every: bool = False) -> Iterator[Span]:
    """Walk the samples of a tar, in order.

    Args:
        path: the tar.
        remarks: where given, files that are no part of a sample are counted here.
        every: take every file for part of a sample, as in encoded shards.

    Raises:
        ValueError: as `members`.
    """
    remarks = TarRemarks() if remarks is None else remarks
    key, files, start, end, archive, fault = "", dict[str, Member](), 0, 0, 0, ""
    for member in members(path):
        name, extension = key_and_extension(member.name)
        if not every and (not files or name != key or not extension):
            kind = skip_reason(member.name)
            if kind:
                remarks.unknown[member.special or kind] += 1
                continue
        if files and (name != key or member.archive != archive):
            yield Span(key, files, start, end, fault)
            files, fault = {}, ""
        if not files:
            key, start, archive = name, member.header, member.archive
        if extension in files:
            fault = f"{member.name!r} is there twice"
        elif member.special and not fault:
            fault = f"its .{printable(extension)} {REMEDIES[member.special]}"
        files.setdefault(extension, member)
        end, remarks.joined = member.end, member.archive
    if files:
        yield Span(key, files, start, end, fault)


def parse_sample_files(span: bytes) -> tuple[str, dict[str, bytes]]:
    """Return key and files of one sample from the bytes that it spans in its tar.

    Args:
        span: from its first header to the end of its last file's block, as
            `samples` walked it or as its crc32 vouches for it; or a beginning.
    """
    found = _plain_files(span)
    if found is not None:
        return found
    key, files, strays = "", dict[str, bytes](), list[Member]()
    for member in _walk(lambda at, length: span[at : at + length], len(span)):
        name, extension = key_and_extension(member.name)
        if (not files or name != key or not extension) and skip_reason(member.name):
            strays.append(member)
        elif not member.special:
            key = name
            files[extension] = span[member.offset : member.offset + member.size]
    for member in strays if not files else ():  # indexes of before have samples of such files
        key, extension = key_and_extension(member.name)
        files[extension] = span[member.offset : member.offset + member.size]
    return key, files


def _plain_files(span: bytes) -> tuple[str, dict[str, bytes]] | None:
    """Return what `parse_sample_files` returns for headers as our shards have them; None where one says more than that."""
    at, key, files = 0, b"", dict[str, bytes]()
    while at + BLOCK <= len(span):
        header = PLAIN_HEADER.match(span, at)
        if header is None or (key and header[1] != key):
            return None
        key, body = header[1], at + BLOCK
        size = int(header[3], 8)
        files[header[2].decode()] = span[body : body + size]
        at = body + -(-size // BLOCK) * BLOCK
    return key.decode(), files


def key_and_extension(name: str) -> tuple[str, str]:
    """`a/b.seg.png` is the file `seg.png` of the sample `a/b`: the name is split at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def skip_reason(name: str) -> str:
    """Return why a file is no part of a sample, by its name: one of HIDDEN, META, BARE; "" where it is."""
    base = name[name.rfind("/") + 1 :]
    if name.startswith(".") or "/." in name or "__" in name:
        for part in name.split("/"):
            if (part.startswith(".") and part != ".") or part == "__MACOSX":
                return HIDDEN
            if len(part) > 4 and part.startswith("__") and part.endswith("__") and ("." not in part or part != base):
                return META
    return "" if base.partition(".")[2] else BARE
