"""YAML of strangers: plain values, each key once, no more than a recipe can need, aliases counted as often as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode

MOST_BYTES = 1 << 20
"""Of a file; the shipped recipes have a few thousand."""
MOST_SIZE = 1 << 22
"""Characters and values once every alias is written out: nine aliases of nine, nine times over, are refused before they are built."""
MOST_DEPTH = 32
"""Lists and mappings inside one another."""
FAULTS = (yaml.YAMLError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError)
"""What PyYAML raises for text that is none, and for values such as `!!int ""` or `!!timestamp x`."""


class Plain(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C loader where libyaml is there: a base known at run time
    """A loader of plain values that takes no key twice."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; a ValueError that names the line of a key that stands in it twice."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise ValueError(f"line {_line(key)}: the key {key.value!r} stands there twice. Leave one of them out")
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: texts, numbers, lists and mappings; None for an empty one.

    Raises:
        ValueError: no YAML, a key that stands twice, or more than MOST_BYTES, MOST_SIZE or MOST_DEPTH.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        body = file.read(MOST_BYTES + 1)
    try:
        if len(body) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        text = body.decode("utf-8-sig")
        _check_size(text)
        return yaml.load(text, Loader=Plain)  # a kind of SafeLoader
    except FAULTS as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}.") from error


def _check_size(text: str) -> None:
    """Count what a text would become, event by event, nothing built.

    Raises:
        ValueError: too large, too deep, or an alias inside what it stands for.
    """
    anchors: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=Plain):
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise ValueError(f"line {_line(event)}: the alias *{event.anchor} stands inside what it names")
            size = anchors.get(str(event.anchor), 0)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value)
            if event.anchor:
                anchors[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            if anchor:
                anchors[anchor] = size
        open_[-1] = (open_[-1][0], open_[-1][1] + size)
        if open_[-1][1] > MOST_SIZE or len(open_) > MOST_DEPTH:
            raise ValueError(f"line {_line(event)}: values nest deeper than {MOST_DEPTH}, or are too many once aliases are written out")


def _line(part: Any) -> int:
    """Return the line on which an event or a node begins, counted from 1."""
    return int(part.start_mark.line) + 1
