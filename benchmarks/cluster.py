"""4,096 ranks over 1,000,000 shards, simulated: what opening, a first batch and a rank's memory cost; no sample is lost or doubled.

The shards are hard links to one real shard of 1,000 images, behind a manifest
of a million lines: opening, the order, the cursor and reading do all that they
would do. Ranks are processes of their own, one after the other, on this
machine; the other 4,090 are the same code with another number. Memory is told
beyond what a process holds that has imported all and opened nothing; of that
much is torch's libraries, which the ranks of a machine share.

    python benchmarks/cluster.py [--shards 1000000] [--ranks 4096]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from loader_scale import one_shard

EACH, NAMES = 1_000, 50_000
"""Images of a shard; names that one file is given (a file system allows 65,000)."""


def memory(what: str) -> float:
    """Megabytes of this process: `VmRSS` resident now, `RssAnon` of them its own, `VmHWM` the most ever resident."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1e3


def simulate(folder: Path, count: int) -> None:
    """So many shards that are one."""
    from condot.data.format.index import index_tar
    from condot.data.format.manifest import Manifest, Tally, write_manifest

    first = one_shard(folder, EACH)
    shard, _ = index_tar(first, "train")
    base, lines = first, []
    for number in range(count):
        if number % NAMES == 0:
            base = folder / f"base-{number}"
            shutil.copy(first, base)
            shutil.copy(first.with_suffix(".npy"), f"{base}.npy")
        name = f"train-{number:07d}"
        os.link(base, folder / f"{name}.tar")
        os.link(f"{base}.npy", folder / f"{name}.npy")
        lines.append(replace(shard, name=f"{name}.tar"))
    write_manifest(folder, Manifest(shards=tuple(lines), tally=Tally(sizes={"8x8": count * EACH})))


def child(folder: str, rank: int, ranks: int, position: int) -> None:
    """One rank: prints seconds and megabytes; without a folder, what its imports alone hold."""
    from condot.core.data_config import DataConfig
    from condot.data.loader.build import build, open_shards
    from condot.data.loader.stream import Share

    before = memory("VmRSS")
    if not folder:
        print(json.dumps({"resident": before, "own": memory("RssAnon")}))
        return
    options = DataConfig(shards=(folder,), resolution=8, workers=1)
    began = time.perf_counter()
    shards = open_shards(options)
    opened, began = time.perf_counter() - began, time.perf_counter()
    stream = build(options, seed=1, share=Share(batch_size=4 * ranks, ranks=ranks, rank=rank), start=position, images=shards)
    batch = next(stream)
    first, held = time.perf_counter() - began, memory("VmRSS") - before
    for _ in range(50):
        next(stream)
    began = time.perf_counter()
    for _ in range(50):
        next(stream)
    rate = 200 / (time.perf_counter() - began)
    stream.close()
    found = {"open": opened, "first": first, "held": held, "after": memory("VmRSS") - before, "rate": rate}
    print(json.dumps(found | {"all": memory("VmRSS"), "peak": memory("VmHWM"), "samples": batch.samples.tolist()}))


def whole_batches(folder: str, ranks: int, position: int) -> str:
    """The samples of a global batch, put together from all ranks' plans, against the order itself; and on half as many ranks."""
    from condot.core.data_config import DataConfig
    from condot.data.loader.build import build, open_shards
    from condot.data.loader.stream import Share

    options, size = DataConfig(shards=(folder,), resolution=8, workers=0), 4 * ranks
    shards = open_shards(options)
    order = build(options, seed=1, share=Share(batch_size=size, ranks=ranks), start=position, images=shards).order
    began = time.perf_counter()
    wanted = np.stack(order(np.arange(position, position + size)), axis=1)
    spent = time.perf_counter() - began
    for count in (ranks, ranks // 2):
        shares = [Share(batch_size=size, ranks=count, rank=rank).indices(0) for rank in range(count)]
        places = np.concatenate([np.arange(r.start, r.stop) for r in shares])
        assert np.array_equal(np.sort(places), np.arange(size)), f"{count} ranks do not share out the batch"
        assert np.array_equal(np.stack(order(position + places), axis=1), wanted[places])
    distinct = len({tuple(row) for row in wanted.tolist()})
    assert distinct == size, "a sample comes twice"
    looked = f"{size:,} samples of a global batch looked up in {spent * 1e3:.1f} ms, {distinct:,} distinct"
    return f"{looked}; the same on {ranks:,} and {ranks // 2:,} ranks"


def rank_of(*words: object) -> dict[str, float]:
    """What a rank in a process of its own prints; arguments as `child`."""
    command = [sys.executable, __file__, "--child", *map(str, words)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--scratch", default=None, help="a folder on a disk that has room for two names a shard")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, *numbers = options.child
        child(folder, *map(int, numbers))
        return 0
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "shards"
        folder.mkdir()
        began = time.perf_counter()
        simulate(folder, options.shards)
        size = (folder / "manifest.json").stat().st_size
        print(f"{options.shards:,} shards of {EACH:,}, made in {time.perf_counter() - began:.0f} s; manifest {size / 1e6:.0f} MB")
        bare = rank_of("", 0, 1, 0)
        print(f"a process that has imported all and opened nothing: {bare['resident']:.0f} MB, {bare['own']:.0f} of them its own")
        total, batch = options.shards * EACH, 4 * options.ranks
        for rank, position in (
            (0, 0),
            (1, 0),
            (options.ranks - 1, 0),
            (options.ranks // 2, total // 2 // batch * batch),
            (7, 3 * total // batch * batch),
        ):
            found = rank_of(folder, rank, options.ranks, position)
            print(
                f"rank {rank:5,} from position {position:15,}: open {found['open']:.2f} s, first batch {found['first'] * 1e3:.0f} ms, "
                f"{found['held']:.0f} MB beyond (after 100 batches {found['after']:.0f}; {found['all']:.0f} in all, "
                f"at most {found['peak']:.0f}), {found['rate']:.0f} images/s"
            )
        print(whole_batches(str(folder), options.ranks, total // 3 // batch * batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
