"""What makes a checkpoint whole: a manifest with the size and sha256 of every file, checked by all ranks together.

The manifest is the last file written; a folder without one, or with files that
do not match it, is no checkpoint. What was found good is not hashed again
while its files stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..process import processors
from .shares import deal

T = TypeVar("T")
Seals = dict[str, dict[str, Any]]
"""Size in `bytes` and `sha256` of files, by name."""
NAME = "manifest.json"
WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file raises."""

_good: dict[Path, Any] = {}
"""The marks, see `_marks`, of folders that were found good."""


def rank() -> int:
    """This process among all; 0 of a process alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T) -> T:
    """The first rank's value, on all."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, on all."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file and force it to the disk; its seal."""
    body = text.encode()
    with open(path, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def sync(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_present(folder: Path, files: Seals) -> None:
    """See, on the first rank, the files that all ranks say they wrote.

    Raises:
        OSError: one is not there, or of another size: the ranks do not share the folder.
    """
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat().st_size for entry in entries}
    lacking = [name for name, seal in files.items() if found.get(name) != seal["bytes"]]
    if lacking:
        raise OSError(
            f"{', '.join(lacking[:3])}: written by other ranks and not seen by the first; output_dir must be a folder that all share"
        )


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: there is none that can be read.
    """
    manifest = json.loads((folder / NAME).read_text())
    files = manifest["files"]
    if not isinstance(files, dict) or "state.json" not in files or any(os.path.basename(name) != name for name in files):
        raise ValueError(f"{NAME} is none of a checkpoint")
    return manifest


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold tensors, in the order of the ranks that wrote them."""
    return sorted(folder / name for name in read(folder)["files"] if name.endswith(".safetensors"))


def verify(folder: Path, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        folder: the checkpoint's.
        together: all ranks ask at once: each hashes a share of the files, and all get the same answer.
    """
    try:
        answer: tuple[str | None, Seals] = (None, read(folder)["files"]) if rank() == 0 or not together else (None, {})
    except WRONG as error:
        answer = (f"{type(error).__name__}: {error}", {})
    fault, files = broadcast(answer) if together else answer
    if fault:
        return fault
    marks = _marks(folder, files)
    fault = None if marks is not None and _good.get(folder) == marks else _hash(folder, files, together)
    if together:
        fault = next((text for text in gather(fault) if text), None)
    if fault is None and marks is not None:
        _good[folder] = marks
    return fault


def _hash(folder: Path, files: Seals, together: bool) -> str | None:
    """The first fault among the files, or among this rank's share of them."""
    mine = list(files)
    if together:
        whose = deal({name: _size(seal) for name, seal in files.items()}, world())
        mine = [name for name in files if whose[name] == rank()]
    with ThreadPoolExecutor(min(8, processors())) as crew:
        faults = crew.map(lambda name: _fault(folder / name, files[name]), mine)
        return next((fault for fault in faults if fault), None)


def _size(seal: Any) -> int:
    size = seal.get("bytes") if isinstance(seal, dict) else None
    return size if isinstance(size, int) else 0


def _fault(path: Path, seal: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != seal["bytes"]:
            return f"{path.name} has {size} bytes, the manifest says {seal['bytes']}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != seal["sha256"]:
                return f"{path.name} does not match its sha256"
    except WRONG as error:
        return f"{type(error).__name__}: {error}"
    return None


def _marks(folder: Path, files: Seals) -> Any:
    """What changes when a file is written: its number, size and time; None while a file is so new that a change might not show."""
    try:
        found = [(folder / name).stat() for name in (NAME, *files)]
    except OSError:
        return None
    if any(time.time() - one.st_mtime < 2 for one in found):
        return None
    return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found], files
