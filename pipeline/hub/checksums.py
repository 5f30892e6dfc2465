"""SHA256SUMS: the list by which an exported folder is known to be whole, in the format that `sha256sum -c SHA256SUMS` verifies."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from condot.core.model_folders import MOST_BYTES, is_own

CHECKSUM_FILE = "SHA256SUMS"
"""The list's file name."""
UNLISTED_FILES = ("README.md", "evaluation.json", "retrieval.json", CHECKSUM_FILE)
"""Not listed: the card is its owner's to complete, results come and go after the export, and a list cannot hold its own hash."""
QUICK_HASH_BYTES = 4_000_000
"""Bytes up to which a file is hashed whenever a folder is opened; 4 MB take some 10 milliseconds."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, as a sorted path with slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def write_checksums(folder: Path) -> None:
    """Write the list of a folder's files, except those in UNLISTED_FILES."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in list_files(folder) if name not in UNLISTED_FILES]
    (folder / CHECKSUM_FILE).write_text("".join(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """The hash of each listed file.

    Raises:
        ValueError: no list, a line that is none, or a path that leads out of the folder.
    """
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CHECKSUM_FILE}, so nobody can tell whether it is whole: export it again, `condot export --run RUN`."
        )
    if not is_own(path, folder) or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: a link that leads out of the folder, or more than {MOST_BYTES} bytes: export the folder again.")
    listed = {}
    for line in path.read_bytes().decode(errors="backslashreplace").removesuffix("\n").split("\n"):  # splitlines knows more ends
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not found or PurePosixPath(found[2]).is_absolute() or ".." in PurePosixPath(found[2]).parts:
            raise ValueError(f"{path}: {line[:80]!r} is no line of a list of hashes: export the folder again.")
        listed[found[2]] = found[1]
    return listed


def check_checksums(folder: Path, *, every: bool = False) -> dict[str, str]:
    """Hold a folder against its list.

    Args:
        folder: with a list; one without passes, unless `every`: folders of others have none.
        every: hash each file. Without it files above QUICK_HASH_BYTES bytes are only held
            against the size that their own safetensors header states.

    Returns:
        The listed hashes, by path.

    Raises:
        ValueError: files that are missing, changed, or links to files of elsewhere, by name.
    """
    if not every and not (folder / CHECKSUM_FILE).is_file():
        return {}
    listed = read_checksums(folder)
    missing = [name for name in listed if not (folder / name).is_file()]
    outside = [name for name in listed if name not in missing and not is_own(folder / name, folder)]
    changed = [name for name, wanted in listed.items() if name not in (*missing, *outside) and _differs(folder / name, wanted, every)]
    configurations = [
        path.relative_to(folder).as_posix()
        for path in (folder / "model_index.json", *sorted(folder.glob("*/*config.json")))
        if path.is_file()
    ]
    unlisted = [name for name in configurations if name not in listed]  # a list that was cut between two lines is none
    kinds = ((missing, "missing"), (outside, "a link that leads out of it"), (changed, "changed"), (unlisted, f"not in {CHECKSUM_FILE}"))
    faults = [f"{', '.join(names)} {what}" for names, what in kinds if names]
    if faults:
        raise ValueError(
            f"{folder} is not as it was exported: {'; '.join(faults)}. Export it again; if you changed it on purpose, "
            f"`sha256sum` the files anew into {CHECKSUM_FILE}."
        )
    return listed


def _differs(path: Path, wanted: str, every: bool) -> bool:
    """Whether a file is known to be another than the listed one."""
    if every or path.stat().st_size <= QUICK_HASH_BYTES:
        return sha256_of(path) != wanted
    return path.suffix == ".safetensors" and path.stat().st_size != safetensors_size(path)


def safetensors_size(path: Path) -> int:
    """Bytes that a safetensors file should have by its header: 8, the header, and the end of its last tensor; -1 if it has none."""
    try:
        header, length = read_safetensors_header(path)
        return 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return -1


def read_safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file, and its length in bytes.

    Raises:
        ValueError: the file has none.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(100_000_000, path.stat().st_size - 8):
            raise ValueError(f"{path}: no safetensors header of {length} bytes. The file is damaged: export again.")
        return json.loads(file.read(length)), length
