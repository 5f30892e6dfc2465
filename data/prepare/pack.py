"""From a source to a folder of shards: each shard is a job that a kill cannot half do, and the manifest comes last.

Shards grow in `.packing` inside the output, each with a journal. The same
command goes on where it was stopped; what it ends with depends on the source
and the settings, not on workers or interruptions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from condot.core.atomic_files import commit_json
from condot.core.errors import summarize_list
from condot.core.process import available_cpus

from ..format.index_record import index_path
from ..format.manifest import Manifest, Tally, parse_manifest, write_manifest
from ..format.shard_table import Shard, ShardTable
from ..images.formats import IMAGE_EXTENSIONS
from .output_folder import (
    announce_repacking,
    check_images_kept,
    check_same_request,
    load_pack_state,
    lock_output,
    remove_stale,
    update_stamps,
)
from .pack_state import PackedShard, PackRequest, PackState, blank_inputs, write_pack_state
from .report import draw_summary
from .shard_plan import Packing, PlannedShard, plan_shards
from .shard_writer import ShardJob, TrimJob, journal_path, trim_shard, write_shard
from .source import ImageSource, digest
from .source_changes import BYTES_PER_WORKER, compare_source, find_shard, invalidate
from .worker_pool import run_jobs

MAX_REPORTED = 1000
"""Names of each kind that the report holds."""


class CorruptImages(ValueError):
    """Images that cannot be read, while none may be left out."""


def pack(source: ImageSource, output: Path, packing: Packing, *, skip: bool = False, workers: int = 0) -> tuple[Manifest, dict[str, Any]]:
    """Pack a source into `output`, go on with it, or find that it is packed there already.

    Args:
        source: what to pack.
        output: folder of the shards.
        packing: sizes, split and seed.
        skip: leave out what cannot be read, instead of an error at the end.
        workers: processes; 0 for as many as there are processors and work.

    Returns:
        The manifest and the report.

    Raises:
        ValueError: no sample, images that cannot be read, or another packing in `output`.
        OSError: the disk is full, or the source cannot be reached.
    """
    if not source.samples:
        raise ValueError(f"no image to pack: the source holds none of .{', '.join(IMAGE_EXTENSIONS)}.")
    request = PackRequest(digest(source.identity, source.class_names, packing), digest(source.settings, packing), source.place)
    shards, packed, found = plan_shards(source, packing), load_pack_state(output), None
    if not packed and source.legacy_identity:
        request = request._replace(legacy_identity=digest(source.legacy_identity(), source.class_names, packing))
    if (output / "manifest.json").exists():
        check_same_request(output, request, packed)
        found = compare_source(source, shards, _find_whole(output / ".packing", output, shards, packed), output, workers)
        if packed and packed.shards.keys() == found.kept.keys() == {shard.name for shard in shards}:
            update_stamps(output, request, packed, found)
            return finished_result(output, skip)
    check_images_kept(output, request, packed, source)
    if found:
        announce_repacking(output, packed, len(found.kept), len(shards))
    with lock_output(output, request, [shard.name for shard in shards], packed) as folder:
        (output / "manifest.json").unlink(missing_ok=True)  # what lies there is no longer what was asked for
        kept = found or compare_source(source, shards, _find_whole(folder, output, shards, packed), folder, workers)
        todo = [s for s in shards if s.name not in kept.kept or (not skip and kept.kept[s.name].journal["faults"])]  # may be mended
        entries = kept.kept | _fill(source, todo, folder, packing, workers)
        entries = {shard.name: entries[shard.name] for shard in shards}
        report = _report(source, [entry.journal for entry in entries.values()])
        drops = _duplicates(source, shards, entries, packing, report)
        bad = report["unreadable"]["count"]
        if bad and (not skip or bad == source.samples):
            commit_json(report, output / "report.json")
            raise CorruptImages(unreadable_message(report, output))
        entries |= _trim(source, drops, shards, entries, folder, packing, workers)
        manifest = _assemble(source, entries, folder, output, request, packed)
        report["samples"] = int(manifest.shards.samples.sum())
        report["missing_captions"] = report["samples"] - manifest.tally.captions if manifest.tally.captions else 0
        commit_json(report, output / "report.json")
        draw_summary(output, manifest, output / "summary.png")
        write_pack_state(output, request, entries)
        write_manifest(output, manifest)
        shutil.rmtree(folder, ignore_errors=True)
    return manifest, report


def finished_result(output: Path, skip: bool) -> tuple[Manifest, dict[str, Any]]:
    """Return what is in a finished folder in which nothing is to be done."""
    manifest = parse_manifest((output / "manifest.json").read_bytes(), f"{output}/manifest.json")
    shutil.rmtree(output / ".packing", ignore_errors=True)
    report = json.loads((output / "report.json").read_text())
    if report["unreadable"]["count"] and not skip:
        raise CorruptImages(unreadable_message(report, output))
    return manifest, report


def _find_whole(folder: Path, output: Path, shards: list[PlannedShard], packed: PackState | None) -> dict[str, PackedShard]:
    """The shards that are whole, by name."""
    found = {shard.name: find_shard(folder, output, shard.name, packed) for shard in shards}
    return {name: entry for name, entry in found.items() if entry}


def _fill(source: ImageSource, todo: list[PlannedShard], folder: Path, packing: Packing, workers: int) -> dict[str, PackedShard]:
    """Write shards; what was known of them before counts no more."""
    for shard in todo:
        for name in (shard.name, f"trimmed-{shard.name}"):
            invalidate(journal_path(folder / name))
    stamps, size = source.sample_stamps, packing.max_side

    def job(shard: PlannedShard) -> ShardJob:
        inputs = blank_inputs(map(source.name, shard.numbers.tolist()), stamps[shard.numbers])
        return ShardJob(folder, shard.name, shard.split, shard.first_key, inputs, source.subset(shard.numbers), size)

    useful = min(len(todo), workers or min(available_cpus(), int(source.bytes.sum()) // BYTES_PER_WORKER + 1))
    done = source.samples - sum(len(shard.numbers) for shard in todo)
    with tqdm(total=source.samples, initial=done, desc="packing", unit="image", mininterval=1) as bar:
        for _ in run_jobs(write_shard, map(job, todo), useful, lambda samples: bar.update(samples)):
            pass
    return _find_whole(folder, folder, todo, None)


def _report(source: ImageSource, journals: list[dict[str, Any]]) -> dict[str, Any]:
    faults = sorted(f"{name} ({why})" for journal in journals for name, why in journal["faults"])
    return {
        "found": source.samples,
        "samples": 0,
        "unreadable": {"count": len(faults), "list": faults[:MAX_REPORTED]},
        "duplicates": {"count": 0, "left_out": 0, "across_splits": 0, "list": []},
        "missing_captions": 0,
        "resized": sum(journal["resized"] for journal in journals),
        **source.notes,
    }


def _duplicates(
    source: ImageSource, shards: list[PlannedShard], entries: dict[str, PackedShard], packing: Packing, report: dict[str, Any]
) -> dict[str, list[str]]:
    """Count images whose bytes are another's; gives the keys to leave out of each shard, all but the first of the source."""
    inside = [np.flatnonzero(entries[shard.name].inputs["packed"]) for shard in shards]
    which = np.repeat(np.arange(len(shards)), [len(part) for part in inside])
    if not len(which):
        return {}
    numbers = np.concatenate([shard.numbers[part] for shard, part in zip(shards, inside, strict=True)])
    places = np.concatenate([shard.first_key + part for shard, part in zip(shards, inside, strict=True)])
    halves = np.concatenate([entries[shard.name].inputs["image"][part] for shard, part in zip(shards, inside, strict=True)])
    order = np.lexsort((numbers, halves[:, 1], halves[:, 0]))
    same = np.r_[False, (halves[order[1:]] == halves[order[:-1]]).all(1)]
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    pairs = sorted(zip(numbers[order[same]].tolist(), order[same].tolist(), first[same].tolist(), strict=True))
    splits = np.array([shard.split for shard in shards])[which]
    report["duplicates"] = {
        "count": len(pairs),
        "left_out": len(pairs) if packing.drop_duplicates else 0,
        "across_splits": sum(bool(splits[copy] != splits[original]) for _, copy, original in pairs),
        "list": [[source.name(int(numbers[kept])), source.name(number)] for number, _, kept in pairs[:MAX_REPORTED]],
    }
    drops = defaultdict[str, list[str]](list)
    if packing.drop_duplicates:
        for _, copy, _ in pairs:
            drops[shards[which[copy]].name].append(f"{int(places[copy]):09d}")
    return {name: sorted(keys) for name, keys in drops.items()}


def unreadable_message(report: dict[str, Any], output: Path) -> str:
    """What to say of images that cannot be read."""
    bad = report["unreadable"]
    return (
        f"{bad['count']} of {report['found']} images cannot be read: "
        f"{summarize_list(bad['list'])}. All are in {output / 'report.json'}. Leave them "
        "out with --skip_corrupt, or mend them and run the same command again; both keep what is done."
    )


def _trim(
    source: ImageSource,
    drops: dict[str, list[str]],
    shards: list[PlannedShard],
    entries: dict[str, PackedShard],
    folder: Path,
    packing: Packing,
    workers: int,
) -> dict[str, PackedShard]:
    """Write again the shards that lose other samples than they did; gives them as they are now."""
    left_out = {name: _trimmed(folder, name) or entry.journal for name, entry in entries.items()}
    todo = [shard for shard in shards if left_out[shard.name]["dropped"] != drops.get(shard.name, [])]
    moved = [s for s in todo if not ((folder / s.name).exists() and journal_path(folder / s.name).exists())]
    made = _fill(source, moved, folder, packing, workers)
    for shard in todo:
        invalidate(journal_path(folder / f"trimmed-{shard.name}"))
    jobs = (TrimJob(folder, s.name, s.split, frozenset(drops[s.name])) for s in todo if drops.get(s.name))
    for _ in run_jobs(trim_shard, jobs, min(len(todo), workers or 1), lambda samples: None):
        pass
    made = entries | made
    return {name: entry._replace(journal=entry.journal | (_trimmed(folder, name) or {})) for name, entry in made.items()}


def _trimmed(folder: Path, name: str) -> dict[str, Any] | None:
    """The journal of a shard that was written again without some samples."""
    journal = journal_path(folder / f"trimmed-{name}")
    return (json.loads(journal.read_text()) or None) if journal.exists() else None


def _assemble(
    source: ImageSource, entries: dict[str, PackedShard], folder: Path, output: Path, request: PackRequest, packed: PackState | None
) -> Manifest:
    """Move the shards to their places and say what they are; a shard whose samples are all left out is none."""
    listed, tally = [], Tally()
    for name, entry in entries.items():
        if not entry.journal["shard"]["samples"]:
            continue
        tar = folder / (f"trimmed-{name}" if _trimmed(folder, name) else name)
        for path in (index_path(tar), tar):
            if path.exists():  # else it was moved before a kill, or stays where it was
                os.replace(path, output / path.name.removeprefix("trimmed-"))
        listed.append(Shard(**entry.journal["shard"]))
        tally += Tally(**entry.journal["tally"])
    remove_stale(output, packed, [shard.name for shard in listed])
    return Manifest(shards=ShardTable.of(listed), class_names=source.class_names, tally=tally, source=request.request)
