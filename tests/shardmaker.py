"""Folders of shards made for a test, with webdataset's own writer: each image's pixels say which sample it is."""

from __future__ import annotations

import io
from itertools import chain
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from condot.data.format.index import index_tar
from condot.data.format.manifest import Manifest, Tally, write_manifest


def flat(lists):
    """One list of several."""
    return list(chain.from_iterable(lists))


def png(number: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """A gray image whose every pixel is the number, modulo 251."""
    buffer = io.BytesIO()
    Image.new("L", size, number % 251).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """An RGB image of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def samples(counts, size_of=lambda n: (4, 4), prefix=""):
    """For each shard its samples, numbered on through all of them."""
    number = 0
    for count in counts:
        shard = []
        for _ in range(count):
            body = {"__key__": f"{prefix}{number:06d}", "png": png(number, size_of(number)), "cls": number % 3, "txt": f"caption {number}"}
            shard.append(body)
            number += 1
        yield shard


def make(folder: Path, shards, *, classes=("a", "b", "c"), split="train") -> Path:
    """Write, index and describe shards of samples as webdataset's writer takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, tally = [], Tally()
    for number, content in enumerate(shards):
        path = folder / f"{split}-{number:06d}.tar"
        with webdataset.TarWriter(str(path)) as sink:
            for sample in content:
                sink.write(sample)
        shard, held = index_tar(path, split)
        lines.append(shard)
        tally = tally + held
    write_manifest(folder, Manifest(shards=tuple(lines), class_names=tuple(classes), tally=tally))
    return folder
