"""A recipe's fields and a command line as one thing: dotted keys, each with the words of its value."""

from __future__ import annotations

import os
from typing import Any

from condot.core.recipe_file import WEIGHTED_FIELDS

Arguments = dict[str, list[str]]


def command_line_words(argv: list[str], aliases: dict[str, str]) -> Arguments:
    """`--a=1 --b 2 3 --c` as {a: [1], b: [2, 3], c: [True]}; a later word wins."""
    words: Arguments = {}
    key = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            key = aliases.get(name, name)
            words[key] = [to_word(value)] if equals else []
        elif key is None:
            raise ValueError(f"{word!r} stands alone: write --name value, as --config configs/digits.yaml.")
        else:
            words[key].append(to_word(word))
    return {name: values or ["True"] for name, values in words.items()}


def to_word(value: Any) -> str:
    """A YAML or command-line value as tyro spells it."""
    text = "None" if value is None else os.path.expanduser(str(value)) if str(value).startswith("~/") else str(value)
    return {"true": "True", "false": "False", "null": "None"}.get(text, text)


def flatten(mapping: dict[str, Any], prefix: str = "") -> Arguments:
    words: Arguments = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and f"{prefix}{key}" in WEIGHTED_FIELDS:
            words[f"{prefix}{key}"] = [f"{name}={to_word(weight)}" for name, weight in value.items()] or ["{}"]
        elif isinstance(value, dict):
            words |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            words[f"{prefix}{key}"] = [to_word(item) for item in value] or (["[]"] if f"{prefix}{key}" in WEIGHTED_FIELDS else [])
        else:
            words[f"{prefix}{key}"] = [to_word(value)]
    return words


def join_weighted(words: Arguments) -> Arguments:
    """Join the words of a field that holds one text to that text."""
    return {key: [",".join(values)] if key in WEIGHTED_FIELDS else values for key, values in words.items()}
