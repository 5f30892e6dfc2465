"""Pack images into shards: `python -m data.prepare imagefolder IMAGES --output SHARDS`.

A folder's sub-folders are its classes; a `.txt` beside an image is its
caption. `digits` packs the handwritten digits that scikit-learn carries,
through the same code.
"""

from __future__ import annotations

import argparse
import errno
import io
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .index import IMAGE_EXTENSIONS, Manifest
from .pack import Packing, Source, pack

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def digits() -> tuple[list[Source], tuple[str, ...]]:
    """scikit-learn's handwritten digits: 1,797 scans of 8 x 8 pixels in 17 grays, 10 classes.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
    Digits, UCI Machine Learning Repository, CC BY 4.0.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn: install it with `pip install condot[demo]`, or `pip install scikit-learn`."
        ) from error
    bunch = load_digits()

    def png(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.round(bunch.images[number] * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [Source(f"digits/{i}", "png", partial(png, i), int(label), f"a handwritten {label}") for i, label in enumerate(bunch.target)]
    return samples, tuple(str(name) for name in bunch.target_names)


def imagefolder(root: Path) -> tuple[list[Source], tuple[str, ...]]:
    """The images below a folder, with classes from its sub-folders and captions from `.txt` files.

    Raises:
        ValueError: no such folder, no image, or images both beside and inside class folders.
    """
    if not root.is_dir():
        raise ValueError(f"source {str(root)!r} is no folder: give the folder that holds the images or one sub-folder a class.")
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not files:
        raise ValueError(f"source {str(root)!r} holds no image: looked for .{', .'.join(IMAGE_EXTENSIONS)} in it and its sub-folders.")
    tops = [path.relative_to(root).parts[0] if path.parent != root else "" for path in files]
    classes = sorted(set(tops) - {""})
    if classes and "" in tops:
        loose = files[tops.index("")]
        raise ValueError(f"{loose} lies beside the class folders {', '.join(classes[:3])}: put every image into a class, or none.")
    samples = []
    for path, top in zip(files, tops, strict=True):
        text = path.with_suffix(".txt")
        caption = text.read_text().strip() if text.is_file() else None
        label = classes.index(top) if classes else None
        samples.append(Source(str(path.relative_to(root)), path.suffix.lower().lstrip("."), path.read_bytes, label, caption))
    return samples, tuple(classes)


def bytes_of(text: str) -> int:
    """`256MB` as a number of bytes; a ValueError for what is no size."""
    match = re.fullmatch(r"([\d.]+)\s*([kKmMgG]?[bB]?)", text)
    try:
        unit = match[2].upper() if match else "?"
        return int(float(match[1]) * UNITS[unit if unit in UNITS else f"{unit}B"]) if match else int(text)
    except ValueError as error:
        raise ValueError(f"--shard_size {text!r} is no size: write 256MB, 1GB or a number of bytes.") from error


def summary(manifest: Manifest, output: Path) -> str:
    """What was packed, in a few lines."""
    lines = [
        f"{output}: {sum(s.samples for s in manifest.shards):,} images in "
        f"{len(manifest.shards)} shards, {sum(s.bytes for s in manifest.shards):,} bytes"
    ]
    for split in sorted({s.split for s in manifest.shards}):
        shards = manifest.split(split)
        lines.append(f"  {split}: {sum(s.samples for s in shards):,} images in {len(shards)} shards")
    common = ", ".join(f"{size} ({count:,})" for size, count in list(manifest.sizes.items())[:5])
    names = ", ".join(manifest.class_names[:10]) + (", ..." if len(manifest.class_names) > 10 else "")
    lines.append(f"  sizes: {common}{', ...' if len(manifest.sizes) > 5 else ''}")
    lines.append(f"  classes: {len(manifest.class_names)}{f' ({names})' if names else ', so models of it are unconditional'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("imagefolder", "digits"), help="what is packed")
    parser.add_argument("source", nargs="?", type=Path, help="the folder of images; not for digits")
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--shard_size", default="256MB", help="bytes of one shard (default: 256MB)")
    parser.add_argument("--holdout", type=float, help="share of the images kept from training as split `val` (default: 0; digits: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which images are stored, and of the split")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be read, instead of stopping")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.kind == "imagefolder"):
        parser.error(f"{args.kind} {'needs a source folder' if args.source is None else 'takes no source'}")
    try:
        holdout = args.holdout if args.holdout is not None else 0.2 if args.kind == "digits" else 0.0
        packing = Packing(bytes_of(args.shard_size), holdout, args.seed, args.skip_corrupt)
        samples, classes = digits() if args.kind == "digits" else imagefolder(args.source)
        print(summary(pack(samples, classes, args.output, packing), args.output))
    except (ValueError, OSError) as error:
        full = " Free some space and run the same command again." if getattr(error, "errno", None) == errno.ENOSPC else ""
        print(f"error: {error}{full}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was packed; run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
