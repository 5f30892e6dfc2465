"""From streams of samples to a folder of shards with indexes: copied, since a stream has no middle to read from.

A stream is one job, whose journal comes last: what a kill left of it is made again from its
beginning, and streams that are finished are not opened again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from condot.core.atomic_files import commit, commit_json, sync
from condot.core.errors import describe_error
from condot.core.file_lock import open_new
from condot.core.printable import printable, redact_url
from condot.core.process import available_cpus

from ..format.index import index_tar
from ..format.index_record import index_path
from ..format.manifest import Manifest, write_manifest
from ..format.sample_files import has_image, image_among
from ..format.tar_reader import TarRemarks
from ..format.tar_writer import MAX_NAME_BYTES, TarWriter
from .output_folder import check_same_request, load_pack_state, lock_output, remove_stale
from .pack import CorruptImages, finished_result, unreadable_message
from .pack_state import PackedShard, PackRequest, write_pack_state
from .report import draw_summary
from .source import digest, split_from_name
from .tar_streams import StreamFilter, display_stream, expand_streams, read_stream
from .webdataset import assemble_report, decodes, no_image_message
from .worker_pool import Progress, run_jobs


@dataclass(frozen=True)
class StreamJob:
    """One stream to copy; it goes to a worker by pickle and is never written to a file, since its URL may hold secrets."""

    url: str
    number: int
    split: str
    folder: Path
    shard_bytes: int
    chosen: StreamFilter
    verify: bool
    image_extension: str

    @property
    def journal(self) -> Path:
        return self.folder / f"stream-{self.number:05d}.json"

    def shard(self, place: int) -> Path:
        """Return where the shard of this number grows."""
        return self.folder / f"{self.split}-{self.number:05d}-{place:05d}.tar"


def pack_streams(
    source: str,
    output: Path,
    *,
    shard_bytes: int,
    chosen: StreamFilter = StreamFilter(),  # noqa: B008  frozen
    class_names: tuple[str, ...] = (),
    split: str = "",
    verify: bool = False,
    skip: bool = False,
    workers: int = 0,
    image_extension: str = "",
) -> tuple[Manifest, dict[str, Any]]:
    """Copy the samples of streams into shards, in the order of the streams.

    Args:
        source: URLs, with braces and `::`, as `expand_streams` reads them.
        output: the folder of the shards.
        shard_bytes: at which a shard ends.
        chosen: which samples and files.
        class_names, split, verify, skip, workers, image_extension: as of `pack_webdataset`.

    Raises:
        ValueError: a stream that breaks off or is no tar, samples that cannot be indexed, no
            sample, another folder in `output`.
    """
    urls = expand_streams(source)
    kept_of = [url if url.startswith("pipe:") else redact_url(url) for url in urls]  # a signature that is new asks for the same
    request = _stream_request(kept_of, chosen, class_names, split, verify, image_extension, shard_bytes)
    before = load_pack_state(output)
    if (output / "manifest.json").exists():
        check_same_request(output, request, before)
        return finished_result(output, skip)
    with lock_output(output, request, [], before) as folder:
        jobs = [
            StreamJob(url, number, split or split_from_name(url) or "train", folder, shard_bytes, chosen, verify, image_extension)
            for number, url in enumerate(urls)
        ]
        journals = _copy([job for job in jobs if not _is_whole(job, output, skip)], jobs, workers)
        manifest, report = assemble_report(journals, class_names, request.request, image_extension)
        if report["unreadable"]["count"] and (not skip or not report["samples"]):
            commit_json(report, output / "report.json")
            raise CorruptImages(unreadable_message(report, output))
        if not report["samples"]:
            raise ValueError(no_image_message([display_stream(url) for url in urls], report))
        for name in manifest.shards.names:
            for path in (index_path(folder / name), folder / name):
                if path.exists():  # else it was moved before a kill
                    os.replace(path, output / path.name)
        sync(output)
        commit_json(report, output / "report.json")
        draw_summary(output, manifest, output / "summary.png")
        remove_stale(output, before, manifest.shards.names)
        write_pack_state(output, request, {entry["shard"]["name"]: PackedShard(entry) for entry in journals if entry["shard"]["samples"]})
        write_manifest(output, manifest)
        shutil.rmtree(folder, ignore_errors=True)
    return manifest, report


def _stream_request(urls: list[str], *settings: object) -> PackRequest:
    """Return what is asked for: hashes alone, since a command may hold secrets of any form."""
    request = digest("streams", urls, *settings)
    return PackRequest(request, request, f"streams {request[:16]}")


def _is_whole(job: StreamJob, output: Path, skip: bool) -> bool:
    """Return whether a stream was copied to its end, and all of its shards are there."""
    if not job.journal.exists():
        return False
    entries = _entries(job)
    there = all(
        any((place / name).exists() for place in (job.folder, output))
        for entry in entries
        if entry["shard"]["samples"]
        for name in (entry["shard"]["name"], index_path(Path(entry["shard"]["name"])).name)
    )
    return there and (skip or not any(entry["faults"] for entry in entries))  # they may have been mended


def _entries(job: StreamJob) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(job.journal.read_text())["shards"]
    return entries


def _copy(todo: list[StreamJob], jobs: list[StreamJob], workers: int) -> list[dict[str, Any]]:
    """Copy the streams that are left to do; return what is known of each shard of all."""
    for job in todo:
        job.journal.unlink(missing_ok=True)
        for left in job.folder.glob(f"*-{job.number:05d}-[0-9]*"):
            left.unlink()
    useful = min(len(todo), workers or available_cpus())
    try:
        with tqdm(desc="reading", unit="image", mininterval=1) as bar:
            for _ in run_jobs(copy_stream, todo, useful, bar.update):
                pass
    except (ValueError, OSError):
        if not any(job.journal.exists() for job in jobs):  # nothing to go on from: a corrected command may begin here
            shutil.rmtree(jobs[0].folder, ignore_errors=True)
        raise
    return [entry for job in jobs for entry in _entries(job)]


def copy_stream(job: StreamJob, progress: Progress) -> int:
    """Copy one stream into as many shards as it takes, and index them; returns its number.

    Raises:
        ValueError: the stream is not whole.
        OSError: the disk is full.
    """
    entries: list[dict[str, Any]] = []
    samples = read_stream(job.url, job.chosen)
    more = True
    while more:
        tar = job.shard(len(entries))
        faults: list[str] = []
        temporary = job.folder / f"tmp-{os.getpid()}-{tar.name}"
        with open_new(temporary) as file:
            more = _fill_shard(file, samples, job, faults, progress)
        commit(temporary, tar)
        entries.append(_index_shard(job, tar, faults))
    commit_json({"shards": entries}, job.journal)
    return job.number


def _fill_shard(
    file: BinaryIO, samples: Iterator[tuple[str, dict[str, bytes]]], job: StreamJob, faults: list[str], progress: Progress
) -> bool:
    """Write samples until a shard is full; return whether the stream may have more."""
    writer = TarWriter(file)
    more = False
    for key, files in samples:
        try:
            writer.add(key, _writable(key, files, job.image_extension))
        except ValueError as error:  # see there
            faults.append(printable(f"{display_stream(job.url)}: {key} ({describe_error(error)})"))
        progress(1)
        if file.tell() >= job.shard_bytes:
            more = True
            break
    writer.finish()
    return more


def _writable(key: str, files: dict[str, bytes], image_extension: str) -> dict[str, bytes]:
    """Return a sample's files in the order in which they are read fastest; the index says what else is wrong with one.

    Raises:
        ValueError: a name that plain tars cannot hold: before anything of the sample is written.
    """
    longest = max(len(f"{key}.{extension}".encode()) for extension in files)
    if longest > MAX_NAME_BYTES:
        raise ValueError(f"a name of {longest} bytes, shards hold at most {MAX_NAME_BYTES}")
    try:
        first = image_among(files, image_extension) if has_image(files, image_extension) else ""
    except ValueError:
        first = ""
    return {first: files[first], **files} if first else files


def _index_shard(job: StreamJob, tar: Path, faults: list[str]) -> dict[str, Any]:
    """Index a shard and return its journal."""
    remarks = TarRemarks()
    verify = decodes if job.verify else None
    shard, tally = index_tar(tar, job.split, faults=faults, verify=verify, image_extension=job.image_extension, remarks=remarks)
    sync(index_path(tar))
    found = {"shard": asdict(shard), "tally": asdict(tally), "faults": faults, "stamp": 0, "content": shard.sha256}
    return found | {"unknown": dict(remarks.unknown), "joined": remarks.joined}
