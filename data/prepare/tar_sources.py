"""Which tars a source names, and what they are called beside one another."""

from __future__ import annotations

import glob
import os
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

from condot.core.errors import summarize_list
from condot.core.regular_files import describe_file_kind

COMPRESSED = (".tar.gz", ".tgz")


def find_tars(source: str) -> list[Path]:
    """Return the tars of a folder, a brace pattern or a glob, sorted; those of its sub-folders for a folder that has none itself.

    Raises:
        ValueError: none, or some that are missing or no files.
    """
    if Path(source).is_dir():
        found = _tars_below(Path(source))
        if not found:
            raise ValueError(f"source {source!r} holds no .tar, .tar.gz or .tgz: name the folder in which the shards themselves lie.")
        return found
    try:
        names = sorted({name for pattern in braceexpand(source) for name in (sorted(glob.glob(pattern)) or [pattern])})
    except ValueError as error:
        raise ValueError(f"source {source!r} is no pattern: {error}. Write shards-{{000000..000009}}.tar.") from error
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise ValueError(
            f"source {source!r}: {len(missing)} of {len(names)} tars are not there: {summarize_list(missing, 3)}. Check the pattern."
        )
    return [Path(name) for name in names]


def _tars_below(folder: Path) -> list[Path]:
    """Return the tars of a folder, or else of its sub-folders, hidden ones apart.

    Raises:
        ValueError: one that is no file, but a pipe or a device.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    found = [folder / name for name in names if name.endswith((".tar", *COMPRESSED)) and not (folder / name).is_dir()]
    special = [f"{path} ({_kind(path)})" for path in found if not path.is_file()]
    if special:
        raise ValueError(f"{summarize_list(special, 3)}: no files. Name the tars by a pattern that leaves them out.")
    below = [folder / name for name in names if (folder / name).is_dir() and not (folder / name).is_symlink()]
    return found or [tar for inner in below for tar in _tars_below(inner)]


def output_names(tars: list[Path], output: Path) -> list[str]:
    """Return the name of each tar in the output: its own, or with its folders before it where two have the same.

    Raises:
        ValueError: two would still be the same.
    """
    names = [_plain_name(path.name) for path in tars]
    if len(set(names)) < len(names):
        root = os.path.commonpath([tar.parent for tar in tars])
        names = [_plain_name("-".join(tar.relative_to(root).parts)) for tar in tars]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two tars would both be {output / twice[0]}: index one folder at a time, or rename one.")
    return names


def _plain_name(name: str) -> str:
    """Return `a.tar` for `a.tar.gz`, `a.tgz` or `a.tar`."""
    return f"{name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}.tar"


def _kind(path: Path) -> str:
    return describe_file_kind(path.stat()) if path.exists() else "a link that leads to nothing"
