"""Images in parquet files, on this machine or wherever fsspec reaches; row groups are read whole, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import Choice, Columns, choose, features_of, names_of
from .listing import Fault, Record, Source, digest, reason, split_named
from .locators import last_name, redact, redact_url

READ_ERRORS = (OSError, ValueError, ImportError, pa.ArrowException)
"""What fsspec and pyarrow raise for files that are missing, out of reach or damaged; ImportError where a protocol's package is missing."""
ROWS_AT_ONCE = 64


class File(NamedTuple):
    """One parquet file: its address, and its row groups."""

    url: str
    bytes: int
    rows: list[int]
    image_bytes: list[int]
    schema: pa.Schema


class Kept(NamedTuple):
    """One row whose image lies in a scratch file."""

    record: Record | Fault
    at: int = 0
    size: int = 0


@dataclass(frozen=True)
class ParquetPart:
    """Some rows: file, row group and row of each."""

    urls: list[str]
    rows: np.ndarray
    """(N, 3), int64: place in `urls`, row group, row within it."""
    columns: Columns

    def read(self, scratch: Path) -> Iterator[Record | Fault]:
        """Row groups are read in the order of the file, rows given in the order asked for: a scratch file lies between."""
        kept: dict[int, Kept] = {}
        order = np.lexsort((self.rows[:, 2], self.rows[:, 1], self.rows[:, 0]))
        with tempfile.TemporaryFile(dir=scratch) as spill:
            for file in np.unique(self.rows[:, 0]).tolist():
                mine = order[self.rows[order, 0] == file]
                self._spill(self.urls[file], mine, kept, spill)
            spill.flush()
            for place in range(len(self.rows)):
                record, at, size = kept.pop(place)
                if isinstance(record, Record):
                    spill.seek(at)
                    record = record._replace(image=spill.read(size))
                yield record

    def _spill(self, url: str, places: np.ndarray, kept: dict[int, Kept], spill: Any) -> None:
        numbers = {name: i for i, name in enumerate(self.columns.class_names)}
        with fsspec.open(url, "rb").open() as opened:
            file = pq.ParquetFile(opened)
            for group in np.unique(self.rows[places, 1]).tolist():
                wanted = {int(self.rows[p, 2]): int(p) for p in places if self.rows[p, 1] == group}
                at = 0
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=self.columns.all, use_threads=False):
                    here = [row for row in range(at, at + len(batch)) if row in wanted]
                    for row in here:
                        values = batch.slice(row - at, 1).to_pylist()[0]
                        kept[wanted[row]] = _kept(values, f"{last_name(url)}:{group}:{row}", self.columns, numbers, spill)
                    at += len(batch)


def _kept(values: dict[str, Any], name: str, columns: Columns, numbers: dict[str, int], spill: Any) -> Kept:
    try:
        record = columns.record(values, name, numbers)
    except ValueError as error:
        return Kept(Fault(name, reason(error)))
    at = spill.tell()
    spill.write(record.image)
    return Kept(record._replace(image=b""), at, len(record.image))


def parquet(source: str, choice: Choice) -> Source:
    """The rows of a parquet file, of those in a folder or that a pattern finds, by path or URL.

    Args:
        source: `photos.parquet`, `folder/`, `s3://bucket/data/*.parquet`, `hf://datasets/...`.
        choice: columns that the user named.

    Raises:
        ValueError: nothing there, files that cannot be read or disagree, no image column.
    """
    try:
        urls = _addresses(source)
        with ThreadPoolExecutor(16) as pool:
            files = list(pool.map(_file, urls))
    except READ_ERRORS as error:
        raise ValueError(
            f"source {redact_url(source)!r} cannot be read as parquet: {redact(reason(error))}. Check the address and your rights to it."
        ) from error
    if not any(file.rows for file in files):
        raise ValueError(f"source {redact_url(source)!r} holds no image: its {len(files)} parquet files have no rows.")
    columns = _columns(files, choice)
    table = np.array([(f, g, rows) for f, file in enumerate(files) for g, rows in enumerate(file.rows)], np.int64)
    starts = np.concatenate([[0], np.cumsum(table[:, 2])])

    def places(numbers: np.ndarray) -> np.ndarray:
        group = np.searchsorted(starts, numbers, side="right") - 1
        return np.stack([table[group, 0], table[group, 1], numbers - starts[group]], 1)

    def name(number: int) -> str:
        file, group, row = places(np.array([number]))[0].tolist()
        return f"{last_name(urls[file])}:{group}:{row}"

    splits = [split_named(last_name(file.url)) or "train" for file in files]
    known = sorted(set(splits), key=lambda split: (split != "train", split))
    return Source(
        part=lambda numbers: ParquetPart(urls, places(numbers), columns),
        name=name,
        rows=table[:, 2],
        bytes=np.array([size for file in files for size in file.image_bytes], np.int64),
        identity=digest("parquet", [(last_name(file.url), file.bytes, file.rows) for file in files], columns),
        splits=tuple(known),
        split_of=np.array([known.index(splits[f]) for f in table[:, 0]], np.int8),
        class_names=columns.class_names,
        notes={"columns": {"image": columns.image, "caption": columns.caption, "label": columns.label, "json": list(columns.others)}},
    )


def _addresses(source: str) -> list[str]:
    """Full addresses of the parquet files, sorted."""
    system, path = fsspec.core.url_to_fs(source)
    if any(mark in (path.partition("?")[0] if path.startswith("http") else path) for mark in "*?["):
        found = system.glob(path)
    elif last_name(path).lower().endswith(".parquet") and not (system.protocol in ("file", ("file", "local")) and system.isdir(path)):
        found = [path]
    else:
        found = [name for name in system.find(path) if name.lower().endswith(".parquet")]
    if not found:
        raise ValueError("it names no .parquet file")
    return sorted(system.unstrip_protocol(name) for name in found)


def _file(url: str) -> File:
    """What a file's last bytes say of it."""
    with fsspec.open(url, "rb").open() as opened:
        meta = pq.ParquetFile(opened)
        groups = [meta.metadata.row_group(g) for g in range(meta.metadata.num_row_groups)]
        sizes = [group.total_byte_size for group in groups]
        return File(url, int(opened.size or 0) if hasattr(opened, "size") else 0, [g.num_rows for g in groups], sizes, meta.schema_arrow)


def _columns(files: list[File], choice: Choice) -> Columns:
    """The columns, the same in all files, with the names of classes from the metadata or from the values.

    Raises:
        ValueError: files that disagree.
    """
    first = files[0]
    columns = choose(first.schema, features_of(first.schema), choice, redact_url(first.url))
    for file in files[1:]:
        for name in columns.all:
            if name not in file.schema.names or file.schema.field(name).type != first.schema.field(name).type:
                raise ValueError(
                    f"{redact_url(file.url)}: column {name!r} is not as in {redact_url(first.url)}. Pack files of one schema together."
                )
    if not columns.label or columns.class_names:
        return columns
    values: set[Any] = set()
    for file in files:
        with fsspec.open(file.url, "rb").open() as opened:
            for batch in pq.ParquetFile(opened).iter_batches(1 << 16, columns=[columns.label]):
                values |= set(batch.column(0).unique().to_pylist())
    return replace(columns, class_names=names_of(values, f"column {columns.label!r}"))
