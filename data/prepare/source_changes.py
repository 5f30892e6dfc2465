"""What changed in a source since a folder was packed from it: stamps are compared, and where they differ what is read.

A touched or copied file costs one read; a shard whose samples are as they were stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from condot.core.atomic_files import commit_json
from condot.core.hashing import sha256_of_file
from condot.core.process import available_cpus

from ..format.file_stamps import compute_stamp, file_facts, name_hash
from ..format.index_record import index_path
from .pack_state import INPUT, PackedShard, PackState, hash_sample, inputs_path
from .shard_plan import PlannedShard
from .source import ImageSource, SourceSubset
from .worker_pool import Progress, run_jobs

BYTES_PER_WORKER = 64_000_000
"""Less than this is read before another process has started."""


def find_shard(folder: Path, output: Path, name: str, packed: PackState | None) -> PackedShard | None:
    """Return a shard that is whole, in the folder of work or, from before, in the output; None where there is none.

    A journal in the folder of work counts more than the memory of the output, even one that was voided by `invalidate`.
    """
    tar = folder / name
    if tar.with_suffix(".json").exists():
        there = tar.exists() or (output / name).exists()
        return read_entry(folder, name) if there else None
    entry = packed.shards.get(name) if packed else None
    return entry if entry and is_in_place(output, entry) else None


def read_entry(folder: Path, name: str) -> PackedShard | None:
    """Return what the journal of a shard in the folder of work says; None where it was voided, or written by an earlier release."""
    journal, inputs = json.loads((folder / name).with_suffix(".json").read_text()), np.zeros(0, INPUT)
    if "shard" not in journal or not ("content" in journal or inputs_path(folder / name).exists()):
        return None
    if "content" not in journal:
        inputs = np.load(inputs_path(folder / name), allow_pickle=False)
    return PackedShard(journal, inputs)


def is_in_place(output: Path, entry: PackedShard) -> bool:
    """Return whether the files of a shard are in the output, its index as it was written; one without samples has none."""
    line = entry.journal["shard"]
    tar = output / line["name"]
    if not line["samples"]:
        return True
    there = tar.is_file() and tar.stat().st_size == line["bytes"] and index_path(tar).is_file()
    return there and sha256_of_file(index_path(tar)) == line["index_sha256"]


def invalidate(journal: Path) -> None:
    """Take back what a journal says, so that neither it nor what the output remembers of its shard counts any more."""
    if journal.exists():
        commit_json({}, journal)


@dataclass(frozen=True)
class ReadJob:
    """Samples to read for a comparison."""

    name: str
    subset: SourceSubset
    count: int
    scratch: Path


def read_inputs(job: ReadJob, progress: Progress) -> tuple[str, np.ndarray]:
    """Return the name of a shard, and the inputs of those of its samples that were to be read."""
    found = np.zeros(job.count, INPUT)[["text", "image", "packed"]]
    for place, sample in enumerate(job.subset.read(job.scratch)):
        found[place] = hash_sample(sample)
        progress(1)
    return job.name, found


class SourceChanges(NamedTuple):
    """Shards that are whole, against the source as it is now."""

    kept: dict[str, PackedShard]
    """Those whose samples are as they were, with today's stamps."""
    changed: int
    """Samples whose content is another, or that are new in their shard."""
    stamps_changed: bool
    """Whether a stamp is another."""


def compare_source(
    source: ImageSource, shards: list[PlannedShard], whole: Mapping[str, PackedShard], scratch: Path, workers: int
) -> SourceChanges:
    """Compare the shards that are whole with what a source holds now.

    Args:
        source: as it is now.
        shards: what is to be there.
        whole: what is there, by name.
        scratch: a folder for temporary files.
        workers: processes; 0 for as many as there are processors and work.
    """
    stamps, kept, changed, jobs = source.sample_stamps, dict[str, PackedShard](), 0, list[ReadJob]()
    doubts, numbers = dict[str, np.ndarray](), {shard.name: shard.numbers for shard in shards}
    for shard in shards:
        entry = whole.get(shard.name)
        if entry is None or not _matches_plan(source, shard, entry):
            changed += len(shard.numbers)
            continue
        kept[shard.name] = entry
        now = stamps[shard.numbers]
        doubtful = np.flatnonzero((now != entry.inputs["stamp"]) | (now == 0))
        if len(doubtful):
            doubts[shard.name] = doubtful
            jobs.append(ReadJob(shard.name, source.subset(shard.numbers[doubtful]), len(doubtful), scratch))
    total = sum(job.count for job in jobs)
    useful = min(
        len(jobs), workers or min(available_cpus(), total * int(source.bytes.sum()) // max(1, source.samples) // BYTES_PER_WORKER + 1)
    )
    with tqdm(total=total, desc="comparing", unit="image", mininterval=1, disable=not jobs) as bar:
        for name, found in run_jobs(read_inputs, jobs, useful, lambda samples: bar.update(samples)):
            inputs = kept[name].inputs.copy()
            before = inputs[doubts[name]]
            differ = (before["text"] != found["text"]) | (before["image"] != found["image"]).any(1)
            changed += int(differ.sum())
            inputs["stamp"] = stamps[numbers[name]]
            kept[name] = kept[name]._replace(inputs=inputs)
            if differ.any():
                del kept[name]
    return SourceChanges(kept, changed, bool(jobs))


def _matches_plan(source: ImageSource, shard: PlannedShard, entry: PackedShard) -> bool:
    """Whether a shard holds the samples that it is to hold, by name, in their order."""
    said = entry.journal
    if (said["shard"]["split"], said["first_key"], len(entry.inputs)) != (shard.split, shard.first_key, len(shard.numbers)):
        return False
    return bool(entry.inputs["name"].tolist() == [name_hash(source.name(number)) for number in shard.numbers.tolist()])


def count_missing_images(source: ImageSource, packed: PackState, scratch: Path) -> int:
    """Return how many images a folder was packed from that the source has no more, under any name; those with new names are read."""
    now = {name_hash(source.name(number)): number for number in range(source.samples)}
    rows = np.concatenate([np.zeros(0, INPUT), *(entry.inputs for entry in packed.shards.values())])
    here = np.array([name in now for name in rows["name"].tolist()], bool)
    missing = rows["image"][~here & rows["packed"]]
    if not len(missing):
        return 0
    images = set(map(tuple, rows["image"][here].tolist()))
    new = np.array(sorted(now[name] for name in now.keys() - set(rows["name"].tolist())), np.int64)
    images |= {hash_sample(sample)[1] for sample in (source.subset(new).read(scratch) if len(new) else ())}
    return sum(tuple(image) not in images for image in missing.tolist())


def compare_files(files: Mapping[str, Path], folder: Path, output: Path, packed: PackState | None) -> SourceChanges:
    """Compare the shards that were made from one file each with these files as they are now.

    Args:
        files: of each shard, by name.
        folder, output, packed: as `find_shard` takes them.
    """

    def look(name: str) -> tuple[PackedShard | None, bool]:
        entry, stamp = find_shard(folder, output, name, packed), compute_stamp(file_facts(files[name].stat()))
        if entry is None or entry.journal["stamp"] == stamp:
            return entry, False
        if sha256_of_file(files[name]) != entry.journal["content"]:
            return None, True
        return entry._replace(journal=entry.journal | {"stamp": stamp}), True

    with ThreadPoolExecutor(available_cpus()) as pool:  # hashing lets go of the interpreter
        found = dict(zip(files, pool.map(look, files), strict=True))
    kept = {name: entry for name, (entry, _) in found.items() if entry}
    return SourceChanges(kept, len(files) - len(kept), any(read for _, read in found.values()))
