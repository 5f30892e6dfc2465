"""Short names of content, and stamps of files: what says cheaply that a file is as it was."""

from __future__ import annotations

import hashlib
import os


def hash_of(value: bytes) -> int:
    """Return 64 bits that name some bytes."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little")


def stamp_of(*facts: object) -> int:
    """Return the stamp of a sample from what is known without reading it: `os.stat_result`s of its files, values that they are read with.

    The time of the last change of a file's status (ctime) counts too, since programs set the other as they like.
    """
    plain = [(f.st_size, f.st_mtime_ns, f.st_ctime_ns) if isinstance(f, os.stat_result) else f for f in facts]
    return hash_of(repr(plain).encode()) or 1  # 0 is for what has none


def name_hash(name: str) -> int:
    """Return 64 bits that name a sample by its name, which may hold bytes that are no UTF-8."""
    return hash_of(name.encode("utf-8", "surrogatepass"))
