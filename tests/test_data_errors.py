"""Data that cannot be read end a run saved; a disk that stalls is waited for; and either way the weights are the undisturbed run's."""

import errno
import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
from conftest import arguments, fit, launch
from forked import launch_ranks
from test_bad_data import flip, payload_of
from test_training import digest

import condot.data.storage.shard_reader
from condot.core.data_config import DataConfig
from condot.core.process import EXIT_DATA_ERROR
from condot.data.loader.batch import BatchLoader
from condot.data.loader.build import build
from condot.data.loader.stream import Share
from condot.data.storage import retry
from condot.data.storage.retry import DiskRetry
from condot.data.storage.shard_reader import LostShard, Shards
from condot.pipeline.checkpoint import saving
from condot.pipeline.training.status import read_status
from tests.shardmaker import make, samples

pytestmark = pytest.mark.usefixtures("one_thread")
EACH = ("--log.every=1",)


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """A run of 12 steps that nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert fit(digits, folder, *EACH) == 0
    return folder


def same(run, undisturbed):
    """Saved at its last step, with the same weights, averages and moments, and the same lines."""
    assert read_status(run)["state"] == "finished" and digest(run / "checkpoint-12") == digest(undisturbed / "checkpoint-12")
    curves = [[json.loads(line)["loss"] for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (run, undisturbed)]
    assert curves[0] == curves[1] and len(curves[0]) == 12
    return True


# --- an error in the data path


def failing(monkeypatch, position, kind, *given):
    """From that position on no micro-batch can be read."""
    load = BatchLoader.load

    def loading(self, plan):
        if int(plan.positions.min()) >= position:
            raise kind(*given)  # a new one: an error that is kept keeps the run that it ended
        return load(self, plan)

    monkeypatch.setattr(BatchLoader, "load", loading)


ERRORS = {
    "a shard": (LostShard, "train-000003.tar: missing. Copy it again.", "train-000003.tar: missing. Copy it again."),
    "memory": (MemoryError, "no memory for a batch", "(MemoryError: no memory for a batch). CONDOT_DEBUG=1 shows where."),
    "a bug": (TypeError, "flip() takes 2 positional arguments", "(TypeError: flip() takes 2 positional arguments)"),
    "an end": (SystemExit, 3, "(SystemExit: 3)"),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_saves_the_last_whole_step_and_says_how_to_mend_it(
    digits, undisturbed, tmp_path, monkeypatch, capsys, kind, workers
):
    """In the second half of step 7, of which nothing is left; the same command goes on."""
    error, given, says = ERRORS[kind]
    words = (*EACH, f"--data.workers={workers}", "--train.gradient_accumulation_steps=2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, 6 * 16 + 8, error, given)
        assert fit(digits, run, *words) == EXIT_DATA_ERROR == 5
    said, err = read_status(run), capsys.readouterr().err
    assert says in err and "The state of step 6 is saved: mend that, and the same command goes on from there." in err
    assert (said["state"], said["step"], said["exit_status"]) == ("failed", 6, 5) and says in said["reason"]
    assert (run / "checkpoint-6").is_dir()
    assert fit(digits, run, *words) == 0 and fit(digits, whole, *words) == 0
    assert same(run, whole)


def test_too_many_bad_samples_end_the_run_saved(digits, tmp_path, capsys):
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(digits, copy)
    for number in range(40):
        flip(copy / "train-000000.tar", payload_of(copy, 0, number)[0] + 30)
    assert fit(copy, tmp_path / "run", *EACH, "--train.max_steps=40") == EXIT_DATA_ERROR
    err, step = capsys.readouterr().err, read_status(tmp_path / "run")["step"]
    assert "data.max_bad_share=0.001" in err and f"The state of step {step} is saved" in err
    assert (tmp_path / f"run/checkpoint-{step}").is_dir()
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == step, "its line is not missing"


def test_a_state_that_cannot_be_saved_either_is_said(digits, tmp_path, monkeypatch, capsys):
    """The disk holds the checkpoint of the start, and no other."""
    write = saving.write_file

    def full(path, *given):
        if list((tmp_path / "run").glob("checkpoint-0")):
            raise OSError(28, "No space left on device")
        return write(path, *given)

    failing(monkeypatch, 16 * 6, MemoryError, "x")
    monkeypatch.setattr(saving, "write_file", full)
    assert fit(digits, tmp_path / "run", *EACH) == EXIT_DATA_ERROR
    assert "The state of step 6 could not be saved: mend that, and the same command goes on from step 0." in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_rank_without_data_ends_all_saved(digits, tmp_path, accumulation):
    """Nobody waits for the gradients of a rank that has none."""
    words = arguments(digits, tmp_path / "run", *EACH, f"--train.gradient_accumulation_steps={accumulation}")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = launch(*two, str(Path(__file__).parent / "faulty.py"), "reader", "1", "5", *words, timeout=600)
    said = read_status(tmp_path / "run")
    assert done.returncode != 0
    assert (said["state"], said["exit_status"]) == ("failed", EXIT_DATA_ERROR) and "rank 1: " in said["reason"], done.stderr[-3000:]
    step = said["step"]
    assert 4 <= step <= 8 and (tmp_path / f"run/checkpoint-{step}").is_dir() and f"The state of step {step} is saved" in said["reason"]
    assert "no memory for a batch" in said["reason"] and "exitcode  : 5" in done.stderr
    assert launch_ranks(2, "train", *words, timeout=600).returncode == 0
    assert launch_ranks(2, "train", *(word.replace("/run", "/whole") for word in words), timeout=600).returncode == 0
    assert same(tmp_path / "run", tmp_path / "whole")


# --- the stream


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "shards", samples([30, 50, 20]))


def stream(folder, workers=0, **more):
    options = DataConfig(**{"shards": (str(folder),), "resolution": 4, "channels": 1, "workers": workers, **more})
    return build(options, seed=1, share=Share(batch_size=8))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_knows_beforehand_what_it_cannot_give(folder, monkeypatch, workers):
    """And what it has read ahead it gives as ever, with its faults when it gives it."""
    plain = stream(folder)
    flip(folder / "train-000001.tar", payload_of(folder, 1, 7)[0] + 30)
    wanted, faults = [next(plain).samples.tolist() for _ in range(9)], plain.take_faults()
    failing(monkeypatch, 72, MemoryError, "none")
    asked = stream(folder, workers)
    seen = []
    for step in range(9):
        assert (asked.ready(3) is None) == (step <= 6)
        seen.append(next(asked).samples.tolist())
    assert seen == wanted and asked.take_faults() == faults
    assert isinstance(asked.ready(1), MemoryError)
    with pytest.raises(MemoryError):
        next(asked)
    asked.close()


# --- a disk that stalls


class Stall:
    """A disk whose reads end in an error for a while, of tars and of indexes alike."""

    def __init__(self, monkeypatch, number, seconds):
        self.number, self.until, self.hits, self.begun = number, None, 0, seconds
        self.pread, self.file, self.index = os.pread, condot.data.storage.shard_reader.FileIO, condot.data.storage.shard_reader.open_index
        monkeypatch.setattr(condot.data.storage.shard_reader.os, "pread", self.tried(self.pread))
        monkeypatch.setattr(condot.data.storage.shard_reader, "FileIO", self.tried(self.file))
        monkeypatch.setattr(condot.data.storage.shard_reader, "open_index", self.tried(self.index))

    def tried(self, act):
        def again(*given):
            if self.until is None:
                return act(*given)
            if time.monotonic() < self.until:
                self.hits += 1
                raise OSError(self.number, os.strerror(self.number))
            return act(*given)

        return again

    def begin(self):
        self.until = time.monotonic() + self.begun


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN])
def test_a_disk_that_stalls_is_waited_for(folder, monkeypatch, capsys, number):
    """Tars that are open, tars that are not, and indexes: the batches are the same."""
    wanted = [next(s).samples.tolist() for s in [stream(folder)] for _ in range(13)]
    asked, stall = stream(folder), Stall(monkeypatch, number, 0.6)
    seen = [next(asked).samples.tolist() for _ in range(3)]
    stall.begin()
    asked.shards._indexes.clear()
    seen += [next(asked).samples.tolist() for _ in range(10)]
    assert seen == wanted and stall.hits >= 2 and asked.take_faults() == []
    assert f"{os.strerror(number)}; trying again in" in capsys.readouterr().err


def test_a_mount_that_is_gone_for_a_while_is_waited_for(folder, monkeypatch):
    """The whole folder is away; a single shard that is away is lost at once, as it ever was."""
    wanted = [next(s).samples.tolist() for s in [stream(folder)] for _ in range(13)]
    asked = stream(folder)
    os.rename(folder, folder.with_name("away"))
    back = threading.Timer(0.8, lambda: os.rename(folder.with_name("away"), folder))
    back.start()
    assert [next(asked).samples.tolist() for _ in range(13)] == wanted
    back.join()
    os.rename(folder / "train-000001.tar", folder / "elsewhere")
    began = time.monotonic()
    with pytest.raises(LostShard, match=r"train-000001\.tar: missing"):
        Shards(folder)._open(1) if (folder / "train-000001.tar").exists() else asked.shards._with_retry(
            1, lambda: io.FileIO(asked.shards.folders[0].file(asked.shards.shards[1]))
        )
    assert time.monotonic() - began < 1


def test_a_disk_that_stalls_for_ever_ends_the_stream_and_its_readers_at_once(folder, monkeypatch):
    """The patience is the disk's, not each read's: others that wait for it, and those that come later, do not wait anew."""
    asked, stall = stream(folder, workers=4, retry_seconds=1.0), Stall(monkeypatch, errno.EIO, 1e6)
    next(asked)
    stall.begin()
    began = time.monotonic()
    with pytest.raises(LostShard, match=r"nothing new in 1 s, .* Check its disk or mount, or raise data.retry_seconds"):
        for _ in range(20):
            next(asked)
    asked.close()
    assert time.monotonic() - began < 5


def test_what_is_no_stall_is_not_waited_for():
    for error in (ValueError("changed"), PermissionError(errno.EACCES, "denied"), FileNotFoundError(errno.ENOENT, "missing")):

        def attempt(error=error):
            raise error

        with pytest.raises(type(error)):
            DiskRetry().read(attempt, 0, "a file", 1e6)


def test_a_disk_that_was_given_up_is_given_another_chance_later(monkeypatch):
    clock, slept = [100.0], []
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: (slept.append(seconds), clock.__setitem__(0, clock[0] + seconds)))
    monkeypatch.setattr(retry, "warn_limited", lambda text: None)

    def attempt():
        raise OSError(errno.EIO, "Input/output error")

    disks, spent = DiskRetry(), []
    for _ in range(3):
        slept.clear()
        with pytest.raises(ValueError, match="nothing new in 10 s"):
            disks.read(attempt, 0, "a file", 10.0)
        spent.append(sum(slept))
        clock[0] += 1
    assert spent == [pytest.approx(10.0), 0, 0]
    clock[0] += 100
    slept.clear()
    assert disks.read(lambda: 3, 0, "a file", 10.0) == 3
    with pytest.raises(ValueError, match="nothing new"):
        disks.read(attempt, 0, "a file", 10.0)
    assert sum(slept) == pytest.approx(10.0)


def test_a_run_whose_disk_stalls_is_the_run(digits, undisturbed, tmp_path, monkeypatch):
    from condot.pipeline.training import loop

    stall, train_step = Stall(monkeypatch, errno.ESTALE, 1.0), loop.train_step

    def stepping(run):
        if run.step == 5:
            stall.begin()
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", stepping)
    assert fit(digits, tmp_path / "run", *EACH) == 0 and stall.hits and same(tmp_path / "run", undisturbed)
