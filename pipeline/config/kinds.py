"""Fields of a recipe that name a line of a table: their choices, and the options that the named kind has of its own.

    path: Annotated[str, OneOf(PATHS, "path_options")] = "condot"
    path_options: Any = None

is written as `path: ve`, or as `path: {kind: ve, sigma_max: 348}`, where `sigma_max` is a field of the dataclass that
PATHS names `ve`. Tables grow when plugins are loaded, so the types that tyro reads are made anew for each command line.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

import tyro

from condot.core.registry import Registry, UnknownKindError

from .words import Arguments

T = TypeVar("T")
HIDDEN: Any = Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress]
"""The type of a field that no command line shows or sets."""


@dataclass(frozen=True)
class OneOf:
    """Metadata of `Annotated`: a field that holds a name of some tables.

    Args:
        tables: where the name is looked up, in turn.
        options: the field beside it that holds the named kind, built, where its options are not the defaults; "" if kinds have none.
        flat: for kinds that had options before kinds could, the older fields that hold them: `{"mode": {"scale": "time_scale"}}`.
        more: names that are in no table.
    """

    tables: tuple[Registry[Any], ...]
    options: str = ""
    flat: Mapping[str, Mapping[str, str]] = field(default_factory=dict, compare=False)
    more: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name there is now."""
        return (*(name for table in self.tables for name in table), *self.more)

    def check(self, key: str, name: str) -> None:
        """Raise UnknownKindError, as of the field `key`, for a name that no table has."""
        if name not in self.names:
            try:
                Registry(self.tables[0].kind, dict.fromkeys(self.names)).lookup(name)
            except UnknownKindError as error:
                raise UnknownKindError(f"{key}={name}: {error}") from None

    def default_of(self, name: str) -> Any:
        """Return the kind of that name with its default options; None where it has no options of its own.

        Raises:
            ValueError: an option without a default.
        """
        table = next((table for table in self.tables if name in table), None)
        if not self.options or table is None:
            return None
        try:
            default = table[name]()
        except TypeError as error:
            raise ValueError(f"{table.kind} {name!r} cannot be built without arguments ({error}): give each field a default.") from error
        return default if own_options(default, self.flat.get(name, {})) else None


def own_options(kind: Any, flat: Mapping[str, str]) -> list[str]:
    """Return the fields of a built kind that a recipe may set: those of plain values, which no older field holds."""
    if not dataclasses.is_dataclass(kind):
        return []
    hints = typing.get_type_hints(type(kind), include_extras=True)
    return [item.name for item in dataclasses.fields(kind) if item.init and item.name not in flat and _is_plain(hints[item.name])]


def _is_plain(hint: Any) -> bool:
    """Return whether a type holds numbers, texts and choices alone."""
    if hint in (int, float, bool, str, type(None), Ellipsis) or typing.get_origin(hint) is Literal:
        return True
    if typing.get_origin(hint) is Annotated:
        return _is_plain(hint.__origin__)
    return typing.get_origin(hint) in (tuple, typing.Union, types.UnionType) and all(map(_is_plain, typing.get_args(hint)))


def kind_fields(cls: type) -> dict[str, OneOf]:
    """Return the fields of a dataclass that hold one name of a table."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: one for name, hint in hints.items() for one in getattr(hint, "__metadata__", ()) if isinstance(one, OneOf)}


def option_fields(cls: type) -> dict[str, str]:
    """Return the fields that hold options, each with the field whose kind has them: `{"path_options": "path"}`."""
    return {one.options: name for name, one in kind_fields(cls).items() if one.options}


def all_kind_fields(cls: type) -> Iterator[tuple[str, OneOf, str]]:
    """Yield the dotted key, the tables and the default of each such field of a dataclass and of its sections."""
    for item in dataclasses.fields(cls):
        if item.name in kind_fields(cls):
            yield item.name, kind_fields(cls)[item.name], typing.cast(str, item.default)
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and name in {item.name for item in dataclasses.fields(cls)}:
            for inner, one, default in all_kind_fields(typing.cast(type, hint)):
                yield f"{name}.{inner}", one, default


def describe_unknown_option(cls: type, key: str, option: str, known: list[str]) -> str:
    """Return what is wrong with an option of a kind, such as `flow.path` and `power`: whose it is, and what the chosen kind takes."""
    one = next((one for name, one, _ in all_kind_fields(cls) if name == key and one.options), None)
    if one is None:
        return ""
    owners = [name for name in one.names if option in (*own_options(one.default_of(name), {}), *one.flat.get(name, {}))]
    if owners:
        return f"{key}.{option} is an option of {key}={' or '.join(owners)}, which was not chosen: set it, or leave the option out."
    taken = [name.removeprefix(f"{key}.") for name in known if name.startswith(f"{key}.")]
    near = get_close_matches(option, taken, 1)
    hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(taken)}." if taken else "it takes none."
    return f"unknown key '{key}.{option}': the chosen {one.tables[0].kind} has no such option; {hint}"


def join_words(cls: type, recipe: Arguments, words: Arguments) -> Arguments:
    """Put a command line's words on top of a recipe's, with every kind written as `path: ve` and its options beside it.

    Another kind on the command line drops the options of the recipe's. Options that older fields hold go there.

    Raises:
        ValueError: one thing that is said twice in the same place.
    """
    layers = [dict(recipe), dict(words)]
    for key, one, default in all_kind_fields(cls):
        for layer in layers:
            _write_once(layer, f"{key}.kind", key)
        below, above = (layer.get(key, [""])[0] for layer in layers)
        if below and above and below != above:
            layers[0] = {name: values for name, values in layers[0].items() if not name.startswith(f"{key}.")}
        section = key.rpartition(".")[0]
        for option, older in one.flat.get(above or below or default, {}).items():
            for layer in layers:
                _write_once(layer, f"{key}.{option}", f"{section}.{older}" if section else older)
    return {**layers[0], **layers[1]}


def _write_once(layer: Arguments, key: str, other: str) -> None:
    """Rename a key of a layer, which must not hold both."""
    if key not in layer:
        return
    if other in layer:
        raise ValueError(f"{key}={' '.join(layer[key])} beside {other}={' '.join(layer[other])}: both say the same. Give one of them.")
    layer[other] = layer.pop(key)


def with_kinds(instance: T, given: Arguments, prefix: str = "") -> T:
    """Return a dataclass whose kinds are the named ones, each with an instance of its options, to be filled.

    Raises:
        UnknownKindError: a name that no table has.
    """
    changes: dict[str, Any] = {}
    for name, one in kind_fields(type(instance)).items():
        kind = given.get(f"{prefix}{name}", [getattr(instance, name)])[0]
        one.check(f"{prefix}{name}", kind)
        changes[name] = kind
        if one.options:
            changes[one.options] = one.default_of(kind)
    for item in dataclasses.fields(instance):  # type: ignore[arg-type]
        value = getattr(instance, item.name)
        if dataclasses.is_dataclass(value) and item.name not in option_fields(type(instance)):
            changes[item.name] = with_kinds(value, given, f"{prefix}{item.name}.")
    return dataclasses.replace(instance, **changes)  # type: ignore[type-var]


def parse_with_kinds(default: T, parse: Callable[[type[Any], Any], Any]) -> T:
    """Let a parser see, in place of a dataclass with kinds, one whose choices and options are typed as they are now.

    Args:
        default: as `with_kinds` returns it.
        parse: takes a class and a default, and returns an instance of that class.
    """
    typed = _typed(default)
    return typing.cast(T, _untyped(default, parse(type(typed), typed)))


def _typed(instance: Any) -> Any:
    """Return a dataclass with the names of tables as choices, and options as sections of their own."""
    cls = type(instance)
    values: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for name, one in kind_fields(cls).items():
        hints[name] = Literal[one.names]
        if not one.options:
            continue
        options = getattr(instance, one.options)
        hints[one.options] = HIDDEN
        if options is not None:
            values[one.options] = _plain_options(options, one.flat.get(getattr(instance, name), {}))
            hints[one.options] = Annotated[type(values[one.options]), tyro.conf.arg(name=name)]
    for item in dataclasses.fields(cls):
        value = getattr(instance, item.name)
        if dataclasses.is_dataclass(value) and item.name not in hints and (made := _typed(value)) is not value:
            values[item.name], hints[item.name] = made, type(made)
    if not hints:
        return instance
    everything = {item.name: getattr(instance, item.name) for item in dataclasses.fields(cls)} | values
    return _subclass(cls, hints, everything)(**everything)


def _plain_options(options: Any, flat: Mapping[str, str]) -> Any:
    """Return a built kind whose other fields no command line can set."""
    hidden = [item.name for item in dataclasses.fields(options) if item.name not in own_options(options, flat)]
    values = {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.init}
    if not hidden:
        return options
    return _subclass(type(options), dict.fromkeys(hidden, HIDDEN), values)(**values)


def _subclass(cls: type, hints: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Return a dataclass with other types of some fields, which documents itself as the original does."""
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    keyword_only = all(item.kw_only for item in dataclasses.fields(cls))
    fields = [(name, hint, field(default_factory=functools.partial(_get, defaults[name]))) for name, hint in hints.items()]
    made = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=params.frozen, eq=False, kw_only=keyword_only)
    for name in ("__module__", "__qualname__", "__doc__", "__firstlineno__"):  # by which tyro finds the comments that are help
        if hasattr(cls, name):
            setattr(made, name, getattr(cls, name))
    return made


def _get(value: Any) -> Any:
    return value


def _untyped(like: Any, made: Any) -> Any:
    """Return what a parser filled as an instance of the original classes; options that are the defaults as None."""
    cls = type(like)
    if not dataclasses.is_dataclass(like) or made is None:
        return made
    values = {item.name: getattr(made, item.name) for item in dataclasses.fields(cls) if item.init}
    for name, one in kind_fields(cls).items():
        if one.options and values[one.options] is not None:
            default = one.default_of(values[name])
            options = _untyped(default, values[one.options])
            values[one.options] = None if options == default else options
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and name not in option_fields(cls):
            values[name] = _untyped(_sample(getattr(like, name), value), value)
    return cls(**values)


def _sample(like: Any, value: Any) -> Any:
    """Return the instance whose class a section of a parsed dataclass has, itself where no parser's class stands in for it."""
    return like if isinstance(value, type(like)) else value


def as_mapping(value: Any) -> Any:
    """Return a dataclass as nested mappings; a kind as its name, or with options that are not the defaults as `{kind: name, ...}`."""
    if isinstance(value, (list, tuple)):
        return [as_mapping(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    holders, found = option_fields(type(value)), {}
    for item in dataclasses.fields(value):
        if item.name not in holders:
            found[item.name] = as_mapping(getattr(value, item.name))
    for name, one in kind_fields(type(value)).items():
        if one.options and (options := getattr(value, one.options)) is not None:
            plain = own_options(options, one.flat.get(found[name], {}))
            found[name] = {"kind": found[name], **{option: as_mapping(getattr(options, option)) for option in plain}}
    return found
