"""The example recipes: `condot recipes` lists them, `condot recipes digits` copies one into this folder."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """Return the recipes that came with condot, by name: `digits`, `stages/256`."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def first_line(path: Path) -> str:
    """Return what a recipe says of itself."""
    return path.read_text().partition("\n")[0].removeprefix("#").strip()


def main(argv: list[str]) -> int:
    """List the recipes, or copy the one named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="condot recipes", description=__doc__)
    parser.add_argument("name", nargs="?", help="of the recipe to copy")
    parser.add_argument("--output", type=Path, help="the new file (default: the recipe's own name, in this folder)")
    options = parser.parse_args(argv)
    found = recipes()
    if options.name is None:
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {first_line(path)}" for name, path in found.items()))
        return 0
    if options.name not in found:
        print(f"error: {options.name!r} is no recipe: choose one of {', '.join(found)}.", file=sys.stderr)
        return 2
    output = options.output or Path(found[options.name].name)
    if output.exists():
        print(f"error: {output} is there already: give another --output.", file=sys.stderr)
        return 2
    shutil.copyfile(found[options.name], output)
    print(f"{output}: now `condot train --config {output}`.")
    return 0
