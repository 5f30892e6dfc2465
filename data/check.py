"""Every sample of a shard read again: do the bytes hash to what was indexed, and do they decode?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .crew import Progress
from .decode import DECODE_ERRORS, upright
from .index import IMAGE_EXTENSIONS, index_path, locate, open_index, sha256
from .listing import reason
from .shardlist import Shard
from .tar import BLOCK, files_of

CHANGED = "its bytes changed since it was indexed"


@dataclass(frozen=True)
class Check:
    """One shard to check."""

    tar: Path
    shard: Shard
    numbers: np.ndarray
    """(N,), int64: which samples to decode."""
    classes: int
    """How many the manifest names."""
    verify: bool
    """Hash the whole tar too."""


def check(job: Check, progress: Progress) -> list[str]:
    """What is wrong with a shard: one line a sample, with shard and key."""
    bad = []
    if job.verify and sha256(job.tar) != job.shard.sha256:
        bad.append(f"{job.tar.name}: its sha256 is not what the manifest says")
    try:
        records = open_index(index_path(job.tar), job.shard, job.classes)
    except (ValueError, OSError) as error:
        return [*bad, f"{index_path(job.tar).name}: {reason(error)}"]  # what it says of samples means nothing
    with open(job.tar, "rb", buffering=0) as file:
        for number in job.numbers.tolist():
            key, why = _sample(file.fileno(), records[number])
            if why:
                bad.append(f"{job.tar.name}: {key or f'sample {number}'} ({why})")
            progress(1)
    return bad


def _sample(file: int, record: np.void) -> tuple[str, str]:
    """Key of a sample and what is wrong with it, or nothing."""
    payload, size, _, before, after = record.item()[:5]
    start = (payload - before) * BLOCK
    body = os.pread(file, (before + after) * BLOCK + -(-size // BLOCK) * BLOCK, start)
    if locate(body, payload * BLOCK, size, start) != record.item()[:6]:
        try:
            return files_of(body[: (before + 1) * BLOCK])[0], CHANGED
        except ValueError:
            return "", CHANGED
    key, files = files_of(body)
    try:
        upright(next(files[e] for e in IMAGE_EXTENSIONS if e in files), 3)
    except DECODE_ERRORS as error:
        return key, reason(error)
    return key, ""
