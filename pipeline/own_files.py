"""Files of a run, in a folder that others may write too: never written through a link, never waited for.

`data/flock.py` opens files by the same rule.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK)
"""What opening a link, a folder, a socket ends in."""


def open_regular(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Open a file itself, never what a link leads to, and never wait for it; fit to be the `opener` of `open`.

    Raises:
        OSError: as `os.open`; "no plain file" where a link, a folder, a FIFO or a device stands there.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno in NO_FILE:
            raise _planted(path) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _planted(path)
    return fd


def _planted(path: str | Path) -> OSError:
    return OSError(errno.EINVAL, "a link, a folder or a device stands where a file of the run's own belongs: move it", str(path))


def open_lock(path: Path) -> int:
    """Open the file of a lock, made where it is missing, its content untouched; errors as `open_regular`."""
    while True:
        try:
            return open_regular(path, os.O_RDWR)
        except FileNotFoundError:
            try:
                return open_regular(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue


def write_whole(path: Path, text: str, *, lasting: bool = False) -> None:
    """Write a small file under a name that nobody can foresee, and rename it: a link in its place is replaced, not followed.

    Args:
        path: of the file.
        text: all of it.
        lasting: force it to the disk.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8", opener=open_regular) as file:
            file.write(text)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
