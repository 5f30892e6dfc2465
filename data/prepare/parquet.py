"""Images in parquet files, on this machine or wherever fsspec reaches; row groups are read whole, one after the other."""

from __future__ import annotations

import os
import re
from bisect import bisect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from condot.core.errors import describe_error
from condot.core.printable import redact, redact_url
from condot.core.regular_files import require_regular
from condot.core.urls import display_url, last_name

from ..format.file_stamps import compute_stamp, file_facts
from .class_labels import number_classes, sort_class_names, unused_labels
from .parquet_rows import READ_ERRORS, ParquetSubset
from .source import ImageSource, digest, ordered_splits, to_utf8
from .splits import ALL, SplitChoice, assign_splits, check_rows, names_of_file, shorten_list, split_columns
from .table_columns import (
    ColumnChoice,
    Columns,
    choose_columns,
    common_type,
    is_text_or_number,
    read_class_names,
    read_features,
    refuse_partitions,
)

Result = TypeVar("Result")


class ParquetFileInfo(NamedTuple):
    """One parquet file: its address, and its row groups."""

    url: str
    bytes: int
    rows: list[int]
    image_bytes: list[int]
    schema: pa.Schema
    stamp: int
    """Zero where nothing tells whether the file is as it was."""


def parquet(source: str, choice: ColumnChoice, splits: SplitChoice = ALL) -> ImageSource:
    """Return the rows of a parquet file, of those in a folder or that a pattern finds, by path or URL.

    Args:
        source: `photos.parquet`, `folder/`, `s3://bucket/data/*.parquet`, `hf://datasets/...`.
        choice: columns that the user named.
        splits: which files are packed, and as what.

    Raises:
        ValueError: nothing there, files that cannot be read or disagree, no image column, splits that cannot be known.
    """
    named = _reached(source, lambda: _addresses(source))
    split_of, left_out = _splits(list(named.values()), splits, source)
    urls = [url for url, name in named.items() if name in split_of]
    names = [named[url] for url in urls]
    with ThreadPoolExecutor(16) as pool:
        files = _reached(source, lambda: list(pool.map(_file, urls)))
    if not any(file.rows for file in files):
        raise ValueError(f"source {redact_url(source)!r} holds no image: its {len(files)} parquet files have no rows.")
    columns, notes = _columns(files, names, choice)
    refuse_partitions(names, columns, choice, f"source {redact_url(source)!r}")
    table = np.array([(f, g, rows) for f, file in enumerate(files) for g, rows in enumerate(file.rows)], np.int64)
    starts = np.concatenate([[0], np.cumsum(table[:, 2])])

    def places(numbers: np.ndarray) -> np.ndarray:
        group = np.searchsorted(starts, numbers, side="right") - 1
        return np.stack([table[group, 0], table[group, 1], numbers - starts[group]], 1)

    begins, groups = starts.tolist(), table[:, :2].tolist()

    def name(number: int) -> str:
        at = bisect(begins, number) - 1
        file, group = groups[at]
        return f"{names[file]}:{group}:{number - begins[at]}"

    for column in [] if splits.is_given else split_columns(columns.others):
        for file, named_so in zip(files, names, strict=True):
            check_rows(_values([file], column), split_of[named_so], named_so, column)
    known = ordered_splits(split_of.values())
    where = [known.index(split_of[name]) for name in names]
    stamps = np.array([file.stamp and compute_stamp(file.stamp, columns) for file in files], np.uint64)
    facts = [(name, file.bytes, file.rows, split_of[name]) for name, file in zip(names, files, strict=True)]
    return ImageSource(
        subset=lambda numbers: ParquetSubset(urls, names, places(numbers), columns),
        name=name,
        rows=table[:, 2],
        bytes=np.array([size for file in files for size in file.image_bytes], np.int64),
        identity=digest("parquet", facts, columns),
        legacy_identity=lambda: digest("parquet", [(f.url.rpartition("/")[2], f.bytes, f.rows) for f in files], columns.legacy_repr),
        splits=tuple(known),
        split_of=np.array(where, np.int8)[table[:, 0]],
        class_names=columns.class_names,
        stamps=stamps[table[:, 0]],
        settings=str((choice, splits)),
        place=os.path.abspath(source) if "://" not in source else display_url(source),
        notes={
            "columns": {"image": columns.image, "caption": columns.caption, "label": columns.label, "json": list(columns.others)},
            "splits_left_out": left_out,
            **notes,
        },
    )


def _reached(source: str, read: Callable[[], Result]) -> Result:
    """Return what reading brings.

    Raises:
        ValueError: the files are missing, out of reach or damaged.
    """
    try:
        return read()
    except READ_ERRORS as error:
        why = redact(describe_error(error)).rstrip(".")
        raise ValueError(
            f"source {redact_url(source)!r} cannot be read as parquet: {why}. Check the address and your rights to it."
        ) from error


def _addresses(source: str) -> dict[str, str]:
    """Return the parquet files, sorted by address: each with its name below the folder that the source names."""
    system, path = fsspec.core.url_to_fs(source)
    local = isinstance(system, LocalFileSystem)
    root = path
    if any(mark in _plain_name(path) for mark in "*?["):
        found = system.glob(path)
        root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
    elif last_name(path).lower().endswith(".parquet") and not (local and system.isdir(path)):
        found, root = [path], _plain_name(path).rpartition("/")[0]
    else:
        found = [name for name in system.find(path) if name.lower().endswith(".parquet") and not _hidden(name.removeprefix(path))]
    if not found:
        raise ValueError("it names no .parquet file")
    if local:
        for name in found:
            require_regular(os.stat(name))
    root = root.rstrip("/") + "/"
    return {system.unstrip_protocol(name): to_utf8(_plain_name(name).removeprefix(root)) for name in sorted(found)}


def _hidden(name: str) -> bool:
    """Return whether a file, or a folder that it lies in, is hidden or a Mac's own; `datasets` passes over these too."""
    return any(part.startswith((".", "__")) for part in name.split("/"))


def _plain_name(path: str) -> str:
    """Return a file's path without the query of a URL, which may be a signature."""
    return path.partition("?")[0] if path.startswith("http") else path


def _splits(names: list[str], choice: SplitChoice, source: str) -> tuple[dict[str, str], dict[str, None]]:
    """Return the split of each file that is packed, by the word in its name or in the nearest folder; and the files that are not."""
    named = {name: names_of_file(name) for name in names}
    assigned = assign_splits(named, choice, f"source {redact_url(source)!r}")
    if assigned is None:
        return dict.fromkeys(names, "train"), {}
    left = [name for name, split in assigned.items() if split is None]
    return {name: split for name, split in assigned.items() if split is not None}, dict.fromkeys(left)


def _file(url: str) -> ParquetFileInfo:
    """Return what a file's last bytes say of it."""
    with fsspec.open(url, "rb").open() as opened:
        try:
            meta = pq.ParquetFile(opened)
        except pa.ArrowException as error:
            raise ValueError(f"{redact_url(url)}: {describe_error(error)}") from error
        groups = [meta.metadata.row_group(g) for g in range(meta.metadata.num_row_groups)]
        sizes = [group.total_byte_size for group in groups]
        size, rows = int(opened.size or 0) if hasattr(opened, "size") else 0, [g.num_rows for g in groups]
        return ParquetFileInfo(url, size, rows, sizes, meta.schema_arrow, _stamp(url))


VERSIONS = ("ETag", "etag", "md5", "md5Hash", "crc32c", "checksum", "content_md5", "sha256", "blob_id", "oid", "version_id", "generation")
TIMES = ("LastModified", "last_modified", "last_commit", "updated", "mtime", "modified")


def _stamp(url: str) -> int:
    """What tells a file from the one that lay there before, without reading it."""
    system, path = fsspec.core.url_to_fs(url)
    if isinstance(system, LocalFileSystem):
        return compute_stamp(file_facts(os.stat(path)))
    facts = system.info(path)
    said = {key: str(facts[key]) for key in (*VERSIONS, *TIMES) if facts.get(key)}
    return compute_stamp(facts.get("size"), said) if said else 0


def _columns(files: list[ParquetFileInfo], names: list[str], choice: ColumnChoice) -> tuple[Columns, dict[str, Any]]:
    """Return the columns, of one kind in all files, with the names of classes from the metadata or from the values; and notes.

    Raises:
        ValueError: files that disagree, a label column whose values are no classes, rows of several splits in one file.
    """
    schema, lacking, odd = _one_schema(files)
    features = read_features(files[0].schema)
    columns = choose_columns(schema, features, choice, names[0])
    for name in columns.all:
        file = odd.get(name) or (lacking.get(name) if name not in columns.others else None)
        if file:
            raise ValueError(f"{redact_url(file.url)}: column {name!r} is not as in other files. Pack files of one schema together.")
    if not columns.label:
        return columns, {}
    for file in files[1:]:
        theirs = read_class_names(read_features(file.schema), columns.label)
        if theirs is not None and theirs != (columns.class_names if columns.class_names_given else None):
            raise ValueError(
                f"{redact_url(file.url)}: the classes of column {columns.label!r} are not named as in {redact_url(files[0].url)}. "
                "Pack these files apart."
            )
    if columns.class_names:
        return columns, {}
    values = _values(files, columns.label)
    columns = replace(columns, class_names=sort_class_names(values, f"{shorten_list(names, 3)}, column {columns.label!r}"))
    gaps = unused_labels(values, number_classes(columns.class_names, given=False))
    return columns, {"classes_without_image": gaps} if gaps else {}


def _one_schema(files: list[ParquetFileInfo]) -> tuple[pa.Schema, dict[str, ParquetFileInfo], dict[str, ParquetFileInfo]]:
    """Return all columns with the types that all files have; and for those that some lack, or have of another type, one such file."""
    kinds, lacking, odd = dict[str, pa.DataType](), dict[str, ParquetFileInfo](), dict[str, ParquetFileInfo]()
    for file in files:
        for field in file.schema:
            common = common_type(kinds.get(field.name, field.type), field.type)
            if common is None and not (is_text_or_number(kinds[field.name]) and is_text_or_number(field.type)):
                odd.setdefault(field.name, file)
            kinds[field.name] = kinds[field.name] if common is None else common
    for file in files:
        for name in kinds.keys() - set(file.schema.names):
            lacking.setdefault(name, file)
    doubled = [name for file in files for name in file.schema.names if file.schema.names.count(name) > 1]
    return pa.schema([*kinds.items(), *((name, kinds[name]) for name in doubled)], files[0].schema.metadata), lacking, odd


def _values(files: list[ParquetFileInfo], column: str) -> list[Any]:
    """Return the values that a column has, each once where Arrow can tell."""
    values: list[Any] = []
    for file in files:
        if column not in file.schema.names:
            continue
        with fsspec.open(file.url, "rb").open() as opened:
            for batch in pq.ParquetFile(opened).iter_batches(1 << 16, columns=[column]):
                part = batch.column(0)
                values += (part if pa.types.is_nested(part.type) else part.unique()).to_pylist()
    return values
