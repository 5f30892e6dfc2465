"""Images in a data set of the Hugging Face Hub, or in anything else that `datasets.load_dataset` opens.

`datasets` runs no code of a data set since its release 4. But a row may name
a file instead of holding an image, and a stranger's row may name any file of
this machine: only those of the data set itself are read.
"""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from condot.core.errors import describe_error
from condot.core.regular_files import MAX_IMAGE_BYTES, read_regular, require_regular

from ..format.file_stamps import Facts, compute_stamp, file_facts
from .class_labels import number_classes, sort_class_names, unused_labels
from .source import ImageSource, RawSample, UnreadableSample, digest, ordered_splits
from .splits import SplitChoice, assign_splits, check_rows, split_columns
from .table_columns import ColumnChoice, Columns, choose_columns

SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes into the folder of a data set with splits, and into that of one split."""
ARROW_ERRORS = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True)
class HubSubset:
    """Some rows of a data set; `datasets` pickles the paths of its memory-mapped files, not what is in them."""

    rows: Any
    names: list[str]
    columns: Columns
    folders: tuple[str, ...]
    """Real paths of the folders of whose files a row may name one."""

    def read(self, scratch: Path) -> Iterator[RawSample | UnreadableSample]:
        numbers = number_classes(self.columns.class_names, given=self.columns.class_names_given)
        for name, row in zip(self.names, self.rows, strict=True):
            try:
                value = row[self.columns.image]
                path = _file_named(value)
                if path:
                    row = {**row, self.columns.image: {**value, "bytes": self._read(path)}}
                yield self.columns.record(row, name, numbers)
            except ARROW_ERRORS as error:
                yield UnreadableSample(name, describe_error(error))

    def _read(self, path: str) -> bytes:
        if not _inside(path, self.folders):
            raise ValueError(f"its row names {path!r}, a file outside the data set, which is not read")
        return read_regular(path, MAX_IMAGE_BYTES)


def _file_named(value: Any) -> str:
    """Return the file of this machine that a row names instead of holding its image; nothing where it holds one or none is there."""
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return value["path"] if os.path.lexists(value["path"]) else ""
    return ""


def _inside(path: str, folders: Sequence[str]) -> bool:
    """Return whether a file lies in one of some folders, wherever its links lead."""
    real = os.path.realpath(path)
    return any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def hub(source: str, subset: str | None, splits: SplitChoice, choice: ColumnChoice) -> ImageSource:
    """Return the rows of a data set.

    Args:
        source: its name on the Hub, or a folder of this machine.
        subset: its configuration, where it has several.
        splits: those to pack, and as what; all where it says nothing.
        choice: columns that the user named.

    Raises:
        ValueError: no such data set, subset or split; a split of which it is
            not known whether it is for training; no image column.
    """
    import datasets

    saved = os.path.isdir(source) and any(os.path.isfile(f"{source}/{name}") for name in SAVED)
    if os.path.isdir(source):
        _refuse_special_files(Path(source))
    errors = (*ARROW_ERRORS, RuntimeError, TypeError, KeyError, AttributeError, ImportError, datasets.exceptions.DatasetsError)
    try:
        loaded = _saved(source, datasets) if saved else datasets.load_dataset(source, subset)
    except errors as error:
        why = describe_error(error).rstrip(".") + (f" ({describe_error(error.__cause__)})" if error.__cause__ else "")
        raise ValueError(f"source {source!r} cannot be loaded by `datasets`: {why}. Check its name, --subset and the network.") from error
    names = [str(name) for name in loaded]
    split_of = assign_splits({name: [name] for name in names}, splits, source, known=True) or dict.fromkeys(names, "train")
    chosen = {name: loaded[name] for name in names if split_of[name]}
    first = next(iter(chosen.values()))
    columns = choose_columns(first.features.arrow_schema, first.features.to_dict(), choice, source)
    for name, part in chosen.items():
        lacking = [column for column in columns.all if column not in part.column_names]
        if lacking:
            raise ValueError(f"split {name!r} of {source} has no column {lacking[0]!r}. Pack it apart with --splits {name}.")
    notes: dict[str, Any] = {"splits_left_out": {name: len(loaded[name]) for name in names if name not in chosen}}
    if columns.label and not columns.class_names:
        values = [value for part in chosen.values() for value in _values(part, columns.label)]
        columns = replace(columns, class_names=sort_class_names(values, f"{source}, column {columns.label!r}"))
        gaps = unused_labels(values, number_classes(columns.class_names, given=False))
        notes |= {"classes_without_image": gaps} if gaps else {}
    for column in [] if splits.is_given else split_columns(columns.others):
        for name, part in chosen.items():
            check_rows(_values(part, column), str(split_of[name]), name, column)
    parts = [_plain(part, columns, datasets) for part in chosen.values()]
    made = _source(parts, {name: str(split_of[name]) for name in chosen}, columns, _own_folders(source, parts, datasets), notes)
    place = os.path.abspath(source) if os.path.exists(source) else source
    return replace(made, settings=str((subset, splits, choice)), place=place)


def _saved(source: str, datasets: Any) -> Any:
    """Return the splits of a folder that `save_to_disk` wrote; `load_dataset` would find only those that have usual names."""
    loaded = datasets.load_from_disk(source)
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _refuse_special_files(folder: Path) -> None:
    """Raise a ValueError where a folder holds what is no file, such as a FIFO, at which `datasets` would wait for ever."""
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            try:
                require_regular(os.stat(path))
            except OSError:
                continue  # a link that leads to nothing
            except ValueError as error:
                raise ValueError(f"{path}: {error}. Move it out of the data set.") from error


def _values(part: Any, column: str) -> list[Any]:
    """Return the values of a column, each once where Arrow can tell."""
    kind = part.features.arrow_schema.field(column).type
    return list(part.select_columns([column])[column] if pa.types.is_nested(kind) else part.unique(column))


def _own_folders(source: str, parts: list[Any], datasets: Any) -> tuple[str, ...]:
    """Return the folders that are a data set's own: the one that was given, or what `datasets` downloaded and made of it."""
    from huggingface_hub import constants

    here = Path(source)
    own = [datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH]
    own += [Path(file["filename"]).parent for part in parts for file in part.cache_files]
    if here.exists():
        own.append(here if here.is_dir() else here.parent)
    else:
        own.append(Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}")
    return tuple(sorted({os.path.realpath(folder) for folder in own}))


def _plain(part: Any, columns: Columns, datasets: Any) -> Any:
    """Return the columns that are kept, images as files."""
    part = part.select_columns(columns.all)
    if isinstance(part.features[columns.image], datasets.Image):
        part = part.cast_column(columns.image, datasets.Image(decode=False))
    return part


def _source(parts: list[Any], split_of: dict[str, str], columns: Columns, folders: tuple[str, ...], notes: dict[str, Any]) -> ImageSource:
    """Return one source of all splits; a group is a row, since memory-mapped rows are read in any order."""
    import datasets

    lengths, names = [len(part) for part in parts], list(split_of)
    starts = [0, *accumulate(lengths)]
    known = ordered_splits(split_of.values())
    whole = datasets.concatenate_datasets(parts)
    versions = sorted({Path(file["filename"]).parent.name for file in whole.cache_files})
    cached = (os.path.realpath(datasets.config.HF_DATASETS_CACHE),)  # where `datasets` keeps tables under a hash of theirs
    here = [file_facts(os.stat(file["filename"])) for file in whole.cache_files if not _inside(file["filename"], cached)]
    tables = digest(versions, whole.data.nbytes, str(whole.features), columns, here)
    files = [_files(part, columns.image, folders) for part in parts]

    def name(number: int) -> str:
        which = bisect(starts, number) - 1
        return f"{names[which]}/{number - starts[which]}"

    facts = list(zip(split_of.items(), lengths, strict=True))
    return ImageSource(
        subset=lambda numbers: HubSubset(whole.select(numbers), [name(number) for number in numbers.tolist()], columns, folders),
        name=name,
        rows=np.ones(starts[-1], np.int64),
        bytes=np.concatenate([_sizes(part, found) for part, found in zip(parts, files, strict=True)]),
        identity=digest("hub", facts, versions, whole.data.nbytes, str(whole.features), columns),
        legacy_identity=lambda: digest(
            "hub", list(zip(split_of, lengths, strict=True)), versions, whole.data.nbytes, str(whole.features), columns.legacy_repr
        ),
        splits=tuple(known),
        split_of=np.repeat([known.index(split) for split in split_of.values()], lengths).astype(np.int8),
        class_names=columns.class_names,
        notes=notes,
        stamps=np.array([compute_stamp(tables, facts) for found in files for facts in found], np.uint64),
    )


def _files(part: Any, image: str, folders: tuple[str, ...]) -> list[Facts | None]:
    """Return what is known of the file that each row names; None where the image lies in the row, or is none of the data set's."""
    if not (len(part) and _file_named(part[0][image])):
        return [None] * len(part)
    return [_facts(_file_named(row[image]), folders) for row in part.select_columns([image])]


def _facts(path: str, folders: tuple[str, ...]) -> Facts | None:
    return file_facts(os.stat(path)) if path and _inside(path, folders) and os.path.isfile(path) else None


def _sizes(part: Any, files: list[Facts | None]) -> np.ndarray:
    """Return the bytes of each row's image: those of its file where some row names one, else the mean."""
    if any(files):
        return np.array([facts.bytes if facts else 0 for facts in files], np.int64)
    return np.full(len(part), max(1, part.data.nbytes // max(1, len(part))), np.int64)
