"""Whether a disk can hold a run's checkpoints, known before the first step."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import resource
import secrets
from pathlib import Path

from torch import Tensor

from .manifest import gather, rank, world
from .sharding import to_write

FALLOC_FL_KEEP_SIZE = 1
"""Of Linux: blocks are taken, and the file stays as long as it is."""
UNSUPPORTED_ERRNOS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR)
"""What file systems answer that cannot reserve."""
METADATA_BYTES = 1 << 20
"""Bytes that state.json, the manifest and the headers take beside the tensors, at most as a rule."""


def check_disk_space(root: Path, tensors: dict[str, Tensor], count: int) -> None:
    """See, all ranks together, that a folder can hold more checkpoints of a state.

    Args:
        root: where they go.
        tensors: of the state, by name, as they lie on the ranks.
        count: checkpoints that need room, as the first rank counts.

    Raises:
        ValueError: it cannot, or a limit on files or a quota forbids it.
    """
    size = sum(math.prod(t.shape) * t.element_size() for t in tensors.values())
    largest = sum(part.tensor.nbytes for part in to_write(tensors, rank(), world()))
    fault = disk_shortage(root, 0, largest, 0)
    if rank() == 0 and not fault:
        fault = disk_shortage(root, size, largest, count) or try_reserve(root, size)
    fault = next((text for text in gather(fault) if text), "")
    if fault:
        raise ValueError(f"output_dir={str(root)!r} cannot hold the checkpoints of this run: {fault}. Nothing was trained.")


def disk_shortage(root: Path, size: int, largest: int, count: int) -> str:
    """Return why a folder cannot hold more checkpoints; "" where it can, for all that can be known.

    Args:
        root: where they go; the nearest folder above that is there counts.
        size: bytes of a checkpoint.
        largest: bytes of its largest file.
        count: checkpoints that need room, the one that is being written among them.
    """
    place = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < largest:
        return f"a file of a checkpoint has {_format_bytes(largest)}, and `ulimit -f` allows {_format_bytes(limit)}: raise it"
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < count * (size + METADATA_BYTES):
        return (
            f"{place} has {_format_bytes(free)} free, and {count} more checkpoint(s) of {_format_bytes(size)} must fit, "
            f"one of them while it is written: "
            f"free some space, or lower checkpoint.keep"
        )
    return ""


def try_reserve(root: Path, size: int) -> str:
    """Take the room of a checkpoint and give it back, so that quotas are asked too; return why there is none, or "".

    Args:
        root: where checkpoints go.
        size: bytes of one.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or size == 0:
        return ""
    path = root / f".tmp-room-{secrets.token_hex(4)}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            done = fallocate(descriptor, FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size))
            number = ctypes.get_errno() if done else 0
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"{root} cannot be written ({error.strerror}): give a folder of yours"
    if number and number not in UNSUPPORTED_ERRNOS:
        return f"{root} cannot take a checkpoint of {_format_bytes(size)} ({os.strerror(number)}): free some space, or raise your quota"
    return ""


def _format_bytes(number: int) -> str:
    """Return bytes as people read them, such as 1.2 GB."""
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
