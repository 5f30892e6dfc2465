"""What a run shows: figures held against closed forms, and files that outlive full disks."""

import contextlib
import json
import math
import resource
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from condot.pipeline.tracking import bad_samples as bad_samples_module
from condot.pipeline.tracking import meter as meter_module
from condot.pipeline.tracking.bad_samples import BadSamples
from condot.pipeline.tracking.jsonl import JsonlWriter, read_lines
from condot.pipeline.tracking.meter import Meter, memory_gb
from condot.pipeline.tracking.mfu import MfuEstimator
from condot.pipeline.tracking.run_log import RunLog, loss_curve

CPU = torch.device("cpu")


class Alone:
    """An accelerator of one process, or of several whose vectors are given beside this one's."""

    device, is_main_process, num_processes = CPU, True, 1

    def __init__(self, *others):
        self.others, self.gathers, self.logged, self.trackers = others, 0, [], []

    def gather(self, tensor):
        self.gathers += 1
        return torch.cat([tensor, *(torch.tensor([other]) for other in self.others)])

    def reduce(self, tensor, reduction):
        return tensor

    def log(self, values, step):
        self.logged.append((step, values))
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def init_trackers(self, project):
        self.trackers = list(self.log_with)
        for tracker in self.trackers:
            tracker.start()


class Clock:
    """Seconds that pass when told."""

    def __init__(self, monkeypatch, module):
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


# --- lines of JSON


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk: a write is taken in part, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_for_a_full_disk_and_follow_in_order(tmp_path):
    lines = JsonlWriter(tmp_path / "a.jsonl")
    assert lines.append([{"n": 0}]) == ""
    before = lines.path.read_bytes()
    with files_of_at_most(len(before) + 4):  # half a line fits
        said = [lines.append([{"n": n}]) for n in (1, 2, 3)]
    assert lines.path.read_bytes() == before, "no half line is left"
    assert "cannot be written" in said[0] and said[1:] == ["", ""] and len(lines.pending) == 3
    assert "3 lines" in lines.append([]) and lines.append([{"n": 4}]) == "" and not lines.pending
    assert [line["n"] for line in read_lines(lines.path)] == [0, 1, 2, 3, 4]


def test_what_waits_for_a_disk_is_bounded_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("condot.pipeline.tracking.jsonl.MAX_PENDING", 3)
    lines = JsonlWriter(tmp_path / "absent" / "a.jsonl")
    lines.pending = type(lines.pending)(maxlen=3)
    for n in range(5):
        lines.append([{"n": n}])
    lines.path.parent.mkdir()
    assert "2 are lost" in lines.append([]) and [line["n"] for line in read_lines(lines.path)] == [2, 3, 4]


def test_lines_that_wait_for_a_disk_are_dropped_too(tmp_path):
    """A rollback while the disk is full: steps that are done again have one line each."""
    lines = JsonlWriter(tmp_path / "a.jsonl")
    lines.append([{"step": 1}])
    with files_of_at_most(lines.path.stat().st_size):
        lines.append([{"step": n} for n in (2, 3, 4)])
        lines.filter(lambda line: line["step"] <= 2)
        lines.append([{"step": 3}])
    lines.append([])
    assert [line["step"] for line in read_lines(lines.path)] == [1, 2, 3]


def test_lines_behind_a_step_go_without_any_room(tmp_path):
    lines = JsonlWriter(tmp_path / "a.jsonl")
    lines.append([{"step": n, "loss": n / 3} for n in range(1, 9)])
    lines.path.write_bytes(lines.path.read_bytes() + b'{"step": 9, "lo')  # torn by a kill
    with files_of_at_most(1):
        lines.filter(lambda line: line["step"] <= 5)
    assert [line["step"] for line in read_lines(lines.path)] == [1, 2, 3, 4, 5]
    assert lines.path.read_bytes().endswith(b"\n") and list(tmp_path.iterdir()) == [lines.path]


def test_a_torn_or_foreign_line_is_none_and_what_is_no_number_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "images": 4, "loss": 0.5}\n\xff\x00[1]\n17\n{"step": 2, "images": 8, "loss": 0.2}')
    lines = JsonlWriter(path)
    lines.filter(lambda line: line["step"])
    lines.append([{"step": 3, "images": 12, "loss": math.nan, "grad_norm": math.inf}])
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"step": 2, "images": 8, "loss": 0.2},
        {"step": 3, "images": 12, "loss": None, "grad_norm": None},
    ]
    assert "NaN" not in path.read_text() and loss_curve(tmp_path) == [(4, 0.5), (8, 0.2)]


# --- the meter


GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def test_means_leave_out_skipped_steps_and_rates_do_not(monkeypatch):
    """A skipped step took its time, and its images: 4 steps of 14 in 7 seconds."""
    clock = Clock(monkeypatch, meter_module)
    meter = Meter(Alone())
    clock.now += 7
    for loss, norm, bad in ((2.0, 2.0, GOOD), (math.nan, 7.0, BAD), (6.0, math.inf, BAD), (6.0, 4.0, GOOD)):
        meter.add_step(torch.tensor(loss), torch.tensor(norm), bad)
    assert meter.state() == {"loss": 8.0, "norm": 6.0, "good": 2}
    values = meter.read(14)
    assert values["loss"] == 4.0 and values["grad_norm"] == 3.0 and values["images_per_second"] == 8.0
    meter.add_step(torch.tensor(math.inf), torch.tensor(1.0), BAD)
    empty = meter.read(14)
    assert empty["loss"] is None and empty["grad_norm"] is None


def test_an_interval_goes_on_from_a_checkpoint_and_back_to_one(monkeypatch):
    """Its means are those of all its steps; its rates of the steps since, for the time before was another process's or is undone."""
    clock = Clock(monkeypatch, meter_module)
    whole, parts = Meter(Alone()), Meter(Alone())
    figures = torch.rand(6, 2)
    for n, (loss, norm) in enumerate(figures):
        for meter in (whole, parts):
            meter.add_step(loss, norm, GOOD)
        if n == 2:
            saved = json.loads(json.dumps(parts.state()))
            parts.add_step(torch.tensor(1e9), norm, GOOD)  # a step that is rolled back
            clock.now += 100
            with parts.data_wait():
                clock.now += 100
            parts.restore(saved)
    clock.now += 3
    a, b = whole.read(5), parts.read(5)
    assert b["images_per_second"] == 5.0 and b["data_wait"] == 0
    assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    assert a["loss"] == pytest.approx(float(figures[:, 0].mean()), rel=1e-6)


def test_rates_and_waits_of_all_ranks_in_one_exchange(monkeypatch):
    """10 s of training, 3 of them waiting, and 5 s of saving beside them; of three other ranks the vectors are known."""
    clock = Clock(monkeypatch, meter_module)
    accelerator = Alone([2.0, 1.0, 4.0, 1.0, 70.0, 0.0], [3.0, 1.0, 4.0, 9.0, 80.5, 4.0], [6.0, 2.0, 4.0, 3.0, 60.0, 0.0])
    monkeypatch.setattr(meter_module, "memory_gb", lambda device: 50.0)
    meter = Meter(accelerator, MfuEstimator(peak_flops=1e12, flops_per_image=2e9, encoder_flops_per_image=1e9, counted=True))
    for _ in range(4):
        with meter.data_wait():
            clock.now += 0.75
        clock.now += 1.75
        meter.add_step(torch.tensor(1.0), torch.tensor(4.0), GOOD)
        with meter.paused():
            clock.now += 1.25
    values = meter.read(256, bad=2)
    assert accelerator.gathers == 1
    assert values == {
        "loss": 3.0,
        "grad_norm": 2.0,
        "images_per_second": 102.4,
        "images_per_second_per_device": 25.6,
        "mfu": pytest.approx(25.6 * 2e9 / 1e12),
        "mfu_with_encoders": pytest.approx(25.6 * 3e9 / 1e12),
        "data_wait": pytest.approx(0.4),
        "data_wait_worst": pytest.approx(0.9),
        "memory_gb": 80.5,
        "bad_samples": 6,
    }


def test_named_sums_are_means_like_the_loss_in_the_same_exchange():
    """Of two ranks, three steps, one of them skipped; a checkpoint in the middle keeps them."""
    accelerator = Alone([1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 7.0, 0.5])
    meter, resumed = Meter(accelerator), Meter(accelerator)
    steps = [(GOOD, 2.0, 0.25), (BAD, math.nan, 100.0), (GOOD, 4.0, 0.75)]
    for number, (bad, a, b) in enumerate(steps):
        for one in (meter, resumed):
            one.add_step(torch.tensor(1.0), torch.tensor(1.0), bad, {"loss/a": torch.tensor(a), "b": torch.tensor(b)})
        if number == 1:
            state = json.loads(json.dumps(resumed.state()))
            assert state == {"loss": 1.0, "norm": 1.0, "good": 1.0, "loss/a": 2.0, "b": 0.25}
            resumed.restore(state)
    values = meter.read(4)
    assert accelerator.gathers == 1 and (values["loss/a"], values["b"]) == ((3.0 + 7.0) / 2, 0.5)
    assert list(values)[-2:] == ["loss/a", "b"] and "loss/a" not in meter.state(), "each interval has its own"
    again = resumed.read(4)
    assert (again["loss/a"], again["b"]) == (5.0, 0.5)


def test_a_wait_that_ends_in_an_error_counts_too(monkeypatch):
    clock, meter = Clock(monkeypatch, meter_module), Meter(Alone())
    meter.started_at = clock.now
    with pytest.raises(StopIteration), meter.data_wait():
        clock.now += 2
        raise StopIteration
    assert meter.data_wait_seconds == 2


def test_memory_is_the_most_that_this_process_held():
    """200 MB that are gone again count; the peak is set back first, which Linux allows a process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    before = memory_gb(CPU)
    held = bytearray(b"x") * 200_000_000
    del held
    assert 0.19 < memory_gb(CPU) - before < 0.26


# --- the log


def test_lines_bar_and_trackers_of_a_log(tmp_path, capsys):
    accelerator = Alone()
    log = RunLog(tmp_path, main=True, start=0, stop=8, accelerator=accelerator)
    for step in (2, 4, 6):
        for _ in range(2):
            log.advance()
        log.write(step, 16 * step, {"loss": 1 / step, "mfu": None, "grad_norm": math.inf if step == 4 else 1.0, "images_per_second": 10.0})
    log.rewind(4)
    assert log.bar.n == 4
    log.write(6, 96, {"loss": 0.5, "images_per_second": 10.0})
    log.close()
    kept = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in kept] == [(2, 0.5), (4, 0.25), (6, 0.5)] and kept[1]["grad_norm"] is None
    assert accelerator.logged[1] == (4, {"images": 64, "loss": 0.25, "images_per_second": 10.0}), "what is no number is not sent"
    for start, left in ((4, [2, 4]), (3, [2])):
        RunLog(tmp_path, main=True, start=start, stop=8, accelerator=accelerator).close()
        assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == left
    assert "/8" in capsys.readouterr().err


def test_other_processes_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path, main=False, start=0, stop=8, accelerator=Alone())
    log.advance()
    log.write(1, 16, {"loss": 1.0})
    log.say("hello")
    log.rewind(0)
    log.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_training_goes_on_where_the_log_cannot_be_written(tmp_path, capsys):
    log = RunLog(tmp_path, main=True, start=0, stop=8, accelerator=Alone())
    with files_of_at_most(10):
        for step in (1, 2, 3):
            log.write(step, step, {"loss": 1.0})
    log.write(4, 4, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert out.count("cannot be written") == 1 and out.count("can be written again") == 1


def test_bad_samples_are_exchanged_only_where_a_rank_found_some(tmp_path, monkeypatch):
    fault = namedtuple("Fault", "position shard key error")
    bad = BadSamples(tmp_path, share=0.01, main=True, start=0)

    def nobody(found):
        raise AssertionError("an exchange for nothing")

    monkeypatch.setattr(bad_samples_module, "gather_object", nobody)
    assert bad.report([], 100, any_rank=False) == 0
    monkeypatch.setattr(bad_samples_module, "gather_object", lambda found: [*found, fault(3, "b.tar", "k", "torn")._asdict()])
    assert bad.report([fault(9, "a.tar", "j", "torn")], 100) == 2
    assert [line["position"] for line in read_lines(bad.path)] == [3, 9]
    for main in (True, False):  # gone on from position 9, which is the first to come again
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again/bad_samples.jsonl").write_bytes(bad.path.read_bytes())
        assert [line["position"] for line in BadSamples(tmp_path / "again", share=0.01, main=main, start=9).lines] == [3]


def test_each_line_has_every_watch(trained):
    keys = """step images loss grad_norm lr images_per_second images_per_second_per_device mfu mfu_with_encoders data_wait
        data_wait_worst memory_gb bad_samples skipped_steps"""
    for line in read_lines(trained / "metrics.jsonl"):
        assert set(line) == set(keys.split()) and None not in line.values()
        assert 0 < line["mfu"] == line["mfu_with_encoders"] < 10, "pixels need no encoder"
        assert 0 <= line["data_wait"] <= line["data_wait_worst"] <= 1 and 0.1 < line["memory_gb"] < 100
