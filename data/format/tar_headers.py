"""One header of a tar, and what extension headers before it say of its file: v7, ustar, old GNU and PAX, read strictly.

Names are UTF-8; bytes that are none are kept as `os.fsdecode` keeps them, so
that distinct names stay distinct. Numbers are octal digits or base-256, PAX's
are decimal digits: no sign, no blank inside, nothing that `int` would forgive.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import adler32

BLOCK = 512
"""Bytes; headers lie at multiples of it."""
MAX_EXTENSION_BYTES = 1 << 20
"""A larger long name or set of PAX records is refused."""
EXTENSIONS = frozenset((b"L", b"K", b"x", b"X", b"g"))
"""Types of headers that speak of the next file: GNU's long name and long link, POSIX's records (Solaris' too), global records."""
ADLER = 65521
"""Adler-32 counts modulo this prime."""


class Extension(NamedTuple):
    """What extension headers say of the file that follows them; None where they are silent."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


NO_EXTENSION = Extension()


def parse_header(head: bytes, *, checked: bool = False) -> tuple[str, int, bytes]:
    """Return what a block of BLOCK bytes says: a name, a number of bytes, and the type of what they are.

    Args:
        head: the block.
        checked: whether its checksum need not be looked at, for what a crc32 vouches for.

    Raises:
        ValueError: another checksum than it states, or a size that is no number.
    """
    if not checked and not _sum_is(head):
        raise ValueError("its checksum is wrong")
    size = int(head[124:135], 8) if head[124:135].isdigit() and not head[135] else _size(head[124:136])
    name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if head[345] and head[257:263] == b"ustar\0":  # old GNU tars have dates there
        name = f"{_text(head[345:500])}/{name}"
    return name, size, head[156:157]


def extended(known: Extension, kind: bytes, body: bytes) -> Extension:
    """Return what is known of the next file after one more extension header.

    Args:
        known: from the headers before it.
        kind: its type, one of EXTENSIONS.
        body: its bytes.

    Raises:
        ValueError: records that are none; two names for one file; global records of what only one file can have.
    """
    if kind == b"K":  # where a link leads is never read
        return known
    records = {} if kind == b"L" else pax_records(body)
    if kind == b"g":
        if records.keys() & {b"path", b"size", b"linkpath"} or any(key.startswith(b"GNU.sparse.") for key in records):
            raise ValueError("a global record of a name or a size, which would hold for every file behind it")
        return known
    sparse = known.sparse or any(key.startswith(b"GNU.sparse.") for key in records)
    if kind == b"L" and not body[:1].strip(b"\0"):
        raise ValueError("a long name of no length")
    raw = body if kind == b"L" else records.get(b"GNU.sparse.name") or records.get(b"path")
    name = _text(raw) if raw else known.name
    if known.name is not None and name != known.name:
        raise ValueError("two long names for one file")
    size = records.get(b"size")
    if size and not (size.isdigit() and len(size) <= 20):
        raise ValueError("a PAX size that is no number")
    return Extension(name, int(size) if size else known.size, sparse)


def pax_records(body: bytes) -> dict[bytes, bytes]:
    """Return the records `LENGTH KEY=VALUE\\n` of a PAX header; the last of a key counts.

    Raises:
        ValueError: a length that is no number, or not that of its record.
    """
    records, at = dict[bytes, bytes](), 0
    while at < len(body):
        if at and not body[at] and not body[at:].strip(b"\0"):  # some writers fill it up
            break
        blank = body.find(b" ", at, at + 9)  # eight digits are more than MAX_EXTENSION_BYTES
        digits = body[at:blank] if blank > at else b""
        end = at + int(digits) if digits.isdigit() else 0
        equals = body.find(b"=", blank, end)
        if end > len(body) or equals <= blank + 1 or body[end - 1] != 0x0A:
            raise ValueError("a PAX record of another length than it states")
        records[body[blank + 1 : equals]] = body[equals + 1 : end - 1]
        at = end
    return records


def _text(field: bytes) -> str:
    """Return a name; a NUL ends it."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _size(field: bytes) -> int:
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("its size is negative, or beyond all measure")
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int:
    """Return the number of a field, 0 for an empty one."""
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ValueError("it has a number of other signs than octal digits")
    return int(digits or b"0", 8)


def _sum_is(head: bytes) -> bool:
    """Return whether the bytes of a header add up to its checksum, that one counted as blanks; some old tars add with a sign.

    The low half of Adler-32 is one more than the sum of the bytes, ten times as fast as `sum` but modulo ADLER: no damage to
    a few bytes changes it by a multiple of that.
    """
    own = head[148:156]
    stated = int(own[:6], 8) if own[:6].isdigit() and not own[6] else _octal(own)
    if not ((adler32(head) & 0xFFFF) + 255 - sum(own) - stated) % ADLER:
        return True
    rest = head[:148] + head[156:]
    return stated - 256 in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))
