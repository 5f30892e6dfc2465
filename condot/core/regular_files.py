"""Opening regular files only: those that a stranger brought, of which no more than a bound is read, and those that are a run's own.

A folder may hold a FIFO, which waits for ever, or a link to `/dev/zero`,
which never ends; opening a device may even act on it. None of them is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_IMAGE_BYTES = 1 << 30
"""A larger file is no image that can be trained on."""
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK)
"""What opening a link, a folder, a socket ends in, by `open_itself`."""
FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Were a FIFO put in the file's place between looking and opening, opening it would not wait."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        ValueError: it is something else.
        OSError: it is not there, or cannot be read.
    """
    require_regular(os.stat(path))
    descriptor = os.open(path, FLAGS)
    try:
        status = os.fstat(descriptor)
        require_regular(status)
        if not status.st_size and os.read(descriptor, 1):
            raise ValueError("it is said to be empty and is not, as the kernel's own files are, and only files on a disk are read")
        os.lseek(descriptor, 0, os.SEEK_SET)
    except (OSError, ValueError):
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def require_regular(status: os.stat_result) -> None:
    """Raise a ValueError unless this is the status of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is {describe_file_kind(status)}, and only regular files are read")


def describe_file_kind(status: os.stat_result) -> str:
    """Return what is no regular file, in words."""
    return KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def read_regular(path: str | Path, at_most: int) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: the file, or a link to it.
        at_most: bytes; a larger file is refused before it is read whole.

    Raises:
        ValueError: it is no regular file, or larger.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path) as file:
        body = file.read(at_most + 1)
    if len(body) > at_most:
        raise ValueError(f"it has more than {at_most} bytes, which are the most that are read")
    return body


class PlantedFile(OSError):
    """A link, a folder, a FIFO or a device where a file should be."""


def open_itself(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Open a file itself, never what a link leads to, and never wait for it.

    Raises:
        PlantedFile: something else stands there.
        OSError: as `os.open`.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno in NO_FILE:
            raise PlantedFile(errno.EINVAL, "no plain file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PlantedFile(errno.EINVAL, "no plain file", str(path))
    return fd
