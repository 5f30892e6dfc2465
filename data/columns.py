"""Which column of a table is the image, which the caption and which the class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pyarrow as pa

from .listing import Record

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
LABEL_COLUMNS = ("label", "class", "labels", "cls")
MAX_CLASSES = 65535


@dataclass(frozen=True)
class Choice:
    """Columns that the user named instead of those found."""

    image: str = ""
    caption: str = ""
    label: str = ""


@dataclass(frozen=True)
class Columns:
    """What each column of a table is."""

    image: str
    caption: str = ""
    label: str = ""
    class_names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Kept in the sample's `.json`."""

    @property
    def all(self) -> list[str]:
        return [name for name in (self.image, self.caption, self.label, *self.others) if name]

    def record(self, row: Mapping[str, Any], name: str, numbers: Mapping[str, int]) -> Record:
        """A row as a sample.

        Args:
            row: values by column; the image as bytes or as `{bytes, path}`.
            name: where it comes from.
            numbers: class number of each class name.

        Raises:
            ValueError: no image, or a class that is not among the names.
        """
        value = row[self.image]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None:
            raise ValueError(f"its image lies elsewhere, at {path!r}" if path else "its row has no image")
        more = {key: row[key] for key in self.others}
        words = row.get(self.caption) if self.caption else None
        if isinstance(words, list):  # several captions of one image: the first is the caption, all are kept
            more[self.caption] = words
        extension = PurePath(path).suffix.lower().lstrip(".") if path else ""
        return Record(name, data, extension, label_of(row.get(self.label), numbers), first_text(words), more)


def first_text(value: Any) -> str | None:
    """A caption, stripped; the first of several; None where it is empty."""
    for text in value if isinstance(value, list) else [value]:
        if text is not None and str(text).strip():
            return str(text).strip()
    return None


def label_of(value: Any, numbers: Mapping[str, int]) -> int | None:
    """A class number from a number or a name; None where there is none.

    Raises:
        ValueError: a class that is not among the names.
    """
    if value is None or value == "" or value == -1:  # -1: how `datasets` marks an unknown class
        return None
    if isinstance(value, str) and value in numbers:
        return numbers[value]
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if isinstance(number, int) and 0 <= number < len(numbers):
        return number
    raise ValueError(f"class {value!r} is not one of the {len(numbers)} names")


def names_of(values: Iterable[Any], where: str) -> tuple[str, ...]:
    """Class names from the values of a column: whole numbers count from 0, names are sorted.

    Raises:
        ValueError: values that are neither, negative numbers, or more than 65,535 classes.
    """
    found = {value for value in values if value is not None and value != ""} - {-1}
    if not found:
        return ()
    if all(isinstance(value, int) or (isinstance(value, str) and value.isascii() and value.isdecimal()) for value in found):
        found = {int(value) for value in found}
        if min(found) < 0 or max(found) >= MAX_CLASSES:
            raise ValueError(f"{where}: class {max(found)} is not in 0 to {MAX_CLASSES - 1}. Number classes from 0, or name them.")
        return tuple(map(str, range(max(found) + 1)))
    if not all(isinstance(value, str) for value in found):
        odd = next(value for value in found if not isinstance(value, str))
        raise ValueError(f"{where}: {odd!r} is no class: whole numbers from 0 or names are. Name another with --label_column.")
    if len(found) > MAX_CLASSES:
        raise ValueError(f"{where}: {len(found):,} classes, at most {MAX_CLASSES:,} are kept. Is this a caption? Use --caption_column.")
    return tuple(sorted(found))


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` wrote beside a schema about its columns; nothing where it did not."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def choose(schema: pa.Schema, features: Mapping[str, Any], choice: Choice, where: str) -> Columns:
    """Find the columns of a table of images; class names come from `features` alone.

    Raises:
        ValueError: a named column that is not there, no image column, or more than one.
    """
    for flag, name in (("image", choice.image), ("caption", choice.caption), ("label", choice.label)):
        if name and name not in schema.names:
            raise ValueError(f"--{flag}_column {name!r}: {where} has no such column, it has {', '.join(schema.names)}.")
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = choice.image or _image_column(schema, kinds, where)
    if not _holds_bytes(schema.field(image).type):
        raise ValueError(
            f"{where}: column {image!r} holds {schema.field(image).type}, not files of images. Name another by --image_column."
        )
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in schema.names]
    label = choice.label or next((name for name in LABEL_COLUMNS if name in schema.names and name != image), classes[0] if classes else "")
    caption = choice.caption or next((n for n in CAPTION_COLUMNS if n in schema.names and n not in (image, label)), "")
    names = features.get(label, {}).get("names", ()) if kinds.get(label) == "ClassLabel" else ()
    others = [f.name for f in schema if f.name not in (image, caption, label) and _says_something(f.type)]
    return Columns(image, caption, label, tuple(names), tuple(others))


def _image_column(schema: pa.Schema, kinds: Mapping[str, Any], where: str) -> str:
    marked = [name for name in schema.names if kinds.get(name) == "Image"]
    possible = marked or [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in possible]
    if named or len(possible) == 1:
        return named[0] if named else possible[0]
    found = f"{len(possible)} columns that could be: {', '.join(possible)}" if possible else f"none among {', '.join(schema.names)}"
    raise ValueError(f"{where}: which column holds the images? There are {found}. Name it with --image_column.")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _says_something(kind: pa.DataType) -> bool:
    """Whether JSON can hold it: no bytes, at no depth."""
    if pa.types.is_struct(kind):
        return all(_says_something(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _says_something(kind.value_type)
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
