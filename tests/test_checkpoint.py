"""Checkpoints: whole or absent, whatever happens while they are written, and never unpickled."""

import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from condot.pipeline.checkpoint import manifest, saving
from condot.pipeline.checkpoint.rank_file import METADATA_KEY, HostBuffer, find_nonfinite
from condot.pipeline.checkpoint.saving import NOT_FINITE
from condot.pipeline.checkpoint.sharding import to_write
from condot.pipeline.checkpoint.store import (
    CheckpointManager,
    averages,
    load_into,
    load_state,
    load_tensors,
    raw_weights,
    select_checkpoint,
    verify,
)

ROOT = Path(__file__).resolve().parent.parent


def tensors(value):
    return {
        "a": torch.full((3, 4), float(value)),
        "b.c": torch.arange(5) + value,
        "empty": torch.zeros(0),
        "scalar": torch.tensor(float(value)),
    }


def test_what_was_saved_comes_back(tmp_path):
    store = CheckpointManager(tmp_path, keep=2)
    for step in (5, 10, 100):
        assert store.save(step, tensors(step), {"step": step}) == []
    assert [p.name for p in store.folders()] == ["checkpoint-100", "checkpoint-10"], "the newest two by number, not by name"
    latest = store.latest()
    loaded = load_tensors(latest)
    assert load_state(latest) == {"step": 100, "world": 1} and loaded.keys() == tensors(100).keys()
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
        (folder / "manifest.json").write_text('{"files": ["state.json"]}')
    elif how == "manifest elsewhere":
        (folder / "manifest.json").write_text('{"files": {"state.json": {}, "../../checkpoint-1/state.json": {}}}')
    elif how == "manifest empty":
        (folder / "manifest.json").write_text('{"files": {}}')
    elif how == "manifest deep":
        (folder / "manifest.json").write_text("[" * 100_000)
    elif how == "state":
        (folder / "state.json").write_text('{"step": 7}')


HOW = ["flip", "cut", "gone", "manifest gone", "manifest torn", "manifest foreign", "manifest elsewhere", "manifest empty", "manifest deep"]


@pytest.mark.parametrize("how", [*HOW, "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, how):
    store = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    damage(tmp_path / "checkpoint-2", how)
    assert store.latest() == tmp_path / "checkpoint-1"
    said = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-2'} is damaged and passed over" in said
    assert ("bytes, the manifest says" in said) == (how in ("cut", "state")), "told by its size, nothing is hashed"
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        load_state(tmp_path / "checkpoint-2")
    assert store.save(2, tensors(2), {"step": 2}) == [] and store.latest() == tmp_path / "checkpoint-2", "a damaged one is written again"


def flips(path):
    """Write a file with each bit of it flipped, one after the other; the file as it was at the end."""
    body = path.read_bytes()
    for at in range(len(body)):
        for bit in range(8):
            path.write_bytes(body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :])
            yield at, bit
    path.write_bytes(body)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_any_bit_that_flips_is_told_and_the_one_before_is_taken(tmp_path, capsys, name):
    """The manifest holds its own sha256: white space, names, shapes and the sha256 itself, all of it."""
    store = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    missed = [place for place in flips(tmp_path / "checkpoint-2" / name) if verify(tmp_path / "checkpoint-2") is None]
    assert missed == [] and verify(tmp_path / "checkpoint-2") is None
    for place in flips(tmp_path / "checkpoint-2" / name):
        assert store.latest().name == "checkpoint-1", place
        break
    assert f"{tmp_path / 'checkpoint-2'} is damaged and passed over" in capsys.readouterr().out


def test_of_a_manifest_without_its_own_sha256_a_bit_that_flips_is_told_or_changes_nothing(tmp_path):
    """As releases before this one wrote it: what is read is what was written, or nothing is."""
    CheckpointManager(tmp_path, keep=1).save(1, tensors(1), {"step": 1})
    folder, told = tmp_path / "checkpoint-1", 0
    said = json.loads((folder / "manifest.json").read_text())
    del said["sha256"]
    (folder / "manifest.json").write_text(json.dumps(said | {"version": 2}, indent=1))
    assert verify(folder) is None
    for place in flips(folder / "manifest.json"):
        if verify(folder) is not None:
            told += 1
            continue
        found = load_tensors(folder)
        assert load_state(folder)["step"] == 1 and found.keys() == tensors(1).keys(), place
        assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors(1).items()), place
    assert told > 1000


KILLER = """
import os, sys, torch
import condot.pipeline.checkpoint.store as c
from condot.pipeline.checkpoint import manifest, saving
from pathlib import Path
point, root = sys.argv[1], Path(sys.argv[2])
def die(*a, **k): os.kill(os.getpid(), 9)
def patch(name, where=c, when=lambda *a: True):
    real = getattr(where, name)
    setattr(where, name, lambda *a, **k: die() if when(*a) else real(*a, **k))
if point == "copy": patch("copy", c.HostBuffer)
elif point == "checked": patch("write_file", saving)
elif point == "half":
    write = os.write
    os.write = lambda fd, chunk: (write(fd, chunk[:50]), die())
elif point == "synced": patch("fsync", os)
elif point == "state": patch("write_text", saving)
elif point == "begun": patch("finish", c.CheckpointManager)
elif point == "gathered": patch("check_files_visible")
elif point == "manifest": patch("write_text", manifest, when=lambda path, text: path.name == "manifest.json")
elif point == "rename": patch("rename", os, lambda a, b: "checkpoint-2" in str(b))
elif point == "renamed": patch("sync", when=lambda folder: folder == root)
elif point == "prune": patch("_prune", c.CheckpointManager)
elif point == "aside": patch("rename", os, lambda a, b: "tmp-old" in str(b))
elif point == "remove": patch("rmtree", c.shutil)
c.CheckpointManager(root, keep=1).save(2, {"a": torch.ones(1000)}, {"step": 2})
"""
BEFORE = ("copy", "checked", "half", "synced", "state", "begun", "gathered", "manifest", "rename")
AFTER = ("renamed", "prune", "aside", "remove")


def test_killed_at_any_point_one_good_checkpoint_remains(tmp_path):
    """kill -9 at thirteen points of a save that keeps one: before the rename the old one is there, after it the new one."""
    points = (*BEFORE, *AFTER)
    for point in points:
        root = tmp_path / point
        root.mkdir()
        assert CheckpointManager(root, keep=1).save(1, tensors(1), {"step": 1}) == []
    command = "import sys; exec(sys.stdin.read())"
    script = f"""
import os, sys
import condot.pipeline.checkpoint.store
for point in {points!r}:
    if os.fork() == 0:
        sys.argv = ["", point, os.path.join({str(tmp_path)!r}, point)]
        exec({KILLER!r})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", command], input=script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["-9"] * len(points), done.stderr
    for point in points:
        store = CheckpointManager(tmp_path / point, keep=1)
        assert store.latest().name == ("checkpoint-2" if point in AFTER else "checkpoint-1"), point
        store.remove_leftovers()
        assert not list((tmp_path / point).glob(".tmp*"))


@pytest.mark.parametrize(
    "name", ["store.HostBuffer.copy", "saving.write_file", "saving.write_text", "store.check_files_visible", "store.sync"]
)
def test_a_full_disk_leaves_the_old_one_and_no_debris(tmp_path, monkeypatch, name):
    """Wherever it shows, in the thread or where it is committed, it is said by `finish`, and the next save goes on."""
    store = CheckpointManager(tmp_path, keep=1)
    store.save(1, tensors(1), {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(f"condot.pipeline.checkpoint.{name}", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        store.begin(2, tensors(2), {"step": 2})
        errors = store.finish()
    assert errors == ["rank 0: [Errno 28] No space left on device"] and store.pending is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and verify(tmp_path / "checkpoint-1") is None
    assert store.save(2, tensors(2), {"step": 2}) == []


def test_a_disk_that_is_really_full(tmp_path):
    """A limit on the size of files: the write stops half-way, in a thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = CheckpointManager(tmp_path, keep=1)
    store.save(1, tensors(1), {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        errors = store.save(2, {"a": torch.ones(100_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert errors == ["rank 0: [Errno 27] File too large"] and [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_state_of_which_a_part_was_not_written_is_no_checkpoint(tmp_path, monkeypatch):
    """Wherever the parts went that no rank took: 17 numbers of 18."""
    monkeypatch.setattr(saving, "to_write", lambda *given: [part for part in to_write(*given) if part.name != "scalar"])
    (error,) = CheckpointManager(tmp_path, keep=1).save(1, tensors(1), {"step": 1})
    assert "17 of 18 numbers were written" in error and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    errors = CheckpointManager(tmp_path / "file" / "run", keep=1).save(1, tensors(1), {})
    assert len(errors) == 1 and errors[0].startswith("rank 0: [Errno 20] Not a directory")


# --- what is saved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 4096, -1])
def test_a_state_gone_wrong_is_never_saved(tmp_path, dtype, bad, place):
    """The largest number of a type is no infinity; NaN and infinity are found at either end and in the middle, by name."""
    if (dtype == torch.float8_e4m3fn and bad != bad) or dtype != torch.float8_e4m3fn:
        good = torch.full((10_001,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        state = {"ema.x": good, "model.y": good.clone(), "optim.z": torch.full((7,), 2**31 - 1, dtype=torch.int32), "u": torch.ones(3)}
        store = CheckpointManager(tmp_path, keep=1)
        assert store.save(1, state, {}) == []
        state["model.y"][place] = bad
        assert store.save(2, state, {}) == [f"rank 0: model.y {NOT_FINITE}"]
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


FLOATS = {torch.float16: 16, torch.bfloat16: 16, torch.float8_e4m3fn: 8, torch.float8_e5m2: 8, torch.float32: 32, torch.float64: 64}


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_is_told_from_those_that_are_none(dtype):
    """All patterns of 8 and 16 bits, and of longer types every exponent with some mantissas; torch says which are finite."""
    width = FLOATS[dtype]
    raw = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    if width <= 16:
        bits = torch.arange(2**width)
    else:
        mantissa = 23 if width == 32 else 52
        high = torch.arange(2 ** (width - mantissa)) << mantissa
        bits = (high[:, None] + torch.tensor([0, 1, 2 ** (mantissa - 1), 2**mantissa - 1])).flatten()
    numbers = bits.to(raw).view(dtype)
    finite = torch.isfinite(numbers.double())

    def found(tensor):
        buffer = HostBuffer()
        spans = buffer.copy(to_write({"x": tensor}, 0, 1))
        return find_nonfinite(spans, buffer.bytes(tensor.nbytes))

    assert 0 < (~finite).sum() < finite.sum() and found(numbers[finite]) is None
    bad = numbers[~finite]
    assert all(found(bad[i : i + 1]) == "x" for i in range(0, len(bad), max(1, len(bad) // 60)))


def test_what_is_saved_is_the_state_when_the_save_began(tmp_path, monkeypatch):
    """Weights and state change while the thread writes, and nothing of that is in the checkpoint; two saves in turn share their memory."""
    gate, write = threading.Event(), saving.write_file
    monkeypatch.setattr("condot.pipeline.checkpoint.saving.write_file", lambda *a: (gate.wait(), write(*a))[1])
    store, state, about = CheckpointManager(tmp_path, keep=3), tensors(1), {"seen": [1]}
    for step in (1, 2):
        gate.clear()
        store.begin(step, state, about)
        assert store.is_writing() and store.pending == step and store.latest() == (None if step == 1 else tmp_path / "checkpoint-1")
        store.remove_leftovers()  # leaves alone what is being written
        for tensor in state.values():
            tensor += 1
        about["seen"].append(step + 1)
        gate.set()
        assert store.finish() == [] and not store.is_writing() and store.pending is None
    for step in (1, 2):
        loaded = load_tensors(tmp_path / f"checkpoint-{step}")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(step).items())
        assert load_state(tmp_path / f"checkpoint-{step}")["seen"] == list(range(1, step + 1))
    assert store.finish() == [], "nothing was begun"


def test_memory_for_copies_is_taken_once():
    """Of a state of the same size or a smaller one; a larger one has room too."""
    buffer = HostBuffer()

    def copied(count):
        buffer.copy(to_write({"x": torch.arange(float(count))}, 0, 1))
        found = torch.frombuffer(buffer.bytes(4 * count), dtype=torch.float32)
        assert found.equal(torch.arange(float(count)))
        return found.data_ptr()

    assert copied(1000) == copied(900) == copied(1000) != copied(9000)


def test_any_reader_of_safetensors_reads_the_file(tmp_path):
    """Every type, strides, no elements, no dimensions, names of any kind; compared with what the library itself would write."""
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    state = {f"kind.{dtype}": torch.arange(1, 8).to(dtype) for dtype in kinds}
    state |= {"turned": torch.arange(12.0).view(3, 4).t(), "every other": torch.arange(10)[::2], "none": torch.zeros(0, 3)}
    state |= {"point": torch.tensor(2.5), 'wei\u00dfes "Rauschen"': torch.ones(1)}
    assert CheckpointManager(tmp_path, keep=1).save(1, state, {}) == []
    read = load_file(tmp_path / "checkpoint-1/rank-00000.safetensors")
    length = int.from_bytes((tmp_path / "checkpoint-1/rank-00000.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0, "tensors begin at a multiple of their size, so that they can be mapped"
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs")
    assert read.keys() == theirs.keys() == load_tensors(tmp_path / "checkpoint-1").keys()
    for name, tensor in theirs.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert (
            read[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)) if tensor.ndim else read[name] == tensor
        )
    assert (
        CheckpointManager(tmp_path, keep=1)
        .save(2, {"c": torch.ones(2, dtype=torch.complex64)}, {})[0]
        .startswith("rank 0: c is of the type")
    )


def test_all_is_on_the_disk_before_it_has_its_name_and_before_anything_is_removed(tmp_path, monkeypatch):
    """The order that a power cut needs: every file, the folder, the rename, its parent; only then the old one goes."""
    done, real = [], (os.fsync, os.rename)
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real[0](fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(f"-> {os.path.basename(b)}"), real[1](a, b))[1])
    store = CheckpointManager(tmp_path, keep=1)
    store.save(1, tensors(1), {"step": 1})
    del done[:]
    store.save(2, tensors(2), {"step": 2})
    generic = [name[:7] if ".tmp-" in name else name for name in done]
    assert generic[:2] == ["rank-00000.safetensors", "state.json"]
    assert generic[2:] == ["manifest.json", ".tmp-2-", "-> checkpoint-2", tmp_path.name, "-> .tmp"]


def test_a_good_checkpoint_is_not_written_twice(tmp_path):
    store = CheckpointManager(tmp_path, keep=1)
    store.save(1, tensors(1), {"step": 1})
    inode = (tmp_path / "checkpoint-1/manifest.json").stat().st_ino
    assert store.save(1, tensors(1), {"step": 1}) == [] and (tmp_path / "checkpoint-1/manifest.json").stat().st_ino == inode


def test_a_pickle_in_a_checkpoint_never_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    store = CheckpointManager(tmp_path, keep=2)
    store.save(1, tensors(1), {"step": 1})
    store.save(2, tensors(2), {"step": 2})
    for name in ("rank-00000.safetensors", "state.json", "manifest.json"):
        (tmp_path / "checkpoint-2" / name).write_bytes(pickle.dumps(Payload()))
        assert store.latest() == tmp_path / "checkpoint-1"
        assert not (tmp_path / "executed").exists()


def test_which_checkpoint_is_resumed(tmp_path):
    store = CheckpointManager(tmp_path, keep=3)
    assert select_checkpoint(store, "latest") is None and select_checkpoint(store, "none") is None
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    assert select_checkpoint(store, "latest").name == "checkpoint-2" == select_checkpoint(store, str(tmp_path / "checkpoint-2")).name
    with pytest.raises(ValueError, match=r"holds checkpoint-2: resume it, or give another --output_dir"):
        select_checkpoint(store, "none")
    with pytest.raises(ValueError, match=r"is older than checkpoint-2"):
        select_checkpoint(store, str(tmp_path / "checkpoint-1"))
    assert select_checkpoint(CheckpointManager(tmp_path / "branch", keep=1), str(tmp_path / "checkpoint-1")).name == "checkpoint-1"
    with pytest.raises(ValueError, match=r"nothing is not there; \S+branch holds none"):
        select_checkpoint(CheckpointManager(tmp_path / "branch", keep=1), str(tmp_path / "nothing"))


def test_a_manifest_holds_sizes_and_hashes(tmp_path):
    CheckpointManager(tmp_path, keep=1).save(3, tensors(3), {"step": 3})
    said = json.loads((tmp_path / "checkpoint-3/manifest.json").read_text())
    assert said["step"] == 3 and set(said["files"]) == {"rank-00000.safetensors", "state.json"}
    assert said["tensors"]["a"] == ["F32", [3, 4]] and said["world"] == 1
    for name, digest in said["files"].items():
        body = (tmp_path / "checkpoint-3" / name).read_bytes()
        assert digest == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


# --- what stays


def test_a_damaged_later_one_does_not_push_the_new_one_out(tmp_path):
    """Of two, step 8 is damaged: the run goes on from 4, and its save of step 6, keeping one, must stay."""
    store = CheckpointManager(tmp_path, keep=2)
    for step in (4, 8):
        store.save(step, tensors(step), {"step": step})
    damage(tmp_path / "checkpoint-8", "flip")
    store = CheckpointManager(tmp_path, keep=1)
    assert store.save(6, tensors(6), {"step": 6}) == []
    assert [p.name for p in store.folders()] == ["checkpoint-8", "checkpoint-6"] and store.latest().name == "checkpoint-6"


def test_who_was_killed_before_old_ones_went_is_cleared_up_after(tmp_path):
    """By the save of the same step, which finds it there, and by the start from it."""
    for clear in (lambda store: store.save(2, tensors(2), {"step": 2}), lambda store: store.remove_leftovers(tmp_path / "checkpoint-2")):
        for step in (1, 2):
            CheckpointManager(tmp_path, keep=2).save(step, tensors(step), {"step": step})
        store = CheckpointManager(tmp_path, keep=1)
        clear(store)
        store.wait_for_cleanup()
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_an_old_one_that_cannot_be_removed_is_said_and_no_failure(tmp_path, monkeypatch, capsys):
    store, rename = CheckpointManager(tmp_path, keep=1), os.rename
    store.save(1, tensors(1), {"step": 1})

    def refuse(source, target):
        if "tmp-old" in str(target):
            raise OSError(1, "Operation not permitted")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert store.save(2, tensors(2), {"step": 2}) == []
    assert "an old checkpoint could not be removed: [Errno 1]" in capsys.readouterr().out and store.latest().name == "checkpoint-2"
    assert store.save(3, tensors(3), {"step": 3}) == [] and [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_was_found_good_is_not_hashed_again_until_it_changes(tmp_path, monkeypatch):
    CheckpointManager(tmp_path, keep=1).save(1, tensors(1), {"step": 1})
    folder, hashed, fault = tmp_path / "checkpoint-1", [], manifest._fault
    monkeypatch.setattr(
        "condot.pipeline.checkpoint.manifest._fault", lambda path, digest: (hashed.append(path.name), fault(path, digest))[1]
    )
    assert verify(folder) is None and verify(folder) is None and len(hashed) == 4, "too new to tell whether it changes"
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    assert verify(folder) is None and verify(folder) is None and len(hashed) == 6
    damage(folder, "flip")
    assert "does not match its sha256" in verify(folder)
    damage(folder, "flip")  # back again
    os.utime(folder / "rank-00000.safetensors", (1e9, 1e9))
    assert verify(folder) is None
    damage(folder, "flip")  # of the same number and size, and old as well
    os.utime(folder / "rank-00000.safetensors", (1e9, 1e9 + 1))
    assert "does not match its sha256" in verify(folder)


# --- what is read


def older(tmp_path):
    """A checkpoint as condot 0.1 wrote it: two ranks, no metadata, a manifest that lists no tensors."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    state = tensors(1)
    for number, names in enumerate((("a", "empty"), ("b.c", "scalar"))):
        save_file({name: state[name] for name in names}, folder / f"rank-{number:05d}.safetensors")
    (folder / "state.json").write_text('{"step": 1}')
    files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "step": 1, "files": files}))
    return folder


@pytest.mark.parametrize("old", [True, False])
def test_tensors_are_filled_in_place(tmp_path, old):
    folder = older(tmp_path) if old else tmp_path / "checkpoint-1"
    assert old or CheckpointManager(tmp_path, keep=1).save(1, tensors(1), {"step": 1}) == []
    assert load_state(folder)["step"] == 1
    loaded, filled = load_tensors(folder), {name: torch.zeros_like(t) for name, t in tensors(1).items()}
    addresses = {name: t.data_ptr() for name, t in filled.items()}
    weight = torch.nn.Parameter(filled["a"])
    assert load_into(folder, {**filled, "a": weight}) == [] and weight.requires_grad
    for name, tensor in tensors(1).items():
        assert filled[name].equal(tensor) and loaded[name].equal(tensor) and filled[name].data_ptr() == addresses[name]


@pytest.mark.parametrize("old", [True, False])
def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path, old):
    folder = older(tmp_path) if old else tmp_path / "checkpoint-1"
    assert old or CheckpointManager(tmp_path, keep=1).save(1, tensors(1), {"step": 1}) == []
    given = {"a": torch.zeros(4, 3), "scalar": torch.zeros(()).double(), "empty": torch.zeros(0), "new.b": torch.zeros(1)}
    with pytest.raises(ValueError, match="of another network or optimiser") as caught:
        load_into(folder, given)
    said = str(caught.value)
    assert "it lacks new.b; it has b.c beside; a is F32 (3, 4) there and F32 (4, 3) here; scalar is F32 () there and F64 () here" in said
    assert "\n" not in said and not any(t.any() for t in given.values())
    given |= {"a": torch.zeros(3, 4), "scalar": torch.zeros(())}
    assert load_into(folder, given, allow_missing=["new."], allow_unexpected=["b."]) == ["new.b"]
    assert given["a"].equal(tensors(1)["a"]) and given["new.b"] == 0
    with pytest.raises(ValueError, match=r"x1, x2, x3, and 7 more"):
        load_into(folder, {**given, **{f"x{i}": torch.zeros(1) for i in range(1, 11)}}, allow_missing=["new."], allow_unexpected=["b."])


@pytest.mark.parametrize("listed", [4, 8])
def test_half_a_tensor_is_none(tmp_path, listed):
    """The file has four of eight numbers, and the manifest lists eight, or four, as of a folder put together by hand."""
    CheckpointManager(tmp_path, keep=1).save(1, {"a": torch.ones(listed)}, {"step": 1})
    folder = tmp_path / "checkpoint-1"
    file, parts = folder / "rank-00000.safetensors", {"a": {"whole": [8], "offset": [0]}}
    save_file({"a": torch.ones(4)}, file, metadata={METADATA_KEY: json.dumps({"parts": parts})})
    said = json.loads((folder / "manifest.json").read_text())
    said["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_manifest(folder, 1, said["files"], said["tensors"])
    assert verify(folder) is None
    with pytest.raises(ValueError, match="lacks parts of a"):
        load_into(folder, {"a": torch.zeros(listed)})
    with pytest.raises(ValueError, match="lacks parts of a"):
        load_tensors(folder)


def test_averages_by_label(tmp_path):
    state = {"model.x.y": torch.tensor(1.0), "ema.x.y": torch.tensor(2.0), "optim.x.y.step": torch.tensor(5.0)}
    CheckpointManager(tmp_path, keep=1).save(
        1, state | {"ema[width=0.05].x.y": torch.tensor(3.0), "ema[halflife=5000].x.y": torch.tensor(4.0)}, {}
    )
    folder = tmp_path / "checkpoint-1"
    assert raw_weights(folder) == {"x.y": 1} and averages(folder) == {"x.y": 2}
    assert averages(folder, "width=0.05") == {"x.y": 3} and averages(folder, "halflife=5000") == {"x.y": 4}
    with pytest.raises(ValueError, match=r"holds no average 'width=0.1': halflife=5000, width=0.05. Name one"):
        averages(folder, "width=0.1")


@pytest.mark.gpu
def test_a_state_on_a_gpu_is_copied_before_the_next_step_changes_it(tmp_path):
    """The copies are queued and the loop goes on at once; the next kernels come after them."""
    store, state = CheckpointManager(tmp_path, keep=2), {f"x{i}": torch.full((1 << 20,), float(i), device="cuda") for i in range(64)}
    for step in (1, 2):
        store.begin(step, state, {"step": step})
        for tensor in state.values():
            tensor += 1
        assert store.finish() == []
    for step in (1, 2):
        loaded = load_tensors(tmp_path / f"checkpoint-{step}")
        assert all((loaded[f"x{i}"] == i + step - 1).all() for i in range(64))
