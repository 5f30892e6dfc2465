"""Short names of content, and stamps of files: what says cheaply that a file is as it was."""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple


def hash64(value: bytes) -> int:
    """Return 64 bits that name some bytes."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little")


class Facts(NamedTuple):
    """What is known of a file without reading it: 190 bytes of memory, where an `os.stat_result` has 640."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    """Of the last change of its status: counts too, since programs set the other as they like."""


def file_facts(status: os.stat_result) -> Facts:
    """Return what a stamp needs of a file's status."""
    return Facts(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def compute_stamp(*facts: object) -> int:
    """Return the stamp of a sample from what is known without reading it: `Facts` of its files, values that they are read with."""
    return hash64(repr(facts).encode()) or 1  # 0 is for what has none


def name_hash(name: str) -> int:
    """Return 64 bits that name a sample by its name, which may hold bytes that are no UTF-8."""
    return hash64(name.encode("utf-8", "surrogatepass"))
