"""The section `data` of a recipe as the commands of `data/` read it: from a YAML file and some flags, without the rest of a run."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .caption_fields import format_caption_fields
from .data_config import DataConfig
from .recipe_file import load_recipe


def read_options(recipe: str | Path, over: dict[str, Any] | None = None) -> tuple[DataConfig, dict[str, Any]]:
    """Return the section `data` of a recipe, and the whole recipe as a mapping.

    Args:
        recipe: a YAML file; what it `extends` is read first.
        over: fields of the section that replace the recipe's.

    Raises:
        ValueError: no such file, an unknown field, a value that cannot be right.
    """
    whole = load_recipe(recipe)
    section = whole.get("data", {})
    if not isinstance(section, dict):
        kind = type(section).__name__
        raise ValueError(f"{recipe}: a recipe is a mapping of sections (data, model, flow, train, ...), and `data` is a {kind}.")
    section = {**section, **(over or {})}
    known = typing.get_type_hints(DataConfig)
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            raise ValueError(f"unknown key 'data.{key}'" + (f": did you mean 'data.{near[0]}'?" if near else "."))
        section[key] = _typed(key, format_caption_fields(value) if key == "caption" else value, known[key])
    return DataConfig(**section), whole


READERS: dict[type, Callable[[Any], Any]] = {
    int: lambda word: int(str(word)),
    float: lambda word: float(str(word)),
    bool: lambda word: {"true": True, "false": False}[str(word).lower()],
    str: lambda word: "" if word is None else os.path.expanduser(str(word)) if str(word).startswith("~/") else str(word),
}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a YAML value, or words of a command, as a field's type has it, `int` or `tuple[int, ...]`: YAML takes 1e-3 for a word."""
    several = typing.get_origin(hint) is tuple
    one = typing.get_args(hint)[0] if several else hint
    if typing.get_origin(one) is typing.Literal:  # DataConfig refuses values that are not listed
        one = type(typing.get_args(one)[0])
    words = list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        values = tuple(READERS[one](word) for word in words)
        if len(values) > 1 and not several:
            raise ValueError
        return values if several else values[-1]
    except (ValueError, KeyError, IndexError):
        given, alone = " ".join(map(str, words)), ", one alone" if len(words) > 1 else ""
        raise ValueError(f"data.{name}={given}: give {one.__name__}{alone}.") from None
