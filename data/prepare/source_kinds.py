"""The kinds of source that `prepare` packs: each with its options and how it is opened. A plugin adds to the table.

@source("mine", help="frames of my films")
def open_films(args: argparse.Namespace) -> ImageSource: ...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from condot.core.registry import Registry

from ..format.manifest import Manifest
from .digits import digits
from .hub import hub
from .imagefolder import imagefolder
from .parquet import parquet
from .source import ImageSource
from .splits import parse_splits
from .table_columns import ColumnChoice
from .tar_command import pack_tars

FILE_HELP = {
    "file": "column of file names in a table, where it is not found by its name; none to look at no table",
    "image": "column of images, where it is not found by its type or name",
}


class SourceKind(NamedTuple):
    """One kind of source; either `open` or `pack` is given."""

    help: str
    """A line of `prepare --help`."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Adds what only this kind takes; `--output`, `--workers` and the options of packing are there already."""
    open: Callable[[argparse.Namespace], ImageSource] | None = None
    """Opens the source that the options name."""
    pack: Callable[[argparse.Namespace], tuple[Manifest, dict[str, Any]]] | None = None
    """Makes the shards by itself, and sets `output` where that may be left out."""
    holdout: float = 0.0
    """Share kept as split `val` unless `--holdout` says otherwise."""


SOURCES: Registry[SourceKind] = Registry("source")
"""Every kind of source that `prepare` can name."""


def add_source_argument(parser: argparse.ArgumentParser) -> None:
    """Add the one word that most sources take: where they lie, a path or a URL."""
    parser.add_argument("source", help="where it lies")


def source(
    name: str,
    *,
    help: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = add_source_argument,
    holdout: float = 0.0,
) -> Callable[[Callable[[argparse.Namespace], ImageSource]], Callable[[argparse.Namespace], ImageSource]]:
    """Return a decorator that registers what opens a source; arguments as in `SourceKind`."""

    def decorate(open: Callable[[argparse.Namespace], ImageSource]) -> Callable[[argparse.Namespace], ImageSource]:
        SOURCES.add(name, SourceKind(help, add_arguments, open, holdout=holdout))
        return open

    return decorate


def _add_splits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--splits",
        default="",
        help="those to pack, by the names of folders, files or Hub splits, each NAME or NAME=SPLIT, with commas: "
        "train,testA,extra=train; none: names say nothing, all is training data (default: all, by the words in their names)",
    )


def _add_columns(parser: argparse.ArgumentParser, named: str) -> None:
    parser.add_argument(f"--{named}_column", default="", help=FILE_HELP[named])
    parser.add_argument("--caption_column", default="", help="column of captions, where it is not found by its name; none for no captions")
    parser.add_argument("--label_column", default="", help="column of classes, where it is not found by its name; none for no classes")


def _columns(args: argparse.Namespace) -> ColumnChoice:
    return ColumnChoice(getattr(args, "file_column", ""), getattr(args, "image_column", ""), args.caption_column, args.label_column)


def _folder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder, or a .csv, .tsv, .jsonl or .parquet table of the image files to pack")
    _add_splits(parser)
    _add_columns(parser, "file")


@source("imagefolder", help="image files in a folder", add_arguments=_folder_arguments)
def _open_folder(args: argparse.Namespace) -> ImageSource:
    return imagefolder(args.source, _columns(args), parse_splits(args.splits), skip=args.skip_corrupt)


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file, a folder, a pattern or a URL")
    _add_splits(parser)
    _add_columns(parser, "image")


@source("parquet", help="parquet files with a column of images", add_arguments=_table_arguments)
def _open_table(args: argparse.Namespace) -> ImageSource:
    return parquet(args.source, _columns(args), parse_splits(args.splits))


def _hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="its name, say user/photos, or a local folder that `datasets` loads")
    parser.add_argument("--subset", help="its configuration, where it has several")
    _add_splits(parser)
    _add_columns(parser, "image")


@source("hub", help="a data set of the Hugging Face Hub", add_arguments=_hub_arguments)
def _open_hub(args: argparse.Namespace) -> ImageSource:
    return hub(args.source, args.subset, parse_splits(args.splits), _columns(args))


def _tar_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder, a brace pattern or a glob of .tar, .tar.gz or .tgz")
    parser.add_argument("--split", default="", help="of all tars (default: by the words in their names and folders, else train)")
    parser.add_argument(
        "--image_extension", default="", help="the image, where samples have several: png, or seg.png (default: the only one)"
    )
    parser.add_argument("--verify", action="store_true", help="decode every image")
    parser.add_argument("--class_names", type=Path, help="a file with one name a line, a JSON list, or a JSON map from numbers to names")
    _add_splits(parser)


SOURCES.add("webdataset", SourceKind("existing tars of samples, indexed in place or linked", _tar_arguments, pack=pack_tars))


@source("digits", help="scikit-learn's handwritten digits", add_arguments=lambda parser: None, holdout=0.2)
def _open_digits(args: argparse.Namespace) -> ImageSource:
    return digits()
