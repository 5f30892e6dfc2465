"""Shards from elsewhere: indexed where they lie, linked, or decompressed; their samples are never unpacked to files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from condot.core.atomic_files import commit, commit_json
from condot.core.errors import describe_error, summarize_list
from condot.core.file_lock import open_new
from condot.core.hashing import sha256_of_file
from condot.core.printable import printable
from condot.core.process import available_cpus

from ..format.file_stamps import compute_stamp, file_facts
from ..format.index import index_tar
from ..format.index_record import index_path
from ..format.manifest import Manifest, Tally, write_manifest
from ..format.shard_table import Shard, ShardTable
from ..format.tar_reader import TarRemarks, members
from ..images.decode import DECODE_ERRORS, decode_preview
from ..images.formats import IMAGE_EXTENSIONS
from .output_folder import (
    announce_repacking,
    check_files_kept,
    check_same_request,
    load_pack_state,
    lock_output,
    remove_stale,
    update_stamps,
)
from .pack import MAX_REPORTED, CorruptImages, finished_result, unreadable_message
from .pack_state import PackedShard, PackRequest, write_pack_state
from .report import draw_summary
from .shard_writer import journal_path
from .source import digest, split_from_name
from .source_changes import compare_files, invalidate
from .tar_sources import COMPRESSED, output_names
from .tar_streams import MAX_INFLATION
from .worker_pool import Progress, run_jobs

CHUNK = 1 << 20
MAX_KINDS = 20
"""Of files that are no part of a sample, which the report counts one by one."""


@dataclass(frozen=True)
class IndexJob:
    """One tar to index."""

    source: Path
    name: str
    """Of the tar in the output."""
    split: str
    output: Path
    folder: Path
    """Where its journal goes."""
    verify: bool
    stamp: int
    """Of the source, before it is read."""
    image_extension: str = ""


def pack_webdataset(
    tars: list[Path],
    output: Path,
    *,
    class_names: tuple[str, ...] = (),
    split: str = "",
    split_of: Mapping[Path, str] | None = None,
    verify: bool = False,
    skip: bool = False,
    workers: int = 0,
    image_extension: str = "",
) -> tuple[Manifest, dict[str, Any]]:
    """Make existing tars a folder of shards.

    Args:
        tars: what to index.
        output: the folder they lie in, or another, to which they are linked
            or, if compressed, decompressed.
        class_names: name of each class number; from the labels where absent.
        split, split_of: of all tars, or of each; else the word in each name, else `train`.
        verify: decode every image.
        skip: leave out of the index what cannot be read, instead of an error.
        workers: processes; 0 for as many as there are processors.
        image_extension: of the image, where samples have several that could be.

    Raises:
        ValueError: damaged tars, samples that cannot be indexed, no sample,
            classes that disagree with `class_names`, another folder in
            `output`.
    """
    names = output_names(tars, output)
    packed = [path.name for path in tars if path.name.endswith(COMPRESSED)]
    if packed and tars[0].parent.resolve() == output.resolve():
        raise ValueError(
            f"{summarize_list(packed, 3)} cannot be read from the middle: give another folder as --output, where they are decompressed."
        )
    more = [*([image_extension] if image_extension else []), *([sorted(split_of.values())] if split_of else [])]
    request = _pack_request(tars, class_names, split, verify, *more)
    before, known = load_pack_state(output), None
    splits = [(split_of or {}).get(tar) or split or split_from_name(tar.name) or "train" for tar in tars]
    files = dict(zip(names, tars, strict=True))
    if (output / "manifest.json").exists():
        check_same_request(output, request, before)
        known = compare_files(files, output / ".packing", output, before)
        if before and before.shards.keys() == known.kept.keys() == files.keys():
            update_stamps(output, request, before, known)
            return finished_result(output, skip)
    check_files_kept(output, request, before, files, known.kept if known else {})
    if known:
        announce_repacking(output, before, len(known.kept), len(tars))
    ours = [name for name, tar in zip(names, tars, strict=True) if tar.parent.resolve() != output.resolve()]
    with lock_output(output, request, ours, before) as folder:
        (output / "manifest.json").unlink(missing_ok=True)
        known = known or compare_files(files, folder, output, before)
        jobs = [
            IndexJob(tar.resolve(), name, where, output, folder, verify, compute_stamp(file_facts(tar.stat())), image_extension)
            for tar, name, where in zip(tars, names, splits, strict=True)
        ]
        kept = {name: entry for name, entry in known.kept.items() if skip or not entry.journal["faults"]}  # they may have been mended
        _index([job for job in jobs if job.name not in kept], len(jobs), workers)
        journals = [kept[job.name].journal if job.name in kept else json.loads(journal_path(folder / job.name).read_text()) for job in jobs]
        _refuse_damaged(journals, folder)
        manifest, report = assemble_report(journals, class_names, request.request, image_extension)
        if report["unreadable"]["count"] and (not skip or not report["samples"]):
            commit_json(report, output / "report.json")
            raise CorruptImages(unreadable_message(report, output))
        if not report["samples"]:
            raise ValueError(no_image_message(list(map(str, tars)), report))
        commit_json(report, output / "report.json")
        draw_summary(output, manifest, output / "summary.png")
        remove_stale(output, before, names)
        write_pack_state(output, request, {job.name: PackedShard(journal) for job, journal in zip(jobs, journals, strict=True)})
        write_manifest(output, manifest)
        shutil.rmtree(folder, ignore_errors=True)
    return manifest, report


def _pack_request(tars: list[Path], *settings: object) -> PackRequest:
    """Return what is asked for: these tars, with these settings."""
    request = digest("webdataset", [(tar.name, tar.stat().st_size) for tar in tars], *settings)
    place = ", ".join(sorted({str(tar.parent.resolve()) for tar in tars}))
    return PackRequest(request, digest("webdataset", *settings), place)


def _index(todo: list[IndexJob], total: int, workers: int) -> None:
    """Index tars; what was known of them before counts no more."""
    for job in todo:
        invalidate(journal_path(job.folder / job.name))
    useful = min(len(todo), workers or min(available_cpus(), sum(job.source.stat().st_size for job in todo) // 64_000_000 + 1))
    with tqdm(total=total, initial=total - len(todo), desc="indexing", unit="shard", mininterval=1) as bar:
        for _ in run_jobs(index, todo, useful, lambda samples: None):
            bar.update()


def index(job: IndexJob, progress: Progress) -> str:
    """Bring one tar to its place and index it; what is wrong with it goes into its journal."""
    tar = job.output / job.name
    faults: list[str] = []
    remarks = TarRemarks()
    try:
        if job.source != tar.resolve():
            _link_or_decompress(job.source, tar)
        verify = decodes if job.verify else None
        shard, tally = index_tar(tar, job.split, faults=faults, verify=verify, image_extension=job.image_extension, remarks=remarks)
    except ValueError as error:
        commit_json({"damaged": str(error)}, journal_path(job.folder / job.name))
        return job.name
    with open(index_path(tar), "rb") as file:
        os.fsync(file.fileno())
    content = shard.sha256 if job.source.name.endswith(".tar") else sha256_of_file(job.source)
    found = {"shard": asdict(shard), "tally": asdict(tally), "faults": faults, "stamp": job.stamp, "content": content}
    found |= {"unknown": dict(remarks.unknown), "joined": remarks.joined}
    commit_json(found, journal_path(job.folder / job.name))
    return job.name


def decodes(image: bytes) -> None:
    """Raise ValueError where an image cannot be decoded."""
    try:
        decode_preview(image)
    except DECODE_ERRORS as error:
        raise ValueError(describe_error(error)) from error


def _link_or_decompress(source: Path, tar: Path) -> None:
    """Link a plain tar, or decompress one, in pieces and under a temporary name.

    Raises:
        ValueError: it is no gzip, is cut, holds no tar, or grows beyond all measure.
    """
    temporary = tar.parent / ".packing" / f"tmp-{os.getpid()}-{tar.name}"
    if not source.name.endswith(COMPRESSED):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(source)
        os.replace(temporary, tar)
        return
    limit, size = MAX_INFLATION * source.stat().st_size, 0
    try:
        with gzip.open(source) as packed, open_new(temporary) as file:
            while piece := packed.read(CHUNK):
                size += len(piece)
                if size > limit:
                    raise ValueError(f"{source}: more than {MAX_INFLATION} times its size when decompressed. Is it a tar of images?")
                file.write(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source}: cannot be decompressed ({error}). Copy it again.") from error
    next(members(temporary), None)
    commit(temporary, tar)


def _refuse_damaged(journals: list[dict[str, Any]], folder: Path) -> None:
    damaged = [journal["damaged"] for journal in journals if "damaged" in journal]
    if damaged:
        for path in folder.glob("*.json"):  # they may be mended: look at them again next time
            if "damaged" in json.loads(path.read_text() or "{}"):
                path.unlink()
        raise ValueError(f"{len(damaged)} of {len(journals)} tars are damaged: {summarize_list(damaged)}")


def assemble_report(
    journals: list[dict[str, Any]], class_names: tuple[str, ...], request: str, image_extension: str
) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest and the report of indexed tars.

    Raises:
        ValueError: a class that has no name.
    """
    tally, shards, unknown = Tally(), [], Counter[str]()
    for journal in journals:
        found = Tally(**journal["tally"])
        most = max(map(int, found.labels), default=-1)
        if class_names and most >= len(class_names):
            raise ValueError(
                f"{journal['shard']['name']} has class {most}, but --class_names names {len(class_names)}, 0 to {len(class_names) - 1}: "
                "give the names that belong to these shards."
            )
        tally += found
        unknown.update(journal.get("unknown", {}))
        shards.append(Shard(**journal["shard"]))
    names = class_names if tally.labels else ()
    if tally.labels and not names:
        names = tuple(map(str, range(int(list(tally.labels)[-1]) + 1)))
    shards.sort(key=lambda shard: (shard.split != "train", shard.split, shard.name))
    faults = [fault for journal in journals for fault in journal["faults"]]
    samples = sum(shard.samples for shard in shards)
    report = {
        "found": samples + len(faults),
        "samples": samples,
        "unreadable": {"count": len(faults), "list": faults[:MAX_REPORTED]},
        "missing_captions": samples - tally.captions if tally.captions else 0,
        "unknown_files": _count_kinds(unknown),
        "joined_tars": sum(journal.get("joined", 0) for journal in journals),
    }
    manifest = Manifest(
        shards=ShardTable.of([shard for shard in shards if shard.samples]),
        class_names=names,
        tally=tally,
        source=request,
        image_extension=image_extension,
    )
    return manifest, report


def _count_kinds(unknown: Counter[str]) -> dict[str, int]:
    """Return counts by kind, at most KINDS of them: a stranger's tar may have a kind for each file."""
    kept = dict(unknown.most_common(MAX_KINDS))
    rest = unknown.total() - sum(kept.values())
    if rest:
        kept["of other kinds"] = kept.get("of other kinds", 0) + rest
    return dict(sorted(kept.items()))


def no_image_message(sources: list[str], report: dict[str, Any]) -> str:
    """Return what to say of tars that hold no image."""
    found = "; ".join(f"{count:,} files {kind}" for kind, count in report["unknown_files"].items())
    return (
        f"{printable(sources[0])}{f' and {len(sources) - 1} more' if len(sources) > 1 else ''}: no image. Looked for files of "
        f".{', .'.join(IMAGE_EXTENSIONS)}{f', and found {found}' if found else ''}."
    )
