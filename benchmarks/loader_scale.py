"""What size costs: a billion samples in 100,000 shards, begun anywhere; a million samples streamed. `loader.py --scale` runs it.

The shards are simulated where they cannot be had: a manifest of 100,000
lines, whose shards are one real shard under 100,000 names (hard links to one
tar and one index), so that opening, planning and reading do all they do.
"""

import os
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

from condot.core.data_config import DataConfig
from condot.data.format.index import index_tar
from condot.data.format.manifest import Manifest, Tally, write_manifest
from condot.data.loader.build import build, open_shards
from condot.data.loader.stream import Share
from condot.data.storage.shard_reader import Shards

SHARDS, EACH = 100_000, 10_000


def rss() -> float:
    """Resident megabytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def one_shard(folder: Path, count: int) -> Path:
    """A tar of so many 8 x 8 images."""
    import io
    import tarfile

    from PIL import Image

    folder.mkdir(exist_ok=True)
    path = folder / "one.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (i % 256, i // 256 % 256, 7)).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"{i:06d}.jpg")
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


def scale(scratch: Path) -> None:
    """Print what opening, beginning, and going on cost."""
    first = one_shard(scratch, EACH)
    shard, _ = index_tar(first, "train")
    folder = scratch / "billion"
    folder.mkdir()
    lines = []
    base = first
    for number in range(SHARDS):
        if number % 50_000 == 0:  # a file has at most 65,000 names
            base = folder / f"base-{number}"
            shutil.copy(first, base)
            shutil.copy(first.with_suffix(".npy"), f"{base}.npy")
        name = f"train-{number:06d}"
        os.link(base, folder / f"{name}.tar")
        os.link(f"{base}.npy", folder / f"{name}.npy")
        lines.append(replace(shard, name=f"{name}.tar"))
    write_manifest(folder, Manifest(shards=tuple(lines), tally=Tally(sizes={"8x8": SHARDS * EACH})))
    print(f"a simulated billion: {SHARDS:,} shards of {EACH:,}; manifest {(folder / 'manifest.json').stat().st_size / 1e6:.0f} MB")
    before = rss()
    options = DataConfig(shards=(str(folder),), resolution=8, workers=0)
    began = time.perf_counter()
    shards = open_shards(options)
    opened, mapped = time.perf_counter() - began, 24 * EACH * SHARDS / 1e9
    print(f"open: {opened:.2f} s, {rss() - before:.0f} MB resident a rank; index {mapped:.0f} GB mapped")
    for kind, more in (("plain", {}), ("buckets", {"aspect_ratios": (0.5, 1.0, 2.0), "bucket_step": 2})):
        begin(replace(options, **more), shards, kind)
    folder = shards.folders[0]
    twice = Shards([folder, folder])
    mixed = replace(options, shards=("a", "b"), weights=(0.3, 0.7), aspect_ratios=(0.5, 1.0, 2.0), bucket_step=2)
    begin(mixed, twice, "buckets and two sources")
    epoch(options, shards)
    million(scratch / "million", first)


def begin(options: DataConfig, shards, kind: str) -> None:
    """From nothing but a position to a batch in hand."""
    build_shapes = dict(shards.manifest.tally.sizes)
    if options.aspect_ratios:  # every bucket must seem used
        shards.manifest.tally.sizes.update({"4x8": 1, "8x4": 1})
    times = {}
    for position in (0, 10 * 256, 10_000_000 // 256 * 256, 999_999_999 // 256 * 256):
        clock = []
        for _ in range(5):
            began = time.perf_counter()
            next(build(options, seed=1, share=Share(batch_size=256, ranks=8, rank=3), start=position, images=shards))
            clock.append(time.perf_counter() - began)
        times[position] = sorted(clock)[2]
    shards.manifest.tally.sizes.clear()
    shards.manifest.tally.sizes.update(build_shapes)
    print(f"first batch, {kind}, at position: " + ", ".join(f"{p:,}: {1000 * t:.0f} ms" for p, t in times.items()))


def epoch(options: DataConfig, shards) -> None:
    """Time a batch at 90 % of an epoch against 1 %."""
    found = {}
    for share in (0.01, 0.9, 0.01, 0.9):
        stream = build(options, seed=1, share=Share(batch_size=256), start=int(share * SHARDS * EACH) // 256 * 256, images=shards)
        next(stream)
        began = time.process_time()
        for _ in range(100):
            next(stream)
        found.setdefault(share, []).append(time.process_time() - began)
    print(f"time of a batch at 90 % of an epoch / at 1 %: {min(found[0.9]) / min(found[0.01]):.2f} (target at most 1.2)")


def million(folder: Path, tar: Path) -> None:
    """Resident memory over a million samples."""
    folder.mkdir()
    lines, tally = [], Tally()
    for number in range(20):
        shutil.copy(tar, folder / f"train-{number:06d}.tar")
        shard, held = index_tar(folder / f"train-{number:06d}.tar", "train")
        lines, tally = [*lines, shard], tally + held
    write_manifest(folder, Manifest(shards=tuple(lines), tally=tally))
    stream = build(DataConfig(shards=(str(folder),), resolution=8, workers=2), seed=1, share=Share(batch_size=256))
    marks = {}
    for step in range(1_000_000 // 256 + 1):
        next(stream)
        if step in (100_000 // 256, 500_000 // 256, 1_000_000 // 256):
            marks[step * 256] = rss()
    stream.close()
    values = list(marks.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    shown = ", ".join(f"{n:,}: {m:.0f} MB" for n, m in marks.items())
    growth = 100 * (values[-1] / values[0] - 1)
    print(f"resident over a million samples: {shown}: growth {growth:.2f} % (target below 1 %), peak {peak:.0f} MB")
