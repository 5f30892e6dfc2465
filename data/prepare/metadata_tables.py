"""Tables that describe image files: CSV, JSON lines and parquet, with a column of file names."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from condot.core.errors import describe_error, summarize_list
from condot.core.printable import printable
from condot.core.regular_files import open_regular
from condot.core.text_files import MAX_TEXT_BYTES, parse_json

from .class_labels import parse_class
from .source import to_utf8
from .splits import split_columns, splits_in_name
from .table_columns import CAPTION_COLUMNS, FILE_COLUMNS, LABEL_COLUMNS, ColumnChoice, find_column, first_text, match_column

EXTENSIONS = (".csv", ".tsv", ".jsonl")
DELIMITERS = (",", ";", "\t", "|")


class Row(NamedTuple):
    """What a table says of one image."""

    raw_label: Any = None
    label: int | None = None
    caption: str | None = None
    more: dict[str, Any] | None = None
    split: str = ""


class ImageNames:
    """The images that are there, found by names as tables write them: composed or not (NFC, NFD), with slashes of either kind."""

    def __init__(self, images: Sequence[str]) -> None:
        self.exact = set(images)
        self.composed: dict[str, list[str]] = {}
        for name in images:
            if not name.isascii():
                self.composed.setdefault(unicodedata.normalize("NFC", name), []).append(name)

    def find(self, name: str, where: str) -> str | None:
        """Return the image that a name means; None where none is there.

        Raises:
            ValueError: it could be several.
        """
        if name in self.exact:
            return name
        found = self.composed.get(unicodedata.normalize("NFC", name), [])
        if len(found) > 1:
            raise ValueError(f"{where}: {name!r} could be {len(found)} files whose names look alike and differ in bytes. Rename one.")
        return found[0] if found else None


def is_table(name: str) -> bool:
    """Return whether a file may describe images: any CSV or JSON lines, and `metadata.parquet`."""
    return name.lower().endswith(EXTENSIONS) or name.lower().rpartition("/")[2] == "metadata.parquet"


def is_metadata(name: str) -> bool:
    """Return whether a table has the name by which `datasets` knows one that describes the images beside it."""
    return PurePosixPath(name).stem.lower() == "metadata"


def lists_images(path: Path, extensions: Sequence[str], choice: ColumnChoice) -> bool:
    """Return whether a table of any name speaks of image files: in a column of file names, or in the one that the user named.

    One that cannot be read counts as meant where its first line has such a
    column, so that the reason is reported.
    """
    names = {choice.file} if choice.file else set(FILE_COLUMNS)
    try:
        for _, raw in read_rows(path, choice.file):
            values = [raw[name] for name in names if name in raw]
            if any(isinstance(v, str) and "://" not in v and v.strip().rpartition(".")[2].lower() in extensions for v in values):
                return True
    except ValueError:
        try:
            with open_regular(path) as file:
                first = file.readline(MAX_TEXT_BYTES).decode("latin-1")
        except (OSError, ValueError):
            return False
        return any(name in re.findall(r"[^,;|\t\r\n\"]+", first) for name in names)
    return False


def read_tables(root: Path, tables: list[str], images: Sequence[str], choice: ColumnChoice) -> tuple[dict[str, Row], list[str]]:
    """Return what tables say of images: a row for each image named, and the names that no image has.

    Args:
        root: the folder of the images.
        tables: names below it; what they name is relative to their own folders.
        images: names of the images that are there, below `root`.
        choice: columns that the user named.

    Raises:
        ValueError: a table that cannot be read or has no column of file
            names; rows without a name; images named twice; names that lead out.
    """
    rows, absent, twice, empty = dict[str, Row](), list[str](), list[str](), list[str]()
    names, seen = ImageNames(images), dict[str, None]()
    for table in tables:
        folder, columns = PurePosixPath(table).parent, dict[tuple[str, ...], tuple[str, str, str]]()
        for line, raw in read_rows(root / table, choice.file):
            where = f"{to_utf8(table)}:{line}"
            header = tuple(raw)
            if header not in columns:
                columns[header] = _columns_of(header, choice, where)
                seen |= dict.fromkeys(header)
            file, caption, label = columns[header]
            value = raw[file]
            if not isinstance(value, str) or not value.strip():
                empty.append(where)
                continue
            name = names.find(_inside(root, folder, value.strip(), where), where)
            if name is None:
                absent.append(to_utf8(value))
            elif name in rows:
                twice.append(to_utf8(value))
            else:
                rows[name] = _row(raw, file, caption, label, where)
    for flag, name in (("caption", choice.caption), ("label", choice.label)):
        if rows or absent:
            find_column(flag, name, list(seen), summarize_list(tables, 3))
    if empty:
        raise ValueError(
            f"{len(empty)} rows name no image: {summarize_list(empty)}. Fill in the file names, or name another column with --file_column."
        )
    if twice:
        raise ValueError(
            f"{len(twice)} images are listed twice: {summarize_list(twice)}. "
            f"Give each image one row; several captions are a list in a .jsonl."
        )
    return rows, absent


def _columns_of(header: tuple[str, ...], choice: ColumnChoice, where: str) -> tuple[str, str, str]:
    """Return the columns of file names, captions and classes; a line of JSON may lack the latter.

    Raises:
        ValueError: no column names the image.
    """
    file = find_column("file", choice.file, header, where, FILE_COLUMNS)
    if not file:
        raise ValueError(
            f"{where}: no column names the image: call one `file_name`, as `datasets` does, or name it with --file_column; "
            f"--file_column none packs the folder without this table. It has {printable(', '.join(header))}."
        )
    rest = [name for name in header if name != file]
    if choice.label in rest:
        rest.remove(choice.label)
    caption = _named_or_known(choice.caption, CAPTION_COLUMNS, rest)
    rest = [name for name in header if name not in (file, caption)]
    return file, caption, _named_or_known(choice.label, LABEL_COLUMNS, rest)


def _named_or_known(name: str, known: Sequence[str], header: Sequence[str]) -> str:
    if name:
        return name if name in header else ""
    return match_column(known, header)


def _row(raw: dict[str, Any], file: str, caption: str, label: str, where: str) -> Row:
    words = raw[caption] if caption else None
    try:
        text = first_text(words)
    except ValueError as error:
        raise ValueError(
            f"{where}, column {caption!r}: {error}. Name another with --caption_column, or none with --caption_column none."
        ) from error
    try:
        parse_class(raw[label] if label else None)
    except ValueError as error:
        raise ValueError(
            f"{where}, column {label!r}: {error}. Name another with --label_column, or none with --label_column none."
        ) from error
    more = {key: value for key, value in raw.items() if key not in (file, caption, label) and value not in (None, "")}
    if isinstance(words, list):  # several captions of one image: the first is the caption, all are kept
        more[caption] = words
    said = [str(raw[name]).strip() for name in split_columns(more)]
    return Row(raw[label] if label else None, None, text, more or None, next(filter(splits_in_name, said), said[0] if said else ""))


def _inside(root: Path, folder: PurePosixPath, name: str, where: str) -> str:
    """Return a name relative to the folder of the images, if it stays there."""
    path = PurePosixPath(name.replace("\\", "/"))
    for own in (root.absolute(), root.resolve()) if path.is_absolute() else ():
        if path.is_relative_to(own):
            path, folder = path.relative_to(own), PurePosixPath()
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {name!r} leads out of its folder. Name images relative to the table.")
    return str(folder / path)


def read_rows(path: Path, file_column: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table as dictionaries, each with its line (its place, in parquet).

    Args:
        path: the table.
        file_column: what the user called the column of file names, which may tell how a CSV is separated.

    Raises:
        ValueError: what it holds is no table, with the line.
    """
    kind = path.suffix.lower()
    try:
        with _open(path) as file:
            if kind == ".parquet":
                batches = pq.ParquetFile(file).iter_batches(1000)
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            else:
                yield from _lines(file, path) if kind == ".jsonl" else _separated(file, path, file_column)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} cannot be read as a table: {describe_error(error).rstrip('.')}. Save it as UTF-8 with a header line."
        ) from error
    except (csv.Error, OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as a table: {describe_error(error).rstrip('.')}. Save it as CSV, JSON lines or parquet."
        ) from error


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a table: {error}.") from error


def _separated(file: BinaryIO, path: Path, file_column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV; the separator is the comma, or the one that shows a column of file names in the header."""
    marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-16" if marked else "utf-8-sig", newline="")
    csv.field_size_limit(MAX_TEXT_BYTES)
    known = {file_column} if file_column else set(FILE_COLUMNS)
    start = text.read(MAX_TEXT_BYTES)  # a header is no longer
    headers = {mark: [name.strip() for name in _header(start, mark)] for mark in DELIMITERS}
    mark = next((mark for mark in DELIMITERS if known & set(headers[mark])), "\t" if path.suffix.lower() == ".tsv" else ",")
    header = headers[mark]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two columns are called {twice[0]!r} in {printable(', '.join(header))}. Rename one.")
    text.seek(0)
    reader = csv.reader(text, delimiter=mark, skipinitialspace=True, strict=True)  # strict: a quote that is never closed swallows rows
    next(reader, None)
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}. Quote text that has commas, and write its quotes twice.") from error
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(header):
            raise ValueError(f"{path}:{reader.line_num} has {len(values)} values for {len(header)} columns. Quote text that has commas.")
        yield reader.line_num, _named(header, values, f"{path}:{reader.line_num}")


def _header(start: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(start, newline=""), delimiter=delimiter, skipinitialspace=True), [])


def _named(header: list[str], values: list[str], where: str) -> dict[str, Any]:
    """Return a row by column; the first may have no name, as the numbers that pandas writes before each row."""
    lost = [value for place, (name, value) in enumerate(zip(header, values, strict=True)) if not name and place and value.strip()]
    if lost:
        raise ValueError(f"{where}: {lost[0]!r} stands in a column without a name. Name the column in the first line.")
    return {name: value for name, value in zip(header, values, strict=True) if name}


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := file.readline(MAX_TEXT_BYTES + 1):
        number += 1
        if not line.strip():
            continue
        try:
            row = parse_json(line) if len(line) <= MAX_TEXT_BYTES else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is no JSON object of at most a megabyte. Write one object a line.")
        yield number, row
