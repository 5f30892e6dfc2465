"""Tables that describe image files: CSV, JSON lines and parquet, with a column of file names."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from .columns import CAPTION_COLUMNS, FILE_COLUMNS, LABEL_COLUMNS, first_text
from .listing import some
from .text_files import MAX_TEXT_BYTES

EXTENSIONS = (".csv", ".jsonl")


class Row(NamedTuple):
    """What a table says of one image."""

    raw_label: Any = None
    label: int | None = None
    caption: str | None = None
    more: dict[str, Any] | None = None


def is_table(name: str) -> bool:
    """Whether a file may describe images: any CSV or JSON lines, and `metadata.parquet`."""
    return name.lower().endswith(EXTENSIONS) or PurePosixPath(name).name == "metadata.parquet"


def read_tables(root: Path, tables: list[str], images: set[str]) -> tuple[dict[str, Row], list[str]]:
    """What tables say of images.

    Args:
        root: the folder of the images.
        tables: names below it; what they name is relative to their own folders.
        images: names of the images that are there, below `root`.

    Returns:
        A row for each image named, and the names that no image has.

    Raises:
        ValueError: a table that cannot be read or has no column of file
            names; rows without a name; images named twice; names that lead out.
    """
    rows, absent, twice, empty = dict[str, Row](), list[str](), list[str](), list[str]()
    for table in tables:
        folder = PurePosixPath(table).parent
        for line, raw in enumerate(_rows(root / table), 2 if table.endswith(".csv") else 1):
            where = f"{table}:{line}"
            column = _first(raw, FILE_COLUMNS)
            if column is None:
                shown = ", ".join(map(str, raw))
                raise ValueError(f"{where}: no column names the image: call one `file_name`, as `datasets` does. It has {shown}.")
            value = raw[column]
            if not isinstance(value, str) or not value.strip():
                empty.append(where)
                continue
            name = _inside(folder, value.strip(), where)
            if name not in images:
                absent.append(value)
            elif name in rows:
                twice.append(value)
            else:
                rows[name] = _row(raw, column)
    if empty:
        raise ValueError(f"{len(empty)} rows name no image: {some(empty)}. Fill in the file names or remove the rows.")
    if twice:
        raise ValueError(f"{len(twice)} images are listed twice: {some(twice)}. Keep one row an image; copy the file for a second caption.")
    return rows, absent


def _row(raw: dict[str, Any], column: str) -> Row:
    caption, label = _first(raw, CAPTION_COLUMNS), _first(raw, LABEL_COLUMNS)
    more = {key: value for key, value in raw.items() if key not in (column, caption, label) and value not in (None, "")}
    words = raw[caption] if caption else None
    if caption and isinstance(words, list):  # several captions of one image: the first is the caption, all are kept
        more[caption] = words
    return Row(raw[label] if label else None, None, first_text(words), more or None)


def _first(raw: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in raw), None)


def _inside(folder: PurePosixPath, name: str, where: str) -> str:
    """A name relative to the folder of the images, if it stays there."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {name!r} leads out of its folder. Name images relative to the table.")
    return str(folder / path)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table as dictionaries.

    Raises:
        ValueError: what it holds is no table, with the line.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _lines(file, path) if kind == ".jsonl" else _comma_separated(file, path)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}. Save it as UTF-8 with a header line.") from error


def _comma_separated(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    reader = csv.reader(file)
    header = next(reader, [])
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: two columns have one name in {', '.join(header)}. Rename one.")
    for values in reader:
        if not values:
            continue
        if len(values) != len(header):
            raise ValueError(f"{path}:{reader.line_num} has {len(values)} values for {len(header)} columns. Quote text that has commas.")
        yield dict(zip(header, values, strict=True))


def _lines(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if len(line) <= MAX_TEXT_BYTES else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is no JSON object of at most a megabyte. Write one object a line.")
        yield row
