"""Images by the thousand: which process makes which, what is there already, and the settings that a folder of them is bound to.

Numbers are cut into units, and process r of N takes the units r, r + N, ...;
what is there already is passed over inside each. So no process needs to hear
of the others while it works, and the next command may have more or fewer of
them. A unit is a batch where each image is a file, and a shard where many are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from condot.core.hashing import sha256_of_file
from condot.core.process import InterruptHandler

from ..launch.distributed import join_process_group
from ..launch.folder_lock import lock_folder
from .image_grid import atomic_file

SETTINGS = "samples.json"
EXPORT_PATTERNS = ("model_index.json", "config.yaml", "*/*")
CHECKPOINT_PATTERNS = ("manifest.json",)
"""It has the hashes of the other files."""

TEMPORARY_PREFIXES = (".tmp-", "tmp-")
"""How names of half-written files begin."""

ImageFiles = Mapping[str, bytes]  # the files of one image by extension, the image's own first
MakeImages = Callable[[range], Sequence[ImageFiles]]  # of the images with these numbers


class ImageWriter(Protocol):
    """Where images go, unit by unit; another process has the other units."""

    @property
    def there(self) -> int:
        """Images that were there when it was opened."""
        ...

    def missing(self, unit: range) -> Sequence[int]:
        """Which of a unit are still to be made."""
        ...

    def put(self, number: int, made: ImageFiles) -> None:
        """Keep one image of the unit at hand."""
        ...

    def close(self, unit: range) -> None:
        """All of the unit were put."""
        ...

    def drop(self) -> None:
        """What was put since the last close is not the whole unit: nothing half-written stays."""
        ...

    def finish(self) -> None:
        """All units of all processes are closed; called by one of them."""
        ...


class FolderWriter:
    """A file per image, all in one folder: `000000.png` and on, or `000000.npy`.

    Flat at any number of images: where a file lies must not depend on how many
    there will be, and what reads such folders wants them flat; for more than
    some 100,000, tars are kinder to a file system.

    Args:
        folder: where to.
        extension: of the images, as `image_files.file_extension` has it.
    """

    def __init__(self, folder: Path, extension: str = "png") -> None:
        self._folder, self._extension = folder, extension
        self._found = {entry.name for entry in os.scandir(folder) if entry.name[0] != "." and entry.stat().st_size}
        self.there = sum(name.endswith(f".{extension}") for name in self._found)

    def missing(self, unit: range) -> Sequence[int]:
        """Those that are no file yet, or an empty one, as after a power failure."""
        return [i for i in unit if self._name(i) not in self._found]

    def put(self, number: int, made: ImageFiles) -> None:
        """Write the image, whole or not at all; the files beside it are for shards."""
        with atomic_file(self._folder / self._name(number)) as temporary:
            temporary.write_bytes(made[self._extension])

    def close(self, unit: range) -> None:
        """Nothing is left to do: each image is whole by itself."""

    def drop(self) -> None:
        """Do nothing: each image is whole by itself."""

    def finish(self) -> None:
        """Do nothing: each image is whole by itself."""

    def _name(self, number: int) -> str:
        return f"{number:06d}.{self._extension}"


def work_units(count: int, size: int, rank: int = 0, ranks: int = 1) -> list[range]:
    """The numbers 0 to count - 1 in ranges of `size`, the last one shorter: those of one process of several.

    Raises:
        ValueError: a size below one.
    """
    if size < 1:
        raise ValueError(f"{size} images at once: at least one.")
    return [range(start, min(start + size, count)) for start in range(rank * size, count, ranks * size)]


def consecutive_ranges(numbers: Sequence[int], batch_size: int) -> Iterator[range]:
    """Rising numbers as ranges of at most `batch_size` that follow one another."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1 or place - start == batch_size:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place


def generate_missing(
    writer: ImageWriter,
    my_units: Sequence[range],
    make: MakeImages,
    batch_size: int,
    should_stop: Callable[[], bool],
    progress_bar: tqdm[Any],
) -> int:
    """Make what is missing of some units.

    Args:
        writer: where to.
        my_units: the units of this process.
        make: the images of some numbers that follow one another.
        batch_size: images at once.
        should_stop: asked after each batch; what then is not whole is left out.
        progress_bar: shows progress, in images.

    Returns:
        How many were made.
    """
    done = 0
    try:
        for unit in my_units:
            todo = writer.missing(unit)
            progress_bar.update(len(unit) - len(todo))
            for numbers in consecutive_ranges(todo, batch_size):
                if should_stop():
                    return done
                for number, made in zip(numbers, make(numbers), strict=True):
                    writer.put(number, made)
                done += len(numbers)
                progress_bar.update(len(numbers))
            if todo:
                writer.close(unit)
    finally:
        writer.drop()
    return done


def fingerprint_model(model: Path) -> str:
    """A hash of all files that decide what a model draws.

    Args:
        model: an exported folder, or a checkpoint.
    """
    digest = hashlib.sha256()
    patterns = CHECKPOINT_PATTERNS if (model / "state.json").exists() else EXPORT_PATTERNS
    for path in sorted(path for pattern in patterns for path in model.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(model)}:{sha256_of_file(path)};".encode())
    return digest.hexdigest()


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose images were made otherwise.

    Args:
        folder: where images go; it need not be there.
        settings: all that decides what image i is, JSON values by name.

    Raises:
        ValueError: other settings there, or images that no settings stand beside.
    """
    path, made = folder / SETTINGS, list(islice(_existing_images(folder), 3))
    if not made:
        return
    if not path.exists():
        raise ValueError(f"--output {str(folder)!r} holds {', '.join(made)} and no {SETTINGS}: give a folder of its own.")
    try:
        there = dict(json.loads(path.read_text())["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give another --output.") from error
    here = json.loads(json.dumps(settings))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if keys:
        differ = "; ".join(f"{key} is {_abbreviated(there.get(key))} there and {_abbreviated(here.get(key))} here" for key in keys)
        raise ValueError(f"--output {str(folder)!r} holds images of other settings: {differ}. Give another --output, or the same settings.")


def _existing_images(folder: Path) -> Iterator[str]:
    """Names of what a folder holds, but for its settings and what is of no worth: then it may be begun anew."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (SETTINGS, ".lock") and not path.name.startswith(TEMPORARY_PREFIXES):
            yield path.name


def _abbreviated(value: Any) -> Any:
    """A hash by its beginning, anything else whole."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def write_settings(folder: Path, settings: Mapping[str, Any], count: int) -> None:
    """Write what the images of a folder are, and remove what was left half-written; for one process, before any begins.

    Args:
        folder: where images go.
        settings: as in `check_settings`.
        count: images asked for now; more may be another time.
    """
    for path in list(folder.rglob("*")):
        if path.name.startswith(TEMPORARY_PREFIXES):
            path.unlink()
    with atomic_file(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "num_images": count}, indent=1) + "\n")


def generate_folder(
    folder: Path,
    count: int,
    settings: Mapping[str, Any],
    unit: int,
    batch_size: int,
    open_writer: Callable[[], ImageWriter],
    make: MakeImages,
    interrupt: InterruptHandler,
) -> tuple[ImageWriter, int]:
    """Fill a folder with images, together with the other processes of this launch.

    Args:
        folder: where to.
        count: images in all.
        settings: as in `check_settings`.
        unit: images of a unit.
        batch_size: images at once.
        open_writer: gives what keeps them, of what is there by now.
        make: the images of some numbers that follow one another.
        interrupt: asked after each batch; a signal before the first one ends the process.

    Returns:
        What keeps them as it was opened at the start, and how many images are missing at the end.

    Raises:
        ValueError: the folder holds other images, or another process fills it.
    """
    check_settings(folder, settings)
    group, folder_lock = join_process_group(), None
    with group.main_process_first():
        if group.is_main_process:
            folder_lock = lock_folder(folder, "--output")
            write_settings(folder, settings, count)
        writer = open_writer()

    def make_while_locked(numbers: range) -> Sequence[ImageFiles]:
        made = make(numbers)
        if folder_lock and (lost := folder_lock.lock_error()):
            raise ValueError(lost)
        return made

    interrupt.defer()
    my_units = work_units(count, unit, group.process_index, group.num_processes)
    title = f"process 1 of {group.num_processes}" if group.num_processes > 1 else "sampling"
    with tqdm(total=sum(map(len, my_units)), desc=title, unit="image", mininterval=1, disable=not group.is_main_process) as progress_bar:
        generate_missing(writer, my_units, make_while_locked, batch_size, lambda: interrupt.requested, progress_bar)
    group.wait_for_everyone()
    remaining = sum(map(len, map(open_writer().missing, work_units(count, unit)))) if group.is_main_process else 0
    if folder_lock:
        folder_lock.close()
    return writer, remaining
