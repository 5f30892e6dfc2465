"""One import name in checkout, editable install and wheel: two names for one class are impossible."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("pipeline", "models", "data")


def run(program, cwd=ROOT, *words):
    """Another process's output; its error where it failed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=cwd, env=env, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("room", ["pipeline", "models"])
@pytest.mark.parametrize("name", ["{0}", "{0}.registry"])
def test_the_top_level_name_of_a_room_is_refused_with_the_right_one(room, name):
    assert f"write `import condot.{room}`, not `import {room}`." in run(f"import {name.format(room)}")


def test_the_top_level_name_data_reaches_its_commands_alone():
    """`python -m data.prepare` works from the checkout; the library has no second name."""
    assert run("import data.prepare, data.encode, data.inspect; print(*data.__path__)").strip().endswith("data/commands")
    for module in ("data.loader", "data.format.index", "data.images"):
        assert "No module named" in run(f"import {module}")


def test_no_file_becomes_two_modules():
    """Everything of condot imported, and `data.prepare` beside it: each file has one module, each class one identity."""
    program = """
import importlib, os, sys
from pathlib import Path
import data.prepare
root = Path(sys.argv[1])
for room in ("core", "data/format", "data/storage", "data/images", "pipeline/flow", "pipeline/config", "models/common"):
    for path in (root / "condot" / room).rglob("*.py"):
        importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
files = {}
for name, module in list(sys.modules.items()):
    file = os.path.realpath(getattr(module, "__file__", None) or os.sep)
    if file.startswith(str(root)) and "site-packages" not in file:
        files.setdefault(file, []).append(name)
print(len(files), [names for names in files.values() if len(names) > 1])
"""
    count, _, twice = run(program, ROOT, str(ROOT)).partition(" ")
    assert int(count) > 60 and twice.strip() == f"[{['data', 'condot.data']}]", "data/__init__.py itself, which holds nothing"


def build(folder, kind="wheel"):
    """What `make wheel` builds, by the back end itself, and the checkout it was built from; ours stays as it is."""
    pytest.importorskip("setuptools")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("condot", *ROOMS, "configs", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    name = run(program, copy, str(folder)).split()[-1]
    return zipfile.ZipFile(folder / name), copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"))[0]


def test_an_editable_install_is_a_plain_path_which_editors_follow(tmp_path):
    """A finder, which setuptools takes for other layouts, works at run time and hides every module from pyright and mypy."""
    editable, checkout = build(tmp_path, "editable")
    names = [name for name in editable.namelist() if ".dist-info/" not in name]
    assert len(names) == 1 and names[0].endswith(".pth") and editable.read(names[0]).decode().strip() == str(checkout)


def test_the_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"condot"}


def test_the_wheel_holds_every_file_of_the_house_once_as_a_real_file(wheel):
    """Links of the checkout are followed: same bytes, none left out, none that is a link."""
    held = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".py")}
    sources = {Path("condot") / path.relative_to(ROOT): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    own = [*(ROOT / "condot").glob("*.py"), *(path for p in ("cli", "core") for path in (ROOT / "condot" / p).rglob("*.py"))]
    sources |= {path.relative_to(ROOT): path for path in own}
    assert held == {str(name): path.read_bytes() for name, path in sources.items()}
    assert not [info.filename for info in wheel.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]


def test_recipes_and_the_mark_of_types_travel_in_the_wheel(wheel):
    found = {name.removeprefix("condot/recipes/"): wheel.read(name) for name in wheel.namelist() if name.endswith(".yaml")}
    there = {str(path.relative_to(ROOT / "configs")): path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")}
    assert found == there and "digits.yaml" in found and "accelerate/cpu2.yaml" in found
    assert "condot/py.typed" in wheel.namelist()
    assert "condot = condot.cli:main" in next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt"))
