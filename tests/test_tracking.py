"""What a run shows: figures held against closed forms, files that outlive full disks, trackers that raise, hang or are gone."""

import contextlib
import importlib.metadata
import json
import math
import resource
import sys
import threading
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import fit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
from models.cost import cost, example
from pipeline import trackers, tracking, utilisation
from pipeline.jsonl import Lines, read_lines
from pipeline.trackers import Tracker, attach, check, finish, flat
from pipeline.tracking import BadSamples, Log, Meter, loss_curve, memory_gb
from pipeline.utilisation import SHEETS, Utilisation, flops, kind_of, listed, measured, peak

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
    lines = Lines(tmp_path / "a.jsonl")
    assert lines.append([{"n": 0}]) == ""
    before = lines.path.read_bytes()
    with files_of_at_most(len(before) + 4):  # half a line fits
        said = [lines.append([{"n": n}]) for n in (1, 2, 3)]
    assert lines.path.read_bytes() == before, "no half line is left"
    assert "cannot be written" in said[0] and said[1:] == ["", ""] and len(lines.held) == 3
    assert "3 lines" in lines.append([]) and lines.append([{"n": 4}]) == "" and not lines.held
    assert [line["n"] for line in read_lines(lines.path)] == [0, 1, 2, 3, 4]


def test_what_waits_for_a_disk_is_bounded_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.jsonl.HELD", 3)
    lines = Lines(tmp_path / "absent" / "a.jsonl")
    lines.held = type(lines.held)(maxlen=3)
    for n in range(5):
        lines.append([{"n": n}])
    lines.path.parent.mkdir()
    assert "2 are lost" in lines.append([]) and [line["n"] for line in read_lines(lines.path)] == [2, 3, 4]


def test_lines_that_wait_for_a_disk_are_dropped_too(tmp_path):
    """A rollback while the disk is full: steps that are done again have one line each."""
    lines = Lines(tmp_path / "a.jsonl")
    lines.append([{"step": 1}])
    with files_of_at_most(lines.path.stat().st_size):
        lines.append([{"step": n} for n in (2, 3, 4)])
        lines.keep(lambda line: line["step"] <= 2)
        lines.append([{"step": 3}])
    lines.append([])
    assert [line["step"] for line in read_lines(lines.path)] == [1, 2, 3]


def test_lines_behind_a_step_go_without_any_room(tmp_path):
    lines = Lines(tmp_path / "a.jsonl")
    lines.append([{"step": n, "loss": n / 3} for n in range(1, 9)])
    lines.path.write_bytes(lines.path.read_bytes() + b'{"step": 9, "lo')  # torn by a kill
    with files_of_at_most(1):
        lines.keep(lambda line: line["step"] <= 5)
    assert [line["step"] for line in read_lines(lines.path)] == [1, 2, 3, 4, 5]
    assert lines.path.read_bytes().endswith(b"\n") and list(tmp_path.iterdir()) == [lines.path]


def test_a_torn_or_foreign_line_is_none_and_what_is_no_number_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "images": 4, "loss": 0.5}\n\xff\x00[1]\n17\n{"step": 2, "images": 8, "loss": 0.2}')
    lines = Lines(path)
    lines.keep(lambda line: line["step"])
    lines.append([{"step": 3, "images": 12, "loss": math.nan, "grad_norm": math.inf}])
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"step": 2, "images": 8, "loss": 0.2},
        {"step": 3, "images": 12, "loss": None, "grad_norm": None},
    ]
    assert "NaN" not in path.read_text() and loss_curve(tmp_path) == [(4, 0.5), (8, 0.2)]


# --- the meter


GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def test_means_leave_out_skipped_steps():
    meter = Meter(Alone())
    for loss, norm, bad in ((2.0, 2.0, GOOD), (math.nan, 7.0, BAD), (6.0, math.inf, BAD), (6.0, 4.0, GOOD)):
        meter.add_step(torch.tensor(loss), torch.tensor(norm), bad)
    assert meter.state() == {"loss": 8.0, "norm": 6.0, "good": 2}
    values = meter.read(14)
    assert values["loss"] == 4.0 and values["grad_norm"] == 3.0
    meter.add_step(torch.tensor(math.inf), torch.tensor(1.0), BAD)
    empty = meter.read(14)
    assert empty["loss"] is None and empty["grad_norm"] is None


def test_an_interval_goes_on_from_a_checkpoint_and_back_to_one():
    whole, parts = Meter(Alone()), Meter(Alone())
    figures = torch.rand(6, 2)
    for n, (loss, norm) in enumerate(figures):
        for meter in (whole, parts):
            meter.add_step(loss, norm, GOOD)
        if n == 2:
            saved = json.loads(json.dumps(parts.state()))
            parts.add_step(torch.tensor(1e9), norm, GOOD)  # a step that is rolled back
            parts.restore(saved)
    a, b = whole.read(5), parts.read(5)
    assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    assert a["loss"] == pytest.approx(float(figures[:, 0].mean()), rel=1e-6)


def test_rates_and_waits_of_all_ranks_in_one_exchange(monkeypatch):
    """10 s of training, 3 of them waiting, and 5 s of saving beside them; of three other ranks the vectors are known."""
    clock = Clock(monkeypatch, tracking)
    accelerator = Alone([2.0, 1.0, 4.0, 1.0, 70.0, 0.0], [3.0, 1.0, 4.0, 9.0, 80.5, 4.0], [6.0, 2.0, 4.0, 3.0, 60.0, 0.0])
    monkeypatch.setattr(tracking, "memory_gb", lambda device: 50.0)
    meter = Meter(accelerator, Utilisation(peak=1e12, model=2e9, encoders=1e9, counted=True))
    for _ in range(4):
        with meter.waiting():
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


def test_a_wait_that_ends_in_an_error_counts_too(monkeypatch):
    clock, meter = Clock(monkeypatch, tracking), Meter(Alone())
    meter.since = clock.now
    with pytest.raises(StopIteration), meter.waiting():
        clock.now += 2
        raise StopIteration
    assert meter.waited == 2


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


# --- utilisation


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x, *rest):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_fused_attention_are_counted(dtype):
    """Projections 2 B L d 3d, scores and values 2 B L^2 d each; torch's own table lacks the CPU's fused kernel."""
    batch, length, width = 3, 80, 64
    network = Attention(width, 4).to(dtype)
    x = torch.randn(batch, length, width, dtype=dtype)
    result, found = flops(lambda: network(x))
    assert found == 2 * batch * length * width * 3 * width + 4 * batch * length**2 * width
    with torch.no_grad():
        assert torch.equal(result, network(x))


def test_training_is_six_a_multiply_add_and_frozen_weights_have_no_gradients():
    """Against the count of models.cost, of another kind; what encodes is counted by itself."""
    options = {"channels": 4, "resolution": 16, "num_classes": 10, "patch_size": 2, "width": 64, "depth": 3, "heads": 4}
    _, products = cost(models.build("dit", device="meta", **options), (4, 16, 16))
    encoder, calls = nn.Conv2d(3, 4, 3, padding=1), []

    def see():
        calls.append(1)
        return encoder(torch.zeros(5, 3, 16, 16)), torch.zeros(5, dtype=torch.long)

    for trained in (1.0, 0.0, 0.25):
        use = Utilisation(models.build("dit", device="meta", **options), trained, peak=2e12)
        assert use.count(see) == "" and use.count(see) == ""
        assert use.model == pytest.approx(2 * (2 + trained) * products) and use.encoders == 2 * 27 * 4 * 16 * 16
        assert use.shares(100.0)["mfu"] == pytest.approx(100 * use.model / 2e12) and use.network is None
    assert len(calls) == 3, "counted once each"


SMALL = {"channels": 4, "resolution": 8, "patch_size": 2, "width": 32, "depth": 2, "heads": 2}
TEXT = {"text_width": 24, "pooled_width": 24}
KINDS = {
    "dit": {**SMALL, "num_classes": 10, "style": "modern", "micro_conditions": True},
    "cross_dit": {**SMALL, **TEXT},
    "mmdit": {**SMALL, **TEXT},
    "unet": {"channels": 4, "resolution": 8, "num_classes": 10, "block_channels": (32, 64), "layers_per_block": 1, "head_width": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_every_kind_are_counted_as_they_are_fed(kind):
    """Two samples, of text seven tokens, against one sample's cost."""
    options = KINDS[kind]
    network = models.build(kind, device="meta", **options)
    text = {"tokens": 7, "text_width": options.get("text_width", 0), "pooled_width": options.get("pooled_width", 0)}
    x, _, *told = example(network, (4, 8, 8), batch=2, **text)
    use = Utilisation(network)
    assert use.count(lambda: (x, *told)) == "" and use.encoders == 0
    assert use.model == pytest.approx(6 * cost(network, (4, 8, 8), **text)[1])


def test_a_step_computes_what_is_counted():
    """Forward and backward of a real network; only the times, which need no gradient, make it less."""
    network = models.build("dit", seed=0, channels=4, resolution=16, num_classes=10, patch_size=2, width=64, depth=3, heads=4)
    x, t, labels = torch.randn(3, 4, 16, 16, requires_grad=True), torch.rand(3), torch.tensor([1, 2, 3])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x, t, labels).sum().backward()
    use = Utilisation(network.to("meta"))
    use.count(lambda: (x.detach(), labels))
    assert counter.get_total_flops() == pytest.approx(len(x) * use.model, rel=0.01)


def test_what_is_not_known_is_null():
    """No peak, an objective that is more than one backward pass, an encoder that cannot be counted."""

    def broken():
        raise RuntimeError("no such kernel")

    assert Utilisation(model=1.0, encoders=1.0).shares(9.0) == {"mfu": None, "mfu_with_encoders": None}
    several = Utilisation(None, peak=1e12)
    assert several.count(lambda: (torch.zeros(1, 1),)) == "" and several.shares(9.0) == {"mfu": None, "mfu_with_encoders": None}
    lost = Utilisation(nn.Linear(1, 1, device="meta"), peak=1e12)
    assert "no such kernel" in lost.count(broken) and lost.count(broken) == "" and lost.shares(9.0)["mfu"] is None


CHIPS = {  # multiprocessors, dense half-precision FLOPs of each in a clock, boost clock in GHz: vendors' white papers
    "NVIDIA H100 80GB HBM3": (132, 4096, 1.83),
    "NVIDIA H200": (132, 4096, 1.83),
    "NVIDIA H100 PCIe": (114, 4096, 1.62),
    "NVIDIA A100-SXM4-80GB": (108, 2048, 1.41),
    "NVIDIA A100 80GB PCIe": (108, 2048, 1.41),
    "NVIDIA A100-PCIE-40GB": (108, 2048, 1.41),
    "NVIDIA A30": (56, 2048, 1.44),
    "NVIDIA A10": (72, 1024, 1.695),
    "NVIDIA A40": (84, 1024, 1.74),
    "NVIDIA L4": (58, 1024, 2.04),
    "NVIDIA L40": (142, 512, 2.49),
    "NVIDIA L40S": (142, 1024, 2.52),
    "NVIDIA RTX A6000": (84, 1024, 1.8),
    "NVIDIA RTX 6000 Ada Generation": (142, 1024, 2.505),
    "NVIDIA GeForce RTX 3090": (82, 512, 1.695),
    "NVIDIA GeForce RTX 3090 Ti": (84, 512, 1.86),
    "NVIDIA GeForce RTX 4080": (76, 512, 2.505),
    "NVIDIA GeForce RTX 4090": (128, 512, 2.52),
    "NVIDIA GeForce RTX 5090": (170, 512, 2.407),
    "Tesla V100-SXM2-16GB": (80, 1024, 1.53),
    "Tesla T4": (40, 1024, 1.59),
    "AMD Instinct MI300X": (304, 2048, 2.1),
}


@pytest.mark.parametrize("name", CHIPS)
def test_listed_peaks_are_what_the_chip_can_do_without_sparsity(name):
    units, each, clock = CHIPS[name]
    assert listed(name, "fp16") == pytest.approx(units * each * clock * 1e9, rel=0.015)


def test_listed_peaks_halve_and_double_with_the_width_of_a_number():
    for name, (half, eighth, tf32, single) in SHEETS.items():
        assert eighth is None or eighth == pytest.approx(2 * half, rel=0.02), name
        assert tf32 is None or tf32 == pytest.approx(half / 2, rel=0.02), name
        assert single <= half, name


def test_other_devices_than_the_listed_are_not_taken_for_them():
    strangers = (
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA H20",
    )
    assert [listed(name, "fp16") for name in (*strangers, "NVIDIA A100-SXM4-40GB MIG 3g.20gb")] == [None] * 6
    assert listed("Tesla V100-SXM2-32GB", "bf16") is None is listed("NVIDIA A100-SXM4-40GB", "fp8"), "no such products there"
    assert listed("NVIDIA H100 80GB HBM3", "fp8") == 1978.9e12 and listed("NVIDIA H100 80GB HBM3", "tf32") == 494.7e12


def test_a_peak_is_asked_for_listed_or_measured(monkeypatch):
    assert peak(2.5, "bf16", CPU) == (2.5e12, "log.peak_tflops")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak(0, "bf16", torch.device("cuda"))[0] == 121e12
    assert kind_of("no", torch.device("cuda")) == "float32" and kind_of("fp16", CPU) == "fp16"
    monkeypatch.setattr(utilisation, "SECONDS", {"cpu": 0.0})
    rate, source = peak(0, "no", CPU)
    assert 1e7 < rate < 1e14 and "measured here" in source and measured(CPU, "fp8") is None


def test_measuring_takes_the_best_of_the_sizes_within_its_time_and_no_random_numbers(monkeypatch):
    """A device of 1e9 FLOP/s up to 512 a side, and half of it beyond."""
    sizes, state, now = [], torch.get_rng_state(), [0.0]

    def product(x, y):
        sizes.append(len(x))
        now[0] += 2 * len(x) ** 3 / (1e9 if len(x) <= 512 else 5e8) * (1 if len(sizes) % 3 else 40)  # some are interrupted

    monkeypatch.setattr(torch, "matmul", product)
    assert measured(CPU, "bf16", seconds=40.0, clock=lambda: now[0]) == pytest.approx(1e9)
    assert sorted(set(sizes)) == [256, 512, 1024] and min(map(sizes.count, sizes)) == 4 and torch.equal(torch.get_rng_state(), state)


# --- the log


def test_lines_bar_and_trackers_of_a_log(tmp_path, capsys):
    accelerator = Alone()
    log = Log(tmp_path, main=True, start=0, stop=8, accelerator=accelerator)
    for step in (2, 4, 6):
        for _ in range(2):
            log.advance()
        log.write(step, 16 * step, {"loss": 1 / step, "mfu": None, "grad_norm": math.inf if step == 4 else 1.0, "images_per_second": 10.0})
    log.back(4)
    assert log.bar.n == 4
    log.write(6, 96, {"loss": 0.5, "images_per_second": 10.0})
    log.close()
    kept = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in kept] == [(2, 0.5), (4, 0.25), (6, 0.5)] and kept[1]["grad_norm"] is None
    assert accelerator.logged[1] == (4, {"images": 64, "loss": 0.25, "images_per_second": 10.0}), "what is no number is not sent"
    again = Log(tmp_path, main=True, start=3, stop=8, accelerator=accelerator)
    again.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2]
    assert "/8" in capsys.readouterr().err


def test_other_processes_are_silent(tmp_path, capsys):
    log = Log(tmp_path, main=False, start=0, stop=8, accelerator=Alone())
    log.advance()
    log.write(1, 16, {"loss": 1.0})
    log.say("hello")
    log.back(0)
    log.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_training_goes_on_where_the_log_cannot_be_written(tmp_path, capsys):
    log = Log(tmp_path, main=True, start=0, stop=8, accelerator=Alone())
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

    monkeypatch.setattr(tracking, "gather_object", nobody)
    assert bad.report([], 100, any_rank=False) == 0
    monkeypatch.setattr(tracking, "gather_object", lambda found: [*found, fault(3, "b.tar", "k", "torn")._asdict()])
    assert bad.report([fault(9, "a.tar", "j", "torn")], 100) == 2
    assert [line["position"] for line in read_lines(bad.path)] == [3, 9]
    bad.back(5)
    assert [line["position"] for line in read_lines(bad.path)] == [3] and len(bad.lines) == 1


# --- trackers


class Server:
    """A package's tracker, that answers as it is told."""

    def __init__(self, start=None, log=None):
        self.got, self._start, self._log, self.ended = [], start, log, False

    def start(self):
        if self._start:
            self._start()

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        if self._log:
            self._log(step)
        self.got.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def held():
    """Holds whoever waits for it until the test ends."""
    event = threading.Event()
    yield event
    event.set()
    trackers.STUCK.clear()


def told(server, lines, patience=5.0):
    """A tracker before that server, and what is said of it after so many lines and the end."""
    tracker = Tracker("wandb", lambda: server)
    tracker.start()
    tracker.store_init_configuration({"a": 1})
    for step in range(1, lines + 1):
        tracker.log({"loss": 1 / step}, step=step)
    return tracker, finish([tracker], patience)


def test_a_tracker_gets_every_line_in_order_and_ends():
    server = Server()
    tracker, said = told(server, 300)
    assert server.got == [(step, {"loss": 1 / step}) for step in range(1, 301)] and server.ended and server.settings == {"a": 1}
    assert said == [] and tracker.lost == 0 and not trackers.STUCK


def test_a_tracker_that_raises_is_said_once_and_counted_and_tried_again():
    def sometimes(step):
        if 3 <= step <= 6:
            raise ConnectionError("refused")

    _, said = told(server := Server(log=sometimes), 9)
    assert [step for step, _ in server.got] == [1, 2, 7, 8, 9] and server.ended
    assert len(said) == 2 and "ConnectionError: refused" in said[0] and "missed 4 of 9" in said[1]


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1)])
def test_a_tracker_that_does_not_start_is_left_out(error):
    def refuse():
        raise error

    _, said = told(server := Server(start=refuse), 5)
    assert server.got == [] and not server.ended
    assert len(said) == 2 and "did not start" in said[0] and "missed 5 of 5" in said[1]


@pytest.mark.parametrize("where", ["start", "log"])
def test_a_tracker_that_hangs_holds_up_nothing(where, held, monkeypatch):
    """Every call returns while the server never answers; what waits is bounded, what is lost is counted, the process can leave."""
    monkeypatch.setattr(trackers, "WAITING", 4)
    monkeypatch.setattr(trackers, "SLOW", -1.0)
    entered = threading.Event()

    def hang(*step):
        entered.set()
        held.wait()

    tracker = Tracker("wandb", lambda: Server(**{where: hang}))
    tracker.start()
    tracker.log({"loss": 1.0}, step=1)
    entered.wait()
    for step in range(2, 11):
        tracker.log({"loss": 1.0}, step=step)
    assert len(tracker._calls) == 4
    said = finish([tracker], patience=0.01)
    assert tracker.lost == 10 and trackers.STUCK == ["wandb"]
    assert [sum(word in text for text in said) for word in ("not answered", "lines behind", "did not end", "missed 10 of 10")] == [1] * 4
    left = []
    monkeypatch.setattr(trackers.os, "_exit", left.append)
    with pytest.raises(SystemExit):
        trackers.leave(7)
    assert left == [7]
    tracker._thread.join = lambda patience: pytest.fail("waited for a second time")
    tracker.finish()


def test_one_tracker_that_hangs_does_not_keep_another_from_its_lines(held):
    well, bad = Tracker("tensorboard", lambda: server), Tracker("wandb", lambda: Server(log=lambda step: held.wait()))
    server = Server()
    for step in range(3):
        for tracker in (bad, well):
            tracker.start() if step == 0 else tracker.log({"loss": 1.0}, step=step)
    said = finish([bad, well], patience=0.3)
    assert [step for step, _ in server.got] == [1, 2] and server.ended and all("wandb" in text for text in said)


def test_a_process_leaves_as_usual_where_nothing_is_stuck(monkeypatch):
    monkeypatch.setattr(trackers.os, "_exit", lambda status: pytest.fail("at once"))
    with pytest.raises(SystemExit) as end:
        trackers.leave(3)
    assert end.value.code == 3


def test_settings_are_flat_and_of_the_types_that_trackers_hold():
    found = flat({"seed": 0, "train": {"lr": 1e-4, "sharding": None, "compile": False}, "data": {"shards": ["a", "b"], "weights": []}})
    assert found == {
        "seed": 0,
        "train.lr": 1e-4,
        "train.sharding": "none",
        "train.compile": False,
        "data.shards": "a b",
        "data.weights": "",
    }


# --- packages


class FakeWandb(types.ModuleType):
    """What Accelerate's tracker uses of wandb."""

    def __init__(self, log=lambda values: None):
        super().__init__("wandb")
        self.inits, self.lines, self.axes = [], [], []
        self.Settings = lambda **more: types.SimpleNamespace(**{"console": "auto", **more})
        self.answer = log

    def init(self, **given):
        self.inits.append(given)
        return types.SimpleNamespace(log=self._log, finish=lambda: None, define_metric=lambda *a, **k: self.axes.append((a, k)))

    def _log(self, values, step=None):
        self.answer(values)
        self.lines.append((step, values))


@pytest.fixture
def wandb(monkeypatch):
    PartialState(cpu=True)
    fake, version = FakeWandb(), importlib.metadata.version
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "wandb" else version(name))
    return fake


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, wandb):
    """The same id, and the step as the axis; a fresh run in the same folder is another."""
    for start in (0, 2, 0):
        accelerator = Alone()
        attach(accelerator, ["wandb", "none", "wandb"], "condot", tmp_path, {"seed": 1}, start)
        accelerator.log({"loss": 0.5}, step=start + 1)
        assert finish(accelerator.trackers) == [] and len(accelerator.trackers) == 1
    ids = [given["id"] for given in wandb.inits]
    assert ids[0] == ids[1] != ids[2] and all(given["resume"] == "allow" and given["name"] == tmp_path.name for given in wandb.inits)
    assert wandb.inits[0]["project"] == "condot" and wandb.inits[0]["config"] == {"seed": 1} and wandb.inits[0]["settings"].console == "off"
    assert wandb.lines[1] == (None, {"loss": 0.5, "step": 3}) and wandb.axes[0] == (("*",), {"step_metric": "step"})


def test_a_missing_package_is_refused_at_start(tmp_path, digits, monkeypatch, capsys):
    version = importlib.metadata.version

    def absent(name):
        if name == "trackio":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    check(["none"])
    with pytest.raises(ValueError, match="pip install trackio"):
        check(["tensorboard", "trackio"])
    assert fit(digits, tmp_path / "run", "--log.report_to", "tensorboard", "trackio") == 2
    assert "pip install trackio" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_whose_tracker_hangs_is_the_run_without_one(tmp_path, digits, trained, wandb, held, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.tracking.finish", lambda given: finish(given, 0.05))
    wandb.answer = lambda values: held.wait()
    assert fit(digits, tmp_path / "run", "--log.report_to=wandb") == 0
    assert loss_curve(tmp_path / "run") == loss_curve(trained) and len(loss_curve(trained)) == 6
    assert "log.report_to=wandb missed 6 of 6 lines" in capsys.readouterr().out


def test_tensorboard_holds_the_metrics_and_no_step_twice(tmp_path, digits):
    """Read back by TensorBoard itself; the run is told to stop and goes on from a checkpoint before its last line."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("--log.report_to=tensorboard", "--checkpoint.every=3", "--log.every=1", "--log.peak_tflops=0.5")
    assert fit(digits, tmp_path / "run", *more, "--train.max_steps=8") == 0
    for folder in (tmp_path / "run").glob("checkpoint-8"):
        (folder / "manifest.json").unlink()
    assert fit(digits, tmp_path / "run", *more, "--train.max_steps=9") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    for name in ("loss", "grad_norm", "lr", "images", "mfu", "data_wait", "memory_gb", "bad_samples"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert [line["step"] for line in lines] == list(range(1, 10))
    said = next((tmp_path / "run/tensorboard").glob("*/hparams.yml")).read_text()
    assert "train.learning_rate: 0.001" in said


def test_each_line_has_every_watch(trained):
    keys = """step images loss grad_norm lr images_per_second images_per_second_per_device mfu mfu_with_encoders data_wait
        data_wait_worst memory_gb bad_samples skipped_steps"""
    for line in read_lines(trained / "metrics.jsonl"):
        assert set(line) == set(keys.split()) and None not in line.values()
        assert 0 < line["mfu"] == line["mfu_with_encoders"] < 10, "pixels need no encoder"
        assert 0 <= line["data_wait"] <= line["data_wait_worst"] <= 1 and 0.1 < line["memory_gb"] < 100
