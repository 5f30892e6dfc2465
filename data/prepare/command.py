"""Make a folder of shards: `condot prepare imagefolder IMAGES --output SHARDS`.

Sources: `imagefolder` (class sub-folders; captions in `.txt`, CSV, JSON lines
or `metadata.csv`; `train`, `val` and `test` as splits), `parquet` (a file, folder, pattern or URL), `hub` (a data
set of the Hugging Face Hub), `webdataset` (existing tars) and `digits`
(handwritten digits that scikit-learn carries). A command that was stopped,
even killed, goes on when it is run again.
"""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path

from condot.core.data_config import parse_size
from condot.core.plugins import take_plugins
from condot.core.printable import one_line, printable, redact
from condot.core.urls import RedactingParser, expand_path

from ..storage.retry import LONGEST
from .pack import pack
from .report import summary_text
from .shard_plan import Packing
from .source_kinds import SOURCES
from .tar_command import refuse_foreign
from .worker_pool import silence_pillow

SHOWN = 20
"""Images left out that are named on the screen."""


def parser() -> argparse.ArgumentParser:
    """Return the command's options, each kind of source with its own."""
    top = RedactingParser(prog="condot prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="kind", required=True, metavar=f"{{{','.join(SOURCES)}}}")
    for name, kind in SOURCES.items():
        one = kinds.add_parser(name, help=kind.help)
        kind.add_arguments(one)
        if kind.open:
            _packing(one, kind.holdout)
        one.add_argument("--output", required=kind.pack is None, type=folder_here, help="folder of the shards")
        one.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be read, instead of stopping")
        one.add_argument("--workers", type=int, default=0, help="processes (default: one a processor, fewer for little work)")
    return top


def _packing(kind: argparse.ArgumentParser, holdout: float) -> None:
    kind.add_argument("--shard_size", default="256MB", help="bytes of one shard (default: 256MB)")
    kind.add_argument("--holdout", type=float, default=holdout, help=f"share kept from training as split `val` (default: {holdout:g})")
    kind.add_argument("--seed", type=int, default=0, help="of the order in which images are stored, and of the split")
    kind.add_argument(
        "--max_side", type=int, default=0, help="make larger images smaller, encoded anew (default: files are copied as they are)"
    )
    kind.add_argument("--drop_duplicates", action="store_true", help="keep only the first of images whose bytes are the same")


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
    try:
        words = take_plugins(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    args = parser().parse_args(words)
    silence_pillow()
    try:
        for name, option in (("source", "source"), ("output", "--output")):
            place = getattr(args, name, None)
            if place is not None and not str(place).startswith("pipe:"):  # a command's variables are the shell's
                setattr(args, name, type(place)(expand_path(str(place), option)))  # `~/`, and `${NAME}` of the environment
        if args.workers < 0:
            raise ValueError(f"--workers {args.workers}: 0 or more processes. Leave it out for one a processor.")
        kind = SOURCES[args.kind]
        if kind.pack:
            manifest, report = kind.pack(args)
        else:
            assert kind.open
            refuse_output(args)
            packing = Packing(parse_size(args.shard_size, "--shard_size"), args.holdout, args.seed, args.max_side, args.drop_duplicates)
            manifest, report = pack(kind.open(args), args.output, packing, skip=args.skip_corrupt, workers=args.workers)
        bad = report["unreadable"]
        for fault in bad["list"][:SHOWN]:
            print(printable(f"left out: {fault}"))
        if bad["count"] > SHOWN:
            print(printable(f"left out: {bad['count'] - SHOWN} more, in {args.output / 'report.json'}"))
        print(summary_text(manifest, report, args.output))
        print(printable(f"  pictures: {args.output / 'summary.png'}"))
    except (ValueError, OSError) as error:
        full = ". Free some space and run the same command again: finished shards are kept." if _full(error) else ""
        print(f"error: {one_line(error, LONGEST)}{full}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def _full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
