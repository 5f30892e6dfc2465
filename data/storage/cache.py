"""A bounded folder of downloaded files that all processes of a machine share.

A file has its final name only when it is whole: it is written as a `.part`
file under an exclusive flock, checked, and renamed. A killed download leaves a
`.part` that nobody locks, which the next process deletes. Whoever uses a file
holds a shared flock on it, and nothing is evicted that cannot be locked
exclusively. Flocks end with their process, however it ends, so no crash leaves
a file that is pinned for ever. Names must hold the content's hash: a name
that is there, with the right size, is never hashed again.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from condot.core.file_lock import claim, is_named, lock_alone, lock_shared, open_file, open_lock, remove_unused

MOST_HELD = 256
"""Files that one process holds; each costs an open file."""
HELD_SHARE = 0.5
"""Part of the limit that one process may hold: ranks of one machine read much the same shards, but not at the same moment."""
POLL_SECONDS = 0.02
PART = re.compile(r"\..*\.(\d{1,20})\.part")
"""The name of a download under way, with the bytes that it takes."""


class CacheItem(NamedTuple):
    """A file that can be cached."""

    name: str
    """Holds the hash of its content."""
    min_bytes: int
    max_bytes: int
    """Bytes; the same where the size is known."""


class CacheFull(ValueError):
    """There is no room: everything else is in use."""


class Cache:
    """One folder, bounded.

    Args:
        folder: made where it is missing; nothing else belongs in it.
        limit_bytes: all files together, those being downloaded included.

    Raises:
        ValueError: a folder that cannot be written, or has no file locks.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._held: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name -> open file, bytes; longest unasked first
        self._lock = threading.RLock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._exclusive():
                self._remove_partial_files()
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={str(self.folder)!r} cannot be used: {error.strerror}. Choose a folder on a disk of this machine."
            ) from error

    def require(self, needed: int, why: str) -> None:
        """Refuse at the start what could not work later.

        Args:
            needed: bytes that are used at one time.
            why: what needs them.

        Raises:
            ValueError: the limit is smaller.
        """
        if needed > self.limit_bytes:
            raise ValueError(
                f"data.cache_size={_size(self.limit_bytes)} is less than the {_size(needed)} that {why}. "
                f"Use {_size(needed)} or more, or a smaller data.shuffle_block."
            )

    def get(self, item: CacheItem) -> Path | None:
        """The file, held from now on, or None where it is not here."""
        path = self.folder / item.name
        with self._lock:
            held = self._held.get(item.name)
            fd = held[0] if held else open_file(path)
            if fd is None:
                return None
            if not held:
                lock_shared(fd)
            size = os.fstat(fd).st_size
            there, fits = is_named(fd, path), item.min_bytes <= size <= item.max_bytes
            if not there or not fits:
                self._held.pop(item.name, None)
                os.close(fd)
                if there:  # cut by a power failure, or by hand
                    path.unlink(missing_ok=True)
                return None
            with suppress(PermissionError):  # another user's
                os.utime(fd)  # what LRU goes by
            self._hold(item.name, fd, size)
        return path

    def fetch(self, item: CacheItem, write: Callable[[BinaryIO], None], *, patience: float = 60.0, wait: bool = True) -> Path | None:
        """The file, from here or by `write`, held from now on.

        Args:
            item: what is wanted.
            write: writes all of it to an empty file and checks it, or raises.
            patience: seconds that another process may download it, or others
                may keep all room in use, with nothing changing.
            wait: off, this returns None where another downloads it already.

        Raises:
            ValueError: another's download stands still; the disk is full.
            CacheFull: all room is in use.
        """
        self.require(item.max_bytes, "one shard takes")
        part = self.folder / f".{item.name}.{item.max_bytes}.part"
        seen, since = -1.0, time.monotonic()
        while True:
            if (path := self.get(item)) is not None:
                return path
            fd = claim(part)
            if fd is not None:
                try:
                    if (self.folder / item.name).exists():  # another was faster
                        continue
                    if self._make_room(fd, item):
                        self._write(fd, item, part, write)
                        continue
                finally:
                    if is_named(fd, part):
                        part.unlink()
                    os.close(fd)
            elif not wait:
                return None
            written = _written(part)
            if written != seen:
                seen, since = written, time.monotonic()
            if not wait or time.monotonic() > since + patience:
                if fd is None:
                    raise ValueError(
                        f"{part}: another process has been downloading it for {patience:g} s without a byte. End that process."
                    )
                raise CacheFull(
                    f"data.cache_size={_size(self.limit_bytes)}: no room for {_size(item.max_bytes)} in {self.folder}, "
                    f"all other files are in use. Raise it, or lower data.shuffle_block."
                )
            time.sleep(POLL_SECONDS)

    def release(self, name: str) -> None:
        """Let a file go: it stays until room is needed."""
        with self._lock:
            held = self._held.pop(name, None)
            if held:
                os.close(held[0])

    def close(self) -> None:
        """Let all files go."""
        for name in list(self._held):
            self.release(name)

    def _write(self, fd: int, item: CacheItem, part: Path, write: Callable[[BinaryIO], None]) -> None:
        """Fill a part, give it its name and hold it."""
        try:
            with open(fd, "wb", closefd=False) as file:
                write(file)
        except OSError as error:
            raise ValueError(
                f"{self.folder} cannot be written ({error.strerror or error}; {_size(item.max_bytes)} were wanted). "
                f"Free space, or set data.cache_dir to another disk."
            ) from error
        size = os.fstat(fd).st_size
        assert item.min_bytes <= size <= item.max_bytes, f"{item} was written with {size} bytes"
        held = os.dup(fd)  # the same open file, so the lock has no gap
        with self._lock, self._exclusive():  # whoever counts the folder's bytes would miss a file that changes its name meanwhile
            os.rename(part, self.folder / item.name)
            lock_shared(held)
            if item.name in self._held:
                os.close(held)
            else:
                self._hold(item.name, held, size)

    def _hold(self, name: str, fd: int, size: int) -> None:
        self._held[name] = (fd, size)
        self._held.move_to_end(name)
        while len(self._held) > 1 and (
            len(self._held) > MOST_HELD or sum(s for _, s in self._held.values()) > HELD_SHARE * self.limit_bytes
        ):
            self.release(next(iter(self._held)))

    def _make_room(self, fd: int, item: CacheItem) -> bool:
        """Evict, longest unused first, until the item fits under the limit and on the disk; then its room is taken.

        What this process itself holds goes last, longest unasked first: open
        files stay readable when their names are gone.
        """
        with self._lock, self._exclusive():
            self._remove_partial_files()
            files = sorted(self._files())
            used = sum(size for _, size, _ in files)

            def fits() -> bool:
                disk = os.statvfs(self.folder)
                return used + item.max_bytes <= self.limit_bytes and item.max_bytes <= disk.f_bavail * disk.f_frsize

            for own in (False, True):
                for _, size, name in files:
                    if fits():
                        os.truncate(fd, 1)  # a part that is not empty counts with the size in its name
                        return True
                    if own and name in list(self._held)[:-1]:
                        self.release(name)
                    if remove_unused(self.folder / name):
                        used -= size
            if fits():
                os.truncate(fd, 1)
                return True
            if used + item.max_bytes <= self.limit_bytes:
                raise ValueError(
                    f"{self.folder}: the disk is full ({_size(item.max_bytes)} are wanted). "
                    f"Free space, or set data.cache_dir to another disk."
                )
            return False

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When each file was used last, the bytes that it takes or will take, its name."""
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if part := PART.fullmatch(entry.name):
                yield status.st_mtime, int(part[1]) if status.st_size else 0, entry.name
            elif not entry.name.startswith(".") and stat.S_ISREG(status.st_mode):
                yield status.st_mtime, status.st_size, entry.name

    def _remove_partial_files(self) -> None:
        """Delete what killed downloads left: parts that nobody locks."""
        for part in self.folder.glob(".*.part"):
            remove_unused(part)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time looks for room."""
        fd = open_lock(self.folder / ".lock")
        try:
            lock_alone(fd)
            yield
        finally:
            os.close(fd)


def _written(part: Path) -> float:
    """A number that changes as long as somebody writes."""
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return -2.0


def _size(count: int) -> str:
    return next(
        (f"{count / unit:.4g}{name}" for name, unit in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)) if count >= unit), f"{count}B"
    )
