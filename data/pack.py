"""From a source to a folder of shards: each shard is a job that a kill cannot half do, and the manifest comes last.

Shards grow in `.packing` inside the output, each with a journal. The same
command goes on where it was stopped; what it ends with depends on the source
and the settings, not on workers or interruptions.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .crew import crew, processors
from .fill import Job, Trim, fill, hashes_path, journal_path, trim
from .image_formats import IMAGE_EXTENSIONS
from .index import index_path
from .listing import Source, digest, some
from .manifest import Manifest, Tally, parse_manifest, write_manifest
from .plan import Packing, Planned, plan
from .shardlist import Shard, ShardList
from .summary import draw
from .write import commit_json

REPORTED = 1000
"""Names of each kind that the report holds."""
BYTES_A_WORKER = 64_000_000
"""Less than this is done before another process has started."""


class Corrupt(ValueError):
    """Images that cannot be read, while none may be left out."""


def pack(source: Source, output: Path, packing: Packing, *, skip: bool = False, workers: int = 0) -> tuple[Manifest, dict[str, Any]]:
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
    request = digest(source.identity, source.class_names, packing)
    if (output / "manifest.json").exists():
        return already(output, request, skip)
    shards = plan(source, packing)
    with locked(output, request, [shard.name for shard in shards]) as folder:
        _fill(source, shards, folder, output, packing, skip, workers)
        journals = [_read(_where(folder, output, shard.name)) for shard in shards]
        report = _report(source, journals)
        drops = _duplicates(source, shards, folder, packing, report)
        bad = report["unreadable"]["count"]
        if bad and (not skip or bad == source.samples):
            commit_json(report, output / "report.json")
            raise Corrupt(complaint(report, output))
        _trim(drops, shards, folder, workers)
        manifest = _assemble(source, shards, folder, output, request)
        report["samples"] = int(manifest.shards.samples.sum())
        report["missing_captions"] = report["samples"] - manifest.tally.captions if manifest.tally.captions else 0
        commit_json(report, output / "report.json")
        draw(output, manifest, output / "summary.png")
        write_manifest(output, manifest)
        shutil.rmtree(folder, ignore_errors=True)
    return manifest, report


def already(output: Path, request: str, skip: bool) -> tuple[Manifest, dict[str, Any]]:
    """What is in a finished folder, if it is what is asked for now."""
    manifest = parse_manifest((output / "manifest.json").read_bytes(), f"{output}/manifest.json")
    if manifest.source != request:
        raise ValueError(f"{output} holds shards of other images or settings: choose another --output, or delete that folder first.")
    shutil.rmtree(output / ".packing", ignore_errors=True)
    report = json.loads((output / "report.json").read_text())
    if report["unreadable"]["count"] and not skip:
        raise Corrupt(complaint(report, output))
    return manifest, report


@contextmanager
def locked(output: Path, request: str, names: list[str]) -> Iterator[Path]:
    """The folder in which shards grow, for this process alone.

    Raises:
        ValueError: another process packs there; another packing is half done
            there; the output holds tars that this would overwrite.
    """
    folder = output / ".packing"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{output}: another process is packing there. Let it finish, or choose another --output.") from error
        begun = folder / "request.json"
        if not begun.exists():
            foreign = [name for name in names if (output / name).exists()]
            if foreign:
                raise ValueError(f"{output} holds {some(foreign, 3)} and no manifest: choose another --output, or move these away.")
            commit_json(request, begun)
        elif json.loads(begun.read_text()) != request:
            raise ValueError(
                f"{output} holds half-packed shards of other images or settings: finish that command, "
                f"choose another --output, or delete {folder} to begin anew."
            )
        for stale in folder.glob("tmp-*"):
            stale.unlink()
        yield folder


def _where(folder: Path, output: Path, name: str) -> Path | None:
    """The journal of a finished shard, wherever its tar is by now."""
    journal = journal_path(folder / name)
    whole = journal.exists() and ((folder / name).exists() or (output / name).exists())
    return journal if whole else None


def _read(journal: Path | None) -> dict[str, Any]:
    assert journal is not None, "every shard has its journal when all are filled"
    return dict(json.loads(journal.read_text()))


def _fill(source: Source, shards: list[Planned], folder: Path, output: Path, packing: Packing, skip: bool, workers: int) -> None:
    """Write the shards that are not there; without `skip` also those with faults, which may have been mended."""
    todo = []
    for shard in shards:
        journal = _where(folder, output, shard.name)
        if journal is None or (not skip and _read(journal)["faults"]):
            todo.append(shard)
    jobs = (Job(folder, s.name, s.split, s.first_key, s.numbers, source.part(s.numbers), packing.max_side) for s in todo)
    useful = min(len(todo), workers or min(processors(), int(source.bytes.sum()) // BYTES_A_WORKER + 1))
    done = source.samples - sum(len(shard.numbers) for shard in todo)
    with tqdm(total=source.samples, initial=done, desc="packing", unit="image", mininterval=1) as bar:
        for _ in crew(fill, jobs, useful, lambda samples: bar.update(samples)):
            pass


def _report(source: Source, journals: list[dict[str, Any]]) -> dict[str, Any]:
    faults = sorted(f"{name} ({why})" for journal in journals for name, why in journal["faults"])
    return {
        "found": source.samples,
        "samples": 0,
        "unreadable": {"count": len(faults), "list": faults[:REPORTED]},
        "duplicates": {"count": 0, "left_out": 0, "across_splits": 0, "list": []},
        "missing_captions": 0,
        "resized": sum(journal["resized"] for journal in journals),
        **source.notes,
    }


def _duplicates(source: Source, shards: list[Planned], folder: Path, packing: Packing, report: dict[str, Any]) -> dict[str, set[str]]:
    """Count images whose bytes are another's; gives the keys to leave out of each shard, all but the first of the source."""
    parts = [np.load(hashes_path(folder / shard.name), allow_pickle=False) for shard in shards]
    which = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    table = np.concatenate(parts)
    if not len(table):
        return {}
    halves = table["hash"].copy().view("<u8").reshape(-1, 2)
    order = np.lexsort((table["number"], halves[:, 1], halves[:, 0]))
    same = np.r_[False, (halves[order[1:]] == halves[order[:-1]]).all(1)]
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    pairs = sorted(zip(table["number"][order[same]].tolist(), order[same].tolist(), first[same].tolist(), strict=True))
    splits = np.array([shard.split for shard in shards])[which]
    report["duplicates"] = {
        "count": len(pairs),
        "left_out": len(pairs) if packing.drop_duplicates else 0,
        "across_splits": sum(bool(splits[copy] != splits[original]) for _, copy, original in pairs),
        "list": [[source.name(int(table["number"][kept])), source.name(number)] for number, _, kept in pairs[:REPORTED]],
    }
    drops = defaultdict[str, set[str]](set)
    if packing.drop_duplicates:
        for _, copy, _ in pairs:
            drops[shards[which[copy]].name].add(f"{int(table['key'][copy]):09d}")
    return drops


def complaint(report: dict[str, Any], output: Path) -> str:
    """What to say of images that cannot be read."""
    bad = report["unreadable"]
    return (
        f"{bad['count']} of {report['found']} images cannot be read: {some(bad['list'])}. All are in {output / 'report.json'}. Leave them "
        "out with --skip_corrupt, which keeps what is done; or mend or remove them and pack into another --output."
    )


def _trim(drops: dict[str, set[str]], shards: list[Planned], folder: Path, workers: int) -> None:
    """Write again the shards that lose samples, if they are not yet."""
    todo = [s for s in shards if s.name in drops and not journal_path(folder / f"trimmed-{s.name}").exists()]
    jobs = (Trim(folder, s.name, s.split, frozenset(drops[s.name])) for s in todo)
    for _ in crew(trim, jobs, min(len(todo), workers or 1), lambda samples: None):
        pass


def _assemble(source: Source, shards: list[Planned], folder: Path, output: Path, request: str) -> Manifest:
    """Move the shards to their places and say what they are; a shard whose samples are all left out is none."""
    listed, tally = [], Tally()
    for planned in shards:
        trimmed = folder / f"trimmed-{planned.name}"
        tar = trimmed if journal_path(trimmed).exists() else folder / planned.name
        journal = _read(journal_path(tar))
        if not journal["shard"]["samples"]:
            continue
        for path in (index_path(tar), tar):
            if path.exists():  # else it was moved before a kill
                os.replace(path, output / path.name.removeprefix("trimmed-"))
        listed.append(Shard(**journal["shard"]))
        tally += Tally(**journal["tally"])
    return Manifest(shards=ShardList.of(listed), class_names=source.class_names, tally=tally, source=request)
