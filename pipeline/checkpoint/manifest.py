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
from condot.core.process import available_cpus

from .rank_file import read_tensor_index
from .sharding import assign_to_ranks

T = TypeVar("T")
FileDigests = dict[str, dict[str, Any]]
"""Size in `bytes` and `sha256` of files, by name."""
NAME = "manifest.json"
VERSION = 3
"""Since 3 a manifest ends with its own sha256; 2 lists tensors, 1 does not."""
SELF_DIGEST = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\Z')
"""How such a manifest ends: with the sha256 of what it would be without this line."""
MAX_ELEMENTS_PER_BYTE = 2
"""Numbers in a byte at most, of any type: so that nobody makes room for more than a file can hold."""
MAX_JSON_BYTES = 1 << 28
"""Of a manifest, or of state.json; more is no text of ours, and is not read."""
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file raises."""

_verified: dict[Path, Any] = {}
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
    """Write a small file and force it to the disk; its size and sha256."""
    body = text.encode()
    with open(path, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def check_files_visible(folder: Path, files: FileDigests) -> None:
    """See, on the first rank, the files that all ranks say they wrote.

    Raises:
        OSError: one is not there, or of another size: the ranks do not share the folder.
    """
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat().st_size for entry in entries}
    lacking = [name for name, digest in files.items() if found.get(name) != digest["bytes"]]
    if lacking:
        raise OSError(
            f"{', '.join(lacking[:3])}: written by other ranks and not seen by the first; output_dir must be a folder that all share"
        )


def check_same_tensors(tensor_index: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    """Raises ValueError where ranks were given other tensors, or do not together hold all of them."""
    other = [number for number, one in enumerate(reports) if one["listed"] != reports[0]["listed"]]
    written, expected = sum(one["numel"] for one in reports), sum(math.prod(shape) for _, shape in tensor_index.values())
    if other or written != expected:
        raise ValueError(f"{written} of {expected} numbers were written, and ranks {other[:3]} named other tensors than the first")


def write_manifest(folder: Path, step: int, files: FileDigests, tensors: dict[str, Any]) -> None:
    """Write the manifest of a folder, its own sha256 last, and force it to the disk.

    Args:
        folder: the checkpoint's.
        step: optimiser steps done.
        files: size and sha256 of all its other files.
        tensors: type and shape of every whole tensor, by name.
    """
    text = json.dumps({"version": VERSION, "step": step, "world": world(), "files": files, "tensors": tensors}, indent=1)
    write_text(folder / NAME, f'{text[:-2]},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}')


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: there is none that can be read, or its own sha256 differs.
    """
    body = read_bytes(folder / NAME)
    digest, manifest = SELF_DIGEST.search(body), json.loads(body)
    if digest and hashlib.sha256(body[: digest.start()] + b"\n}").hexdigest() != digest[1].decode():
        raise ValueError(f"{NAME} does not match its own sha256")
    if not digest and manifest["version"] not in (1, 2):
        raise ValueError(f"{NAME} has lost its own sha256")
    files, tensors = manifest["files"], manifest.get("tensors", {})
    if not isinstance(files, dict) or "state.json" not in files or not all(_is_digest(name, digest) for name, digest in files.items()):
        raise ValueError(f"{NAME} is none of a checkpoint")
    if not isinstance(tensors, dict) or not all(map(_is_tensor, tensors.values())):
        raise ValueError(f"{NAME} lists what are no tensors")
    held = sum(digest["bytes"] for name, digest in files.items() if name.endswith(".safetensors"))
    if sum(math.prod(shape) for _, shape in tensors.values()) > held * MAX_ELEMENTS_PER_BYTE:
        raise ValueError(f"{NAME} lists more numbers than its files can hold")
    known: dict[str, Any] = manifest
    return known


def _is_digest(name: str, digest: Any) -> bool:
    """Return whether a manifest names a file of its own folder, and says what is to be said of it."""
    size, sha = (digest.get("bytes"), digest.get("sha256")) if isinstance(digest, dict) else (None, None)
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
        if size > MAX_JSON_BYTES:
            raise OSError(f"{path.name} has {size} bytes, more than any of ours")
        return file.read()


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold tensors, in the order of the ranks that wrote them."""
    return sorted(folder / name for name in read_manifest(folder)["files"] if name.endswith(".safetensors"))


def verify(folder: Path, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        folder: the checkpoint's.
        together: all ranks ask at once: each hashes a share of the files, and all get the same answer.
    """
    try:
        answer: tuple[str | None, FileDigests] = (None, read_manifest(folder)["files"]) if rank() == 0 or not together else (None, {})
    except READ_ERRORS as error:
        answer = (f"{type(error).__name__}: {one_line(error)}", {})
    fault, files = broadcast(answer) if together else answer
    if fault:
        return fault
    signature = _stat_signature(folder, files)
    known = signature is not None and _verified.get(folder) == signature
    fault = None if known else _hash_files(folder, files, together)
    if fault is None and not known and (rank() == 0 or not together):
        fault = _listing_fault(folder)
    if together:
        fault = next((text for text in gather(fault) if text), None)
    if fault is None and signature is not None:
        _verified[folder] = signature
    return fault


def _hash_files(folder: Path, files: FileDigests, together: bool) -> str | None:
    """The first fault among the files, or among this rank's share of them."""
    mine = list(files)
    if together:
        owner = assign_to_ranks({name: _size(digest) for name, digest in files.items()}, world())
        mine = [name for name in files if owner[name] == rank()]
    with ThreadPoolExecutor(min(8, available_cpus())) as pool:
        faults = pool.map(lambda name: _fault(folder / name, files[name]), mine)
        return next((fault for fault in faults if fault), None)


def _listing_fault(folder: Path) -> str | None:
    """Return what is wrong with the list of tensors; where the manifest has no sha256 of its own, only the files' headers can tell."""
    try:
        manifest = read_manifest(folder)
        said = manifest.get("tensors")
        if "sha256" not in manifest and said is not None:
            found = read_tensor_index(tensor_files(folder))
            if {name: (dtype, tuple(shape)) for name, (dtype, shape) in said.items()} != found:
                return f"{NAME} lists other tensors than its files hold"
    except READ_ERRORS as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _size(digest: Any) -> int:
    size = digest.get("bytes") if isinstance(digest, dict) else None
    return size if isinstance(size, int) else 0


def _fault(path: Path, digest: dict[str, Any]) -> str | None:
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size != digest["bytes"]:
                return f"{path.name} has {size} bytes, the manifest says {digest['bytes']}"
            if hashlib.file_digest(file, "sha256").hexdigest() != digest["sha256"]:
                return f"{path.name} does not match its sha256"
    except READ_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return None


def _stat_signature(folder: Path, files: FileDigests) -> Any:
    """What changes when a file is written: its number, size and time; None while a file is so new that a change might not show."""
    try:
        found = [(folder / name).stat() for name in (NAME, *files)]
    except OSError:
        return None
    if any(time.time() - one.st_mtime < 2 for one in found):
        return None
    return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found], files
