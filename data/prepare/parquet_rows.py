"""Rows of parquet files as a worker reads them: row groups whole, one after the other, rows in any order that is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from condot.core.errors import describe_error
from condot.core.printable import redact, redact_url

from .class_labels import Class, number_classes
from .source import RawSample, UnreadableSample
from .table_columns import Columns

READ_ERRORS = (OSError, ValueError, ImportError, pa.ArrowException)
"""What fsspec and pyarrow raise for files that are missing, out of reach or damaged; ImportError where a protocol's package is missing."""
ROWS_AT_ONCE = 64


class SpilledRow(NamedTuple):
    """One row whose image lies in a scratch file."""

    record: RawSample | UnreadableSample
    at: int = 0
    size: int = 0


@dataclass(frozen=True)
class ParquetSubset:
    """Some rows: file, row group and row of each."""

    urls: list[str]
    names: list[str]
    rows: np.ndarray
    """(N, 3), int64: place in `urls`, row group, row within it."""
    columns: Columns

    def read(self, scratch: Path) -> Iterator[RawSample | UnreadableSample]:
        """Row groups are read in the order of the file, rows given in the order asked for: a scratch file lies between."""
        kept: dict[int, SpilledRow] = {}
        order = np.lexsort((self.rows[:, 2], self.rows[:, 1], self.rows[:, 0]))
        with tempfile.TemporaryFile(dir=scratch) as spill:
            for file in np.unique(self.rows[:, 0]).tolist():
                mine = order[self.rows[order, 0] == file]
                try:
                    self._spill(file, mine, kept, spill)
                except READ_ERRORS as error:
                    why = redact(describe_error(error)).rstrip(".")
                    raise ValueError(f"{redact_url(self.urls[file])} cannot be read as parquet: {why}. Copy it again.") from error
            spill.flush()
            for place in range(len(self.rows)):
                record, at, size = kept.pop(place)
                if isinstance(record, RawSample):
                    spill.seek(at)
                    record = record._replace(image=spill.read(size))
                yield record

    def _spill(self, file: int, places: np.ndarray, kept: dict[int, SpilledRow], spill: Any) -> None:
        numbers = number_classes(self.columns.class_names, given=self.columns.class_names_given)
        with fsspec.open(self.urls[file], "rb").open() as opened:
            table = pq.ParquetFile(opened)
            for group in np.unique(self.rows[places, 1]).tolist():
                mine = places[self.rows[places, 1] == group]
                wanted = dict(zip(self.rows[mine, 2].tolist(), mine.tolist(), strict=True))
                at = 0
                there = [name for name in self.columns.all if name in table.schema_arrow.names]
                for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=there, use_threads=False):
                    here = [row for row in range(at, at + len(batch)) if row in wanted]
                    for row in here:
                        values = batch.slice(row - at, 1).to_pylist()[0]
                        kept[wanted[row]] = _kept(values, f"{self.names[file]}:{group}:{row}", self.columns, numbers, spill)
                    at += len(batch)


def _kept(values: dict[str, Any], name: str, columns: Columns, numbers: dict[Class, int], spill: Any) -> SpilledRow:
    try:
        record = columns.record(values, name, numbers)
    except ValueError as error:
        return SpilledRow(UnreadableSample(name, describe_error(error)))
    at = spill.tell()
    spill.write(record.image)
    return SpilledRow(record._replace(image=b""), at, len(record.image))
