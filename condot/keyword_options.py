"""From the keywords of a Python call to the dataclasses that commands fill from words; what is mistyped is named."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from condot.core.recipe_file import WEIGHTED_FIELDS, load_recipe
from condot.pipeline.config.kinds import as_mapping
from condot.pipeline.config.parse import config_from_mapping
from condot.pipeline.config.schema import ALIASES, Config

Options = TypeVar("Options")


def fill_options(options: type[Options], call: str, given: Mapping[str, Any], reserved: tuple[str, ...] = ()) -> Options:
    """Return a command's options with the given values.

    Args:
        options: a dataclass of `pipeline.sampling.options`.
        call: how messages call the function.
        given: values by name; one value stands for a tuple of one.
        reserved: fields that the call has another way for.

    Raises:
        ValueError: a name that is none, or a value of another type or out of range.
    """
    hints = typing.get_type_hints(options)
    known = [name for name in hints if name not in reserved]
    filled = {}
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
            raise ValueError(f"{call}({name}=...) is no option of it: {meant}")
        filled[name] = _as_type(value, hints[name], f"{call}({name}={value!r})")
    return options(**filled)


def _as_type(value: Any, kind: Any, place: str) -> Any:
    """Return a value as a dataclass of options holds it."""
    value = value.tolist() if hasattr(value, "tolist") else str(value) if isinstance(value, Path) else value
    if typing.get_origin(kind) is tuple:
        items = list(value) if isinstance(value, (list, tuple, range)) else [value]
        members = typing.get_args(kind)
        fixed = members[-1] is not Ellipsis
        if fixed and len(items) != len(members):
            raise ValueError(f"{place}: it takes {len(members)} values.")
        return tuple(
            _as_type(item, member, place) for item, member in zip(items, members if fixed else members[:1] * len(items), strict=True)
        )
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{place}: choose one of {', '.join(map(repr, typing.get_args(kind)))}.")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{place}: it takes a value of type {kind.__name__}, and this is {type(value).__name__}.")
    return value


def build_config(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any]) -> Config:
    """Return the configuration of a run.

    Args:
        config: the path of a recipe, its sections as a mapping, or a configuration.
        overrides: on top of it: by dotted key, by section, or by diffusers' names.

    Raises:
        ValueError: as the command's: an unknown key, with the nearest known one; a value of the wrong type or out of range.
    """
    if isinstance(config, Config):
        if not overrides:
            return config
        sections: Mapping[str, Any] = as_mapping(config)
    elif isinstance(config, (str, Path)):
        sections = load_recipe(Path(config).expanduser())
    else:
        sections = config
    return config_from_mapping(Config, {**_dotted(sections), **_dotted(overrides)})


def _dotted(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return sections as dotted keys, and diffusers' names as ours."""
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        key = f"{prefix}{name}" if prefix else ALIASES.get(name, name)
        if isinstance(value, Mapping) and key not in WEIGHTED_FIELDS:
            found |= _dotted(value, f"{key}.")
        else:
            found[key] = str(value) if isinstance(value, Path) else value
    return found
