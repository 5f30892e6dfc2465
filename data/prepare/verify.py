"""Every sample of a shard read again: do the bytes hash to what was indexed, and do they decode?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from condot.core.caption_fields import draw_caption
from condot.core.errors import describe_error
from condot.core.hashing import sha256_of_file
from condot.core.printable import printable

from ..format.index_record import index_path, index_payload, is_unchanged, open_index, sample_span, slice_image
from ..format.shard_table import Shard
from ..format.tar_headers import BLOCK
from ..format.tar_reader import parse_sample_files
from ..images.decode import DECODE_ERRORS, decode_into
from .worker_pool import Progress

SIDE = 16
"""Pixels that a decoded image is made smaller to, as training makes it: whether it decodes is all that is asked."""
CHANGED = "its bytes changed since it was indexed"


@dataclass(frozen=True)
class ShardCheck:
    """One shard to check."""

    tar: Path
    shard: Shard
    numbers: np.ndarray
    """(N,), int64: which samples to decode."""
    classes: int
    """How many the manifest names."""
    verify: bool
    """Hash the whole tar too."""
    caption: str = ""
    """As `data.caption` has it: which texts must be readable."""
    channels: int = 3
    bit_depth: int = 8
    """As a recipe's section `data` has them."""


def check_shard(job: ShardCheck, progress: Progress) -> list[str]:
    """What is wrong with a shard: one line a sample, with shard and key."""
    bad = []
    if job.verify and sha256_of_file(job.tar) != job.shard.sha256:
        bad.append(f"{printable(job.tar.name)}: its sha256 is not what the manifest says")
    pixels = np.empty((SIDE, SIDE, job.channels), f"uint{job.bit_depth}")
    try:
        records = open_index(index_path(job.tar), job.shard, job.classes)
    except (ValueError, OSError) as error:
        return [*bad, f"{printable(index_path(job.tar).name)}: {describe_error(error)}"]  # what it says of samples means nothing
    with open(job.tar, "rb", buffering=0) as file:
        for number in job.numbers.tolist():
            key, why = _sample(file.fileno(), records[number], job.caption, pixels)
            if why:
                bad.append(f"{printable(job.tar.name)}: {printable(key) or f'sample {number}'} ({why})")
            progress(1)
    return bad


def _sample(file: int, record: np.void, caption: str, pixels: np.ndarray) -> tuple[str, str]:
    """Return the key of a sample and what is wrong with it, or nothing; its image is decoded into `pixels`."""
    fields: tuple[Any, ...] = tuple(record.item())
    payload, size, _, before = fields[:4]
    start, length = sample_span(fields)
    body = os.pread(file, length, start)
    if not is_unchanged(index_payload(body, payload * BLOCK, size, start), fields):
        try:
            return parse_sample_files(body[: (before + 1) * BLOCK])[0], CHANGED
        except ValueError:
            return "", CHANGED
    key = ""
    try:
        key, files = parse_sample_files(body)
        decode_into(pixels, slice_image(body, before, size))
        draw_caption(files, caption)
    except DECODE_ERRORS as error:
        return key, describe_error(error)
    return key, ""
