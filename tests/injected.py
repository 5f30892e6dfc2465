"""One fault at every file operation of a save, a packing or an export: `LD_PRELOAD=fault.so injected.py WHAT FOLDER STRIDE [START]`.

WHAT is save, prepare, prepare_again or export; every STRIDE-th operation from the START-th on is tried.
The imports are made once; every trial is a fork. After each fault the same
command goes on undisturbed, and what is there must be what it is without one.
Prints a line of JSON: operations, trials, findings.
"""

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from condot.pipeline.checkpoint.store import CheckpointManager, load_tensors
from condot.pipeline.launch.folder_lock import lock_folder
from condot.pipeline.training.status import Status, read_status

KILL_BEFORE, KILL_AFTER, TORN, ONCE, FROM_THEN_ON = range(1, 6)
"""Modes of fault.c."""
TRIALS = [(KILL_BEFORE, 0), (KILL_AFTER, 0), (TORN, 0), (ONCE, errno.ENOSPC), (ONCE, errno.EIO), (FROM_THEN_ON, errno.ENOSPC)]
fault = ctypes.CDLL(None)
fault.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p]
fault.fault_count.restype = ctypes.c_long


class Save:
    """The second checkpoint of a run that keeps one, and what is said of the run beside it."""

    def __init__(self, work):
        self.tensors = {step: {"model.a": torch.arange(6.0) + step, "optim.b": torch.ones(3) * step} for step in (1, 2)}

    def before(self, root):
        CheckpointManager(root, keep=1).save(1, self.tensors[1], {"step": 1})
        Status(root).write("running", step=1)

    def act(self, root):
        owned = lock_folder(root)
        store, status = CheckpointManager(root, keep=1), Status(root)
        store.remove_leftovers()
        errors = store.save(2, self.tensors[2], {"step": 2})
        status.write("running", step=2)
        owned.close()
        if errors:
            raise OSError("; ".join(errors))

    def check(self, root):
        found = CheckpointManager(root, keep=1).latest()
        assert found is not None, "no checkpoint is left"
        step = int(found.name.split("-")[1])
        held = load_tensors(found)
        assert all(held[name].equal(tensor) for name, tensor in self.tensors[step].items()), "another state"
        assert (read_status(root) or {}).get("state") == "running", "status.json is torn"

    def same(self, root):
        """status.json tells the time."""
        return {name: body for name, body in tree(root).items() if name != "status.json"}


class Prepare:
    """A folder of images, packed where nothing is."""

    def __init__(self, work):
        from condot.data.prepare.command import main

        self.prepare, self.source = main, work / "images"
        noise = np.random.default_rng(0)
        for i in range(16):
            (self.source / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(self.source / f"class{i % 2}" / f"{i}.png")

    def before(self, root):
        pass

    def act(self, root):
        words = ["imagefolder", str(self.source), "--output", str(root / "out"), "--workers", "0", "--shard_size", "10kB"]
        if self.prepare(words):
            raise OSError("not packed")

    def check(self, root):
        """Whole or not there: a manifest names only what is there."""
        path = root / "out" / "manifest.json"
        if path.exists():
            for shard in json.loads(path.read_text())["shards"]:
                assert (root / "out" / shard["name"]).stat().st_size == shard["bytes"], shard["name"]

    def same(self, root):
        return tree(root)


class PrepareAgain(Prepare):
    """The same, when an image has come since."""

    def before(self, root):
        extra = self.source / "class1" / "9.png"
        extra.unlink(missing_ok=True)
        self.act(root)
        Image.new("RGB", (8, 8), (7, 7, 7)).save(extra)
        os.utime(extra, (1e9, 1e9))


class Export:
    """An export in the place of an older one."""

    def __init__(self, work):
        from condot.models.convert import to_diffusers
        from condot.models.dit.model import DiT
        from condot.pipeline.config.parse import config_from_mapping
        from condot.pipeline.config.schema import Config
        from condot.pipeline.export.load import load_flow_model
        from condot.pipeline.export.model_card import CardFacts
        from condot.pipeline.export.write import export_pipeline
        from condot.pipeline.latent_space import LatentSpace

        self.export_pipeline, self.load_flow_model = export_pipeline, load_flow_model
        self.config = config_from_mapping(Config, {"data": {"resolution": 4, "channels": 1}, "output_dir": "x"})
        torch.manual_seed(0)
        own = DiT(channels=1, resolution=4, patch_size=2, width=16, depth=1, heads=2, num_classes=2)
        self.network, self.space = to_diffusers(own.eval(), -1.0), LatentSpace.from_pixels(1, 4)
        self.card = {title: CardFacts.from_run(work, 100, 10, own, title=title) for title in ("old", "new")}

    def write(self, root, title):
        about = (self.network, self.config, ("a", "b"), self.card[title], self.space)
        self.export_pipeline(root / "export", *about, progress=lambda text: None)

    def before(self, root):
        self.write(root, "old")

    def act(self, root):
        self.write(root, "new")

    def check(self, root):
        self.load_flow_model(root / "export")
        assert not {"# old", "# new"}.isdisjoint((root / "export/README.md").read_text().splitlines()), "no card"

    def same(self, root):
        return tree(root)


def tree(root):
    """Every file by its path, hashed; and every folder."""
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in root.rglob("*")
    }


def forked(act):
    """Run in a fork; how it ended: 0, 3 for an error, or -9; and what was said."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        told, code = io.StringIO(), 0
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                act()
            except (ValueError, OSError, SafetensorError) as error:  # as `pipeline.process.report_errors` has it
                code = 3
                print(f"{type(error).__name__}: {error}")
            except BaseException:  # an assertion, or a traceback that no user should see
                code = 4
                traceback.print_exc()
        os.write(writer, told.getvalue()[-1500:].encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def armed(job, root, number, mode, error):
    fault.fault_arm(os.fsencode(root), number, mode, error, b"", b"")
    try:
        job.act(root)
    finally:
        fault.fault_off()


def main(what, work, stride, start=1):
    work = Path(work)
    job = {"save": Save, "prepare": Prepare, "prepare_again": PrepareAgain, "export": Export}[what](work)
    base, whole, root = work / "base", work / "whole", work / "root"
    base.mkdir()
    assert forked(lambda: job.before(base))[0] == 0
    shutil.copytree(base, root, symlinks=True)

    def counted():
        armed(job, root, -1, 0, 0)
        (work / "count").write_text(str(fault.fault_count()))

    code, said = forked(counted)
    assert code == 0, said
    operations, findings, trials = int((work / "count").read_text()), [], 0
    os.rename(root, whole)
    wanted = job.same(whole)
    for number in range(start, operations + 1, stride):
        for mode, error in TRIALS:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(base, root, symlinks=True)
            trials += 1
            ended, said = forked(lambda number=number, mode=mode, error=error: armed(job, root, number, mode, error))
            at = f"operation {number} of {operations}, mode {mode}, errno {error}"
            if ended not in ((-9,) if mode <= TORN else (0, 3)):
                findings.append(f"{at}: ended {ended}: {said}")
            for step, act in (("meanwhile", job.check), ("again", job.act), ("after", job.check)):
                code, said = forked(lambda act=act: act(root))
                if code:
                    findings.append(f"{at}: {step}: {said}")
            there = job.same(root)
            if there != wanted:
                other = sorted(name for name in {**there, **wanted} if there.get(name) != wanted.get(name))
                findings.append(f"{at}: differs in {other[:6]}")
    print(json.dumps({"operations": operations, "trials": trials, "findings": findings}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
