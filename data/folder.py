"""Images in a folder: classes from its sub-folders, captions from `.txt` beside them, or both from tables as `datasets` knows them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .columns import NONE, Choice
from .index import IMAGE_EXTENSIONS
from .labels import class_name, label_of, names_of, natural, numbers_of, unused
from .listing import Fault, Record, Source, digest, ordered_splits, reason, some, storable
from .regular_files import MAX_IMAGE_BYTES, open_regular, read_regular
from .splits import SplitChoice, assign, kinds_of, split_folders
from .tables import Row, is_meant, is_metadata, is_table, read_tables
from .text_files import MAX_TEXT_BYTES, decode_text
from .walk import READ, Found, extension, stem, walk

KNOWN = f".{', .'.join(READ)}"


class Sample(NamedTuple):
    """One image file, with what is known of it."""

    name: str
    bytes: int
    row: Row
    sidecar: str
    """The `.txt` with its caption, below the folder; empty where it has none."""


@dataclass(frozen=True)
class FolderPart:
    """Some image files below a folder."""

    root: str
    samples: list[Sample]

    def read(self, scratch: Path) -> Iterator[Record | Fault]:
        for sample in self.samples:
            try:
                data = self._image(sample)
                caption = self._caption(sample.sidecar) if sample.sidecar else sample.row.caption
            except (OSError, ValueError) as error:
                yield Fault(storable(sample.name), reason(error))
                continue
            kind = extension(sample.name)
            known = kind if kind in IMAGE_EXTENSIONS else ""
            yield Record(storable(sample.name), data, known, sample.row.label, caption, sample.row.more or {})

    def _image(self, sample: Sample) -> bytes:
        path = Path(self.root, sample.name)
        if path.is_symlink() and not path.exists():
            raise ValueError("it is a link that leads to nothing")
        if sample.bytes > MAX_IMAGE_BYTES:
            raise ValueError(f"it has {sample.bytes} bytes, at most {MAX_IMAGE_BYTES} are read")
        with open_regular(path) as file:
            data = file.read(sample.bytes + 1)
        if len(data) != sample.bytes:
            raise ValueError(
                f"it had {sample.bytes} bytes when it was listed and has {'more' if len(data) > sample.bytes else len(data)} now"
            )
        return data

    def _caption(self, name: str) -> str | None:
        try:
            return decode_text(read_regular(Path(self.root, name), MAX_TEXT_BYTES)) or None
        except (OSError, ValueError) as error:
            raise ValueError(f"its caption {name.rpartition('/')[2]}: {reason(error)}") from error


def imagefolder(path: Path, choice: Choice | None = None, splits: SplitChoice | None = None, *, skip: bool = False) -> Source:
    """Return the images below a folder, or those that a table names.

    Args:
        path: the folder, or a table of image files, whose images alone are packed.
        choice: columns of tables that the user named; `none` for no captions or no classes.
        splits: which folders are packed, and as what.
        skip: leave out captions without an image, instead of an error.

    Raises:
        ValueError: no such folder, no image, captions without images, images
            both beside and inside class folders, a table that contradicts
            itself, splits that cannot be known.
    """
    choice, splits = choice or Choice(), splits or SplitChoice()
    selects = (is_table(path.name) or path.suffix.lower() == ".parquet") and not path.is_dir() and os.path.lexists(path)
    root = path.parent if selects else path
    if not root.is_dir():
        raise ValueError(f"source {str(path)!r} is no folder: give the folder that holds the images or one sub-folder a class.")
    found = walk(root)
    if not found.images:
        raise ValueError(_nothing(path, found))
    tables = [path.name] if selects else _tables_of(path, found, choice)
    rivals = [f"{one} and {other}" for one, other in found.rivals if stem(one) in {stem(name) for name in found.images}]
    if rivals and not tables:
        raise ValueError(f"{len(rivals)} images have two captions: {some(rivals)}. Keep one `.txt` an image.")
    if tables:
        rows, notes = _described(root, found, tables, choice, skip)
        images = [name for name in found.images if name in rows] if selects else found.images
        if not images:
            raise ValueError(f"source {str(path)!r} names no image: it has no rows. Fill it in, or give the folder itself as the source.")
        notes |= {"images_not_in_table": len(found.images) - len(rows), "only_images_in_table": selects}
        split_of, tops = _splits_of_tables(images, rows, splits, path), [""] * len(images)
        sidecars = dict[str, str]()
    else:
        _refuse_columns(path, choice)
        split_of, tops = _splits_of_folders(found, splits, path)
        images, rows, notes = found.images, {}, _orphans(found, skip)
        sidecars = {} if choice.caption.lower() == NONE else found.sidecars
    classes = _classes(root, images, tops, split_of, found.dead) if choice.label.lower() != NONE and not tables else []
    numbers = numbers_of(classes, given=True)
    of_class = {top: Row(label=numbers[class_name(storable(top))]) for top in set(tops) if classes and top} | {"": Row()}
    sizes = {name: status.st_size if status else 0 for name, status in zip(found.images, found.stats, strict=True)}
    samples = [
        Sample(name, sizes[name], rows.get(name) or of_class.get(top, Row()), sidecars.get(stem(name), ""))
        for name, top, split in zip(images, tops, split_of, strict=True)
        if split is not None
    ]
    left = Counter(storable(name.partition("/")[0]) for name, split in zip(images, split_of, strict=True) if split is None)
    notes |= {"splits_left_out": dict(left), "repeated_folders": found.repeated[:1000]}
    notes["unknown_files"] = {kind: found.count[kind] for kind in sorted(found.count)}
    names = notes.pop("class_names", classes)
    return _source(root, samples, [split for split in split_of if split is not None], names, notes)


def _nothing(path: Path, found: Found) -> str:
    """Return why a folder without images is refused."""
    what = f"source {str(path)!r} holds no image: looked for {KNOWN} in it and its sub-folders"
    if found.sidecars or found.tables:
        count = len(found.sidecars) or len(found.tables)
        return f"{what}, and found captions without images ({count} {'.txt files' if found.sidecars else 'tables'}). Put the images beside them."
    other = ", ".join(f"{n} {kind} ({found.unknown[kind][0]})" for kind, n in found.count.most_common(4))
    return f"{what}{f', and found {other}' if other else ''}. Convert other formats to PNG, JPEG or WebP."


def _tables_of(path: Path, found: Found, choice: Choice) -> list[str]:
    """Return the tables that describe a folder: every `metadata.*` in it, or the only other one at its top that names images.

    Tables that describe no images are counted as files that are not packed.

    Raises:
        ValueError: which one is meant cannot be told.
    """
    metadata = [name for name in found.tables if is_metadata(name)]
    others = [name for name in found.tables if "/" not in name and not is_metadata(name)]
    meant = metadata or [name for name in others if is_meant(path / name, READ, choice)]
    if not metadata and len(meant) > 1:
        raise ValueError(f"{path} holds the tables {', '.join(meant)}: which describes the images? Give that file as the source.")
    for name in found.tables:
        if name not in meant:
            found.leave(name)
    return meant


def _described(root: Path, found: Found, tables: list[str], choice: Choice, skip: bool) -> tuple[dict[str, Row], dict[str, Any]]:
    """Return captions, classes and the rest from tables, by image, and notes; sub-folders are no classes then, as in `datasets`."""
    there = [name for name in found.images if name not in found.dead or extension(name) in READ]
    rows, absent = read_tables(root, tables, there, choice)
    listed = some([storable(name) for name in tables], 3)
    if absent and (not skip or not rows):
        raise ValueError(
            f"{len(absent)} rows of {listed} name no image that is there (captions without images): {some(absent)}. "
            "Add the images, correct the names, or leave these rows out with --skip_corrupt."
        )
    values = [row.raw_label for row in rows.values()]
    names = names_of(values, f"{listed}, column of labels")
    numbers = numbers_of(names, given=False)
    rows = {name: row._replace(label=label_of(row.raw_label, numbers)) for name, row in rows.items()}
    notes: dict[str, Any] = {"captions_without_image": absent[:1000], "class_names": names}
    gaps = unused(values, numbers)
    if gaps:
        notes["classes_without_image"] = gaps
    for name in found.images:
        if stem(name) in found.sidecars:
            found.leave(found.sidecars[stem(name)], ".txt, since a table describes the images")
    return rows, notes


def _refuse_columns(path: Path, choice: Choice) -> None:
    for flag, name in (("file", choice.file), ("caption", choice.caption), ("label", choice.label)):
        if name and name.lower() != NONE:
            raise ValueError(f"--{flag}_column {name!r}: {path} has no table of images. Put a metadata.csv beside them, or leave it out.")


def _orphans(found: Found, skip: bool) -> dict[str, Any]:
    """Return notes on captions without an image.

    Raises:
        ValueError: there are some, and others that have one.
    """
    images = {stem(name) for name in found.images}
    orphans = [storable(found.sidecars[name]) for name in sorted(found.sidecars.keys() - images)]
    if orphans and images & found.sidecars.keys() and not skip:
        raise ValueError(
            f"{len(orphans)} captions have no image: {some(orphans)}. "
            "Add the images, move these files away, or leave them out with --skip_corrupt."
        )
    return {"captions_without_image": orphans[:1000]}


def _splits_of_folders(found: Found, splits: SplitChoice, path: Path) -> tuple[list[str | None], list[str]]:
    """Return the split and the class folder of each image; links that lead to nothing say neither."""
    alive = [name for name in found.images if name not in found.dead]
    split_of, tops = split_folders(alive, splits, str(path)) if alive else ([], [])
    known = dict(zip(alive, zip(split_of, tops, strict=True), strict=True))
    both = [known.get(name, ("train", "")) for name in found.images]
    return [split for split, _ in both], [top for _, top in both]


def _splits_of_tables(images: list[str], rows: dict[str, Row], splits: SplitChoice, path: Path) -> list[str | None]:
    """Return the split of each image, from a column `split` where the tables have one, else from its folders."""
    words = [rows[name].split if name in rows else "" for name in images]
    if not any(map(kinds_of, words)):
        return split_folders(images, splits, str(path))[0]
    named = {word or "(no split)": [word] for word in dict.fromkeys(words)}
    assigned = assign(named, splits, f"{path}, column `split`")
    return [assigned[word or "(no split)"] if assigned else "train" for word in words]


def _classes(root: Path, images: Sequence[str], tops: Sequence[str], splits: Sequence[str | None], dead: set[str]) -> list[str]:
    """Return the names of the classes, in natural order.

    Raises:
        ValueError: some images lie in class folders and others beside them.
    """
    packed = [(name, top) for name, top, split in zip(images, tops, splits, strict=True) if split is not None and name not in dead]
    classes = sorted({class_name(storable(top)) for _, top in packed if top}, key=natural)
    loose = next((name for name, top in packed if not top), None)
    if classes and loose is not None:
        raise ValueError(
            f"{root / loose} lies beside the class folders {', '.join(classes[:3])}: put every image into a class, or pack without classes "
            "by --label_column none."
        )
    return classes


def _source(root: Path, samples: list[Sample], splits: list[str], classes: Sequence[str], notes: dict[str, Any]) -> Source:
    names = ordered_splits(splits)
    return Source(
        part=lambda numbers: FolderPart(str(root), [samples[i] for i in numbers.tolist()]),
        name=lambda number: storable(samples[number].name),
        rows=np.ones(len(samples), np.int64),
        bytes=np.array([sample.bytes for sample in samples], np.int64),
        identity=digest("folder", samples, splits),
        splits=tuple(names),
        split_of=np.array([names.index(split) for split in splits], np.int8),
        class_names=tuple(classes),
        notes=notes,
    )
