"""What is installed with condot is what its code imports, line by line, and nothing of it is left to chance."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CALLED_OTHERWISE = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
IMPORTED_BY_NAME = {"tensorboard"}
"""accelerate imports it, for the tracker of that name."""
OPTIONAL = {"wandb", "trackio"}
"""Trackers that their users install; asked for with an error that says so."""


def product():
    """Files that are installed; the rooms are links in `condot`, which a search does not follow."""
    for place in ("condot/core", "condot/cli", "pipeline", "models", "data"):
        yield from (ROOT / place).rglob("*.py")


def imported():
    """The packages that product code imports, at the top or where they are used, as the registry calls them."""
    found = set()
    for path in product():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    return {CALLED_OTHERWISE.get(name, name) for name in found - set(sys.stdlib_module_names) - {"condot"}}


def names(lines):
    return {re.match(r"[\w-]+", line)[0] for line in lines}


def test_each_dependency_is_imported_and_each_import_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always, extras = names(project["dependencies"]), project["optional-dependencies"]
    used = imported()
    assert always - used == IMPORTED_BY_NAME, "dependencies that nothing imports"
    assert used - always - OPTIONAL <= names(line for lines in extras.values() for line in lines), "imports that nothing installs"


def test_tested_versions_are_listed_for_all():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    assert names(project["dependencies"]) <= listed
