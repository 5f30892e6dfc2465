"""Images in a folder: classes from its sub-folders, captions from `.txt` beside them, or both from tables as `datasets` knows them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .columns import label_of, names_of
from .index import IMAGE_EXTENSIONS, MAX_TEXT_BYTES
from .listing import SPLIT_WORDS, Fault, Record, Source, digest, reason, some
from .stamps import stamp_of
from .tables import Row, is_table, read_tables

KNOWN = f".{', .'.join(IMAGE_EXTENSIONS)}"


@dataclass
class Found:
    """What a walk through a folder finds; names are relative to it."""

    images: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    """Names of `.txt` files without their ending."""
    stats: dict[str, os.stat_result] = field(default_factory=dict)
    """Of images by name, and of `.txt` files by their name without ending."""
    tables: list[str] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    """Other files by extension: the first few names, then the count."""
    count: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class FolderPart:
    """Some image files, with what is known of each."""

    root: str
    names: list[str]
    sizes: list[int]
    labels: list[int | None]
    captions: list[str | None]
    sidecars: list[bool]
    more: list[dict[str, Any] | None]

    def read(self, scratch: Path) -> Iterator[Record | Fault]:
        for i, name in enumerate(self.names):
            try:
                data = Path(self.root, name).read_bytes()
                if len(data) != self.sizes[i]:
                    raise ValueError(f"it had {self.sizes[i]} bytes when it was listed and has {len(data)} now")
                caption = _sidecar(Path(self.root, name).with_suffix(".txt")) if self.sidecars[i] else self.captions[i]
            except (OSError, ValueError) as error:
                yield Fault(name, reason(error))
                continue
            yield Record(name, data, _extension(name), self.labels[i], caption, self.more[i] or {})


def _sidecar(path: Path) -> str | None:
    with open(path, "rb") as file:
        text = file.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"its .txt has more than {MAX_TEXT_BYTES} bytes")
    return text.decode("utf-8-sig").strip() or None


def imagefolder(path: Path, *, skip: bool = False) -> Source:
    """The images below a folder, or those that a table names.

    Args:
        path: the folder, or a `.csv` or `.jsonl` table of image files.
        skip: leave out captions without an image, instead of an error.

    Raises:
        ValueError: no such folder, no image, captions without images, images
            both beside and inside class folders, a table that contradicts itself.
    """
    root = path.parent if path.is_file() and is_table(path.name) else path
    if not root.is_dir() or (root == path and not path.is_dir()):
        raise ValueError(f"source {str(path)!r} is no folder: give the folder that holds the images or one sub-folder a class.")
    found = _walk(root)
    if not found.images:
        raise ValueError(_nothing(path, found))
    tables = [path.name] if root != path else _tables_of(path, found)
    notes: dict[str, Any] = {"unknown_files": {kind: found.count[kind] for kind in sorted(found.count)}}
    if tables:
        return _with_tables(path, root, found, tables, notes, skip)
    splits, tops = _split_folders(root, found.images)
    orphans = sorted(found.texts - {_stem(name) for name in found.images})
    captioned = [_stem(name) in found.texts for name in found.images]
    if orphans and any(captioned) and not skip:
        raise ValueError(
            f"{len(orphans)} captions have no image: {some([f'{name}.txt' for name in orphans])}. "
            "Add the images, move these files away, or leave them out with --skip_corrupt."
        )
    notes["captions_without_image"] = [f"{name}.txt" for name in orphans[:1000]]
    classes = _classes(root, found.images, tops)
    row_of = {"": Row()} | {name: Row(label=number) for number, name in enumerate(classes)}
    return _source(root, found, [row_of[top] for top in tops], captioned, classes, splits, notes)


def _walk(root: Path) -> Found:
    """Everything below a folder but hidden files, in the order of names; links to folders are followed, once each."""
    found, seen, folders = Found(), set[str](), [""]
    while folders:
        at = folders.pop()
        real = os.path.realpath(root / at)
        if real in seen:
            continue
        seen.add(real)
        below = []
        for entry in sorted(os.scandir(root / at), key=lambda entry: entry.name):
            name = f"{at}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below.append(f"{name}/")
            elif _extension(name) in IMAGE_EXTENSIONS:
                found.images.append(name)
                if entry.is_file():
                    found.stats[name] = entry.stat()
                found.sizes.append(found.stats[name].st_size if entry.is_file() else 0)  # a dangling link is a fault when it is read
            elif _extension(name) == "txt":
                found.texts.add(_stem(name))
                if entry.is_file():
                    found.stats[_stem(name)] = entry.stat()
            elif is_table(name):
                found.tables.append(name)
            else:
                kind = f".{_extension(name)}" if _extension(name) else "without extension"
                found.count[kind] += 1
                found.unknown.setdefault(kind, [])
                if len(found.unknown[kind]) < 3:
                    found.unknown[kind].append(name)
        folders += reversed(below)
    return found


def _nothing(path: Path, found: Found) -> str:
    """Why a folder without images is refused."""
    what = f"source {str(path)!r} holds no image: looked for {KNOWN} in it and its sub-folders"
    if found.texts or found.tables:
        count = len(found.texts) or len(found.tables)
        return (
            f"{what}, and found captions without images ({count} {'.txt files' if found.texts else 'tables'}). Put the images beside them."
        )
    other = ", ".join(f"{n} {kind} ({found.unknown[kind][0]})" for kind, n in found.count.most_common(4))
    return f"{what}{f', and found {other}' if other else ''}. Convert other formats to PNG, JPEG or WebP."


def _tables_of(path: Path, found: Found) -> list[str]:
    """The tables that describe a folder: every `metadata.*` in it, or the only other one at its top.

    Raises:
        ValueError: which one is meant cannot be told.
    """
    metadata = [name for name in found.tables if Path(name).stem == "metadata"]
    others = [name for name in found.tables if "/" not in name and Path(name).stem != "metadata"]
    if not metadata and len(others) > 1:
        raise ValueError(f"{path} holds the tables {', '.join(others)}: which describes the images? Give that file as the source.")
    return metadata or others


def _with_tables(path: Path, root: Path, found: Found, tables: list[str], notes: dict[str, Any], skip: bool) -> Source:
    """Captions, classes and the rest from tables; sub-folders are no classes then, as in `datasets`."""
    rows, absent = read_tables(root, tables, set(found.images))
    if absent and (not skip or not rows):
        raise ValueError(
            f"{len(absent)} rows of {', '.join(tables[:3])} name no image that is there (captions without images): {some(absent)}. "
            "Add the images, remove the rows, or leave them out with --skip_corrupt."
        )
    notes["captions_without_image"] = absent[:1000]
    notes["images_not_in_table"] = len(found.images) - len(rows)
    names = names_of((row.raw_label for row in rows.values()), str(path))
    numbers = {name: i for i, name in enumerate(names)}
    labelled = [row._replace(label=label_of(row.raw_label, numbers)) for name in found.images for row in [rows.get(name, Row())]]
    splits = _split_folders(root, found.images)[0]
    return _source(root, found, labelled, [False] * len(labelled), list(names), splits, notes)


def _split_folders(root: Path, images: list[str]) -> tuple[list[str], list[str]]:
    """The split of each image and the name of its class folder; top folders that are all named like splits are splits."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in images]
    if not set(tops) <= set(SPLIT_WORDS) or "train" not in {SPLIT_WORDS[top] for top in set(tops)}:
        return ["train"] * len(images), tops
    return [SPLIT_WORDS[top] for top in tops], [name.split("/")[1] if name.count("/") > 1 else "" for name in images]


def _classes(root: Path, images: list[str], tops: list[str]) -> list[str]:
    classes = sorted(set(tops) - {""})
    if classes and "" in tops:
        loose = root / images[tops.index("")]
        raise ValueError(f"{loose} lies beside the class folders {', '.join(classes[:3])}: put every image into a class, or none.")
    return classes


def _source(
    root: Path,
    found: Found,
    rows: list[Row],
    captioned: list[bool],
    classes: list[str],
    splits: list[str],
    notes: dict[str, Any],
) -> Source:
    images, sizes = found.images, found.sizes

    def part(numbers: np.ndarray) -> FolderPart:
        chosen = numbers.tolist()
        return FolderPart(
            root=str(root),
            names=[images[i] for i in chosen],
            sizes=[sizes[i] for i in chosen],
            labels=[rows[i].label for i in chosen],
            captions=[rows[i].caption for i in chosen],
            sidecars=[captioned[i] for i in chosen],
            more=[rows[i].more for i in chosen],
        )

    def stamp(i: int) -> int:
        text = found.stats.get(_stem(images[i])) if captioned[i] else None
        return stamp_of(found.stats.get(images[i]), text, rows[i])

    names = sorted(set(splits), key=lambda split: (split != "train", split))
    return Source(
        part=part,
        name=images.__getitem__,
        rows=np.ones(len(images), np.int64),
        bytes=np.array(sizes, np.int64),
        identity=digest("folder", images, sizes, rows, captioned, splits),
        splits=tuple(names),
        split_of=np.array([names.index(split) for split in splits], np.int8),
        class_names=tuple(classes),
        notes=notes,
        stamps=np.array([stamp(i) for i in range(len(images))], np.uint64),
        place=str(root.resolve()),
    )


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower().lstrip(".")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
