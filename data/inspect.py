"""Look at a folder of shards: `condot inspect SHARDS [--config recipe.yaml]`.

Prints counts, classes, sizes, aspect ratios, missing captions, what cannot be
read, and how fast this machine streams it; draws the first batches exactly as
training will see them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from condot.core.data_config import DataConfig
from condot.core.data_options import read_options
from condot.core.printable import one_line, printable
from condot.core.process import available_cpus
from condot.core.urls import RedactingParser

from .format.manifest import Manifest
from .format.sample_files import NO_LABEL
from .loader.build import build, open_shards
from .loader.captions import caption_warning
from .loader.stream import BatchStream, Share
from .prepare.report import contact_sheet, nearest_ratio, ratio_name
from .prepare.verify import ShardCheck, check_shard
from .prepare.worker_pool import run_jobs, silence_pillow
from .storage.retry import LONGEST
from .storage.shard_reader import LostShard, Shards

SECONDS = 3.0
"""Throughput is measured for so long, after the first batch."""
SHOWN = 20
PICTURED = 64
ALPHA_SUFFIXES = (".png", ".webp", ".avif", ".tif", ".tiff")


def parser() -> argparse.ArgumentParser:
    """The command's options; those of the stream replace the recipe's."""
    made = RedactingParser(prog="condot inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("shards", nargs="+", help="folders of shards")
    made.add_argument("--split", help="which split (default: the recipe's, else train)")
    made.add_argument("--samples", type=int, help="decode so many samples, evenly spaced, to find those that cannot be (default: all)")
    made.add_argument("--verify", action="store_true", help="hash all shards too and compare with the manifest (indexes always are)")
    made.add_argument("--output", type=Path, default=Path("inspect.png"), help="the picture of the first batches (default: inspect.png)")
    made.add_argument("--workers", type=int, default=0, help="processes that check (default: one a processor)")
    made.add_argument("--config", type=Path, help="a recipe, to see the batches of its run")
    made.add_argument("--seed", type=int, help="of the order (default: the recipe's, else 0)")
    made.add_argument("--batch_size", type=int, help="(default: the recipe's, else 64)")
    made.add_argument("--resolution", type=int, help="in pixels (default: the recipe's, else 256)")
    made.add_argument("--channels", type=int, help="1 gray, 2 with alpha, 3 RGB, 4 with alpha, more: bands (default: the recipe's, else 3)")
    made.add_argument("--bit_depth", type=int, help="8, or 16 as 16-bit files have them (default: the recipe's, else 8)")
    for flag in ("horizontal_flip", "random_crop"):
        made.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=None)
    return made


def resolve_options(args: argparse.Namespace) -> tuple[DataConfig, int, int]:
    """The stream's options, its seed and batch size: the recipe's where the command does not say.

    Raises:
        ValueError: no such recipe, or values that cannot be right.
    """
    names = ("split", "resolution", "channels", "bit_depth", "horizontal_flip", "random_crop")
    over: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    over |= {"shards": tuple(args.shards), "encoding": "online"}
    options, recipe = (read_options(args.config, over)) if args.config else (DataConfig(**over), {})
    seed = args.seed if args.seed is not None else int(recipe.get("seed", 0))
    batch = args.batch_size if args.batch_size is not None else int(recipe.get("train", {}).get("batch_size", 64))
    if batch < 1:
        raise ValueError(f"--batch_size {batch}: at least one image. Use 64.")
    return options, seed, batch


def describe_split(shards: Shards, split: str) -> list[str]:
    """Counts, classes, sizes and aspect ratios of one split, from its indexes."""
    sizes, labels = Counter[tuple[int, int]](), Counter[int]()
    for shard in range(len(shards.counts)):
        try:
            records = shards.records(shard)
        except LostShard:
            continue  # `find_bad` names it
        sizes.update(zip(records["width"].tolist(), records["height"].tolist(), strict=True))
        labels.update(records["label"].tolist())
    total, unlabelled = sum(sizes.values()), labels.pop(NO_LABEL, 0)
    lines = [f"{split}: {sum(shards.counts):,} images in {len(shards.counts):,} shards of {min(shards.counts):,} to {max(shards.counts):,}"]
    if not total:
        return lines
    sides = sorted((min(size), count) for size, count in sizes.items())
    median = next(side for (side, _), sum_ in zip(sides, accumulate(n for _, n in sides), strict=True) if 2 * sum_ >= total)
    common = ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in sizes.most_common(5))
    lines.append(f"  sizes: {common}{', ...' if len(sizes) > 5 else ''}")
    lines.append(f"  shorter side: {sides[0][0]} to {sides[-1][0]}, median {median}")
    ratios = Counter[float]()
    for (width, height), count in sizes.items():
        ratios[nearest_ratio(width, height)] += count
    lines.append(f"  width / height, nearest: {', '.join(f'{ratio_name(r)} ({n:,})' for r, n in sorted(ratios.items()))}")
    names = shards.manifest.class_names
    shown = ", ".join(f"{names[i] if i < len(names) else i} ({n:,})" for i, n in labels.most_common(SHOWN))
    empty = sum(1 for i in range(len(names)) if i not in labels)
    lines.append(f"  classes: {len(names)}{f': {shown}' if shown else ''}{', ...' if len(labels) > SHOWN else ''}")
    if empty:
        lines.append(f"  classes without an image in {split}: {empty}")
    if unlabelled and labels:
        lines.append(f"  without a class: {unlabelled:,}")
    return lines


def describe_captions(manifests: list[Manifest]) -> str:
    """How many samples of all splits have captions."""
    total = sum(int(manifest.shards.samples.sum()) for manifest in manifests)
    have = sum(manifest.tally.captions for manifest in manifests)
    return f"captions: {have:,} of {total:,} in all splits" + (f", {total - have:,} missing" if 0 < have < total else "")


def find_bad(shards: Shards, options: DataConfig, samples: int | None, verify: bool, workers: int) -> tuple[int, list[str]]:
    """Decode samples as training would, and read their captions; gives how many were decoded, and what is wrong, by shard and key."""
    counts = shards.samples
    total, starts = int(counts.sum()), np.cumsum(counts) - counts
    wanted = total if samples is None else min(samples, total)
    chosen = np.unique(np.linspace(0, total - 1, wanted).round().astype(np.int64)) if wanted else np.zeros(0, np.int64)
    jobs = []
    places = [(shard, folder) for folder, part in zip(shards.folders, shards.parts, strict=True) for shard in part]
    for number, (shard, folder) in enumerate(places):
        here = chosen[(chosen >= starts[number]) & (chosen < starts[number] + counts[number])] - starts[number]
        if len(here) or verify:
            classes = len(folder.manifest.class_names)
            job = ShardCheck(folder.file(shard), shard, here, classes, verify, options.caption, options.channels, options.bit_depth)
            jobs.append(job)
    bad: list[str] = []
    useful = min(len(jobs), workers or min(available_cpus(), len(chosen) // 5000 + 1))
    with tqdm(total=len(chosen), desc="checking", unit="image", mininterval=1) as bar:
        for found in run_jobs(check_shard, jobs, useful, lambda done: bar.update(done)):
            bad += found
    return len(chosen), sorted(bad)


def throughput(stream: BatchStream) -> float:
    """Images a second that the stream gives here, with nothing to take them."""
    next(stream)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        count += len(next(stream).labels)
    return count / (time.perf_counter() - began)


def draw_first_batches(stream: BatchStream, names: tuple[str, ...]) -> Image.Image:
    """The first batches in a grid: pixels as the model gets them, with captions or classes."""
    tiles: list[tuple[Image.Image, str]] = []
    while len(tiles) < PICTURED:
        batch = next(stream)
        captions = batch.captions or ("",) * len(batch.labels)
        for pixels, label, caption in zip(batch.images.numpy(), batch.labels.tolist(), captions, strict=True):
            tiles.append((shown(pixels), caption or (names[label] if 0 <= label < len(names) else "")))
    return contact_sheet(tiles[:PICTURED], 8)


def shown(pixels: np.ndarray) -> Image.Image:
    """Pixels, (C, H, W), with 8 bits a channel: gray, RGB, either with its alpha; of more bands the first three."""
    eight = pixels if pixels.dtype == np.uint8 else np.round(pixels / 257).astype(np.uint8)
    array = np.ascontiguousarray(rearrange(eight[: 3 if len(eight) > 4 else None], "c h w -> h w c"))
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save(image: Image.Image, path: Path) -> None:
    """Write a picture; where the file's format has no alpha, on white."""
    if image.mode == "RGBA" and path.suffix.lower() not in ALPHA_SUFFIXES:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 where something is wrong with the shards."""
    args = parser().parse_args(argv)
    silence_pillow()
    try:
        options, seed, batch = resolve_options(args)
        shards = open_shards(options)
        print("\n".join(map(printable, describe_split(shards, options.split))))
        print(describe_captions([folder.manifest for folder in shards.folders]))
        if note := caption_warning(shards, options.caption):
            print(note)
        checked, bad = find_bad(shards, options, args.samples, args.verify, args.workers)
        print(f"checked: {checked:,} of {sum(shards.counts):,} images{' and all hashes' if args.verify else ''}, {len(bad):,} bad")
        for line in bad[:SHOWN]:
            print(f"  {printable(line)}")
        if len(bad) > SHOWN:
            print(f"  and {len(bad) - SHOWN:,} more")
        share = Share(batch_size=batch)
        first = build(options, seed=seed, share=share, captions=True, images=shards)
        save(draw_first_batches(first, shards.manifest.class_names), args.output)
        first.close()
        bands = f", the first three of {options.channels} bands" if options.channels > 4 else ""
        print(f"the first {PICTURED} images of training, seed {seed}{bands}: {args.output}")
        rate = throughput(build(options, seed=seed, share=share, images=shards))
        print(f"stream: {rate:,.0f} images/s at {options.resolution} px with {options.workers} threads on this machine")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error, LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    return 1 if bad else 0
