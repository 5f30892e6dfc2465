"""From samples to a folder of shards: shuffled once, packed into tars, indexed, and whole only with its manifest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .decode import DECODE_ERRORS, upright
from .index import IMAGE_EXTENSIONS, Manifest, describe, index_path, read_manifest, write_manifest
from .order import permutation


@dataclass(frozen=True)
class Source:
    """One sample to pack."""

    name: str
    """Where it comes from, kept in its `.json`."""
    extension: str
    """Of the image: png, jpg, ..."""
    read: Callable[[], bytes]
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Packing:
    """How a folder is packed; part of what decides whether a folder is already packed."""

    shard_bytes: int
    holdout: float = 0.0
    seed: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout {self.holdout}: the share of images kept from training is at least 0 and below 1. Use 0.1.")
        if self.shard_bytes < 10_000:
            raise ValueError(f"--shard_size {self.shard_bytes}: a shard holds at least 10kB. Use 256MB to 1GB, less for a small set.")


def pack(samples: list[Source], class_names: tuple[str, ...], output: Path, packing: Packing) -> Manifest:
    """Pack samples into `output`, or find that they are packed there already.

    Everything is written to a folder beside its place and moved at the end,
    the manifest last: whatever stops this, no half is taken for a whole.

    Args:
        samples: what to pack; the order they are stored in is shuffled.
        class_names: name of each label.
        output: folder of the shards.
        packing: sizes, split and seed.

    Raises:
        ValueError: no sample, corrupt images, or another packing in `output`.
    """
    if not samples:
        raise ValueError(f"no image to pack: the source holds none of .{', .'.join(IMAGE_EXTENSIONS)}.")
    request = _request(samples, class_names, packing)
    if (output / "manifest.json").exists():
        manifest = read_manifest(output)
        if manifest.source != request:
            raise ValueError(f"{output} holds shards of other images or settings: choose another --output, or delete that folder first.")
        return manifest
    samples = _readable(samples, packing.skip_corrupt)
    temporary = output / ".packing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        manifest = _write(samples, class_names, temporary, packing, request)
        for shard in manifest.shards:
            for path in (temporary / shard.name, index_path(temporary / shard.name)):
                os.replace(path, output / path.name)
        write_manifest(output, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _request(samples: list[Source], class_names: tuple[str, ...], packing: Packing) -> str:
    """A hash of what was asked for: names, labels, captions and settings."""
    lines = [repr((s.name, s.extension, s.label, s.caption)) for s in samples]
    return hashlib.sha256(repr((sorted(lines), class_names, packing)).encode()).hexdigest()


def _readable(samples: list[Source], skip: bool) -> list[Source]:
    """The samples whose images decode.

    Raises:
        ValueError: some do not and `skip` is off; or none does.
    """

    def fault(sample: Source) -> str | None:
        try:
            upright(sample.read(), 3)
        except DECODE_ERRORS as error:
            return f"{sample.name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        return None

    pool = ThreadPoolExecutor()
    try:
        faults = list(tqdm(pool.map(fault, samples), "checking", len(samples), unit="image", mininterval=1))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    bad = [text for text in faults if text]
    if bad and (not skip or len(bad) == len(samples)):
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(
            f"{len(bad)} of {len(samples)} images cannot be read: {shown}. Mend or remove them, or leave them out with --skip_corrupt."
        )
    for text in bad:
        print(f"left out: {text}")
    return [sample for sample, text in zip(samples, faults, strict=True) if text is None]


def _write(samples: list[Source], class_names: tuple[str, ...], folder: Path, packing: Packing, request: str) -> Manifest:
    """Shuffle, split and write all shards into an empty folder."""
    order = permutation(len(samples), packing.seed, 0).tolist()
    held = round(packing.holdout * len(samples))
    if held == len(samples):
        raise ValueError(f"--holdout {packing.holdout} of {len(samples)} images leaves none to train on: lower it.")
    splits = {"val": order[:held], "train": order[held:]}
    shards, sizes = [], Counter[str]()
    with tqdm(total=len(samples), desc="packing", unit="image", mininterval=1) as bar:
        for split, chosen in splits.items():
            for tar in _write_split(samples, chosen, folder, split, packing.shard_bytes, bar):
                shard, found = describe(tar, split)
                shards.append(shard)
                sizes += found
    shards.sort(key=lambda shard: (shard.split != "train", shard.name))
    return Manifest(shards=tuple(shards), class_names=class_names, sizes=dict(sizes.most_common()), source=request)


def _write_split(samples: list[Source], chosen: list[int], folder: Path, split: str, limit: int, bar: tqdm) -> Iterator[Path]:
    """Write the chosen samples as tars of about `limit` bytes; yields each when it is finished."""
    tar: tarfile.TarFile | None = None
    path = folder
    for number, which in enumerate(chosen):
        if tar is not None and tar.offset >= limit:
            tar.close()
            yield path
            tar = None
        if tar is None:
            path = folder / f"{split}-{sum(1 for _ in folder.glob(f'{split}-*.tar')):06d}.tar"
            tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
        sample = samples[which]
        files = {sample.extension: sample.read(), "json": json.dumps({"source": sample.name}).encode()}
        if sample.label is not None:
            files["cls"] = str(sample.label).encode()
        if sample.caption is not None:
            files["txt"] = sample.caption.encode()
        for extension, body in files.items():
            info = tarfile.TarInfo(f"{number:09d}.{extension}")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        bar.update()
    if tar is not None:
        tar.close()
        yield path
