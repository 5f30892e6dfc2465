"""The example recipes: `condot recipes` lists them, `condot recipes digits` copies one into this folder.

Recipes of launchers (`accelerate/fsdp2`) are among them, for `accelerate launch --config_file`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import yaml

from condot.core.atomic_files import write_whole
from condot.core.process import report_errors

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """Return the recipes that came with condot, by name: `digits`, `stages/256`."""
    paths = sorted(FOLDER.rglob("*.yaml"))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}


def first_sentence(path: Path) -> str:
    """Return what a recipe says of itself first."""
    line = path.read_text().partition("\n")[0]
    sentence, dot, _ = line.removeprefix("#").strip().partition(". ")
    return sentence + dot.strip() if line.startswith("#") else ""


def copy_recipe(name: str, output: Path) -> list[Path]:
    """Copy a recipe, and beside it those that it extends; return the new files, the recipe's own first.

    Raises:
        ValueError: no such recipe, or a file in the way.
    """
    found = recipes()
    if name not in found:
        raise ValueError(f"{name!r} is no recipe: choose one of {', '.join(found)}.")
    copies, source = {output: found[name]}, found[name]
    while base := (yaml.safe_load(source.read_text()) or {}).get("extends"):
        source = source.parent / str(base)
        copies[output.parent / str(base)] = source
    for path, origin in list(copies.items())[1:]:
        if path.is_file() and path.read_text() == origin.read_text():  # it came with another stage
            del copies[path]
    for path in copies:
        if os.path.lexists(path):
            raise ValueError(f"{path} is there already: give another --output.")
    for path, origin in copies.items():
        write_whole(path, origin.read_text())
    return list(copies)


@report_errors
def main(argv: list[str]) -> int:
    """List the recipes, or copy the one named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="condot recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the recipe to copy")
    parser.add_argument("--output", type=Path, help="the new file (default: the recipe's own name, in this folder)")
    options = parser.parse_args(argv)
    if options.name is None:
        found = recipes()
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {first_sentence(path)}".rstrip() for name, path in found.items()))
        return 0
    written = copy_recipe(options.name, options.output or Path(f"{Path(options.name).name}.yaml"))
    use = "accelerate launch --config_file" if options.name.startswith("accelerate/") else "condot train --config"
    print(f"{', '.join(map(str, written))}: now `{use} {written[0]}`.")
    return 0
