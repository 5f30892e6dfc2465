"""Which column of a table is the image, which the caption and which the class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pyarrow as pa

from condot.core.text_files import caption_text, decode_text

from .class_labels import Class, class_number
from .source import RawRepr, RawSample

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
LABEL_COLUMNS = ("label", "class", "labels", "cls")
NONE = "none"
"""Given for a column: there is none."""


@dataclass(frozen=True)
class ColumnChoice:
    """Columns that the user named instead of those found; `none` for a sample without a caption or class."""

    file: str = ""
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
    class_names_given: bool = False
    """By the source itself, so that its numbers are places among them."""
    others: tuple[str, ...] = ()
    """Kept in the sample's `.json`."""

    @property
    def legacy_repr(self) -> RawRepr:
        """Return the columns as the release 85bd0c6 printed them."""
        names = ("image", "caption", "label", "class_names", "others")
        return RawRepr(f"Columns({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})")

    @property
    def all(self) -> list[str]:
        return [name for name in (self.image, self.caption, self.label, *self.others) if name]

    def record(self, row: Mapping[str, Any], name: str, numbers: Mapping[Class, int]) -> RawSample:
        """Return a row as a sample.

        Args:
            row: values by column; the image as bytes or as `{bytes, path}`.
            name: where it comes from.
            numbers: number of each class.

        Raises:
            ValueError: no image, a class that is not among the names, or a caption that is no text.
        """
        value = row[self.image]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        path = path if isinstance(path, str) else None
        if data is None:
            raise ValueError(f"its image lies elsewhere, at {path!r}" if path else "its row has no image")
        more = {key: row[key] for key in self.others if key in row}
        words = row.get(self.caption) if self.caption else None
        if isinstance(words, list):  # several captions of one image: the first is the caption, all are kept
            more[self.caption] = words
        extension = PurePath(path).suffix.lower().lstrip(".") if path else ""
        return RawSample(name, data, extension, class_number(row.get(self.label) if self.label else None, numbers), first_text(words), more)


def first_text(value: Any) -> str | None:
    """Return a caption, stripped; the first of several; None where it is empty.

    Raises:
        ValueError: it is no text, nor a number.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, list | dict | tuple):
            raise ValueError(f"its caption is a {type(text).__name__}, not a text")
        caption = decode_text(text) if isinstance(text, bytes) else caption_text(text)
        if caption and caption not in ("nan", "NaN"):  # pandas writes a gap so
            return caption
    return None


def refuse_partitions(files: Sequence[str], columns: Columns, choice: ColumnChoice, where: str) -> None:
    """Raise a ValueError where captions or classes stand in names of folders, as `label=cat/0.parquet`, and are not in the files."""
    parts = [part.partition("=") for file in files for part in file.split("/")[:-1]]
    keys = list(dict.fromkeys(key for key, equals, _ in parts if equals))
    for flag, given, found, known in (
        ("caption", choice.caption, columns.caption, CAPTION_COLUMNS),
        ("label", choice.label, columns.label, LABEL_COLUMNS),
    ):
        key = "" if found or given else match_column(known, keys)
        if key:
            raise ValueError(
                f"{where}: {key!r} is in the names of folders ({key}=...), which are not read as columns. Write it into the files "
                f"(`pyarrow.dataset` reads both), or leave it out with --{flag}_column none."
            )


def read_features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` wrote beside a schema about its columns; nothing where it did not."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def choose_columns(schema: pa.Schema, features: Mapping[str, Any], choice: ColumnChoice, where: str) -> Columns:
    """Find the columns of a table of images; class names come from `features` alone.

    Raises:
        ValueError: a named column that is not there, no image column, more than one, or a column whose values cannot be what it is for.
    """
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: two columns are called {twice[0]!r}. Rename one.")
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = find_column("image", choice.image, schema.names, where) or _image_column(schema, kinds, where)
    if not _holds_bytes(schema.field(image).type):
        raise ValueError(
            f"{where}: column {image!r} holds {schema.field(image).type}, not files of images. Name another by --image_column."
        )
    rest = [name for name in schema.names if name != image]
    classes = [name for name in rest if read_class_names(features, name) is not None]
    label = find_column("label", choice.label, schema.names, where, (*LABEL_COLUMNS, *classes), rest)
    rest = [name for name in rest if name != label]
    caption = find_column("caption", choice.caption, schema.names, where, CAPTION_COLUMNS, rest)
    if caption and not _holds_text(schema.field(caption).type):
        raise ValueError(
            f"{where}: column {caption!r} holds {schema.field(caption).type}, not captions. "
            "Name another by --caption_column, or none with --caption_column none."
        )
    names = read_class_names(features, label)
    others = [f.name for f in schema if f.name not in (image, caption, label) and _says_something(f.type)]
    return Columns(image, caption, label, names or (), names is not None, tuple(others))


def find_column(
    flag: str, name: str, names: Sequence[str], where: str, known: Sequence[str] = (), among: Sequence[str] | None = None
) -> str:
    """Return the column that the option `--FLAG_column` names, else the first known one; empty where there is none.

    Args:
        flag: what the column is for.
        name: what the user gave; empty where nothing.
        names: of all columns.
        where: the table.
        known: names by which such a column is found.
        among: columns in which it is looked for, all where absent.

    Raises:
        ValueError: the column that was named is not there.
    """
    if name in names:
        return name
    if name.lower() == NONE:
        return ""
    if name:
        raise ValueError(f"--{flag}_column {name!r}: {where} has no such column, it has {', '.join(names)}.")
    return match_column(known, names if among is None else among)


def match_column(known: Sequence[str], names: Sequence[str]) -> str:
    """Return the column that has the first of some known names, in letters of either case where none has it exactly; else empty."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    return next((c for c in known if c in names), "") or next((lower[c.lower()] for c in known if c.lower() in lower), "")


def read_class_names(features: Mapping[str, Any], column: str) -> tuple[str, ...] | None:
    """Return the names of the classes of a column, also of one that holds lists of one class; None where it has none.

    Raises:
        ValueError: its names are no texts.
    """
    feature = features.get(column)
    while isinstance(feature, dict) and feature.get("_type") in ("List", "LargeList", "Sequence"):
        feature = feature.get("feature")
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"column {column!r} has class names that are no texts: {str(names)[:60]}. Name another with --label_column.")
    return tuple(names) if names else None


def _image_column(schema: pa.Schema, kinds: Mapping[str, Any], where: str) -> str:
    marked = [name for name in schema.names if kinds.get(name) == "Image"]
    possible = marked or [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in possible]
    if named or len(possible) == 1:
        return named[0] if named else possible[0]
    found = f"{len(possible)} columns that could be: {', '.join(possible)}" if possible else f"none among {', '.join(schema.names)}"
    raise ValueError(f"{where}: which column holds the images? There are {found}. Name it with --image_column.")


def _holds_bytes(kind: pa.DataType) -> bool:
    kind = plain_type(kind)
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and bool(pa.types.is_binary(kind.field(place).type) or pa.types.is_null(kind.field(place).type))
    return bool(pa.types.is_binary(kind))


def _holds_text(kind: pa.DataType) -> bool:
    """Return whether values are texts, numbers, or lists of them."""
    kind = plain_type(kind)
    if pa.types.is_list(kind):
        kind = kind.value_type
    return not (pa.types.is_nested(kind))


def is_text_or_number(kind: pa.DataType) -> bool:
    """Return whether values are texts or numbers, whose captions and classes are read alike: 3, "3" and 3.0."""
    return plain_type(kind) in (pa.string(), pa.float64())


def _says_something(kind: pa.DataType) -> bool:
    """Return whether JSON can hold it: no bytes, at no depth."""
    kind = plain_type(kind)
    if pa.types.is_struct(kind):
        return all(_says_something(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind):
        return _says_something(kind.value_type)
    return not pa.types.is_binary(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return a type that has the same values: how they are stored (dictionary, large offsets, views, widths) does not matter here."""
    types = pa.types
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return pa.float64()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in fields])
    return kind


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the plain type of which both are; what holds nothing but null is of every type. None where they differ."""
    one, other = plain_type(one), plain_type(other)
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = common_type(one.value_type, other.value_type)
        return pa.list_(inner) if inner is not None else None
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _common_struct(one, other)
    return None


def _common_struct(one: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    fields = {one.field(i).name: one.field(i).type for i in range(one.num_fields)}
    for i in range(other.num_fields):
        field = other.field(i)
        both = common_type(fields[field.name], field.type) if field.name in fields else plain_type(field.type)
        if both is None:
            return None
        fields[field.name] = both
    return pa.struct(list(fields.items()))
