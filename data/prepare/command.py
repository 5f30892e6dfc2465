"""Make a folder of shards: `python -m data.prepare imagefolder IMAGES --output SHARDS`.

Sources: `imagefolder` (class sub-folders; captions in `.txt`, CSV, JSON lines
or `metadata.csv`; `train`, `val` and `test` as splits), `parquet` (a file, folder, pattern or URL), `hub` (a data
set of the Hugging Face Hub), `webdataset` (existing tars) and `digits`
(handwritten digits that scikit-learn carries). A command that was stopped,
even killed, goes on when it is run again.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from condot.core.data_options import parse_size
from condot.core.errors import describe_error
from condot.core.printable import printable, redact
from condot.core.regular_files import read_regular
from condot.core.urls import RedactingParser, expand_path

from ..format.manifest import Manifest
from ..format.sample_files import parse_image_extension
from ..storage.retry import one_line
from .class_labels import class_name
from .digits import digits
from .hub import hub
from .imagefolder import imagefolder
from .pack import pack
from .parquet import parquet
from .report import summary_text
from .shard_plan import Packing
from .source import ImageSource, split_from_name, to_utf8
from .splits import SPLIT_WORDS, SplitChoice, assign_splits, is_split_name, names_of_file, parse_splits, split_name_words
from .table_columns import ColumnChoice
from .tar_sources import find_tars
from .webdataset import pack_webdataset
from .worker_pool import silence_pillow

SHOWN = 20
"""Images left out that are named on the screen."""
FILE_HELP = {
    "file": "column of file names in a table, where it is not found by its name; none to look at no table",
    "image": "column of images, where it is not found by its type or name",
}
MAX_NAMES_BYTES = 1 << 26
"""Of a file of class names."""


def parser() -> argparse.ArgumentParser:
    """The command's options, each kind of source with its own."""
    top = RedactingParser(prog="condot prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="{imagefolder,parquet,hub,webdataset,digits}")
    folder = kinds.add_parser("imagefolder", help="image files in a folder")
    folder.add_argument("source", type=Path, help="a folder, or a .csv, .tsv, .jsonl or .parquet table of the image files to pack")
    table = kinds.add_parser("parquet", help="parquet files with a column of images")
    table.add_argument("source", help="a file, a folder, a pattern or a URL")
    remote = kinds.add_parser("hub", help="a data set of the Hugging Face Hub")
    remote.add_argument("source", help="its name, say user/photos, or a local folder that `datasets` loads")
    remote.add_argument("--subset", help="its configuration, where it has several")
    tars = kinds.add_parser("webdataset", help="existing tars of samples, indexed in place or linked")
    tars.add_argument("source", help="a folder, a brace pattern or a glob of .tar, .tar.gz or .tgz")
    tars.add_argument("--split", default="", help="of all tars (default: by the words in their names and folders, else train)")
    tars.add_argument(
        "--image_extension", default="", help="the image, where samples have several: png, or seg.png (default: the only one)"
    )
    tars.add_argument("--verify", action="store_true", help="decode every image")
    tars.add_argument("--class_names", type=Path, help="a file with one name a line, a JSON list, or a JSON map from numbers to names")
    for kind in (folder, table, remote, tars):
        kind.add_argument(
            "--splits",
            default="",
            help="those to pack, by the names of folders, files or Hub splits, each NAME or NAME=SPLIT, with commas: "
            "train,testA,extra=train; none: names say nothing, all is training data (default: all, by the words in their names)",
        )
    for kind, named in ((folder, "file"), (table, "image"), (remote, "image")):
        kind.add_argument(f"--{named}_column", default="", help=FILE_HELP[named])
        kind.add_argument(
            "--caption_column", default="", help="column of captions, where it is not found by its name; none for no captions"
        )
        kind.add_argument("--label_column", default="", help="column of classes, where it is not found by its name; none for no classes")
    scans = kinds.add_parser("digits", help="scikit-learn's handwritten digits")
    for kind in (folder, table, remote, scans):
        _packing(kind, holdout=0.2 if kind is scans else 0.0)
    for kind in (folder, table, remote, tars, scans):
        kind.add_argument("--output", required=kind is not tars, type=folder_here, help="folder of the shards")
        kind.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be read, instead of stopping")
        kind.add_argument("--workers", type=int, default=0, help="processes (default: one a processor, fewer for little work)")
    return top


def _packing(kind: argparse.ArgumentParser, holdout: float) -> None:
    kind.add_argument("--shard_size", default="256MB", help="bytes of one shard (default: 256MB)")
    kind.add_argument("--holdout", type=float, default=holdout, help=f"share kept from training as split `val` (default: {holdout:g})")
    kind.add_argument("--seed", type=int, default=0, help="of the order in which images are stored, and of the split")
    kind.add_argument(
        "--max_side", type=int, default=0, help="make larger images smaller, encoded anew (default: files are copied as they are)"
    )
    kind.add_argument("--drop_duplicates", action="store_true", help="keep only the first of images whose bytes are the same")


def open_source(args: argparse.Namespace) -> ImageSource:
    """The source that the options name."""
    if args.kind == "digits":
        return digits()
    choice = ColumnChoice(getattr(args, "file_column", ""), getattr(args, "image_column", ""), args.caption_column, args.label_column)
    splits = parse_splits(args.splits)
    if args.kind == "imagefolder":
        return imagefolder(args.source, choice, splits, skip=args.skip_corrupt)
    if args.kind == "parquet":
        return parquet(args.source, choice, splits)
    return hub(args.source, args.subset, splits, choice)


def refuse_output(args: argparse.Namespace) -> None:
    """Raise a ValueError where shards would lie among what they are made from, or replace a picture that is no summary of ours."""
    output, source = args.output.resolve(), Path(str(getattr(args, "source", ""))).absolute()
    if args.kind == "imagefolder" and output == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(
            f"--output {args.output} is the folder of the images. Name another for the shards, such as {args.output / 'shards'}."
        )
    if args.kind == "hub" and source.is_dir() and output.is_relative_to(source.resolve()):
        raise ValueError(f"--output {args.output} lies inside the source, where `datasets` would find it. Name a folder outside of it.")
    refuse_foreign(args.output, [] if any(args.output.glob("*.tar")) else ["summary.png"])


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


def _webdataset(args: argparse.Namespace) -> tuple[Manifest, dict[str, Any]]:
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


def folder_here(text: str) -> Path:
    """Return the folder that an option names, of this machine.

    Raises:
        argparse.ArgumentTypeError: no name, or a URL, which a path would take for folders.
    """
    if not text.strip() or "://" in text:
        raise argparse.ArgumentTypeError(printable(f"{redact(text)!r} is no folder of this machine. Name one, such as shards/digits."))
    return Path(text)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(argv)
    silence_pillow()
    try:
        for name, option in (("source", "source"), ("output", "--output")):
            place = getattr(args, name, None)
            if place is not None:
                setattr(args, name, type(place)(expand_path(str(place), option)))  # `~/`, and `${NAME}` of the environment
        if args.workers < 0:
            raise ValueError(f"--workers {args.workers}: 0 or more processes. Leave it out for one a processor.")
        if args.kind == "webdataset":
            manifest, report = _webdataset(args)
        else:
            refuse_output(args)
            packing = Packing(parse_size(args.shard_size, "--shard_size"), args.holdout, args.seed, args.max_side, args.drop_duplicates)
            manifest, report = pack(open_source(args), args.output, packing, skip=args.skip_corrupt, workers=args.workers)
        bad = report["unreadable"]
        for fault in bad["list"][:SHOWN]:
            print(printable(f"left out: {fault}"))
        if bad["count"] > SHOWN:
            print(printable(f"left out: {bad['count'] - SHOWN} more, in {args.output / 'report.json'}"))
        print(summary_text(manifest, report, args.output))
        print(printable(f"  pictures: {args.output / 'summary.png'}"))
    except (ValueError, OSError) as error:
        full = ". Free some space and run the same command again: finished shards are kept." if _full(error) else ""
        print(f"error: {one_line(error)}{full}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def _full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
