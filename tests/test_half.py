"""fp16 without a GPU: torch scales gradients on a CPU too, Accelerate only refuses to ask for it."""

import json
import math

import accelerate
import pytest
import sharded_state
import torch
from conftest import fit
from ranks import together
from test_guard import LOG, equal, lines, poison  # noqa: F401  the fixture

import condot.pipeline.launch.distributed
from condot.core.process import EXIT_DIVERGED
from condot.pipeline.checkpoint.store import load_tensors
from condot.pipeline.training.guard import MAX_OVERFLOWS

pytestmark = pytest.mark.usefixtures("one_thread", "scaled")
HALF = (*LOG, "--train.mixed_precision=fp16", "--checkpoint.every=1", "--checkpoint.keep=99")


@pytest.fixture
def scaled(monkeypatch):
    """An Accelerator of the CPU that computes in fp16, with a scaler whose scale doubles after three steps."""

    def accelerator(mixed_precision, **more):
        made = accelerate.Accelerator(mixed_precision="no", **more)
        if mixed_precision == "fp16":
            made.state._mixed_precision, made.native_amp = "fp16", True
            made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        return made

    monkeypatch.setattr(condot.pipeline.launch.distributed, "Accelerator", accelerator)
    monkeypatch.setattr(condot.pipeline.launch.distributed, "check_hardware", lambda precision: None)


def state(folder):
    return json.loads((folder / "state.json").read_text())


def weights(folder):
    return {name: value for name, value in load_tensors(folder).items() if name.startswith(("model.", "optim."))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_curve_is_that_of_float32_and_a_resumed_run_is_the_same(digits, tmp_path):
    """Rounding apart: fp16 has 11 bits. The scale, and how far it is from its next doubling, are part of the state."""
    assert fit(digits, tmp_path / "half", *HALF) == fit(digits, tmp_path / "full", *LOG) == 0
    half, full = (lines(tmp_path / name / "metrics.jsonl") for name in ("half", "full"))
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], rel=5e-3)
    assert any(a["loss"] != b["loss"] for a, b in zip(half, full, strict=True)), "it is computed in another precision"
    assert state(tmp_path / "half/checkpoint-12")["scaler"]["scale"] == 1024 * 2**4
    for stop in (2, 7, 12):
        assert fit(digits, tmp_path / "pieces", *HALF, f"--train.max_steps={stop}") == 0
    assert equal(tmp_path / "half/checkpoint-12", tmp_path / "pieces/checkpoint-12")
    assert state(tmp_path / "half/checkpoint-12")["scaler"] == state(tmp_path / "pieces/checkpoint-12")["scaler"]


@pytest.mark.parametrize("where", ["batch", "loss"])
def test_a_loss_that_is_not_a_number_moves_no_weight(digits, tmp_path, poison, where):  # noqa: F811
    poison(where, 5)
    assert fit(digits, tmp_path / "run", *HALF) == 0
    (line,) = lines(tmp_path / "run/bad_steps.jsonl")
    assert line["step"] == 5 and not (tmp_path / "run/rollbacks.jsonl").exists()
    before, after, next_ = (weights(tmp_path / f"run/checkpoint-{step}") for step in (5, 7, 8))
    step = next(name for name in before if name.endswith("step"))
    assert (float(before[step]), float(after[step]), float(next_[step])) == (5, 6, 7), "one of the two was not done"
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["skipped_steps"] == 1


def test_an_overflow_halves_the_scale_and_is_no_bad_step(digits, tmp_path, poison):  # noqa: F811
    poison("overflow", 4)
    assert fit(digits, tmp_path / "run", *HALF) == 0
    assert not (tmp_path / "run/bad_steps.jsonl").exists()
    scales = [state(tmp_path / f"run/checkpoint-{step}")["scaler"]["scale"] for step in (4, 5, 8)]
    assert scales == [2048, 1024, 2048] and same(weights(tmp_path / "run/checkpoint-4"), weights(tmp_path / "run/checkpoint-5"))
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert rows[4]["loss"] is None and all(math.isfinite(row["grad_norm"]) for row in rows if row["step"] != 5)


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(digits, tmp_path, poison, capsys):  # noqa: F811
    poison("overflow", *range(4, 999))
    words = ("--train.max_steps=200", "--checkpoint.every=4", "--guard.rollbacks=1")
    assert fit(digits, tmp_path / "run", *HALF, *words) == EXIT_DIVERGED
    (line,) = lines(tmp_path / "run/rollbacks.jsonl")
    assert f"{MAX_OVERFLOWS + 1} steps in a row" in line["reason"] and line["from_step"] == 4 + MAX_OVERFLOWS + 1


def test_an_overflow_on_one_rank_is_one_on_all_where_weights_are_shared_out():
    together(2, sharded_state.overflow_on_one)
