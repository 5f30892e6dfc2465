"""What a folder of shards holds, in a few lines and as one picture: aspect ratios, sizes, and a sheet of samples."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from condot.core.file_lock import open_new
from condot.core.printable import printable
from condot.core.text_files import decode_text

from ..format.index_record import index_path, sample_span, slice_image
from ..format.manifest import Manifest, Tally
from ..format.tar_reader import parse_sample_files
from ..images.decode import DECODE_ERRORS, decode_preview

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE, LINE, MARGIN = 128, 16, 8
SHEET = 64
CHARTS, DPI = 220, 100
"""Height of the histograms, pixels, and how many of them are an inch to matplotlib."""
LONGEST = 512
"""Characters of a caption that are looked at for a line of SIDE pixels: the narrowest letters have three."""
INK, PAPER, BAR = "#222222", "white", "#4878a8"
ASPECTS = (1 / 4, 1 / 3, 1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2, 3, 4)
SIDES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)


def summary_text(manifest: Manifest, report: dict[str, Any], output: Path) -> str:
    """Return what was packed, in a few lines that may be printed."""
    tally = manifest.tally
    total = int(manifest.shards.samples.sum())
    lines = [f"{output}: {total:,} images in {len(manifest.shards)} shards, {manifest.shards.bytes.sum():,} bytes"]
    for split in sorted(manifest.shards.splits, key=lambda name: (name != "train", name)):
        shards = manifest.split(split)
        lines.append(f"  {split}: {shards.samples.sum():,} images in {len(shards)} shards")
    common = ", ".join(f"{size} ({count:,})" for size, count in list(tally.sizes.items())[:5])
    lines.append(f"  sizes: {common}{', ...' if len(tally.sizes) > 5 else ''}")
    names = ", ".join(manifest.class_names[:10]) + (", ..." if len(manifest.class_names) > 10 else "")
    lines.append(f"  classes: {len(manifest.class_names)}{f' ({names})' if names else ', so models of it are unconditional'}")
    lines.append(f"  captions: {tally.captions:,}" + (f", missing from {total - tally.captions:,}" if 0 < tally.captions < total else ""))
    return "\n".join(map(printable, lines + findings(report)))


def findings(report: dict[str, Any]) -> list[str]:
    """What the report says that someone should know."""
    lines = []
    same = report.get("duplicates", {})
    if same.get("count"):
        done = "left out" if same["left_out"] else "kept; --drop_duplicates leaves them out"
        across = f", {same['across_splits']:,} of them across splits" if same["across_splits"] else ""
        first = "; ".join(f"{copy} = {kept}" for kept, copy in same["list"][:3])
        lines.append(f"  duplicates: {same['count']:,}{across} ({done}): {first}")
    for kind, count in report.get("unknown_files", {}).items():
        lines.append(f"  not packed: {count:,} files {kind}")
    if report.get("joined_tars"):
        lines.append(f"  tars joined end to end, all of them read: {report['joined_tars']:,} behind the first of a file")
    for name, count in report.get("splits_left_out", {}).items():
        lines.append(f"  not packed, since --splits does not name it: {name}" + (f" ({count:,} images)" if count else ""))
    for link, folder in report.get("repeated_folders", [])[:3]:
        lines.append(f"  link not followed: {link} leads to {folder}, which is read already")
    gaps = report.get("classes_without_image", [])
    if gaps:
        lines.append(f"  class numbers without an image: {len(gaps):,}, such as {gaps[0]}")
    if report.get("renumbered_folders"):
        lines.append("  folders named by numbers that are not from 0 without gaps: a class has its place among them, not its name")
    if report.get("similar_classes"):
        lines.append(f"  classes that differ in capitals alone: {report['similar_classes'][0]}")
    if report.get("counted_folders"):
        lines.append(f"  no image is repeated for a number in its folder's name, such as {report['counted_folders'][0]}")
    orphans = report.get("captions_without_image", [])
    if orphans:
        lines.append(f"  captions without image: {len(orphans):,}, such as {orphans[0]}")
    if report.get("images_not_in_table"):
        kept = "not packed" if report.get("only_images_in_table") else "packed without caption or class"
        lines.append(f"  images that no table names: {report['images_not_in_table']:,}, {kept}")
    if report.get("resized"):
        lines.append(f"  made smaller: {report['resized']:,}")
    return lines


def draw_summary(folder: Path, manifest: Manifest, path: Path) -> None:
    """Write the picture of a folder: two histograms above a sheet of samples."""
    sheet = contact_sheet(_sample(folder, manifest), 8)
    charts = plot_histograms(manifest.tally, sheet.width)
    picture = Image.new("RGB", (sheet.width, charts.height + sheet.height), PAPER)
    picture.paste(charts, (0, 0))
    picture.paste(sheet, (0, charts.height))
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    with open_new(temporary) as file:
        picture.save(file, "PNG")
    os.replace(temporary, path)


def _histograms(tally: Tally) -> tuple[dict[str, int], dict[str, int]]:
    """Images by the nearest aspect ratio (on a log scale) and by the largest of SIDES not above theirs."""
    aspects = {ratio_name(value): 0 for value in ASPECTS}
    sides = {f"<{SIDES[0]}": 0, **{str(side): 0 for side in SIDES}}
    for size, count in tally.sizes.items():
        if size == "other":
            continue
        width, height = map(int, size.split("x"))
        aspects[ratio_name(nearest_ratio(width, height))] += count
        below = [side for side in SIDES if side * side <= width * height]
        sides[str(below[-1]) if below else f"<{SIDES[0]}"] += count
    return aspects, sides


def nearest_ratio(width: int, height: int) -> float:
    """The nearest of ASPECTS, on a log scale."""
    return min(ASPECTS, key=lambda value: abs(math.log(value * max(1, height) / max(1, width))))


def ratio_name(value: float) -> str:
    """Return the name of an aspect ratio: `4:3` for 1.333."""
    for height in (1, 2, 3, 4, 9, 16):
        if abs(value * height - round(value * height)) < 1e-9:
            return f"{round(value * height)}:{height}"
    return f"{value:.2f}"


def plot_histograms(tally: Tally, width: int) -> Image.Image:
    """Return both histograms side by side, RGB, (CHARTS, width) pixels.

    Args:
        tally: of all images.
        width: of the picture, pixels.
    """
    import matplotlib.style  # here, since it takes half a second that most commands need not spend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):  # not as the user's matplotlibrc has it
        figure = Figure(figsize=(width / DPI, CHARTS / DPI), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)  # no pyplot: no window, no global state
        titles = ("width / height", "side in pixels, sqrt(width x height)")
        for axes, title, bars in zip(figure.subplots(1, 2), titles, _histograms(tally), strict=True):
            draw_histogram(axes, title, bars)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw_histogram(axes: Axes, title: str, bars: dict[str, int]) -> None:
    """Draw bars with their names below and their counts above; what was not seen has no count."""
    drawn = axes.bar(list(bars), list(bars.values()), color=BAR)
    axes.bar_label(drawn, [format_count(count) if count else "" for count in bars.values()], fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_ylim(0, 1.15 * max(1, *bars.values()))  # room for the count of the highest
    axes.tick_params("x", length=0, labelsize=7)
    axes.yaxis.set_visible(False)
    axes.spines[["top", "left", "right"]].set_visible(False)


def format_count(count: int) -> str:
    """Return a count in few characters: 9999, 12k, 3M."""
    return f"{count}" if count < 10_000 else f"{count / 1000:.0f}k" if count < 10**7 else f"{count / 10**6:.0f}M"


def contact_sheet(tiles: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """Images in a grid, each whole in its square and named below; what is transparent stays so."""
    mode = "RGBA" if any(image.mode in ("LA", "RGBA") for image, _ in tiles) else "RGB"
    rows = max(1, -(-len(tiles) // columns))
    picture = Image.new(mode, (MARGIN + columns * (SIDE + MARGIN), MARGIN + rows * (SIDE + LINE + MARGIN)), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for i, (image, name) in enumerate(tiles):
        x, y = MARGIN + i % columns * (SIDE + MARGIN), MARGIN + i // columns * (SIDE + LINE + MARGIN)
        small = ImageOps.contain(
            image.convert(mode), (SIDE, SIDE), Image.Resampling.LANCZOS if max(image.size) > SIDE else Image.Resampling.NEAREST
        )
        picture.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        pen.text((x, y + SIDE + 1), shortened(name, SIDE, lambda line: pen.textlength(line, font)), INK, font)
    return picture


def shortened(name: str, width: float, measure: Callable[[str], float]) -> str:
    """Return as much of a text as fits on one line, with "..." where something is missing; however long it is, a few lines are measured.

    Args:
        name: any text, a caption of a megabyte too.
        width: of the line, in the unit of `measure`.
        measure: gives the width of a line.
    """
    line = printable(" ".join(name[:LONGEST].split()))[:LONGEST]
    if len(name) <= LONGEST and measure(line) <= width:
        return line
    fits = bisect_right(range(1, len(line) + 1), width, key=lambda count: measure(f"{line[:count]}..."))
    return f"{line[:fits].rstrip()}..." if fits else ""


def _sample(folder: Path, manifest: Manifest) -> list[tuple[Image.Image, str]]:
    """SHEET samples, evenly spaced over all shards, with their captions or classes."""
    counts = manifest.shards.samples
    ends, total = np.cumsum(counts), int(counts.sum())
    tiles = []
    for number in np.unique(np.linspace(0, max(0, total - 1), min(SHEET, total)).round().astype(int)).tolist():
        s = int(np.searchsorted(ends, number, side="right"))
        tar = folder / manifest.shards[s].name
        record = np.load(index_path(tar), mmap_mode="r", allow_pickle=False)[number - int(ends[s] - counts[s])]
        _, files, data = read_sample(tar, record)
        try:
            image = decode_preview(data)
        except DECODE_ERRORS:
            image = Image.new("RGB", (SIDE, SIDE), "#cc3333")  # red: it cannot be decoded
        tiles.append((image, _tile_label(files, int(record["label"]), manifest.class_names)))
    return tiles


def read_sample(tar: Path, record: np.void) -> tuple[str, dict[str, bytes], bytes]:
    """Return key, files and image of one sample, by its line of the index."""
    fields: tuple[Any, ...] = tuple(record.item())
    start, length = sample_span(fields)
    with open(tar, "rb", buffering=0) as file:
        body = os.pread(file.fileno(), length, start)
    return *parse_sample_files(body), slice_image(body, fields[3], fields[1])


def _tile_label(files: dict[str, bytes], label: int, names: Sequence[str]) -> str:
    """Return what to write below a sample: its caption, else its class."""
    with suppress(ValueError):  # what cannot be read is reported elsewhere
        if caption := decode_text(files.get("txt", b"")):
            return caption
    return names[label] if 0 <= label < len(names) else ""
