"""Tables of kinds that a user's own file can add to: `PATHS.register("mine")` above a class or a function.

    PATHS: Registry[type[Path]] = Registry("path", {"condot": CondOT, "cosine": Cosine})

    @PATHS.register("mine")
    @dataclass(frozen=True)
    class Mine: ...

A Registry reads as any mapping does, in the order of registration. What is registered while
`registering_from` is open is known to come from that source, and goes with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")
Entry = TypeVar("Entry")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""What a recipe, a command line and a file name can hold alike."""
_open_sources: list[tuple[str, list[tuple[Registry[Any], str]]]] = []


class Registry(Mapping[str, T]):
    """A table from names to things of one kind.

    Args:
        kind: what the things are, in the singular, for errors: `path`, `metric`.
        entries: those of the house.
    """

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._sources: dict[str, str] = {}
        for name, entry in (entries or {}).items():
            self.add(name, entry)

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that adds what it decorates, and leaves it as it is.

        Raises:
            ValueError: a name that is taken, or that no recipe could hold.
        """

        def decorate(entry: Entry) -> Entry:
            self.add(name, entry)  # type: ignore[arg-type]  # a class of T's protocol, which mypy cannot relate to a decorator's type
            return entry

        return decorate

    def add(self, name: str, entry: T) -> None:
        """Add a line to the table.

        Raises:
            ValueError: a name that is taken, or that no recipe could hold.
        """
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{self.kind} {name!r}: a name is letters, digits and underscores, a letter first. "
                f"Use {re.sub(r'[^A-Za-z0-9_]+', '_', name).strip('_') or 'mine'!r}."
            )
        if name in self._entries:
            owner = f"by {self._sources[name]}" if self._sources[name] else "by condot itself"
            raise ValueError(f"{self.kind} {name!r} is registered already, {owner}: choose another name.")
        self._entries[name] = entry
        self._sources[name] = _open_sources[-1][0] if _open_sources else ""
        if _open_sources:
            _open_sources[-1][1].append((self, name))

    def discard(self, name: str) -> None:
        """Take a line out of the table, if it is there."""
        self._entries.pop(name, None)
        self._sources.pop(name, None)

    def lookup(self, name: str) -> T:
        """Return what has this name; `table[name]` raises KeyError instead.

        Raises:
            ValueError: no such name; the nearest known one is said.
        """
        if name in self._entries:
            return self._entries[name]
        near = get_close_matches(name, self._entries, 1)
        meant = f"did you mean {near[0]!r}? There are " if near else "choose one of "
        raise ValueError(
            f"{self.kind} {name!r} is unknown: {meant}{', '.join(self._entries)}; a kind of your own comes with --plugin FILE."
        )

    def source(self, name: str) -> str:
        """Return which file registered a name; "" is condot itself."""
        return self._sources[name]

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {list(self._entries)})"


@contextmanager
def registering_from(source: str) -> Iterator[list[tuple[Registry[Any], str]]]:
    """Note what is registered meanwhile as coming from `source`; after an error none of it stays.

    Yields:
        The tables and names, as they are added.
    """
    added: list[tuple[Registry[Any], str]] = []
    _open_sources.append((source, added))
    try:
        yield added
    except BaseException:
        for registry, name in added:
            registry.discard(name)
        raise
    finally:
        _open_sources.pop()
