"""The house law: three rooms that do not know each other, a core that knows none of them, and commands that introduce them."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "core": [],
    "pipeline": [
        *("flow", "objectives", "config", "latent_space", "launch", "checkpoint", "ema", "tracking", "evaluation", "sampling"),
        *("hub", "training", "export", "dry_run"),
    ],
    "models": ["common", "cross_dit", "dit", "mmdit", "unet"],
    "data": ["images", "format", "storage", "encoders", "loader", "encode", "prepare", "inspect"],
}
"""The packages of each room, the lowest first: a file imports from its own package and from lower ones."""
PLACES = {"core": ROOT / "condot" / "core", **{room: ROOT / room for room in ("pipeline", "models", "data")}}
FILES = sorted(path for place in PLACES.values() for path in place.rglob("*.py"))
PRODUCT = [
    *FILES,
    *sorted((ROOT / "condot" / "cli").rglob("*.py")),
    *sorted((ROOT / "condot").glob("*.py")),
    *(ROOT / name for name in ("train.py", "sample.py")),
]


def module_of(path: Path) -> str:
    """The dotted name by which everybody imports a file: `condot.pipeline.flow.path`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "condot" else ("condot", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> list[str]:
    """The dotted names of all that a file imports, of ours as whole names of modules."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            head = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*head, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
    return found


def place_of(module: str) -> str:
    """`pipeline` of `condot.pipeline.flow`; "" of what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "condot" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_sealed_and_only_core_is_shared(path):
    here = place_of(module_of(path))
    for name in imports(path):
        if "commands" in path.parts:
            assert name in ("condot.cli", "sys"), f"{path} imports {name}"
            continue
        assert place_of(name) in ("", here, "core"), f"{path} imports {name}"
        assert name.split(".")[0] not in ("torchvision", "torchaudio", "train", "sample"), f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if "flow" in p.parts], ids=lambda p: p.name)
def test_mathematics_imports_torch_numpy_scipy_its_siblings_and_the_kind_of_its_tables_only(path):
    standard = {"__future__", "collections", "collections.abc", "dataclasses", "enum", "functools", "itertools", "math", "typing"}
    for name in imports(path):
        known = name in standard or name.split(".")[0] in ("torch", "numpy", "scipy") or name.startswith("condot.pipeline.flow")
        known = known or name == "condot.core.registry"  # which imports the standard library alone
        assert known, f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_packages_import_lower_ones_only_and_files_never_in_a_circle(room):
    graph = {m: {n for n in imports(p) if n in MODULES and n != m} for m, p in MODULES.items() if place_of(m) == room}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    height = {name: number for number, name in enumerate(ROOMS[room])}
    for module, others in graph.items():
        for other in others:
            a, b = (name.split(".")[2] if name.count(".") > 1 else "" for name in (module, other))
            if a in height and a != b and place_of(other) == room:
                assert b in height, f"{module} imports {other}, which stands above all packages"
                assert height[b] < height[a], f"{module} imports {other}, of a higher package"


def test_everything_has_one_import_name():
    """`import pipeline` and `import condot.pipeline` would be two modules with two classes of every name."""
    for folder in ("condot/cli", "condot/core", "pipeline", "models", "data", "tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not {name.split(".")[0] for name in names} & {"pipeline", "models", "data"}, f"{path}: {names}"


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    assert text.count("\n") <= 320, f"{path} has {text.count(chr(10))} lines: find the second idea in it"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} does not say what lives in it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 75, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("room", ["pipeline", "models", "data", "condot/cli", "condot/cli/assembly"])
def test_a_room_can_be_taken_in_at_a_glance(room):
    entries = [p for p in (ROOT / room).iterdir() if p.name != "__pycache__" and not p.name.startswith(".")]
    assert len(entries) <= 15, sorted(p.name for p in entries)


def test_packages_say_what_they_are_and_nothing_else():
    """A room's own `__init__` also guards its top-level name: see test_import_names."""
    for path in [p for p in FILES if p.name == "__init__.py" and p.parent.name != "flow"]:
        top = path.parent.parent == ROOT
        _, *rest = ast.parse(path.read_text()).body
        guards = [node for node in rest if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
        imports = [node for node in rest if isinstance(node, ast.Import)]
        assert path.read_text().count("\n") <= 12 and rest == (imports + guards if top else []), path


def test_no_class_name_stands_twice():
    """A network's own `Block` aside, and versions of what travels, which diffusers finds by one name."""
    found = Counter()
    for path in PRODUCT:
        if path.stem.endswith(("_v1", "_v2")):
            continue
        found.update(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef) and node.name != "Block")
    assert not [name for name, times in found.items() if times > 1]
