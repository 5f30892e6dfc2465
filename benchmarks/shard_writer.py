"""How fast samples become a tar: our writer and webdataset's, interleaved, into memory and to a disk.

webdataset's is given what makes its bytes depend on no clock and no user (`mtime=0`, fixed names).
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset

from condot.data.format.tar_writer import TarWriter

Sample = tuple[str, dict[str, bytes]]


def make_samples(count: int, size: int) -> list[Sample]:
    """Images of `size` bytes with a class, a caption and a `.json`, as `condot prepare` writes them."""
    rng = np.random.default_rng(0)
    texts = {"cls": b"3", "txt": b"a photograph of nothing in particular", "json": b'{"source": "a/b.jpg"}'}
    return [(f"{i:09d}", {"jpg": rng.bytes(size), **texts}) for i in range(count)]


def write_ours(file: io.BufferedIOBase, samples: list[Sample]) -> None:
    """Write samples by `data.format.tar_writer`."""
    writer = TarWriter(file)
    for key, files in samples:
        writer.add(key, files)
    writer.finish()


def write_webdataset(file: io.BufferedIOBase, samples: list[Sample]) -> None:
    """Write samples by `webdataset.TarWriter`, bytes as they are."""
    with webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})


def main() -> None:
    """Print the ratio of the two, with its spread over repetitions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    for size in (2_000, 30_000, 200_000):
        samples = make_samples(min(args.count, 300_000_000 // size), size)
        for place in ("memory", "disk"):
            times: dict[str, list[float]] = {"ours": [], "webdataset": []}
            lengths = {}
            with tempfile.TemporaryDirectory() as folder:
                for turn in range(2 * args.repeat):
                    name = ("ours", "webdataset")[(turn + turn // 2) % 2]  # A B B A A B ...
                    file = io.BytesIO() if place == "memory" else open(Path(folder, name), "wb", buffering=1 << 20)
                    start = time.perf_counter()
                    (write_ours if name == "ours" else write_webdataset)(file, samples)
                    file.flush()
                    if place == "disk":
                        os.fsync(file.fileno())
                    times[name].append(time.perf_counter() - start)
                    lengths[name] = file.tell()
                    file.close()
            ratios = sorted(a / b for a, b in zip(times["ours"], times["webdataset"], strict=True))
            rate = {name: len(samples) / statistics.median(each) for name, each in times.items()}
            print(
                f"{size:>7,} bytes, {place}: ours {rate['ours']:,.0f}/s, webdataset {rate['webdataset']:,.0f}/s; "
                f"webdataset/ours {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); bytes {lengths}"
            )


if __name__ == "__main__":
    main()
