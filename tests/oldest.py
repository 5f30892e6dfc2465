"""Print the lowest versions that pyproject.toml allows, as pip's constraints: `python tests/oldest.py > oldest.txt` (`make test-oldest`).

torch is left out: its CPU build comes from another index, and from one release only on some machines.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=([0-9.]+)")
TOOLS = {"build", "mypy", "pre-commit", "ruff"}
"""Tools of a developer, which no test imports."""


def lowest_versions(pyproject: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """Yield `name==version` for every dependency with a lower bound, of the package and of its extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in dict.fromkeys([*project["dependencies"], *extras]):
        match = BOUND.fullmatch(line)
        if match and match[1] not in TOOLS | {"torch", "huggingface_hub[hf_xet]"}:
            yield f"{match[1]}=={match[2]}"


if __name__ == "__main__":
    print("\n".join(sorted(set(lowest_versions()))))
