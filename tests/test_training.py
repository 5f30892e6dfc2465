"""Training: an interrupted run is the uninterrupted one, and the number of processes does not change the curve."""

import copy
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, UNET, arguments, fit, launch
from PIL import Image

from condot.data.prepare import command
from condot.models.dit.model import DiT
from condot.pipeline.checkpoint import saving
from condot.pipeline.checkpoint.store import load_tensors
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.config.objective import TrainingObjective
from condot.pipeline.config.schema import EmaConfig, TrainConfig
from condot.pipeline.ema.averages import HalfLifeProfile, WeightAverages, ema_profiles
from condot.pipeline.training import loop
from condot.pipeline.training.optimizer import adamw, learning_rate
from condot.pipeline.training.resume_rules import find_differences


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in curve(folder)]


def digest(folder):
    """Every weight, average and moment of a checkpoint."""
    tensors = load_tensors(folder)
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def test_the_weights_are_those_of_adamw_by_its_formula(digits, tmp_path, monkeypatch):
    """Loshchilov and Hutter's algorithm 2 in float64, on the gradients that the run had; the young moments' correction counts from 1."""
    seen, clip_gradients = [], loop.clip_gradients
    monkeypatch.setattr(
        loop,
        "clip_gradients",
        lambda run: (seen.append({n: p.grad.clone() for n, p in run.network.named_parameters()}), clip_gradients(run))[1],
    )
    more = (
        "--train.weight_decay=0.1",
        "--train.lr_warmup_steps=3",
        "--train.max_steps=4",
        "--checkpoint.keep=9",
        "--train.max_grad_norm=0.5",
    )
    assert fit(digits, tmp_path / "run", *more) == 0
    first, last = load_tensors(tmp_path / "run/checkpoint-0"), load_tensors(tmp_path / "run/checkpoint-4")
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in step.values())) for step in seen]
    assert len(seen) == 4 and max(norms) > 0.5, "nothing is clipped"
    for name in seen[0]:
        w = first[f"model.{name}"].double()
        decay = 0.1 if w.ndim >= 2 and name != "classes.weight" else 0.0
        m = v = torch.zeros_like(w)
        for t, (step, norm) in enumerate(zip(seen, norms, strict=True), 1):
            g, rate = step[name].double() * min(1, 0.5 / norm), 1e-3 * t / 4
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            w = w - rate * decay * w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        moved = (w - first[f"model.{name}"]).norm()
        assert (last[f"model.{name}"] - w).norm() <= 2e-3 * moved + 1e-7, name
        assert float(last[f"optim.state.{name}.step"]) == 4


def test_compiled_blocks_draw_the_same_curve_and_leave_the_same_names(digits, tmp_path):
    """One graph serves all blocks, forwards and backwards; a checkpoint goes on without it."""
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    more = ("--train.max_steps=4", "--log.every=1")
    assert fit(digits, tmp_path / "plain", *more) == 0 and not dynamo.counters["stats"]
    assert fit(digits, tmp_path / "compiled", *more, "--train.compile=true") == 0
    assert dynamo.counters["stats"]["unique_graphs"] == 1 and dynamo.counters["aot_autograd"]["ok"] == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert digest(tmp_path / "compiled/checkpoint-4").keys() == digest(tmp_path / "plain/checkpoint-4").keys()
    assert fit(digits, tmp_path / "compiled", "--train.max_steps=5") == 0


# --- resume


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--train.gradient_accumulation_steps=4", "--data.horizontal_flip=true", "--train.lr_ramp=cosine"),
        (*UNET, "--train.max_steps=9"),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(digits, tmp_path, more):
    """Weights, averages, moments and the log; stopped in the middle of a log interval, where no checkpoint was due."""
    assert fit(digits, tmp_path / "whole", *more) == 0
    step = loop.fit

    def stop_after(run, stop, at=7):
        advance = run.log.advance

        def count():
            advance()
            if run.step == at:
                run.interrupt.received = signal.SIGINT

        run.log.advance = count
        step(run, stop)

    loop.fit = stop_after
    try:
        assert fit(digits, tmp_path / "parts", *more) == 128 + signal.SIGINT
    finally:
        loop.fit = step
    assert (tmp_path / "parts/checkpoint-7").is_dir()
    assert fit(digits, tmp_path / "parts", *more) == 0
    last = max((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])).name
    assert digest(tmp_path / "parts" / last) == digest(tmp_path / "whole" / last)
    for key in ("step", "images", "loss", "lr", "grad_norm"):
        assert [line[key] for line in curve(tmp_path / "parts")] == [line[key] for line in curve(tmp_path / "whole")]
    assert last == f"checkpoint-{curve(tmp_path / 'whole')[-1]['step']}", "the last step has a line, whether or not one is due"
    if "--train.lr_ramp=cosine" in more:  # of the steps 1, 3, ... counted from 0, which the lines of 2, 4, ... are about
        told = [line["lr"] for line in curve(tmp_path / "whole")]
        assert told == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(1, 12, 2)])


def test_a_step_in_four_passes_is_the_step(digits, tmp_path):
    """Loss and gradient as the log tells them, and so the next steps; only sums are in another order."""
    for passes in (1, 4):
        more = ("--train.max_steps=3", "--log.every=1", f"--train.gradient_accumulation_steps={passes}")
        assert fit(digits, tmp_path / str(passes), *more) == 0
    one, four = curve(tmp_path / "1"), curve(tmp_path / "4")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in four] == pytest.approx([line[key] for line in one], rel=1e-4)


def test_a_finished_run_is_left_as_it_is(digits, trained, capsys):
    before = digest(trained / "checkpoint-12")
    lines = (trained / "metrics.jsonl").read_text()
    assert fit(digits, trained) == 0
    assert "step 12 of 12" in capsys.readouterr().out
    assert digest(trained / "checkpoint-12") == before and (trained / "metrics.jsonl").read_text() == lines


@pytest.mark.faults
def test_killed_at_a_random_moment_the_run_ends_the_same(digits, tmp_path):
    """kill -9 twice, wherever it falls; the log has no line twice."""
    words = arguments(digits, tmp_path / "run", "--train.max_steps=40", "--checkpoint.every=3", "--log.every=1")
    for wait in (0.4, 0.9):
        process = subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()  # the run is set up
        time.sleep(wait)
        process.kill()
        process.wait()
    assert fit(digits, tmp_path / "run", *words[2:]) == 0
    assert fit(digits, tmp_path / "whole", *[w for w in words if not w.startswith("--output_dir")]) == 0
    assert digest(tmp_path / "run/checkpoint-40") == digest(tmp_path / "whole/checkpoint-40")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [line["step"] for line in curve(tmp_path / "run")] == list(range(1, 41))


def test_metrics_say_what_is_promised(trained):
    for line in curve(trained):
        assert {"step", "images", "loss", "lr", "images_per_second", "grad_norm"} <= line.keys() and line["images"] == 16 * line["step"]
    assert (trained / "config.yaml").exists() and (trained / "samples/step-0000012.png").exists()
    assert json.loads((trained / "checkpoint-12/state.json").read_text())["config"]["model"]["width"] == 32


def test_what_the_network_is_shown(digits, tmp_path, monkeypatch):
    """Over 100 steps: new times in every step, a tenth of the labels null (5 sigma), pixels in -1..1 mixed with noise of unit size."""
    seen = []
    forward = DiT.forward

    def spy(self, x, t, labels):
        if self.training:
            seen.append((x.detach().clone(), t.clone(), labels.clone()))
        return forward(self, x, t, labels)

    monkeypatch.setattr(DiT, "forward", spy)
    assert fit(digits, tmp_path / "run", "--train.max_steps=100", "--checkpoint.every=1000") == 0
    x, t, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(t) == 1600 == len(t.unique()) and bool(((t > 0) & (t < 1)).all())
    assert abs((labels == 10).double().mean() - 0.1) < 5 * (0.09 / 1600) ** 0.5 and set(labels.tolist()) == set(range(11))
    noisy, clean = x[t < 0.1], x[t > 0.97]
    assert abs(noisy.std() - 1) < 0.1 and clean.min() > -1.2 and clean.max() < 1.2 and clean.std() > 0.5


# --- processes


def test_two_processes_have_the_curve_of_one(digits, tmp_path):
    """The same global batch, noise, times and drops; the sums differ by the order of their terms."""
    more = ("--train.max_steps=20", "--log.every=1", "--checkpoint.every=20")
    assert fit(digits, tmp_path / "one", *more) == 0
    done = launch(
        "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml", "train.py",
        *arguments(digits, tmp_path / "two", *more, "--train.gradient_accumulation_steps=2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) < 1e-5
    files = [p.name for p in (tmp_path / "two/checkpoint-20").iterdir()]
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(files), "each rank writes its part"
    first, second = load_tensors(tmp_path / "one/checkpoint-20"), load_tensors(tmp_path / "two/checkpoint-20")
    assert first.keys() == second.keys()
    assert all((first[k] - second[k]).abs().max() < 1e-3 for k in first if k.startswith("ema.") and first[k].numel())
    further = ("--train.max_steps=26", *more[1:])
    assert fit(digits, tmp_path / "one", *further) == fit(digits, tmp_path / "two", *further) == 0, "two ranks' checkpoint goes on with one"
    assert losses(tmp_path / "two")[20:] == pytest.approx(losses(tmp_path / "one")[20:], rel=1e-5) and len(losses(tmp_path / "two")) == 26


def test_a_launch_that_starts_fewer_processes_than_asked_is_refused(digits, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one, without a word."""
    words = arguments(digits, tmp_path / "run")
    environment = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = launch("train.py", *words, **environment)
    assert done.returncode == 2 and "several processes were asked for and one was started" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# --- signals


def test_ctrl_c_saves_and_the_same_command_goes_on(digits, tmp_path):
    words = arguments(digits, tmp_path / "run", "--train.max_steps=100000", "--checkpoint.every=100000")
    process = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error and "stopping after this step" in error
    steps = [int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*")]
    assert len(steps) == 2 and f"stopped at step {max(steps)}" in out + error, "the first and the last state"


def listens(pid):
    """Whether a process has taken the signals that mean its end."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return int(caught, 16) >> (signal.SIGUSR1 - 1) & 1


def test_ctrl_c_while_it_starts_says_one_line(digits, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments(digits, tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "CONDOT_ALLOCATOR": "system"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not listens(process.pid):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip() == "interrupted: the same command goes on from the last checkpoint."


# --- what a user can get wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.shards=/nowhere"], "data.shards='/nowhere' is no folder"),
        (["--train.batch_size=10", "--train.gradient_accumulation_steps=4"], "train.batch_size=10 is not a multiple"),
        (["--train.max_step=3"], "did you mean 'train.max_steps'"),
        (["--model.heads=5"], "model.width=32 must be a multiple of 4 and of model.heads=5"),
        (["--data.split=test"], "split 'test' has no shard"),
        (["--output_dir=/proc/nowhere"], "cannot be written"),
        (["--export=true", "--flow.prior=uniform"], "stock pipelines start from normal noise"),
        (["--model.kind=mmdit"], "data.text_encoder is empty"),
        (["--model.preset=M/3"], "model.preset='M/3' is unknown"),
        (["--train.lora_rank=4"], "without weights to add to"),
        (["--init_from=/nowhere"], "there is no such folder or file"),
        (["--checkpoint.resume=/nowhere"], "/nowhere is not there"),
    ],
)
def test_mistakes_are_one_line_before_any_work(digits, tmp_path, capsys, words, message):
    assert fit(digits, tmp_path / "run", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("run/checkpoint*"))


def test_a_checkpoint_of_another_run_is_refused(digits, trained, capsys):
    assert fit(digits, trained, "--model.width=64", "--flow.predict=noise") == 2
    error = capsys.readouterr().err
    assert "model.width is 32 there and 64 here" in error and "flow.predict is velocity there and noise here" in error


def test_more_classes_than_an_export_holds_are_refused_at_the_start(tmp_path, capsys):
    for i in range(1001):
        (tmp_path / f"images/{i:04d}").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / f"images/{i:04d}/a.png")
    assert command.main(["imagefolder", str(tmp_path / "images"), "--output", str(tmp_path / "shards")]) == 0
    assert fit(tmp_path / "shards", tmp_path / "run", "--export=true") == 2 and not (tmp_path / "run").exists()
    assert "1001 classes: the stock pipeline takes label 1000 for none" in capsys.readouterr().err


def test_two_runs_on_one_folder(digits, tmp_path, capsys):
    from condot.pipeline.launch.folder_lock import lock_folder

    held = lock_folder(tmp_path / "run")
    assert fit(digits, tmp_path / "run") == 2 and "in use by another run" in capsys.readouterr().err
    held.close()


def test_a_disk_that_fills_does_not_stop_training(digits, tmp_path, monkeypatch, capsys):
    """From the second checkpoint on nothing can be written; before the first step that would be an error, see test_room.py."""
    write = saving.write_file

    def full(path, *rest):
        if not path.parent.name.startswith(".tmp-0-"):
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("condot.pipeline.checkpoint.saving.write_file", full)
        assert fit(digits, tmp_path / "run") == 2
    out, error = capsys.readouterr()
    assert "the state of step 12 could not be saved" in error and len(curve(tmp_path / "run")) == 6
    assert "checkpoint of step 4 failed, older ones are untouched: rank 0: [Errno 28] No space left on device" in out
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0"] and not list((tmp_path / "run").glob(".tmp*"))


def test_a_save_that_failed_is_tried_again_soon(digits, tmp_path, monkeypatch, capsys):
    """A tenth of checkpoint.every later, and of 4 steps that is the next one; then as before."""
    write = saving.write_file

    def full_at_4(path, *rest):
        if path.parent.name.startswith(".tmp-4-"):
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    monkeypatch.setattr(saving, "write_file", full_at_4)
    assert fit(digits, tmp_path / "run", "--checkpoint.asynchronous=false", "--checkpoint.keep=9") == 0
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (0, 5, 8, 12)}
    assert "It is tried again at step 5." in "".join(capsys.readouterr())


def test_training_goes_on_while_a_checkpoint_is_written(digits, tmp_path, monkeypatch):
    """The file of step 4 is held back until step 7 is done."""
    gate, waits, write, advance = threading.Event(), [], saving.write_file, loop.train_step

    def held(path, *rest):
        if path.parent.name.startswith(".tmp-4-"):
            waits.append(gate.wait(20))
        return write(path, *rest)

    def counted(run):
        seen = advance(run)
        if run.step == 7:
            gate.set()
        return seen

    monkeypatch.setattr(saving, "write_file", held)
    monkeypatch.setattr(loop, "train_step", counted)
    assert fit(digits, tmp_path / "run", "--checkpoint.keep=9") == 0 and waits == [True]
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (0, 4, 8, 12)}


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(digits, tmp_path, capsys):
    """From the first step on, and after every rollback: what is left is the state before it."""
    assert fit(digits, tmp_path / "run", "--train.learning_rate=1e30", "--train.max_grad_norm=0") == 3
    assert "training diverged" in "".join(capsys.readouterr())
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-0"]


# --- parts


def test_the_learning_rate_is_a_function_of_the_step():
    config = TrainConfig(max_steps=100, learning_rate=2.0, lr_warmup_steps=9, lr_ramp="linear", lr_decay_fraction=0.5)
    assert [learning_rate(s, config) for s in (0, 4, 9, 50)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert [learning_rate(s, config) for s in (75, 99, 100)] == pytest.approx([1.0, 0.04, 0.0])
    cosine = TrainConfig(max_steps=100, learning_rate=2.0, lr_ramp="cosine")
    assert learning_rate(25, cosine) == pytest.approx(1 + math.cos(math.pi / 4)) and learning_rate(50, cosine) == pytest.approx(1.0)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 5))
    decayed, plain = adamw(model, TrainConfig(weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(5, 4)] and len(plain["params"]) == 2
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_the_average_is_on_an_image_clock():
    """A weight that jumps from 0 to 1 is half there after one half-life, in steps of any size."""
    for batch in (10, 50):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        ema = WeightAverages(model, copy.deepcopy(model), EmaConfig(halflife=(1000,), ramp=1e9))
        torch.nn.init.ones_(model.weight)
        for images in range(batch, 1001, batch):
            ema.update(model, images, batch)
        assert ema.model.weight.item() == pytest.approx(0.5, abs=1e-5)
    assert HalfLifeProfile(1e9, 0.1).decay(1000, 100) == pytest.approx(0.5), "at first the half-life is a share of the images seen"
    assert ema_profiles(EmaConfig(enabled=False))[0].decay(1000, 100) == 0


@pytest.mark.parametrize(
    "flow", [{}, {"stratified": True, "time": "mode"}, {"prior": "uniform"}, {"objective": "sliced", "predict": "score"}]
)
def test_draws_are_a_function_of_seed_step_and_place(flow):
    method, batch_indices = TrainingObjective(FlowConfig(**flow), (2, 3), 6), torch.arange(6)
    whole, part = method.draw_random_inputs(0, 3, batch_indices), method.draw_random_inputs(0, 3, batch_indices[4:])
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, part, strict=True) if a is not None)
    assert not torch.equal(whole.noise, method.draw_random_inputs(0, 4, batch_indices).noise)
    assert not torch.equal(whole.noise, method.draw_random_inputs(1, 3, batch_indices).noise)
    assert abs(torch.corrcoef(torch.stack([whole.t.double(), whole.drop]))[0, 1]) < 0.99


def test_compare_lists_every_difference():
    assert find_differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == [
        "a.c is 2 there and 5 here",
        "d is 3 there and None here",
        "e is None there and 4 here",
    ]
