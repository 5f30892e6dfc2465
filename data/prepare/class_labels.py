"""Classes: what a value of a label column, or the name of a folder, says of one; and which number each class has.

A class is a whole number from 0 or a name. `10`, `10.0` and `"10"` are one
number, `cat` and ` cat ` one name, in every source.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

MAX_CLASSES = 65535
NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")
FRACTION = re.compile(r"[+-]?([0-9]*\.[0-9]+|[0-9]+\.?)(e[+-]?[0-9]+)?", re.IGNORECASE)
Class = int | str


def class_name(text: str) -> str:
    """Return the name of a class as it is kept: without blanks around it, composed (NFC)."""
    return unicodedata.normalize("NFC", text.strip())


def natural_sort_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return what sorts names as people count: `class2` before `class10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part], name


def parse_class(value: Any) -> Class | None:
    """Return the class that a value says, a number or a name; None where it says none.

    No label is what `datasets` marks so, -1, and what tables hold where
    nothing is known: nothing at all, null, NaN, an empty text or list.

    Raises:
        ValueError: it says several classes, or is no class.
    """
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise ValueError(f"{_shown(value)} are several classes, and a sample has one")
        return parse_class(value[0]) if value else None
    if value is None or isinstance(value, str):
        return _class_of_text(value or "")
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return str(bool(value))
    if isinstance(value, Integral):
        return _numbered(int(value))
    if isinstance(value, Real | Decimal):
        if math.isnan(value):
            return None
        if math.isfinite(value) and float(value).is_integer():
            return _numbered(int(float(value)))
    raise ValueError(f"{_shown(value)} is no class: whole numbers from 0 or names are")


def _class_of_text(text: str) -> Class | None:
    name = class_name(text)
    if NUMBER.fullmatch(name) and len(name) < 20:
        return _numbered(int(name.partition(".")[0]))
    return name or None


def _numbered(number: int) -> int | None:
    if number < -1 or number >= MAX_CLASSES:
        raise ValueError(f"class {number} is not in 0 to {MAX_CLASSES - 1}: number classes from 0, or name them")
    return None if number == -1 else number


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def sort_class_names(values: Iterable[Any], where: str) -> tuple[str, ...]:
    """Return class names from the values of a column: whole numbers count from 0, names are in natural order.

    Raises:
        ValueError: values that are no classes, or more than 65,535 of them.
    """
    found = set[Class]()
    for value in values:
        try:
            said = parse_class(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Name another column with --label_column, or none with --label_column none.") from error
        if said is not None:
            found.add(said)
    missing = {said for said in found if isinstance(said, str) and said.lower() == "nan"}
    if all(isinstance(said, int) for said in found - missing):  # `nan` among numbers is how a gap is written
        return tuple(map(str, range(max((int(said) for said in found - missing), default=-1) + 1)))
    numeric = {said for said in found if isinstance(said, int) or FRACTION.fullmatch(said)}
    odd = next((said for said in numeric if isinstance(said, str)), None)
    if odd is not None and numeric | missing == found:
        raise ValueError(
            f"{where}: {odd!r} is no class: whole numbers from 0 or names are. "
            "Name another column with --label_column, or none with --label_column none."
        )
    if len(found) > MAX_CLASSES:
        raise ValueError(
            f"{where}: {len(found):,} classes, at most {MAX_CLASSES:,} are kept. Is this a caption? "
            "Name it with --caption_column, and the class with --label_column, or none with --label_column none."
        )
    return tuple(sorted(map(str, found), key=natural_sort_key))


def number_classes(names: Iterable[str], *, given: bool) -> dict[Class, int]:
    """Return the number of each class.

    Args:
        names: of all classes, in the order of their numbers.
        given: the source numbers its classes itself, so that a whole number
            is a place among the names, not a name.
    """
    numbers: dict[Class, int] = {}
    for place, name in enumerate(names):
        numbers.setdefault(class_name(name), place)
        numbers[place if given else parse_class(name) or 0] = place  # a name such as `3`
    return numbers


def class_number(value: Any, numbers: Mapping[Class, int]) -> int | None:
    """Return the class number of a value; None where it says no class.

    Raises:
        ValueError: it is none of the classes.
    """
    if isinstance(value, str) and class_name(value) in numbers:
        return numbers[class_name(value)]
    said = parse_class(value)
    if said is None or (isinstance(said, str) and said.lower() == "nan" and said not in numbers):
        return None
    if said not in numbers:
        raise ValueError(f"class {_shown(value)} is not one of the {len(set(numbers.values()))} names")
    return numbers[said]


def unused_labels(values: Iterable[Any], numbers: Mapping[Class, int]) -> list[int]:
    """Return the class numbers below the largest that no value has, as where whole numbers have gaps."""
    seen = {class_number(value, numbers) for value in values}
    return sorted(set(numbers.values()) - seen)
