"""A recipe's file: sections of fields, dotted keys among them, on top of the file that it extends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from condot.core.safe_yaml import read_yaml

WEIGHTED_FIELDS = ("data.caption",)
"""Fields of one text that a recipe may also write as a list, or as a mapping to weights."""


def load_recipe(path: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe, on top of the one that its `extends` names (a path beside it).

    Raises:
        ValueError: no such file, no YAML of a recipe's size, no mapping, or recipes that extend one another in a circle.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config {path}: no such recipe. The shipped ones are in configs/.")
    if path.resolve() in seen:
        raise ValueError(f"{path}: recipes extend one another in a circle: {' -> '.join(p.name for p in (*seen, path))}.")
    recipe = read_yaml(path) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections (data, model, flow, train, ...), not a {type(recipe).__name__}.")
    for key in ("plugin", "plugins"):
        if key in recipe:
            raise ValueError(
                f"{path}: {key}: a recipe, which may be a stranger's, names no code to run. Take the line out, and give the file on the "
                f"command line: --plugin FILE."
            )
    recipe = _sections(recipe, path)
    base = recipe.pop("extends", None)
    return _merge(load_recipe(path.parent / str(base), (*seen, path.resolve())), recipe) if base else recipe


def _sections(recipe: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Return a recipe with its dotted keys in their sections, where one that extends it finds them.

    Raises:
        ValueError: a field that is written in both ways.
    """
    sections: dict[Any, Any] = {}
    dotted = {key: value for key, value in recipe.items() if isinstance(key, str) and "." in key}
    for key, value in recipe.items():
        if key not in dotted and value is not None:  # a section whose fields are all commented out is empty
            sections[key] = dict(value) if isinstance(value, dict) else value
    for key, value in dotted.items():
        section, _, field = key.partition(".")
        fields = sections.setdefault(section, {})
        if not isinstance(fields, dict) or field in fields:
            raise ValueError(f"{path}: {key} stands there twice, as {key!r} and below {section!r}. Leave one of them out.")
        fields[field] = value
    return sections


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `over` on top of `base`, section by section, field by field; another `kind` starts its section afresh."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        merged[key] = _merge_fields(key, old, value) if isinstance(old, dict) and same else value
    return merged


def _merge_fields(section: str, base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return a section's fields on top of others; options of a kind that is not named again are on top of the kind's."""
    merged = {**base, **over}
    for name, value in over.items():
        old = base.get(name)
        if not isinstance(value, dict) or "kind" in value or f"{section}.{name}" in WEIGHTED_FIELDS:
            continue
        if isinstance(old, dict) and "kind" in old:
            merged[name] = {**old, **value}
        elif isinstance(old, str):
            merged[name] = {"kind": old, **value}
    return merged
