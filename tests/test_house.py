"""The house law: three rooms that do not know each other, and a room of mathematics that knows only torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "models", "data")
FLOORS = {
    "pipeline": [
        [
            *(
                "ranges",
                "safe_yaml",
                "printable",
                "standard_streams",
                "scheduling_flow_v1",
                "image_files",
                "frechet",
                "retrieval",
                "classifier",
                "standing",
            ),
            *(
                "own_files",
                "model_folders",
                "curve",
                "provenance",
                "captions_v1",
                "guidance_v1",
                "guidance_v2",
                "scheduler_check_v2",
                "checkpoint.shares",
                "ema.posthoc",
                "launch.meeting",
            ),
            *("launch.parallel", "launch.precision", "tracking.utilisation", "training.pulse"),
        ],
        ["recipe_file"],
        [
            "checksums",
            "networks",
            "sheet",
            "recipe",
            "markdown",
            "process",
            "leaks",
            "tracking.jsonl",
            "training.status",
            "training.side",
            "checkpoint.rankfile",
        ],
        ["config", "measured", "scheduling_flow_ode_v1", "scheduling_flow_sde_v1", "checkpoint.manifest", "tracking.trackers"],
        ["scheduling_flow_v2"],
        ["scheduling_flow_ode_v2", "scheduling_flow_sde_v2"],
        [
            *(
                "identity",
                "method",
                "stock",
                "space",
                "pipeline_condot_v1",
                "checkpoint.stored",
                "ema",
                "launch.launcher",
                "tracking",
            ),
            *("training.guard", "training.optim", "training.told", "checkpoint.room", "checkpoint.saving"),
        ],
        ["launch", "checkpoint", "inputs_v2", "resume"],
        ["ema.snapshots", "pipeline_condot_v2"],
        ["ema.weights", "plan"],
        ["source", "fold", "card", "choice", "training.watch"],
        ["training.run", "guidance_options"],
        ["training.batches", "sampler"],
        ["follow"],
        ["classified", "many", "plan.mistakes", "training.loop"],
        ["generate"],
        ["folder", "options", "animate", "plan.case"],
        ["export", "evaluate", "density", "restore", "asked", "publish", "plan.dry_run", "training.preview"],
        ["draw"],
    ],
    "models": [
        ["kernels", "initialise", "presets"],
        ["layers", "condition", "layout", "find"],
        ["grid", "interface"],
        ["dit", "mmdit", "cross_dit", "unet"],
        ["modeling_dit_v1", "modeling_mmdit_v1", "modeling_cross_dit_v1"],
        ["convert_dit", "convert_mmdit", "convert_cross_dit", "convert_unet", "convert_own", "cost"],
        ["convert", "lora", "memory"],
        ["published"],
    ],
    "data": [
        [
            "printable",
            "safe_yaml",
            "standard_streams",
            "text_files",
            "image_formats",
            "regular_files",
            "jpeg_header",
            "flock",
            "stamps",
            "model_folders",
        ],
        ["orientation", "color", "splits", "labels", "locators", "tar_headers", "sample_files", "caption_fields"],
        ["bands"],
        ["tiff"],
        ["tar", "order", "decode", "options", "retry", "claim", "fingerprint", "listing", "crew", "join", "shardlist"],
        ["manifest", "tar_sources", "buckets", "fetch", "cache", "encoders", "text_encoders", "write", "columns", "plan", "shrink"],
        ["index", "packed"],
        ["hollow", "source", "encoded", "summary", "check", "fill", "tables", "digits", "changes"],
        ["shards", "remote", "target", "side", "walk", "parquet", "hub"],
        ["beside", "open", "pack", "made", "folder"],
        ["batch", "adopt"],
        ["stream", "prepare"],
        ["forms", "opening", "reading"],
        ["words"],
        ["sources"],
        ["encode", "inspect", "survey"],
    ],
}
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(number of leading dots, module) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_sealed_and_relative_inside(path):
    for level, name in imports(path):
        head = name.split(".")[0]
        assert level or head not in (*ROOMS, "condot", "train", "sample", "torchvision", "torchaudio"), f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if "flow" in p.parts], ids=lambda p: p.name)
def test_mathematics_imports_torch_scipy_and_its_siblings_only(path):
    standard = {"__future__", "collections", "collections.abc", "dataclasses", "enum", "functools", "itertools", "math", "typing"}
    for level, name in imports(path):
        assert level == 1 or (level == 0 and (name.split(".")[0] in ("torch", "numpy", "scipy") or name in standard)), (
            f"{path} imports {'.' * level}{name}"
        )


def siblings(path: Path, room: Path) -> list[str]:
    """What a file imports of its own room, by dotted name: files, and packages for what their `__init__.py` holds."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].relative_to(room).parts
            name = ".".join((*folder, *(node.module or "").split("."))).strip(".")
            inner = [f"{name}.{alias.name}".strip(".") for alias in node.names]
            files = [one for one in inner if (room / f"{one.replace('.', '/')}.py").exists() or (room / one.replace(".", "/")).is_dir()]
            found += files if len(files) == len(inner) else [name]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_files_import_from_lower_floors_only(room):
    """The packages `flow` and `pictures` have a law, and a command, of their own."""
    height = {name: i for i, floor in enumerate(FLOORS[room]) for name in floor}
    for path in (ROOT / room).rglob("*.py"):
        parts = path.relative_to(ROOT / room).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[0] in ("flow", "pictures") or name == "":
            continue
        brought = siblings(path, ROOT / room)
        if name not in height:
            assert parts[-1] == "__init__" and not brought, f"{path} has no floor: write it into FLOORS"
        for other in brought:
            if other in height:
                assert height[other] < height[name], f"{name} (floor {height[name]}) imports {other} (floor {height[other]})"


@pytest.mark.parametrize("path", [*FILES, ROOT / "train.py", ROOT / "sample.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    assert text.count("\n") <= 320, f"{path} has {text.count(chr(10))} lines: find the second idea in it"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} does not say what lives in it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 75, f"{path}: {node.name} has {length} lines"


def test_the_wheel_lists_every_package():
    """Mapped packages are listed by hand; one left out would be missing from the wheel alone."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"condot." + ".".join(p.parent.relative_to(ROOT).parts) for room in ROOMS for p in (ROOT / room).rglob("__init__.py")}
    assert set(listed) == found
