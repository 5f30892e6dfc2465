"""`prepare webdataset`: which tars an option names, the split of each, and the names of their classes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from condot.core.errors import describe_error
from condot.core.regular_files import read_regular

from ..format.manifest import Manifest
from ..format.sample_files import parse_image_extension
from .class_labels import class_name
from .source import split_from_name, to_utf8
from .splits import SPLIT_WORDS, SplitChoice, assign_splits, is_split_name, names_of_file, parse_splits, split_name_words
from .tar_sources import find_tars
from .webdataset import pack_webdataset

MAX_NAMES_BYTES = 1 << 26
"""Of a file of class names."""


def refuse_foreign(output: Path, names: list[str]) -> None:
    """Raise a ValueError where a folder that `data.prepare` never wrote to has files of names that it would write."""
    ours = any((output / name).exists() for name in ("manifest.json", ".packing/request.json", ".packed"))
    there = [name for name in names if not ours and os.path.lexists(output / name)]
    if there:
        raise ValueError(f"{output} holds {there[0]} and no manifest: choose another --output, or move it away.")


def class_names(path: Path | None) -> tuple[str, ...]:
    """Class names from a file.

    Raises:
        ValueError: no such file, a map whose numbers have gaps, no names.
    """
    if path is None:
        return ()
    try:
        written = read_regular(path, MAX_NAMES_BYTES).decode("utf-8-sig")
        raw: Any = json.loads(written) if written.lstrip()[:1] in ("[", "{") else [line for line in written.splitlines() if line.strip()]
        if isinstance(raw, dict):
            numbered = {int(number): name for number, name in raw.items()}
            raw = [numbered[number] for number in range(len(numbered))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"number {error} has no name" if isinstance(error, KeyError) else describe_error(error)
        raise ValueError(
            f"--class_names {path}: {what}. Write one name a line, a JSON list, or a JSON map of the numbers from 0 without gaps."
        ) from error
    if not raw or not all(isinstance(name, str) for name in raw):
        raise ValueError(f"--class_names {path}: {'no names' if not raw else 'names are texts'}. Write one name a line.")
    return tuple(map(class_name, raw))


def splits_of_tars(tars: list[Path], choice: SplitChoice, source: str) -> tuple[dict[Path, str], list[str]]:
    """Return the split of each tar that is packed, by the word in its name or in the nearest folder; and the tars that are left out.

    Raises:
        ValueError: some say a split and others none, or one says several.
    """
    top = Path(os.path.commonpath([tar.parent for tar in tars]))
    named = {str(tar.relative_to(top)): names_of_file(str(tar.relative_to(top))) for tar in tars}
    own = top.resolve().name  # counts where it is a split's name and nothing else: `val/`, not `my-test-shards/`
    alone = SPLIT_WORDS[split_name_words(own)[0]] if is_split_name(own) else "train"
    assigned = assign_splits(named, choice, f"source {source!r}") or dict.fromkeys(named, "train" if choice.ignored else alone)
    split_of = {tar: split for tar, split in zip(tars, assigned.values(), strict=True) if split is not None}
    return split_of, [to_utf8(name) for name, split in assigned.items() if split is None]


def pack_tars(args: argparse.Namespace) -> tuple[Manifest, dict[str, Any]]:
    """Index or link the tars that the options name; `output` becomes the folder of the tars where none is given."""
    if args.split and args.splits:
        raise ValueError(f"--split {args.split} and --splits {args.splits}: one is of all tars, the other of each. Give one of them.")
    tars = find_tars(args.source)
    split_of, left_out = (
        (dict.fromkeys(tars, args.split), []) if args.split else splits_of_tars(tars, parse_splits(args.splits), args.source)
    )
    plain = all(split == (args.split or split_from_name(tar.name) or "train") for tar, split in split_of.items())
    folders = sorted({tar.parent for tar in tars})
    if args.output is None and len(folders) > 1:
        raise ValueError(
            f"source {args.source!r} has tars in {len(folders)} folders, {folders[0]} first: give --output, where they are linked."
        )
    args.output = args.output or folders[0]
    if args.output.exists() and not (
        os.access(args.output, os.W_OK) and args.output.stat().st_mode & 0o222
    ):  # the mode counts for root too
        raise ValueError(f"{args.output} cannot be written, and indexes go beside the tars: give another folder as --output.")
    refuse_foreign(args.output, ["report.json", "summary.png"])
    manifest, report = pack_webdataset(
        list(split_of),
        args.output,
        class_names=class_names(args.class_names),
        split=args.split,
        split_of=None if plain else split_of,
        verify=args.verify,
        skip=args.skip_corrupt,
        workers=args.workers,
        image_extension=parse_image_extension(args.image_extension),
    )
    return manifest, {**report, "splits_left_out": dict.fromkeys(left_out)}
