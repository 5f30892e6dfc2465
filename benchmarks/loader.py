"""What our loader costs beside decoding itself, and beside the other loaders, on the same images in one interleaved run.

The floor is simplejpeg over bytes in memory, straight into the batch's array:
the least that any loader does; `floor, stacked` makes arrays and stacks them,
as the others do. Every loader decodes with simplejpeg. Figures are CPU
microseconds a sample, children included, medians over rounds; shares and
ratios are of medians. Images come from ../shared/data, or are made here.

    python benchmarks/loader.py [--rounds 7] [--sizes 32 256 512] [--scale]

`--scale` measures what a billion samples would cost instead.
"""

import argparse
import gzip
import io
import os
import resource
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from condot.core.data_config import DataConfig
from condot.data.format.index import NO_LABEL, index_tar
from condot.data.format.index_record import RECORD
from condot.data.format.manifest import Manifest, Tally, write_manifest
from condot.data.loader.build import EncodedCache, build
from condot.data.loader.stream import Share
from condot.data.storage.shard_reader import Shards

SHARED = ROOT.parent / "shared" / "data"
BATCH = 64
TARGETS = {32: (0.75, 5.0), 256: (0.93, 1.5), 512: (0.95, None)}


# --- the images


def shards_of(folder: Path, size: int) -> Path:
    """A folder of indexed shards of JPEG files of one size: CIFAR-10 at 32, photographs above."""
    folder.mkdir(parents=True)
    if size == 32 and SHARED.is_dir():
        for path in sorted((SHARED / "cifar10").glob("*train*.tar.gz"))[:8]:
            with gzip.open(path) as packed, open(folder / path.name.removesuffix(".gz"), "wb") as out:
                shutil.copyfileobj(packed, out)
    else:
        bodies = photographs(size)
        for number in range(4):
            with tarfile.open(folder / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for i, body in enumerate(bodies[number::4]):
                    for name, content in ((f"{i:06d}.jpg", body), (f"{i:06d}.cls", b"1"), (f"{i:06d}.txt", b"a photograph")):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    lines, tally, began, samples = [], Tally(), time.process_time(), 0
    for tar in sorted(folder.glob("*.tar")):
        shard, held = index_tar(tar, "train")
        lines, tally, samples = [*lines, shard], tally + held, samples + shard.samples
    print(
        f"{size} px: {samples} samples, strict indexing with hashes {samples / (time.process_time() - began):,.0f} samples per CPU-second"
    )
    write_manifest(folder, Manifest(shards=tuple(lines), class_names=tuple(map(str, range(10))), tally=tally))
    return folder


def photographs(size: int) -> list[bytes]:
    """840 photographs, or as many smooth random pictures, as JPEG files of one size."""
    pictures = []
    if SHARED.is_dir():
        for path in sorted((SHARED / "photos").glob("*train*.tar")):
            with tarfile.open(path) as tar:
                pictures += [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in tar if m.name.endswith(".jpg")]
    else:
        draw = np.random.default_rng(0)
        pictures = [Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8)) for _ in range(840)]
    bodies = []
    for picture in pictures:
        buffer = io.BytesIO()
        ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
        bodies.append(buffer.getvalue())
    return bodies


# --- the loaders: each takes a folder and a number of samples, and gives a generator of batches


def decoded(sample):
    return simplejpeg.decode_jpeg(sample["jpg"])


def ours(folder, size, workers):
    stream = build(DataConfig(shards=(str(folder),), resolution=size, workers=workers), seed=0, share=Share(batch_size=BATCH))
    try:
        yield from stream
    finally:
        stream.close()


def theirs(folder, shuffle, workers):
    import webdataset

    tars = sorted(map(str, folder.glob("*.tar")))
    pipeline = webdataset.WebDataset(tars, shardshuffle=False, repeat=True, nodesplitter=None)
    if shuffle:
        pipeline = pipeline.shuffle(1000)
    pipeline = pipeline.map(decoded).batched(BATCH, collation_fn=np.stack)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers) if workers else pipeline
    for batch in loader:
        yield torch.as_tensor(batch)


def huggingface(folder, _):
    """`datasets` over the same tars, streamed."""
    import datasets

    datasets.disable_progress_bars()
    tars = sorted(map(str, folder.glob("*.tar")))
    while True:
        found = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
        found = found.cast_column("jpg", datasets.Image(decode=False))
        rows = []
        for row in found:
            rows.append(simplejpeg.decode_jpeg(row["jpg"]["bytes"]))
            if len(rows) == BATCH:
                yield torch.from_numpy(np.stack(rows))
                rows = []


def lit(folder, _):
    """litdata over its own copy of the same files."""
    import litdata

    copy = folder.parent / f"{folder.name}-litdata"
    if not copy.exists():
        shards = Shards(folder)
        places = [(s, n) for s, count in enumerate(shards.counts) for n in range(count)]
        writer = litdata.streaming.writer.BinaryWriter(str(copy), chunk_bytes="64MB")
        for i, place in enumerate(places):
            writer.add_item(i, {"jpg": shards.read(*place).files["jpg"]})
        writer.done()
        writer.merge()
    while True:
        rows = []
        for row in litdata.StreamingDataset(str(copy), shuffle=True):
            rows.append(simplejpeg.decode_jpeg(row["jpg"]))
            if len(rows) == BATCH:
                yield torch.from_numpy(np.stack(rows))
                rows = []


def cpu() -> float:
    """CPU seconds of this process and of its children that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def spent(make, count: int) -> tuple[float, float]:
    """CPU and wall microseconds a sample of so many samples, start and end included where there are workers."""
    batches = make()
    began, clock, got = cpu(), time.perf_counter(), 0
    for batch in batches:
        got += len(batch.images) if hasattr(batch, "images") else len(batch)
        if got >= count:
            break
    wall = time.perf_counter() - clock
    batches.close()
    return (cpu() - began) / got * 1e6, wall / got * 1e6


def floors(folder, count):
    """Bytes in memory, decoded in place, and decoded and stacked: two functions of nothing."""
    shards = Shards(folder)
    places = [(s, n) for s, held in enumerate(shards.counts) for n in range(held)][: min(count, sum(shards.counts))]
    blobs = [shards.read(*place).files["jpg"] for place in places]
    size = simplejpeg.decode_jpeg(blobs[0]).shape

    def in_place():
        while True:
            for i in range(0, len(blobs) - BATCH + 1, BATCH):
                out = np.empty((BATCH, *size), np.uint8)
                for row, blob in zip(out, blobs[i : i + BATCH], strict=True):
                    simplejpeg.decode_jpeg(blob, buffer=row)
                yield torch.from_numpy(out)

    def stacked():
        while True:
            for i in range(0, len(blobs) - BATCH + 1, BATCH):
                yield torch.from_numpy(np.stack([simplejpeg.decode_jpeg(blob) for blob in blobs[i : i + BATCH]]))

    return in_place, stacked


def compare(folder: Path, size: int, rounds: int) -> None:
    """One size: every loader in turns, then the table."""
    count = {32: 12_800, 256: 1_280, 512: 640}.get(size, 640)
    in_place, stacked = floors(folder, count)
    cases = {
        "floor": in_place,
        "floor, stacked": stacked,
        "ours": lambda: ours(folder, size, 0),
        "ours, 2 threads": lambda: ours(folder, size, 2),
        "webdataset": lambda: theirs(folder, False, 0),
        "webdataset, shuffled (1,000)": lambda: theirs(folder, True, 0),
        "webdataset, shuffled, 2 workers": lambda: theirs(folder, True, 2),
        "datasets": lambda: huggingface(folder, size),
        "litdata": lambda: lit(folder, size),
    }
    for name, module in (("datasets", "datasets"), ("litdata", "litdata")):
        try:
            __import__(module)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            del cases[name]
    figures = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, make in cases.items():
            figure = spent(make, count)
            if turn:  # the first warms the page cache
                figures[name].append(figure)
    middle = {name: tuple(map(statistics.median, zip(*found, strict=True))) for name, found in figures.items()}
    print(f"\n{size} px, batches of {BATCH}, {rounds} rounds in turns{'':12}CPU us   wall us   share of the floor   of stacked")
    for name, (used, wall) in middle.items():
        print(f"  {name:48}{used:8.1f} {wall:9.1f} {middle['floor'][0] / used:14.2f} {middle['floor, stacked'][0] / used:14.2f}")
    share, times = TARGETS.get(size, (None, None))
    if share:
        print(f"  target: at least {share} of the floor: {middle['floor'][0] / middle['ours'][0]:.3f}")
    if times:
        other, our = middle["webdataset, shuffled, 2 workers"], middle["ours, 2 threads"]
        print(f"  target: at least {times} x webdataset's 2 workers: {other[0] / our[0]:.2f} in CPU, {other[1] / our[1]:.2f} on the clock")


def latents(folder: Path, rounds: int) -> None:
    """32 kB latents (4 x 64 x 64, float16) a CPU-second, read with their crc32, against webdataset with numpy's own reader."""
    import webdataset

    folder.mkdir()
    draw = np.random.default_rng(0)
    path = folder / "train-000000.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(4000):
            buffer = io.BytesIO()
            np.save(buffer, draw.normal(size=(1, 4, 64, 64)).astype(np.float16))
            sink.write({"__key__": f"{i:06d}", "moments.npy": buffer.getvalue()})
    like = np.zeros(4000, RECORD)
    like["width"] = like["height"] = 512
    like["label"] = NO_LABEL
    shard, tally = index_tar(path, "train", like=like)
    encoding = {"flips": ["plain"], "moments": ["mean"], "latent_channels": 4, "factor": 8}
    write_manifest(folder, Manifest(shards=(shard,), tally=tally, encoding=encoding))

    def our_latents(workers):
        options = DataConfig(shards=(str(folder),), resolution=512, workers=workers)
        shards = Shards(folder)
        stream = build(options, seed=0, share=Share(batch_size=BATCH), images=shards, latents=EncodedCache(shards, encoding))
        try:
            yield from stream
        finally:
            stream.close()

    def their_latents():
        pipeline = webdataset.WebDataset([str(path)], shardshuffle=False, repeat=True, nodesplitter=None)
        yield from pipeline.map(lambda s: np.load(io.BytesIO(s["moments.npy"]))).batched(BATCH, collation_fn=np.stack)

    found = {"ours": [], "webdataset": []}
    for turn in range(rounds + 1):
        for name, make in (("ours", lambda: our_latents(0)), ("webdataset", their_latents)):
            figure = spent(make, 12_800)[0]
            if turn:
                found[name].append(figure)
    our, other = (statistics.median(found[name]) for name in ("ours", "webdataset"))
    print(f"\nlatents of 32 kB: ours {1e6 / our:,.0f} a CPU-second (target 60,000), webdataset {1e6 / other:,.0f}: {other / our:.1f} x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 256, 512])
    parser.add_argument("--scale", action="store_true", help="only what a billion samples would cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        if options.scale:
            from loader_scale import scale

            scale(Path(scratch))
            return 0
        for size in options.sizes:
            compare(shards_of(Path(scratch) / str(size), size), size, options.rounds)
        latents(Path(scratch) / "latents", options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
