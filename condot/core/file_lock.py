"""Files that processes share: who holds one has it locked shared, who deletes one has it locked alone.

The lock is flock's, which belongs to an open file and ends with its process,
however that ends. A name may change between opening and locking, so each
function looks again when it has the lock. Others may write the folder too:
what stands under a name and is no file of its own (a link to somewhere else, a
folder, a FIFO that never answers) is refused, and nothing is ever written through it.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO

from .regular_files import PlantedFile, open_itself


def open_regular(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a file itself, never what a link leads to, and never wait for it.

    The error is not that of `atomic_files`: what reads shards tries an OSError again, and a planted file stays what it is.

    Raises:
        ValueError: a link, a folder, a FIFO or a device stands there.
        OSError: as `os.open`.
    """
    try:
        return open_itself(path, flags, mode)
    except PlantedFile:
        raise ValueError(_planted(path)) from None


def lock_alone(fd: int | IO[Any]) -> None:
    """Wait until nobody else holds an open file, and hold it alone, until it is closed."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def lock_shared(fd: int | IO[Any]) -> None:
    """Hold an open file together with others, until it is closed."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def try_lock(fd: int | IO[Any]) -> bool:
    """Hold an open file alone, until it is closed; false, without waiting, where another holds it.

    Raises:
        OSError: the disk has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _planted(path: Path) -> str:
    return f"{path} is a link, a folder or a device, and condot keeps a file of its own under this name: move it elsewhere."


def open_lock(path: Path) -> int:
    """Open the file of a lock, made where it is missing; who may write its folder may lock it too.

    A file that is there is opened without O_CREAT: Linux refuses that for
    another user's file in a folder like /tmp.

    Raises:
        ValueError, OSError: as `open_regular`.
    """
    while True:
        try:
            return open_regular(path, os.O_RDWR)
        except PermissionError:
            return open_regular(path, os.O_RDONLY)  # of another release or user: local disks lock it all the same
        except FileNotFoundError:
            try:
                fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue
            _share(fd, os.stat(path.parent).st_mode)
            return fd


def _share(fd: int, folder: int) -> None:
    """Let those write a new file who may write its folder, whatever our umask is."""
    writers = folder & (stat.S_IWGRP | stat.S_IWOTH)
    if writers:
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | writers | writers << 1)


def make_folder(path: Path) -> None:
    """Make a folder of ours where it is missing; a link in its place would lead what is written there to somebody else's.

    Raises:
        ValueError: a link stands there.
        OSError: something else that is no folder does.
    """
    if path.is_symlink():
        raise ValueError(_planted(path))
    path.mkdir(parents=True, exist_ok=True)


def open_new(path: Path) -> BinaryIO:
    """Open a temporary file of ours to write: what stands there, a leftover or a link that somebody planted, is replaced, never followed.

    Raises:
        OSError: a folder stands there, or another user's file that cannot be removed.
    """
    path.unlink(missing_ok=True)
    return open(path, "xb", buffering=1 << 20)


def open_file(path: Path) -> int | None:
    """Open a file to read; None where there is none.

    Raises:
        ValueError, OSError: as `open_regular`.
    """
    try:
        return open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def is_named(fd: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def claim(part: Path) -> int | None:
    """Open a part, locked exclusively; None where another has it.

    Raises:
        ValueError, OSError: as `open_regular`.
    """
    while True:
        try:
            fd = _open_part(part)
        except PermissionError:
            if part.exists():
                return None  # another user's
            raise
        if not try_lock(fd):
            os.close(fd)
            return None
        if is_named(fd, part):
            os.truncate(fd, 0)
            return fd
        os.close(fd)  # renamed or deleted between the two calls


def _open_part(part: Path) -> int:
    """Open or make a part; in a folder that its group shares, the group's, unless each may delete only what is its own."""
    try:
        return open_regular(part, os.O_RDWR)
    except FileNotFoundError:
        fd = open_regular(part, os.O_RDWR | os.O_CREAT, 0o644)
        folder = os.stat(part.parent).st_mode
        if not folder & stat.S_ISVTX and os.fstat(fd).st_uid == os.geteuid():
            _share(fd, folder)
        return fd


def remove_unused(path: Path) -> bool:
    """Delete a file that nobody holds; false for another user's that cannot be, and for what is no plain file."""
    try:
        fd = open_regular(path, os.O_RDWR)  # some network disks lock exclusively only what can be written
    except (FileNotFoundError, PermissionError, ValueError):
        return False
    try:
        if try_lock(fd) and is_named(fd, path):
            path.unlink()
            return True
    except PermissionError:
        pass
    finally:
        os.close(fd)
    return False
