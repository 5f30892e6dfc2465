"""Who owns a run's folder: one process at a time, wherever the folder is moved meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from condot.core.atomic_files import open_lock
from condot.core.file_lock import try_lock


class FolderLock:
    """A folder that is this process's own until it ends, wherever it is moved meanwhile.

    Args:
        folder: of a run, or of images.
        file: its `.lock`, open and locked.
        name: how messages call it.
    """

    def __init__(self, folder: Path, file: IO[str], name: str) -> None:
        self.folder, self.file, self.name = folder, file, name
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lock_error(self) -> str:
        """Return why what is written to the folder's path would not be in the folder that is locked; "" where it would be."""
        if self._holds(self.folder):
            return ""
        other = "another folder stands there now" if self.folder.exists() else "it is not there any more"
        return (
            f"{self.name}={str(self.folder)!r} was moved or replaced while it was in use ({other}), and nothing more is written there: "
            f"give the same command its new place."
        )

    def current_path(self) -> Path | None:
        """Return where the locked folder is now; None where it was removed, or the system does not tell."""
        try:
            place = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        except OSError:
            return None
        return place if self._holds(place) else None

    def _holds(self, folder: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.lstat(folder / ".lock"))
        except (OSError, ValueError):  # gone, or given back already
            return False

    def close(self) -> None:
        """Give the folder back."""
        os.close(self._descriptor)
        self.file.close()


def lock_folder(folder: Path, name: str = "output_dir") -> FolderLock:
    """Own a folder until the process ends.

    Args:
        folder: of a run, or of images.
        name: how messages call it.

    Returns:
        What holds the lock; keep it.

    Raises:
        ValueError: another run owns the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_lock(folder / ".lock"), "r+")
    except OSError as error:
        raise ValueError(f"{name}={str(folder)!r} cannot be written ({error.strerror}): give a folder of yours.") from error
    if not try_lock(file):
        raise ValueError(f"{name}={str(folder)!r} is in use by another run: wait for it, or give another folder.")
    return FolderLock(folder, file, name)
