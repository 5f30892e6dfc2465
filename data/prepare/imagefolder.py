"""Images in a folder: classes from its sub-folders, captions from `.txt` beside them, or both from tables as `datasets` knows them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condot.core.errors import summarize_list

from ..format.file_stamps import compute_stamp
from ..images.formats import IMAGE_EXTENSIONS
from .class_labels import class_name, class_number, natural_sort_key, number_classes, sort_class_names, unused_labels
from .folder_samples import FolderSubset, Sample
from .metadata_tables import ImageNames, Row, is_metadata, is_table, lists_images, read_tables
from .scan_folder import FolderScan, extension, stem, walk
from .source import ImageSource, RawRepr, digest, ordered_splits, to_utf8
from .splits import ALL, NO_FOLDER, SplitChoice, assign_splits, split_folders, splits_in_name
from .table_columns import NONE, ColumnChoice

KNOWN = f".{', .'.join(IMAGE_EXTENSIONS)}"


UNKNOWN = Row()
"""Of an image of which nothing is known."""


class FolderContent(NamedTuple):
    """What is to be packed of a folder."""

    images: list[str]
    split_of: list[str | None]
    """Of each image; None where `--splits` leaves it out."""
    rows: dict[str, Row]
    """What is known of each image."""
    sidecars: dict[str, str]
    """The `.txt` of each image that has one."""
    classes: Sequence[str]
    notes: dict[str, Any]


def imagefolder(path: Path, choice: ColumnChoice | None = None, splits: SplitChoice = ALL, *, skip: bool = False) -> ImageSource:
    """Return the images below a folder, or those that a table names.

    Args:
        path: the folder, or a table of image files, whose images alone are packed.
        choice: columns of tables that the user named; `none` for no tables, no captions or no classes.
        splits: which folders are packed, and as what.
        skip: leave out captions without an image, instead of an error.

    Raises:
        ValueError: no such folder, no image, captions without images, images
            both beside and inside class folders, a table that contradicts
            itself, splits that cannot be known.
    """
    choice = choice or ColumnChoice()
    selects = (is_table(path.name) or path.suffix.lower() == ".parquet") and not path.is_dir() and os.path.lexists(path)
    root = path.parent if selects else path
    if not root.is_dir():
        raise ValueError(f"source {str(path)!r} is no folder: give the folder that holds the images or one sub-folder a class.")
    found = walk(root)
    if not found.images:
        raise ValueError(_no_image_message(path, found))
    tables = [path.name] if selects else _tables_of(path, found, choice)
    content = (
        _read_with_tables(path, root, found, tables, choice, splits, skip)
        if tables
        else _read_class_folders(path, found, choice, splits, skip)
    )
    samples, splits_of, stamps, left = list[Sample](), list[str](), list[int](), Counter[str]()
    for name, split in zip(content.images, content.split_of, strict=True):
        if split is None:
            left[to_utf8(name.partition("/")[0]) if "/" in name else NO_FOLDER] += 1
            continue
        facts, row, sidecar = found.images[name], content.rows.get(name, UNKNOWN), content.sidecars.get(name, "")
        samples.append(Sample(name, facts.bytes if facts else 0, row, sidecar))
        splits_of.append(split)
        stamps.append(compute_stamp(facts, found.sidecar_facts.get(stem(sidecar)), row))
    notes = {
        "unknown_files": {kind: found.count[kind] for kind in sorted(found.count)},
        "splits_left_out": dict(left),
        "repeated_folders": found.repeated[:1000],
        **content.notes,
    }
    made = _source(root, samples, splits_of, content.classes, notes)
    settings = str((path.name if selects else "", choice, splits))
    return replace(made, stamps=np.array(stamps, np.uint64), settings=settings, place=str(root.resolve()))


def _no_image_message(path: Path, found: FolderScan) -> str:
    """Return why a folder without images is refused."""
    what = f"source {str(path)!r} holds no image: looked for {KNOWN} in it and its sub-folders"
    if found.sidecars or found.tables:
        texts = f"{len(found.sidecars)} .txt files" if found.sidecars else f"{len(found.tables)} tables"
        return f"{what}, and found captions without images ({texts}). Put the images beside them."
    other = ", ".join(f"{n} {kind} ({found.unknown[kind][0]})" for kind, n in found.count.most_common(4))
    return f"{what}{f', and found {other}' if other else ''}. Convert other formats to PNG, JPEG or WebP."


def _tables_of(path: Path, found: FolderScan, choice: ColumnChoice) -> list[str]:
    """Return the tables that describe a folder: every `metadata.*` in it, or the only other one at its top that names images.

    Tables that describe no images are counted as files that are not packed.

    Raises:
        ValueError: which one is meant cannot be told.
    """
    ignored = choice.file.lower() == NONE
    metadata = [name for name in found.tables if is_metadata(name) and not ignored]
    others = [name for name in found.tables if "/" not in name and not is_metadata(name) and not ignored]
    meant = metadata or [name for name in others if lists_images(path / name, IMAGE_EXTENSIONS, choice)]
    if not metadata and len(meant) > 1:
        raise ValueError(f"{path} holds the tables {', '.join(meant)}: which describes the images? Give that file as the source.")
    for name in found.tables:
        if name not in meant:
            found.count_unpacked(name)
    return meant


def _read_with_tables(
    path: Path, root: Path, found: FolderScan, tables: list[str], choice: ColumnChoice, splits: SplitChoice, skip: bool
) -> FolderContent:
    """Take captions, classes and the rest from tables; sub-folders are no classes then, as in `datasets`."""
    selects = root != path
    there = [name for name, facts in found.images.items() if facts or extension(name) in IMAGE_EXTENSIONS]
    rows, absent = read_tables(root, tables, there, choice)
    listed = summarize_list([to_utf8(name) for name in tables], 3)
    if not rows and not absent:
        raise ValueError(f"{listed} has no rows. Fill it in, or pack the folder without it by --file_column none.")
    if absent and (not skip or not rows):
        remedy = (
            "Add the images, correct the names, or leave these rows out with --skip_corrupt."
            if rows
            else "Name images relative to the table, or pack the folder without it by --file_column none."
        )
        raise ValueError(
            f"{len(absent)} rows of {listed} name no image that is there (captions without images): {summarize_list(absent)}. {remedy}"
        )
    values = [row.raw_label for row in rows.values()]
    names = sort_class_names(values, f"{listed}, column of labels")
    numbers = number_classes(names, given=False)
    rows = {name: row._replace(label=class_number(row.raw_label, numbers)) for name, row in rows.items()}
    images = [name for name in found.images if name in rows or not selects]
    notes = {
        "captions_without_image": absent[:1000],
        "images_not_in_table": len(found.images) - len(rows),
        "only_images_in_table": selects,
        "classes_without_image": unused_labels(values, numbers),
    }
    for _ in _sidecars(found, root)[0]:
        found.count_unpacked("", ".txt, since a table describes the images")
    return FolderContent(images, _splits_of_tables(images, rows, splits, path), rows, {}, names, notes)


def _read_class_folders(path: Path, found: FolderScan, choice: ColumnChoice, splits: SplitChoice, skip: bool) -> FolderContent:
    """Take classes from the folders, captions from sidecars.

    Raises:
        ValueError: a column was named, and no table is there.
    """
    for flag, name in (("file", choice.file), ("caption", choice.caption), ("label", choice.label)):
        if name and name.lower() != NONE:
            raise ValueError(f"--{flag}_column {name!r}: {path} has no table of images. Put a metadata.csv there, or leave it out.")
    sidecars, orphans, rivals = _sidecars(found, path)
    if rivals:
        raise ValueError(f"{len(rivals)} images have two captions: {summarize_list(rivals)}. Move one of the two away.")
    if orphans and sidecars and not skip:
        raise ValueError(
            f"{len(orphans)} captions have no image: {summarize_list(orphans)}. "
            "Add the images, move these files away, or leave them out with --skip_corrupt."
        )
    alive = [name for name, facts in found.images.items() if facts]
    split_of, tops = split_folders(alive, splits, str(path)) if alive else ([], [])
    known = dict(zip(alive, zip(split_of, tops, strict=True), strict=True))
    packed = {name: top for name, (split, top) in known.items() if split is not None and choice.label.lower() != NONE}
    classes = _classes(path, packed)
    numbers = {name: number for number, name in enumerate(classes)}
    of_top = {top: Row(label=numbers[class_name(to_utf8(top))]) for top in set(packed.values()) if top}
    return FolderContent(
        list(found.images),
        [known[name][0] if name in known else "train" for name in found.images],
        {name: of_top[top] for name, top in packed.items() if top},
        {} if choice.caption.lower() == NONE else sidecars,
        classes,
        {
            "captions_without_image": orphans[:1000],
            "similar_classes": [
                f"{one} and {other}" for one, other in pairwise(sorted(classes, key=str.lower)) if one.lower() == other.lower()
            ],
            "counted_folders": [name for name in classes if re.fullmatch(r"[0-9]+_\S.*", name)],
            "renumbered_folders": [n for n, name in enumerate(classes) if name.isdecimal() and int(name) != n],
        },
    )


def _sidecars(found: FolderScan, root: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the `.txt` of each image that has one, those of no image, and pairs of one image; NFC and NFD are one name."""
    images: dict[str, list[str]] = {}
    for name in found.images:
        images.setdefault(stem(name), []).append(name)
    names, owner, orphans = ImageNames(list(images)), dict[str, str](), list[str]()
    rivals = [f"{one} and {other}" for one, other in found.rivals if stem(one) in images]
    for base in sorted(found.sidecars):
        sidecar = found.sidecars[base]
        of = names.find(base, str(root / sidecar))
        if of is None:
            orphans.append(to_utf8(sidecar))
        elif of in owner:
            rivals.append(f"{owner[of]} and {sidecar}")
        else:
            owner[of] = sidecar
    return {name: sidecar for base, sidecar in owner.items() for name in images[base]}, orphans, list(map(to_utf8, rivals))


def _splits_of_tables(images: list[str], rows: dict[str, Row], splits: SplitChoice, path: Path) -> list[str | None]:
    """Return the split of each image, from a column `split` where the tables have one, else from its folders."""
    words = [rows[name].split if name in rows else "" for name in images]
    if not any(map(splits_in_name, words)):
        return split_folders(images, splits, str(path))[0]
    named = {word or "(no split)": [word] for word in dict.fromkeys(words)}
    assigned = assign_splits(named, splits, f"{path}, column `split`")
    return [assigned[word or "(no split)"] if assigned else "train" for word in words]


def _classes(root: Path, tops: dict[str, str]) -> list[str]:
    """Return the names of the classes, in natural order.

    Args:
        root: the folder.
        tops: the class folder of each image, empty where it is in none.

    Raises:
        ValueError: some images lie in class folders and others beside them.
    """
    classes = sorted({class_name(to_utf8(top)) for top in set(tops.values()) if top}, key=natural_sort_key)
    loose = next((name for name, top in tops.items() if not top), None)
    if classes and loose is not None:
        raise ValueError(
            f"{root / loose} lies beside the class folders {summarize_list(classes, 3)}: put every image into a class, or none, "
            "leave its split out with --splits, or pack without classes by --label_column none."
        )
    return classes


def _source(root: Path, samples: list[Sample], splits: list[str], classes: Sequence[str], notes: dict[str, Any]) -> ImageSource:
    names = ordered_splits(splits)
    return ImageSource(
        subset=lambda numbers: FolderSubset(str(root), [samples[i] for i in numbers.tolist()]),
        name=lambda number: to_utf8(samples[number].name),
        rows=np.ones(len(samples), np.int64),
        bytes=np.array([sample.bytes for sample in samples], np.int64),
        identity=digest("folder", samples, splits),
        legacy_identity=lambda: _legacy_identity(samples, splits),
        splits=tuple(names),
        split_of=np.array([names.index(split) for split in splits], np.int8),
        class_names=tuple(classes),
        notes=notes,
    )


def _legacy_identity(samples: list[Sample], splits: list[str]) -> str:
    """Return the identity that the release 85bd0c6 gave a folder."""
    rows = [RawRepr(f"Row({', '.join(f'{name}={getattr(sample.row, name)!r}' for name in Row._fields[:4])})") for sample in samples]
    captioned = [bool(sample.sidecar) for sample in samples]
    return digest("folder", [sample.name for sample in samples], [sample.bytes for sample in samples], rows, captioned, splits)
