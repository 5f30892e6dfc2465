"""Checkpoints: whole or absent, whatever happens while they are written, and never unpickled."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Store, choose, load_state, load_tensors, verify

ROOT = Path(__file__).resolve().parent.parent


def tensors(value):
    return {
        "a": torch.full((3, 4), float(value)),
        "b.c": torch.arange(5) + value,
        "empty": torch.zeros(0),
        "scalar": torch.tensor(float(value)),
    }


def test_what_was_saved_comes_back(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (5, 10, 100):
        assert store.save(step, tensors(step), {"step": step}) == []
    assert [p.name for p in store.folders()] == ["checkpoint-100", "checkpoint-10"], "the newest two by number, not by name"
    latest = store.latest()
    loaded = load_tensors(latest)
    assert load_state(latest) == {"step": 100} and loaded.keys() == tensors(100).keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors(100).items())
    assert not list(tmp_path.glob(".tmp*"))


def damage(folder, how):
    file = folder / "rank-00000.safetensors"
    body = file.read_bytes()
    if how == "flip":
        file.write_bytes(body[:-9] + bytes([body[-9] ^ 4]) + body[-8:])
    elif how == "cut":
        file.write_bytes(body[:-1])
    elif how == "gone":
        file.unlink()
    elif how == "manifest gone":
        (folder / "manifest.json").unlink()
    elif how == "manifest torn":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:40])
    elif how == "manifest foreign":
        (folder / "manifest.json").write_text("[1, 2]")
    elif how == "state":
        (folder / "state.json").write_text('{"step": 7}')


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "manifest gone", "manifest torn", "manifest foreign", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, how):
    store = Store(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    damage(tmp_path / "checkpoint-2", how)
    assert store.latest() == tmp_path / "checkpoint-1"
    assert f"{tmp_path / 'checkpoint-2'} is damaged and passed over" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        load_state(tmp_path / "checkpoint-2")
    assert store.save(2, tensors(2), {"step": 2}) == [] and store.latest() == tmp_path / "checkpoint-2", "a damaged one is written again"


KILLER = """
import os, sys, torch
import pipeline.checkpoint as c
point, root = sys.argv[1], sys.argv[2]
def die(*a, **k): os.kill(os.getpid(), 9)
def half(t, path):
    save(t, path); open(path, "r+b").truncate(50); die()
save = c.save_file
if point == "tensors": c.save_file = half
elif point == "seal": c._seal = die
elif point == "state": c._write_json = lambda p, v: (p.write_text("{"), die())
elif point == "manifest":
    write = c._write_json
    c._write_json = lambda p, v: die() if p.name == "manifest.json" else write(p, v)
elif point == "rename":
    rename = os.rename
    os.rename = lambda a, b: die() if "checkpoint-2" in str(b) else rename(a, b)
elif point == "prune": c.Store._prune = die
elif point == "sweep": c.shutil.rmtree = die
c.Store(c.Path(root), keep=1).save(2, {"a": torch.ones(1000)}, {"step": 2})
"""


def test_killed_at_any_point_one_good_checkpoint_remains(tmp_path):
    """kill -9 at seven points of a save that keeps one: before the rename the old one is there, after it the new one."""
    points = ["tensors", "seal", "state", "manifest", "rename", "prune", "sweep"]
    for point in points:
        root = tmp_path / point
        root.mkdir()
        assert Store(root, keep=1).save(1, tensors(1), {"step": 1}) == []
    running = [
        subprocess.Popen([sys.executable, "-c", KILLER, point, str(tmp_path / point)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for point in points
    ]
    assert [process.wait() for process in running] == [-9] * len(points)
    for point in points:
        store = Store(tmp_path / point, keep=1)
        assert store.latest().name == ("checkpoint-2" if point in ("prune", "sweep") else "checkpoint-1"), point
        store.sweep()
        assert not list((tmp_path / point).glob(".tmp*"))


def test_a_full_disk_leaves_the_old_one_and_no_debris(tmp_path, monkeypatch):
    store = Store(tmp_path, keep=1)
    store.save(1, tensors(1), {"step": 1})
    for name in ("save_file", "_write_json", "_seal"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.checkpoint.{name}", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            errors = store.save(2, tensors(2), {"step": 2})
        assert errors == ["rank 0: [Errno 28] No space left on device"]
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and verify(tmp_path / "checkpoint-1") is None
    assert store.save(2, tensors(2), {"step": 2}) == []


def test_a_good_checkpoint_is_not_written_twice(tmp_path):
    store = Store(tmp_path, keep=1)
    store.save(1, tensors(1), {"step": 1})
    inode = (tmp_path / "checkpoint-1/manifest.json").stat().st_ino
    assert store.save(1, tensors(1), {"step": 1}) == [] and (tmp_path / "checkpoint-1/manifest.json").stat().st_ino == inode


def test_a_pickle_in_a_checkpoint_never_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    store = Store(tmp_path, keep=2)
    store.save(1, tensors(1), {"step": 1})
    store.save(2, tensors(2), {"step": 2})
    for name in ("rank-00000.safetensors", "state.json", "manifest.json"):
        (tmp_path / "checkpoint-2" / name).write_bytes(pickle.dumps(Payload()))
        assert store.latest() == tmp_path / "checkpoint-1"
        assert not (tmp_path / "executed").exists()


def test_which_checkpoint_is_resumed(tmp_path):
    store = Store(tmp_path, keep=3)
    assert choose(store, "latest") is None and choose(store, "none") is None
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    assert choose(store, "latest").name == "checkpoint-2" == choose(store, str(tmp_path / "checkpoint-2")).name
    with pytest.raises(ValueError, match=r"holds checkpoint-2: resume it, or give another --output_dir"):
        choose(store, "none")
    with pytest.raises(ValueError, match=r"is older than checkpoint-2"):
        choose(store, str(tmp_path / "checkpoint-1"))
    assert choose(Store(tmp_path / "branch", keep=1), str(tmp_path / "checkpoint-1")).name == "checkpoint-1"
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        choose(Store(tmp_path / "branch", keep=1), str(tmp_path / "nothing"))


def test_a_manifest_holds_sizes_and_hashes(tmp_path):
    Store(tmp_path, keep=1).save(3, tensors(3), {"step": 3})
    manifest = json.loads((tmp_path / "checkpoint-3/manifest.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {"rank-00000.safetensors", "state.json"}
    assert all(set(seal) == {"bytes", "sha256"} and len(seal["sha256"]) == 64 for seal in manifest["files"].values())
