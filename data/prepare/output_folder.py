"""The folder that shards are packed into: for one process, one request, and never over what is somebody else's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from condot.core.atomic_files import commit_json
from condot.core.errors import summarize_list
from condot.core.file_lock import make_folder, open_lock, try_lock

from ..format.index_record import index_path
from ..format.manifest import parse_manifest
from .pack_state import PackedShard, PackRequest, PackState, read_pack_state, write_pack_state
from .source import ImageSource
from .source_changes import SourceChanges, count_missing_images

HALF_AN_INDEX = f".[0-9]*-{'[0-9a-f]' * 16}.npy"
"""What `index.describe` was writing when it was killed."""
HALF_WRITTEN = (HALF_AN_INDEX, ".[0-9]*-summary.png", "tmp-[0-9]*-report.json", ".manifest.json.[0-9]*", ".packed/tmp-[0-9]*.npz")
"""What any writer of a finished folder's files was writing then; all of them write only while they have it locked."""


def load_pack_state(output: Path) -> PackState | None:
    """Return what an output was made from, if it is finished or is being made again; tars without a manifest may be anybody's."""
    ours = (output / "manifest.json").exists() or (output / ".packing" / "request.json").exists()
    return read_pack_state(output) if ours else None


def check_same_request(output: Path, request: PackRequest, packed: PackState | None) -> None:
    """Raise ValueError where a finished folder was packed from another source, or in another way."""
    manifest = None if packed else parse_manifest((output / "manifest.json").read_bytes(), f"{output}/manifest.json")
    if not request.continues(packed.request if packed else PackRequest(manifest.source if manifest else "", "", "")):
        or_else = "" if packed else ", or of an earlier release that numbered classes or read splits otherwise"
        raise ValueError(f"{output} holds shards of other images or settings{or_else}: choose another --output.")


def check_images_kept(output: Path, request: PackRequest, packed: PackState | None, source: ImageSource) -> None:
    """Raise ValueError where packing again would overwrite the last copy of an image, for all that is known here."""
    if packed and packed.request.place != request.place:
        raise ValueError(f"{output} was packed from {packed.request.place}, and {request.place} has other images: choose another --output.")
    lost = count_missing_images(source, packed, output) if packed else 0
    if lost:
        raise ValueError(
            f"{lost} of the images in {output} are no longer in {request.place}: maybe these are their last copies, so nothing is packed "
            "again. Choose another --output, or put them back."
        )


def check_files_kept(
    output: Path, request: PackRequest, packed: PackState | None, files: Mapping[str, Path], kept: Mapping[str, PackedShard]
) -> None:
    """Raise ValueError where a tar that was decompressed would be overwritten or left out, and its source may be there no more.

    Args:
        output, request, packed: as `lock_output` takes them.
        files: the source of each tar, by name.
        kept: what stays as it is.
    """
    moved = packed is not None and packed.request.place != request.place
    lost = sorted(name for name in (packed.shards if packed else ()) if name not in files or (moved and name not in kept))
    copies = [name for name in lost if (output / name).is_file() and not (output / name).is_symlink()]
    if copies:
        raise ValueError(
            f"{output} holds {summarize_list(copies, 3)}, decompressed from what "
            f"{request.place} does not have or what is not asked for now, maybe "
            "the last copies: choose another --output."
        )


def remove_stale(output: Path, packed: PackState | None, listed: Iterable[str]) -> None:
    """Remove from an output what belongs to its packing of before and not to that of now: our shards, our links, our indexes."""
    for name in packed.shards.keys() - set(listed) if packed else ():
        for path in (output / name, index_path(output / name)):
            path.unlink(missing_ok=True)


def update_stamps(output: Path, request: PackRequest, packed: PackState, found: SourceChanges) -> None:
    """Remember the stamps of files that were read and found to be as they were."""
    if found.stamps_changed or packed.request != request:
        with suppress(OSError):  # it cannot be written: the next time reads the same again
            write_pack_state(output, request, found.kept)


def announce_repacking(output: Path, packed: PackState | None, kept: int, shards: int) -> None:
    """Print that a finished folder is not as its source is now."""
    why = "its source has changed since, or its shards" if packed else "what it was made from is not remembered there"
    print(f"{output}: {why}, so {shards - kept} of its {shards} shards are made again", file=sys.stderr)


@contextmanager
def lock_output(output: Path, request: PackRequest, names: list[str], packed: PackState | None) -> Iterator[Path]:
    """The folder in which shards grow, for this process alone.

    Args:
        output: of the shards.
        request: what for.
        names: of the tars that will be written into the output.
        packed: what the output was made from, if that is known.

    Raises:
        ValueError: another process packs there; another packing is half done
            there; the output holds tars that this would overwrite.
    """
    folder = output / ".packing"
    make_folder(folder)
    with os.fdopen(open_lock(folder / "lock"), "r+") as lock:
        if not try_lock(lock):
            raise ValueError(f"{output}: another process is packing there. Let it finish, or choose another --output.")
        begun = folder / "request.json"
        if not begun.exists():
            ours = set(packed.shards) if packed else _listed(output)
            foreign = [name for name in names if name not in ours and os.path.lexists(output / name)]
            if foreign:
                raise ValueError(
                    f"{output} holds {summarize_list(foreign, 3)} and no manifest: choose another --output, or move these away."
                )
        elif not request.continues(_read_request(begun)):
            raise ValueError(
                f"{output} holds half-packed shards of other images or settings: finish that command, or choose another --output."
            )
        commit_json(request[:3], begun)
        for stale in (*folder.glob("tmp-*"), *(path for left in HALF_WRITTEN for path in output.glob(left))):
            stale.unlink()
        yield folder


def _read_request(path: Path) -> PackRequest:
    """What a half-done packing was asked for; earlier releases kept the request alone."""
    raw = json.loads(path.read_text())
    return PackRequest(raw, "", "") if isinstance(raw, str) else PackRequest(*raw)


def _listed(output: Path) -> set[str]:
    """The names of the shards of a finished folder."""
    path = output / "manifest.json"
    return set(parse_manifest(path.read_bytes(), str(path)).shards.names) if path.exists() else set()
