"""Images in a data set of the Hugging Face Hub, or in anything else that `datasets.load_dataset` opens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .columns import Choice, Columns, choose, names_of
from .listing import SPLIT_WORDS, Fault, Record, Source, digest, reason
from .stamps import stamp_of


@dataclass(frozen=True)
class HubPart:
    """Some rows of a data set; `datasets` pickles the paths of its memory-mapped files, not what is in them."""

    rows: Any
    names: list[str]
    columns: Columns

    def read(self, scratch: Path) -> Iterator[Record | Fault]:
        numbers = {name: i for i, name in enumerate(self.columns.class_names)}
        for name, row in zip(self.names, self.rows, strict=True):
            try:
                value = row[self.columns.image]
                if isinstance(value, dict) and value.get("bytes") is None and value.get("path") and os.path.isfile(value["path"]):
                    row = {**row, self.columns.image: {**value, "bytes": Path(value["path"]).read_bytes()}}
                yield self.columns.record(row, name, numbers)
            except (OSError, ValueError) as error:
                yield Fault(name, reason(error))


def hub(source: str, subset: str | None, splits: list[str], choice: Choice) -> Source:
    """The rows of a data set.

    Args:
        source: its name on the Hub, or a folder of this machine.
        subset: its configuration, where it has several.
        splits: those to pack; all where empty.
        choice: columns that the user named.

    Raises:
        ValueError: no such data set, subset or split; no image column.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(source, subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source {source!r} cannot be loaded by `datasets`: {reason(error)}. Check its name, --subset and the network."
        ) from error
    missing = [name for name in splits if name not in loaded]
    if missing:
        raise ValueError(f"--splits {missing[0]!r}: {source} has {', '.join(map(str, loaded))}.")
    chosen = {str(name): loaded[name] for name in (splits or loaded)}
    first = next(iter(chosen.values()))
    columns = choose(first.features.arrow_schema, first.features.to_dict(), choice, source)
    if columns.label and not columns.class_names:
        values = {value for part in chosen.values() for value in part.unique(columns.label)}
        columns = replace(columns, class_names=names_of(values, f"column {columns.label!r}"))
    parts = [_plain(part, columns, datasets) for part in chosen.values()]
    made = _source(parts, list(chosen), columns, datasets)
    place = os.path.abspath(source) if os.path.exists(source) else source
    return replace(made, settings=str((subset, splits, choice)), place=place)


def _plain(part: Any, columns: Columns, datasets: Any) -> Any:
    """The columns that are kept, images as files."""
    part = part.select_columns(columns.all)
    if isinstance(part.features[columns.image], datasets.Image):
        part = part.cast_column(columns.image, datasets.Image(decode=False))
    return part


def _source(parts: list[Any], names: list[str], columns: Columns, datasets: Any) -> Source:
    """One source of all splits; a group is a row, since memory-mapped rows are read in any order."""
    lengths = [len(part) for part in parts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    splits = [SPLIT_WORDS.get(name.lower(), "train") for name in names]
    known = sorted(set(splits), key=lambda split: (split != "train", split))
    whole = datasets.concatenate_datasets(parts)
    versions = sorted({Path(file["filename"]).parent.name for file in whole.cache_files})

    facts = digest(versions, whole.data.nbytes, str(whole.features), columns)
    stamps = [_stamp(facts, path) for part in parts for path in _paths(part, columns.image)]

    def name(number: int) -> str:
        which = int(np.searchsorted(starts, number, side="right")) - 1
        return f"{names[which]}/{number - int(starts[which])}"

    return Source(
        part=lambda numbers: HubPart(whole.select(numbers), [name(number) for number in numbers.tolist()], columns),
        name=name,
        rows=np.ones(int(starts[-1]), np.int64),
        bytes=np.concatenate([_sizes(part, columns.image) for part in parts]),
        identity=digest("hub", list(zip(names, lengths, strict=True)), versions, whole.data.nbytes, str(whole.features), columns),
        splits=tuple(known),
        split_of=np.repeat([known.index(split) for split in splits], lengths).astype(np.int8),
        class_names=columns.class_names,
        stamps=np.array(stamps, np.uint64),
    )


def _paths(part: Any, image: str) -> list[str]:
    """The file that each row names; empty where its image lies in the row."""
    first = part[0][image] if len(part) else None
    if isinstance(first, dict) and first.get("bytes") is None and first.get("path"):
        return [row[image]["path"] or "" for row in part.select_columns([image])]
    return [""] * len(part)


def _stamp(facts: str, path: str) -> int:
    """The stamp of a row: of the tables of the data set, which `datasets` keeps under a hash, and of the file that it names."""
    return stamp_of(facts, os.stat(path) if path and os.path.isfile(path) else None)


def _sizes(part: Any, image: str) -> np.ndarray:
    """Bytes of each row's image: those of its file where the row names one, else the mean."""
    paths = _paths(part, image)
    if any(paths):
        return np.array([os.path.getsize(path) if path and os.path.isfile(path) else 0 for path in paths], np.int64)
    return np.full(len(part), max(1, part.data.nbytes // max(1, len(part))), np.int64)
