"""The range of each number that an option takes, declared beside its field: shown by `--help`, held when the dataclass is made.

    beta1: Annotated[float, Real("[0, 1)")] = 0.9

Intervals are written as in mathematics: a bracket takes its end in, a
parenthesis leaves it out. No interval holds NaN, and none that a recipe's
number may have holds an infinity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

INTERVAL = re.compile(r"([\[(]) *([^ ,]+) *, *([^ ,\])]+) *([\])])")
INT64_MAX = 2**63 - 1
"""Whole numbers are kept in 64 bits with a sign, unless an interval says more."""


class NumberRange(PrimitiveConstructorSpec[Any]):
    """The interval in which an option's number lies; metadata of `Annotated`, which tyro reads the number by.

    Args:
        kind: int or float.
        interval: such as `[0, 1)`.
        rule: what an error says after the value; by default the interval in words. Its remedy belongs into it.
    """

    def __init__(self, kind: type[int] | type[float], interval: str, rule: str = "") -> None:
        found = INTERVAL.fullmatch(interval)
        assert found, f"{interval!r} is no interval"
        low, high = float(found[2]), float(found[3])
        bounded = interval if math.isfinite(low) or math.isfinite(high) else ""
        super().__init__(
            nargs=1,
            metavar=f"{kind.__name__.upper()} {bounded}".strip(),
            instance_from_str=lambda words: kind(words[0]),
            is_instance=lambda value: isinstance(value, (int, kind)),
            str_from_instance=lambda value: [str(value)],
        )
        for name, value in (("kind", kind), ("low", low), ("high", high), ("interval", interval)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "closed", (found[1] == "[", found[4] == "]"))
        object.__setattr__(self, "rule", rule or f"{self._describe()}.")

    kind: type[int] | type[float]
    low: float
    high: float
    interval: str
    closed: tuple[bool, bool]
    rule: str

    def __repr__(self) -> str:
        return f"a number in {self.interval}"

    def contains(self, value: float) -> bool:
        """Return whether a number lies in the interval; NaN lies in none."""
        if self.kind is int and math.isinf(self.high) and value > INT64_MAX:
            return False
        above = self.low <= value if self.closed[0] else self.low < value
        below = value <= self.high if self.closed[1] else value < self.high
        return above and below

    def _describe(self) -> str:
        low, high = self.low, self.high
        number = "a whole number" if self.kind is int else "a number"
        if math.isinf(low) and math.isinf(high):
            return f"a finite number{' without a fraction' if self.kind is int else ''}"
        first = "" if math.isinf(low) else f"{'at least' if self.closed[0] else 'above'} {low:.16g}"
        last = "" if math.isinf(high) else f"{'at most' if self.closed[1] else 'below'} {high:.16g}"
        return f"{number} {' and '.join(part for part in (first, last) if part)}{', and finite' if not last and self.kind is float else ''}"


class FloatRange(NumberRange):
    """The interval of a real number."""

    def __init__(self, interval: str, rule: str = "") -> None:
        super().__init__(float, interval, rule)


class IntRange(NumberRange):
    """The interval of a whole number."""

    def __init__(self, interval: str, rule: str = "") -> None:
        super().__init__(int, interval, rule)


SEED_RANGE = IntRange("[0, 18446744073709551616)", "a seed is a whole number from 0 to 2^64 - 1. Use 0, or any other.")
"""Of every seed: the numbers that all our streams and torch's generators take for different ones."""


@functools.cache
def ranges_of(cls: type) -> dict[str, NumberRange]:
    """Return the intervals that a dataclass declares, by field: of the number, or of each of several."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: found for item in dataclasses.fields(cls) if (found := next(_declared(hints[item.name]), None))}


def _declared(hint: Any) -> Iterator[NumberRange]:
    """Yield the intervals inside a type such as `tuple[Annotated[float, ...], ...] | None`."""
    if typing.get_origin(hint) is typing.Annotated:
        yield from (one for one in hint.__metadata__ if isinstance(one, NumberRange))
    for inner in typing.get_args(hint):
        if not dataclasses.is_dataclass(inner):
            yield from _declared(inner)


def check_numbers(options: Any, prefix: str) -> None:
    """Hold every number of a dataclass against its interval.

    Args:
        options: the dataclass.
        prefix: what users write before a field's name, such as `train.`, or `--` of an option that has its value behind a blank.

    Raises:
        ValueError: the first that lies outside, by its option.
    """
    kind: Any = type(options)
    for name, number_range in ranges_of(kind).items():
        value = getattr(options, name)
        for number in value if isinstance(value, (tuple, list)) else () if value is None else (value,):
            if not number_range.contains(number):
                given = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else number
                raise ValueError(f"{prefix}{name}{' ' if prefix == '--' else '='}{given}: {number_range.rule}")
