"""One row of an index: where a sample lies in its tar, how large it is, and what it must hash to; and the file of such rows.

Beside `train-000000.tar` lies `train-000000.npy`, 24 bytes a sample.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32 as crc32_of  # zlib's, three times as fast

from condot.core.hashing import sha256_of

from ..images.decode import is_plain
from .sample_files import NO_LABEL
from .shard_table import Shard
from .tar_headers import BLOCK

RECORD = np.dtype(
    [
        ("payload", "<u4"),
        ("bytes", "<u4"),
        ("crc32", "<u4"),
        ("before", "<u2"),
        ("after", "<u2"),
        ("rest", "<u2"),
        ("label", "<u2"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)
"""One sample: the block of 512 bytes at which its image (or array) begins, that file's length and crc32; the blocks of the same
sample before and after it, with 15 bits of their crc32, and a bit that says `decode.is_plain`; its class or NO_LABEL; the upright
image's size in pixels."""
PLAIN = 0x8000
"""That bit of `rest`."""
MAX_SAMPLE_BYTES = 0x7FFFF000
"""Of all files of a sample, headers too: what one read of a file gives."""
MAX_BLOCKS = (1 << 16) - 1
"""Beside an image, on either side."""
REMEMBERED = 1 << 17
"""Indexes known to be right at most, 100 bytes each."""
_verified: set[int] = set()


def index_payload(body: bytes, offset: int, size: int, start: int) -> tuple[int, int, int, int, int, int]:
    """Where a payload lies and what it and the rest of its sample hash to: the first six fields of a RECORD.

    Args:
        body: all that the sample spans.
        offset, size: of the payload, bytes from the tar's beginning.
        start: of the sample, likewise.
    """
    first, last = offset - start, offset - start + size
    payload = body[first:last]
    rest = crc32_of(body[last:], crc32_of(body[:first])) % PLAIN + PLAIN * is_plain(payload)
    after = len(body) // BLOCK - (last + BLOCK - 1) // BLOCK
    return offset // BLOCK, size, crc32_of(payload), first // BLOCK, after, rest


def sample_span(record: tuple[Any, ...]) -> tuple[int, int]:
    """Return where a sample begins in its tar, and how many bytes it spans."""
    block, size, _, before, after = record[:5]
    return (block - before) * BLOCK, (before + after + -(-size // BLOCK)) * BLOCK


def slice_image(body: bytes, before: int, size: int) -> bytes:
    """Return the image (or array) of a sample, the one that the index points at.

    Args:
        body: all that the sample spans.
        before, size: fields of its RECORD, `before` and `bytes`.
    """
    return body[before * BLOCK : before * BLOCK + size]


def is_unchanged(found: tuple[int, ...], record: tuple[Any, ...]) -> bool:
    """Whether what `index_payload` finds is what a record says, except for `is_plain`, whose rule has changed since the first shards."""
    return found[:5] == record[:5] and found[5] % PLAIN == record[5] % PLAIN


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_suffix(".npy")


def open_index(path: Path, shard: Shard, classes: int) -> np.ndarray:
    """Return the index at `path`, one RECORD a sample, if it is the one that the manifest means.

    It is read whole: a mapped file that is cut, or whose disk fails, ends the process by SIGBUS. What was right is not hashed again.

    Args:
        path: of the index.
        shard: its line of the manifest.
        classes: how many the manifest names.

    Raises:
        ValueError: it is another, or has a class that the manifest does not name.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        known = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, shard.index_sha256, classes))
        try:
            body = file.read(min(status.st_size, RECORD.itemsize * shard.samples + 4096))  # and what stands before the samples
            found = np.lib.format.read_array(BytesIO(body), allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:  # whatever is no array
            raise ValueError(f"its index is cut or no index ({status.st_size} bytes). Copy both or pack again.") from error
        if known in _verified and len(body) == status.st_size:
            return found
        if found.shape != (shard.samples,):
            raise ValueError(f"its index has {found.size} samples, the manifest says {shard.samples}. Copy both again.")
        if sha256_of(body) != shard.index_sha256:
            raise ValueError("its index is not the one that the manifest means (another sha256). Copy both or pack again.")
    if found.dtype != RECORD:
        raise ValueError(f"its index has rows of {found.dtype}, which are no samples. Index the folder again.")
    labels = found["label"][found["label"] != NO_LABEL]
    if len(labels) and labels.max() >= classes:
        raise ValueError(f"its index has class {labels.max()}, the manifest names {classes} classes. Pack or index the folder again.")
    if len(_verified) >= REMEMBERED:
        _verified.clear()
    _verified.add(known)
    return found
