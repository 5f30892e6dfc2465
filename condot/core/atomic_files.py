"""Files of a run, in a folder that others may write too: never written through a link, never waited for.

What is written anew stands under a temporary name first, locked by its writer: a name that nobody has locked is what a kill left, and
the next writer of the same file or folder removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .file_lock import open_new, try_lock
from .regular_files import PlantedFile, open_itself

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux: paths as they are given; two names that change places."""


def open_regular(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Open a file itself, never what a link leads to, and never wait for it; fit to be the `opener` of `open`.

    Raises:
        OSError: as `os.open`; "no plain file" where a link, a folder, a FIFO or a device stands there.
    """
    try:
        return open_itself(path, flags, mode)
    except PlantedFile as error:
        error.strerror = "a link, a folder or a device stands where a file of the run's own belongs: move it"
        raise


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
    sweep(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8", opener=open_regular) as file:
            _held(file.fileno())
            file.write(text)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit(temporary: Path, final: Path) -> None:
    """Give a finished file its name: after this it is there whole, even if the power fails."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def commit_json(raw: Any, final: Path) -> None:
    """Write a value as JSON under a temporary name and give it its own."""
    temporary = final.with_name(f"tmp-{os.getpid()}-{final.name}")
    with open_new(temporary) as file:
        file.write((json.dumps(raw, indent=1) + "\n").encode())
    commit(temporary, final)


def write_once(path: Path, body: bytes) -> None:
    """Write a file whole, unless somebody has written it already."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(body)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


@contextlib.contextmanager
def folder_for(place: Path) -> Iterator[Path]:
    """Make a folder beside `place`, to be filled and given to `put_in_place`; what is left of it at the end is removed.

    Args:
        place: where the folder will be; what killed processes left beside it is removed first.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    sweep(place)
    folder = place.with_name(f".{place.name}.tmp-{secrets.token_hex(4)}")
    folder.mkdir()  # new: where somebody planted a link, an error
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _held(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def put_in_place(folder: Path, place: Path) -> None:
    """Give a finished folder its name, on the disk to the last byte; what stood there is exchanged for it, and then called `folder`.

    No moment is without a whole folder of that name, except on file systems
    that cannot exchange two names (NFS, some of FUSE): there the older one is
    called `.NAME.old-...` between two renames, and comes back by `sweep` where
    the process ends there.
    """
    for where, _, names in os.walk(folder, topdown=False):
        for name in (*names, "."):
            sync(Path(where, name))
    if not place.is_dir():
        os.rename(folder, place)
    elif not exchange(folder, place):
        aside = place.with_name(f".{place.name}.old-{secrets.token_hex(4)}")
        os.rename(place, aside)
        try:
            os.rename(folder, place)
        except OSError:
            os.rename(aside, place)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync(place.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names of one file system in one step; false where the system cannot.

    Source: renameat2(2), RENAME_EXCHANGE; Linux 3.15.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(place: Path) -> None:
    """Remove what killed processes left beside a file or folder that is to be written; what a process still writes stays.

    Args:
        place: its name decides which names beside it are temporary ones. If it is a folder that is not there, and its older self was
            called `.NAME.old-...` when the process that would replace it ended, that one comes back.
    """
    left = re.compile(rf"\.{re.escape(place.name)}\.(?:(tmp|old)(?:-[0-9a-f]{{8}})?|[0-9a-f]{{8}})")
    try:
        names = [entry.name for entry in os.scandir(place.parent) if left.fullmatch(entry.name)]
    except OSError:
        return
    for name in names:
        path = place.with_name(name)
        is_folder = (match := left.fullmatch(name)) is not None and match[1] is not None
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | (os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC if is_folder else 0)
            descriptor = os.open(path, flags) if is_folder else open_regular(path, os.O_RDWR)
            try:
                if not try_lock(descriptor):  # somebody writes it; on a disk without locks an error, and nobody sweeps
                    continue
                if is_folder and match and match[1] == "old" and not os.path.lexists(place):
                    os.rename(path, place)
                elif is_folder:
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def _held(descriptor: int) -> None:
    """Lock a new temporary file or folder of this process, so that no other sweeps it; it ends with the process."""
    with contextlib.suppress(OSError):  # a disk without locks: nobody sweeps there either
        try_lock(descriptor)
