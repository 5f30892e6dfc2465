"""One shard, start to end: read its samples, see that they decode, write the tar, its index and its journal.

The journal is written last, so a shard that has one is whole. It lists the
samples that could not be read; those are simply not in the tar, so that
leaving them out later costs nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from condot.core.atomic_files import commit, commit_json
from condot.core.errors import describe_error
from condot.core.file_lock import open_new
from condot.core.text_files import MAX_TEXT_BYTES, decode_text

from ..format.index import index_tar
from ..format.index_record import index_path
from ..format.sample_files import NO_LABEL
from ..format.tar_reader import samples
from ..format.tar_writer import TarWriter
from ..images.decode import DECODE_ERRORS, decode_preview, upright_size
from ..images.downscale import downscale
from ..images.formats import IMAGE_EXTENSIONS, detect_extension
from .pack_state import hash_sample, inputs_path
from .source import RawSample, SourceSubset, UnreadableSample
from .worker_pool import Progress


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    folder: Path
    name: str
    split: str
    first_key: int
    inputs: np.ndarray
    """Of each sample, with its name and stamp."""
    subset: SourceSubset
    max_side: int


@dataclass(frozen=True)
class TrimJob:
    """One finished shard to write again without some samples."""

    folder: Path
    name: str
    split: str
    keys: frozenset[str]


def journal_path(tar: Path) -> Path:
    """Where the journal of a shard lies."""
    return tar.with_suffix(".json")


def write_shard(job: ShardJob, progress: Progress) -> str:
    """Write one shard; returns its name.

    Raises:
        OSError: the disk is full, or the source cannot be reached.
    """
    faults: list[UnreadableSample] = []
    inputs = job.inputs.copy()
    resized = 0
    temporary = job.folder / f"tmp-{os.getpid()}-{job.name}"
    with open_new(temporary) as file:
        writer = TarWriter(file)
        for place, found in enumerate(job.subset.read(job.folder)):
            ready = found if isinstance(found, UnreadableSample) else prepare_sample(found, job.max_side)
            inputs[["text", "image", "packed"]][place] = hash_sample(found)
            progress(1)
            if isinstance(ready, UnreadableSample):
                faults.append(ready)
                inputs[place]["packed"] = False
                continue
            record, files = ready
            resized += "resized_from" in record.more
            writer.add(f"{job.first_key + place:09d}", files)
        writer.finish()
    with open_new(inputs_path(temporary)) as file:
        np.lib.format.write_array(file, inputs, allow_pickle=False)
    commit(inputs_path(temporary), inputs_path(job.folder / job.name))
    more = {"faults": faults, "resized": resized, "first_key": job.first_key, "dropped": []}
    commit_shard(temporary, job.folder / job.name, job.split, more)
    return job.name


def trim_shard(job: TrimJob, progress: Progress) -> str:
    """Write a shard again without some samples, beside it as `trimmed-NAME`; returns its name."""
    temporary = job.folder / f"tmp-{os.getpid()}-trimmed-{job.name}"
    with open(job.folder / job.name, "rb") as source, open_new(temporary) as file:
        writer = TarWriter(file)
        for span in samples(job.folder / job.name):
            if span.key not in job.keys:
                writer.add_span(os.pread(source.fileno(), span.end - span.start, span.start))
        writer.finish()
    commit_shard(temporary, job.folder / f"trimmed-{job.name}", job.split, {"dropped": sorted(job.keys)})
    progress(len(job.keys))
    return job.name


def commit_shard(temporary: Path, final: Path, split: str, more: dict[str, Any]) -> None:
    """Index a tar and give it and all that belongs to it their names, the journal last."""
    shard, tally = index_tar(temporary, split)
    commit(index_path(temporary), index_path(final))
    commit(temporary, final)
    shard = replace(shard, name=final.name.removeprefix("trimmed-"))
    commit_json({"shard": asdict(shard), "tally": asdict(tally), **more}, journal_path(final))


def prepare_sample(record: RawSample, max_side: int) -> tuple[RawSample, dict[str, bytes]] | UnreadableSample:
    """A sample that decodes, with its files as they are stored; or why it does not.

    The record's image stays as it was read, for its hash.
    """
    try:
        size = upright_size(record.image)
        extension, stored = record.extension, record.image
        if extension not in IMAGE_EXTENSIONS:
            extension = detect_extension(record.image)
        if max_side and max(size) > max_side:
            record = record._replace(more={**record.more, "resized_from": list(size)})
            extension, stored = downscale(stored, max_side, extension)
        else:
            decode_preview(stored)  # to see that it decodes
        return record, _files(record, extension, stored)
    except DECODE_ERRORS as error:
        return UnreadableSample(record.name, describe_error(error))


def _files(record: RawSample, extension: str, stored: bytes) -> dict[str, bytes]:
    files = {extension: stored}
    if record.label is not None:
        if not 0 <= record.label < NO_LABEL:
            raise ValueError(f"class {record.label} is not in 0 to {NO_LABEL - 1}")
        files["cls"] = str(record.label).encode()
    if record.caption:
        files["txt"] = record.caption.encode()
        decode_text(files["txt"])  # as the index reads it
    files["json"] = json.dumps({"source": record.name, **record.more}, default=str, ensure_ascii=False).encode()
    if len(files["json"]) > MAX_TEXT_BYTES:
        raise ValueError(f"its .json would have {len(files['json'])} bytes, at most {MAX_TEXT_BYTES} are read")
    return files
