"""Files that processes share: who holds one has it locked shared, who deletes one has it locked alone.

The lock is flock's, which belongs to an open file and ends with its process,
however that ends. A name may change between opening and locking, so each
function looks again when it has the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


def open_lock(path: Path) -> int:
    """Open a lock file, made if need be, without writing to it or following a link that somebody put in its place.

    Raises:
        ValueError: there is a link.
        OSError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link, and a lock that leads elsewhere is not used: give another folder.") from error
        raise


def open_file(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def is_named(fd: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def claim(part: Path) -> int | None:
    """A part, locked exclusively; None where another has it."""
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if is_named(fd, part):
            os.truncate(fd, 0)
            return fd
        os.close(fd)  # renamed or deleted between the two calls


def remove_unused(path: Path) -> bool:
    """Delete a file that nobody holds."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)  # some network disks lock exclusively only what can be written
    except (FileNotFoundError, PermissionError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_named(fd, path):
            path.unlink()
            return True
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
    return False
