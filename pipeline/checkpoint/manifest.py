"""What makes a checkpoint whole: a manifest with the size and sha256 of every file, checked by all ranks together.

The manifest is the last file written, and its own last line holds the sha256 of all before it. A folder without a manifest, or
with files that do not match it, is no checkpoint. What was found good is not hashed again while its files stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from condot.core.atomic_files import open_regular
from condot.core.printable import one_line
from condot.core.process import processors

from .rank_file import listed
from .sharding import deal

T = TypeVar("T")
Seals = dict[str, dict[str, Any]]
"""Size in `bytes` and `sha256` of files, by name."""
NAME = "manifest.json"
VERSION = 3
"""Since 3 a manifest is sealed; 2 lists tensors, 1 does not."""
SEALED = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\Z')
"""How a sealed manifest ends: with the sha256 of what it would be without this line."""
PACKED = 2
"""Numbers in a byte at most, of any type: so that nobody makes room for more than a file can hold."""
MOST_BYTES = 1 << 28
"""Of a manifest, or of state.json; more is no text of ours, and is not read."""
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


def check_alike(listed: dict[str, Any], told: list[dict[str, Any]]) -> None:
    """Raises ValueError where ranks were given other tensors, or do not together hold all of them."""
    other = [number for number, one in enumerate(told) if one["listed"] != told[0]["listed"]]
    written, asked = sum(one["numel"] for one in told), sum(math.prod(shape) for _, shape in listed.values())
    if other or written != asked:
        raise ValueError(f"{written} of {asked} numbers were written, and ranks {other[:3]} named other tensors than the first")


def write(folder: Path, step: int, files: Seals, tensors: dict[str, Any]) -> None:
    """Write the manifest of a folder, sealed, and force it to the disk.

    Args:
        folder: the checkpoint's.
        step: optimiser steps done.
        files: the seals of all its other files.
        tensors: type and shape of every whole tensor, by name.
    """
    text = json.dumps({"version": VERSION, "step": step, "world": world(), "files": files, "tensors": tensors}, indent=1)
    write_text(folder / NAME, f'{text[:-2]},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}')


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: there is none that can be read, or its seal is broken.
    """
    body = read_bytes(folder / NAME)
    seal, manifest = SEALED.search(body), json.loads(body)
    if seal and hashlib.sha256(body[: seal.start()] + b"\n}").hexdigest() != seal[1].decode():
        raise ValueError(f"{NAME} does not match its own sha256")
    if not seal and manifest["version"] not in (1, 2):
        raise ValueError(f"{NAME} has lost its seal")
    files, tensors = manifest["files"], manifest.get("tensors", {})
    if not isinstance(files, dict) or "state.json" not in files or not all(_is_seal(name, seal) for name, seal in files.items()):
        raise ValueError(f"{NAME} is none of a checkpoint")
    if not isinstance(tensors, dict) or not all(map(_is_tensor, tensors.values())):
        raise ValueError(f"{NAME} lists what are no tensors")
    held = sum(seal["bytes"] for name, seal in files.items() if name.endswith(".safetensors"))
    if sum(math.prod(shape) for _, shape in tensors.values()) > held * PACKED:
        raise ValueError(f"{NAME} lists more numbers than its files can hold")
    return manifest


def _is_seal(name: str, seal: Any) -> bool:
    """Return whether a manifest names a file of its own folder, and says what is to be said of it."""
    size, sha = (seal.get("bytes"), seal.get("sha256")) if isinstance(seal, dict) else (None, None)
    plain = name not in ("", ".", "..", NAME) and "/" not in name and name.isascii() and name.isprintable()  # as all of ours are
    return plain and type(size) is int and 0 <= size < 2**63 and isinstance(sha, str) and len(sha) == 64


def _is_tensor(said: Any) -> bool:
    """Return whether a manifest's entry is a type and a shape."""
    if not (isinstance(said, list) and len(said) == 2 and isinstance(said[0], str) and isinstance(said[1], list)):
        return False
    return len(said[1]) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in said[1])


def read_bytes(path: Path) -> bytes:
    """Return a small file of a checkpoint; what is no plain file, or too large for one of ours, is an OSError."""
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise OSError(f"{path.name} has {size} bytes, more than any of ours")
        return file.read()


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
        answer = (f"{type(error).__name__}: {one_line(error)}", {})
    fault, files = broadcast(answer) if together else answer
    if fault:
        return fault
    marks = _marks(folder, files)
    known = marks is not None and _good.get(folder) == marks
    fault = None if known else _hash(folder, files, together)
    if fault is None and not known and (rank() == 0 or not together):
        fault = _listing_fault(folder)
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


def _listing_fault(folder: Path) -> str | None:
    """Return what is wrong with the list of tensors, which only the headers of the files can tell where the manifest has no seal."""
    try:
        manifest = read(folder)
        said = manifest.get("tensors")
        if "sha256" not in manifest and said is not None:
            found = listed(tensor_files(folder))
            if {name: (dtype, tuple(shape)) for name, (dtype, shape) in said.items()} != found:
                return f"{NAME} lists other tensors than its files hold"
    except WRONG as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _size(seal: Any) -> int:
    size = seal.get("bytes") if isinstance(seal, dict) else None
    return size if isinstance(size, int) else 0


def _fault(path: Path, seal: dict[str, Any]) -> str | None:
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size != seal["bytes"]:
                return f"{path.name} has {size} bytes, the manifest says {seal['bytes']}"
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
