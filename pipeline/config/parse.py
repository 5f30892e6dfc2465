"""From a YAML recipe and a command line to a filled dataclass, with errors that name the nearest key.

Everything becomes `--key value` words that tyro parses by the fields' types:
one parser for files and flags, and nothing in a file can name code to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import tyro
import yaml

from condot.core.printable import one_line, redacted
from condot.core.recipe_file import load_recipe
from condot.core.registry import Registry

from ..objectives.regularisers import check_regulariser_names, drop_unused_regularisers
from .kinds import (
    all_kind_fields,
    as_mapping,
    describe_unknown_option,
    join_words,
    option_fields,
    own_options,
    parse_with_kinds,
    with_kinds,
)
from .words import Arguments, command_line_words, flatten, join_weighted

T = TypeVar("T")
R = TypeVar("R")


def parse(cls: type[T], argv: list[str], aliases: dict[str, str] | None = None) -> T:
    """Fill a dataclass from the command line and the recipe that `--config` names.

    Args:
        cls: a frozen dataclass whose fields are values, dataclasses, or unions
            of dataclasses told apart by their field `kind`.
        argv: words such as `--config a.yaml --train.max_steps=100 --labels 1 2`.
        aliases: short names for dotted keys.

    Raises:
        ValueError: an unknown key (with the nearest known one), or a value of the wrong type.
        SystemExit: after printing `--help`.
    """
    wants_help = any(word in ("-h", "--help") for word in argv)
    words = command_line_words([word for word in argv if word not in ("-h", "--help")], aliases or {})
    config = _pop_recipe_path(words, argv, cls)
    given = join_weighted(join_words(cls, flatten(load_recipe(config[0])) if config else {}, words))
    default = _choose_kinds(cls, given)
    _check_keys(cls, given, default, aliases or {})
    if wants_help and aliases:
        names = ", ".join(f"--{short} ({full})" for short, full in aliases.items())
        about = f"{cls.__doc__}\n\nAlso understood: {names}."
        parse_with_kinds(default, lambda typed, start: tyro.cli(typed, default=start, args=["--help"], description=about, **TYRO))
    return _run_tyro(cls, default, ["--help"] if wants_help else _arguments(given))


def _check_keys(cls: type, given: Arguments, default: Any, aliases: dict[str, str]) -> None:
    known = _dotted_keys(default)
    check_regulariser_names(given)
    for key in given:
        if key not in known:
            raise ValueError(_unknown_key_message(key, known, list(aliases), cls))


def _arguments(given: Arguments) -> list[str]:
    """Words as tyro takes them; a value of a file that looks like an option stays a value.

    Raises:
        ValueError: several values of which one looks like an option: tyro would read it as that, `--help` included.
    """
    words: list[str] = []
    for key, values in given.items():
        option = next((value for value in values if value.startswith("--") or value == "-h"), None)
        if option and len(values) > 1:
            raise ValueError(f"{key}={option}: it stands among several values, where it would be read as an option. Leave it out.")
        words += [f"--{key}={option}"] if option else [f"--{key}", *values]
    return words


def parse_collecting_errors(cls: type[T], argv: list[str], aliases: dict[str, str] | None = None) -> tuple[T, list[str]]:
    """Parse as `parse` does, and collect every mistake in place of raising the first.

    Returns:
        The dataclass, with defaults where a value is mistaken; and one line a
        mistake, none where `parse` would pass.
    """
    errors: list[str] = []
    start = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    for word in argv[:start]:
        errors += _attempt(command_line_words, [word], aliases or {})[1]
    words = command_line_words([word for word in argv[start:] if word not in ("-h", "--help")], aliases or {})
    named, recipe_errors = _attempt(_pop_recipe_path, words, argv, cls)
    path = words.pop("config", None) if recipe_errors else named
    recipe, read_errors = _attempt(load_recipe, path[0]) if path and "several" not in "".join(recipe_errors) else ({}, [])
    recipe_errors += read_errors
    joined, twice = _attempt(join_words, cls, flatten(recipe or {}), words)
    given = join_weighted(joined or {**flatten(recipe or {}), **words})
    recipe_errors += twice
    default, unknown_kind = _attempt(_choose_kinds, cls, given)
    if default is None:  # what the fields of an unknown kind are cannot be said
        named = [key for key in given if key.endswith(".kind") or key in {field for field, _, _ in all_kind_fields(cls)}]
        wrong = [key for key in named if _attempt(_choose_kinds, cls, {key: given[key]})[1]]
        sections = tuple(key.removesuffix("kind") if key.endswith(".kind") else f"{key}." for key in wrong)
        unknown_kind = [text for key in wrong for text in _attempt(_choose_kinds, cls, {key: given[key]})[1]]
        given = {key: values for key, values in given.items() if key not in wrong and not key.startswith(sections)}
        default = _choose_kinds(cls, given)
    known = _dotted_keys(default)
    unknown = [_unknown_key_message(key, known, list(aliases or {}), cls) for key in given if key not in known]
    given = {key: values for key, values in given.items() if key in known}
    filled, value_errors = _fill_valid(cls, default, given)
    return filled, list(dict.fromkeys([*errors, *recipe_errors, *unknown_kind, *unknown, *value_errors]))


def _fill_valid(cls: type[T], default: T, given: Arguments) -> tuple[T, list[str]]:
    """What is right of the given values, and what is wrong of them: each alone first, then together."""

    def fill(chosen: Arguments) -> T:
        return _run_tyro(cls, default, _arguments(chosen))

    filled, errors = _attempt(fill, given)
    if not errors:
        return typing.cast(T, filled), []
    errors_of_each = {key: _attempt(fill, {key: values})[1] for key, values in given.items()}
    for key, texts in errors_of_each.items():
        if any(name != key and name in given for text in texts for name in _named(text, given)):
            texts.clear()  # beside the other value, which it was tried without, it may be right
    kept = {key: values for key, values in given.items() if not errors_of_each[key]}
    errors = [text for texts in errors_of_each.values() for text in texts]
    filled, joint_errors = _attempt(fill, kept)
    while joint_errors:  # two values that are right, each alone
        first = next(iter(_named(joint_errors[0], kept)), None)
        errors += joint_errors
        kept = {key: values for key, values in kept.items() if first is not None and key != first}
        filled, joint_errors = _attempt(fill, kept)
    return typing.cast(T, filled), errors


def _named(text: str, given: Arguments) -> list[str]:
    """Return the given options that an error names, in its order."""
    return [name for name in re.findall(r"\w+(?:\.\w+)*", text) if name in given]


def _attempt(function: Callable[..., R], *arguments: Any) -> tuple[R | None, list[str]]:
    """What a function gives, or what it says is wrong."""
    try:
        return function(*arguments), []
    except ValueError as error:
        return None, [" ".join(str(error).split())]


def is_switch_set(argv: list[str], switch: str) -> bool:
    """Whether a command line, or else the recipe that it names, sets a switch; with `--help`, and where the recipe cannot be read, not."""
    return read_word(argv, switch).lower() == "true" and not {"-h", "--help"} & set(argv)


def read_word(argv: list[str], key: str) -> str:
    """Return what a command line, or else the recipe that it names, says of a field, before either is checked; "" for nothing."""
    start = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    words = command_line_words(argv[start:], {})
    recipe = _attempt(load_recipe, words["config"][0])[0] if "config" in words else None
    return (words.get(key) or flatten(recipe or {}).get(key) or [""])[-1]


def config_from_mapping(cls: type[T], mapping: dict[str, Any]) -> T:
    """Fill a dataclass from a mapping, such as a saved configuration, which may be a stranger's: it names no file to be read.

    Raises:
        ValueError: as `parse`; or what no saved configuration holds.
    """
    try:
        given = {key: values for key, values in flatten(mapping).items() if values}  # an empty list is every list's default
    except (AttributeError, RecursionError) as error:
        raise ValueError("a saved configuration is a mapping of sections (data, model, flow, train, ...), and this is none.") from error
    for key in given:
        if key in ("config", "help") or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ValueError(f"{one_line(key)[:60]}: nothing that a saved configuration holds.")
    given = join_weighted(join_words(cls, given, {}))
    default = _choose_kinds(cls, given)
    _check_keys(cls, given, default, {})
    return _run_tyro(cls, default, _arguments(given))


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain values that YAML and JSON keep, and anyone may read: the secrets of its URLs are cut."""
    mapping: dict[str, Any] = redacted(yaml.safe_load(yaml.safe_dump(_tuples_to_lists(drop_unused_regularisers(as_mapping(config))))))
    return mapping


TYRO: dict[str, Any] = {"config": (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), "use_underscores": True}


def _run_tyro(cls: type[T], default: T, args: list[str]) -> T:
    """Call tyro; its boxed error messages become one line."""

    def run(typed: type[Any], start: Any) -> Any:
        return tyro.cli(typed, default=start, args=args, **TYRO)

    if "--help" in args:
        return parse_with_kinds(default, run)
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            return parse_with_kinds(default, run)
    except SystemExit:
        title, *message = re.split(r"-{5,}", " ".join(out.getvalue().split()))
        text = re.sub(r"^Error parsing (?:\w+\.)?(\w+)_options: ", r"flow.\1: ", (message or [title])[0].strip())
        text = re.sub(r"^Error parsing \w+: ", "", text).rstrip(".")
        raise ValueError(f"{text}. --help says what each field takes.") from None


def _pop_recipe_path(words: Arguments, argv: list[str], cls: type) -> list[str] | None:
    """Take the recipe out of the words of a command line.

    Raises:
        ValueError: words behind it, or a second recipe, which nobody would read.
    """
    recipe, *more = words.get("config", [""])
    several = sum(word.partition("=")[0] == "--config" for word in argv) > 1
    if several or any(word.endswith((".yaml", ".yml")) for word in more):
        named = "several recipes" if several else f"{recipe} and {more[0]}"
        raise ValueError(f"--config names {named}: give one, whose `extends` names another.")
    if more:
        name, equals, value = more[0].lstrip("-").partition("=")
        key = next((key for key in _dotted_keys(cls()) if name in (key, key.rpartition(".")[2])), "")
        remedy = f"--{key} {value}" if key and equals else "--section.field value, such as --train.max_steps 3"
        raise ValueError(f"{more[0]!r} stands behind --config {recipe}: write {remedy}.")
    return words.pop("config", None)


def _union_members(kind: Any) -> tuple[Any, ...]:
    """Return the dataclasses of a union, or of a class with a table of its `kinds`; none of any other type."""
    if isinstance(table := getattr(kind, "kinds", None), Registry):
        return tuple(table.values())
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return ()
    return tuple(member for member in typing.get_args(kind) if dataclasses.is_dataclass(member))


def _choose_kinds(cls: type[T], given: Arguments) -> T:
    """The default of `cls`, with the member of each union that the given `kind` names.

    Raises:
        ValueError: a kind that no member has.
    """
    chosen: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        members = {typing.get_args(typing.get_type_hints(m)["kind"])[0]: m for m in _union_members(hint)}
        kind = given.get(f"{name}.kind", [None])[0]
        if members and kind is not None:
            if kind not in members:
                raise ValueError(f"{name}.kind={kind} is unknown: choose one of {', '.join(members)}.")
            chosen[name] = members[kind]()
    return with_kinds(cls(**chosen), given)


def _dotted_keys(instance: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    holders = option_fields(type(instance))
    for item in dataclasses.fields(instance):
        value, name = getattr(instance, item.name), holders.get(item.name, item.name)
        if item.name in holders:
            keys += [f"{prefix}{name}.{option}" for option in own_options(value, {})]
        elif dataclasses.is_dataclass(value):
            keys += _dotted_keys(value, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _unknown_key_message(key: str, known: list[str], aliases: list[str], cls: type) -> str:
    section, _, leaf = key.rpartition(".")
    if not_taken := describe_unknown_option(cls, section, leaf, known):
        return not_taken
    for name, hint in typing.get_type_hints(cls).items():
        for member in _union_members(hint) if name == section else ():
            if leaf in [f.name for f in dataclasses.fields(member)]:
                kind = typing.get_args(typing.get_type_hints(member)["kind"])[0]
                return f"{key} is a field of {section}.kind={kind}, which was not chosen: set it, or leave the field out."
    near = difflib.get_close_matches(key, known + aliases, 1, 0.5) or [k for k in known if k.rpartition(".")[2] == leaf][:1]
    near = near or difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in known], 1, 0.5)
    return f"unknown key {key!r}: did you mean {near[0]!r}?" if near else f"unknown key {key!r}: --help lists the known ones."


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
