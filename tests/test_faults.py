"""Whole runs that are killed, stopped, starved and lied to: each ends as the run that nobody touched, or says why not. `make faults`."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, arguments, launch
from test_injected import injected

from condot.pipeline.checkpoint.store import load_tensors

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("one_thread")]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
RUN = ("--train.max_steps=40", "--checkpoint.every=3", "--log.every=1", "--ema.power", "0.1")
STEPS = 40


@pytest.mark.parametrize(("what", "least"), [("save", 20), ("prepare", 240), ("prepare_again", 95), ("export", 70)])
def test_a_fault_at_any_operation_leaves_a_whole_result_and_the_same_command_ends_as_if_nothing_was(tmp_path, what, least):
    """Killed before and after, torn, ENOSPC and EIO once, ENOSPC from then on: at each of the operations of one save, packing, export."""
    found = injected(tmp_path, what, 1)
    assert found["findings"] == [] and found["operations"] >= least and found["trials"] == 6 * found["operations"], found


def digest(folder):
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in load_tensors(folder).items()}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(folder, other):
    """Two runs ended alike: every tensor, and every line of the log once."""
    a, b = lines(folder), lines(other)
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in a] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in b
    ]
    assert digest(folder / f"checkpoint-{STEPS}") == digest(other / f"checkpoint-{STEPS}")


def faulty(ranks, fault, rank, step, words, *launcher, **environment):
    start = (*TWO, *launcher) if ranks == 2 else ()
    return launch(*start, "tests/faulty.py", fault, str(rank), str(step), *words, **environment)


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture(scope="module")
def untouched(digits, tmp_path_factory):
    """By number of ranks, a run to its end."""
    found = {}

    def run(ranks):
        if ranks not in found:
            found[ranks] = tmp_path_factory.mktemp(f"whole{ranks}") / "run"
            done = launch(*(TWO if ranks == 2 else ()), "train.py", *arguments(digits, found[ranks], *RUN))
            assert done.returncode == 0, done.stderr[-3000:]
        return found[ranks]

    return run


def test_killed_at_twenty_random_moments_the_run_ends_the_same(digits, untouched, tmp_path):
    """Anywhere from the first line on: in steps, in saves, every third step, and while it reads a checkpoint."""
    words = arguments(digits, tmp_path / "run", *RUN)
    moments, kills = random.Random(7), 0
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        while "run " not in process.stdout.readline():  # it says where it begins
            assert process.poll() is None
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.wait()
        kills += 1
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            assert (folder / "manifest.json").is_file(), "under its name a checkpoint is whole"
    assert launch("train.py", *words).returncode == 0
    same(tmp_path / "run", untouched(1))
    assert not list((tmp_path / "run").glob(".tmp*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_restarted_and_the_run_ends_the_same(digits, untouched, tmp_path, rank):
    done = faulty(2, "kill", rank, 17, arguments(digits, tmp_path / "run", *RUN), "--max_restarts=2")
    assert done.returncode == 0 and "goes on from" in done.stdout, done.stderr[-3000:]
    same(tmp_path / "run", untouched(2))


@pytest.mark.parametrize("fault", ["SIGTERM", "SIGUSR1", "saving:SIGTERM", "saving:SIGUSR1", "sampling:SIGTERM", "sampling:SIGUSR1"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_any_moment_saves_on_every_rank_within_the_grace(digits, untouched, tmp_path, ranks, fault):
    """30 seconds, torchrun's own; here it is the time from the fault to the end of all. And the same command goes on."""
    words = arguments(digits, tmp_path / "run", *RUN, "--log.sample_every=20", "--log.sample_steps=500")
    began = time.monotonic()
    done = faulty(ranks, fault, 0, 9, words)
    said = status(tmp_path / "run")
    assert said["state"] == "stopped" and said["signal"] == fault.rpartition(":")[2], (said, done.stderr[-2000:])
    assert time.monotonic() - began < 30 + 60  # and what starting takes
    steps = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*"))
    assert steps[-1] == said["step"] and 9 <= said["step"] <= 22
    more = arguments(digits, tmp_path / "run", *RUN)
    assert launch(*(TWO if ranks == 2 else ()), "train.py", *more).returncode == 0
    same(tmp_path / "run", untouched(ranks))


@pytest.mark.parametrize(("fault", "says"), [("stop", "has not been heard of"), ("sleep", "has stood in step 1[01]")])
def test_a_rank_that_hangs_is_named_and_the_run_ends(digits, tmp_path, fault, says):
    began = time.monotonic()
    done = faulty(2, fault, 1, 11, arguments(digits, tmp_path / "run", *RUN, "--guard.hang_seconds=8"))
    assert done.returncode != 0 and re.search(rf"rank 1 \(host .*\) {says}", done.stderr), done.stderr[-3000:]
    assert status(tmp_path / "run")["state"] == "hung" and time.monotonic() - began < 120
    assert (tmp_path / "run/checkpoint-9").is_dir()


def test_one_rank_with_a_bad_batch_skips_on_all(digits, tmp_path):
    """Both ranks' keys are told; nothing else is lost."""
    done = faulty(2, "nan", 1, 13, arguments(digits, tmp_path / "run", *RUN))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert line["step"] == 13 and len(set(line["keys"])) == 16 and lines(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_a_clock_that_jumps_changes_nothing(digits, untouched, tmp_path):
    assert faulty(1, "clock", 0, 5, arguments(digits, tmp_path / "run", *RUN)).returncode == 0
    same(tmp_path / "run", untouched(1))
    assert all(0 < line["images_per_second"] < 1e6 for line in lines(tmp_path / "run"))


def test_a_reader_that_dies_ends_the_run_with_its_reason_and_the_run_goes_on(digits, untouched, tmp_path):
    words = arguments(digits, tmp_path / "run", *RUN)
    done = faulty(1, "reader", 0, 14, words)
    assert done.returncode not in (0, None) and "no memory for a batch" in done.stderr
    assert status(tmp_path / "run")["state"] == "failed" and "no memory for a batch" in status(tmp_path / "run")["reason"]
    assert launch("train.py", *words).returncode == 0
    same(tmp_path / "run", untouched(1))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_saving_and_not_training(digits, untouched, tmp_path, ranks):
    """A tmpfs that a file fills from step 10 to step 20."""
    small = tmp_path / "disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(small)]).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        words = arguments(digits, small / "run", *RUN, "--checkpoint.keep=1")
        done = faulty(ranks, "fill", 0, 10, words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "failed, older ones are untouched" in done.stdout + done.stderr and "No space left" in done.stdout + done.stderr
        assert lines(small / "run") and [line["step"] for line in lines(small / "run")] == list(range(1, STEPS + 1))
        assert digest(small / f"run/checkpoint-{STEPS}") == digest(untouched(ranks) / f"checkpoint-{STEPS}")
        assert not list((small / "run").glob(".tmp*"))
    finally:
        subprocess.run(["umount", "-l", str(small)])
