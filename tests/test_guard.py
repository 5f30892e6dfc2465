"""A bad step is not the end: skipped as if it had never been asked for, undone by a rollback, and the evidence kept."""

import json
import math
import shutil
import threading

import pytest
import torch
from conftest import fit
from test_scale import BUCKETS, shapes  # noqa: F401  the fixture

from condot.core.data_config import DataConfig
from condot.core.process import EXIT_DIVERGED
from condot.data.loader.build import build
from condot.data.loader.stream import Share
from condot.pipeline.checkpoint import saving
from condot.pipeline.checkpoint.store import load_tensors
from condot.pipeline.config.schema import GuardConfig
from condot.pipeline.training import loop
from condot.pipeline.training.guard import Guard
from condot.pipeline.training.incidents import IncidentLog
from condot.pipeline.training.step_stats import StepReducer, StepStats

pytestmark = pytest.mark.usefixtures("one_thread")
LOG = ("--log.every=1", "--checkpoint.every=4", "--checkpoint.keep=9")


def equal(a, b):
    one, two = load_tensors(a), load_tensors(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(digits, position):
    """Of the batch of 16 that begins there."""
    options = DataConfig(shards=(str(digits),), resolution=8, channels=1)
    stream = build(options, seed=0, share=Share(batch_size=16), start=position)
    return stream.keys(next(stream))


def make_stats(step=0, loss=1.0, norm=1.0, bad=False):
    return StepStats(step, loss, norm, bad, False, False)


@pytest.fixture
def poison(monkeypatch):
    """Break what a run computes in the n-th step that it does, from 0, steps done again included: its data, a gradient or a weight."""

    def plant(where, *steps, by=math.nan):
        count = -1
        train_step, compute_loss, clip_gradients = loop.train_step, loop.compute_loss, loop.clip_gradients

        def counted(run):
            nonlocal count
            count += 1
            if where == "weight" and count in steps:
                next(run.network.parameters()).data.view(-1)[3] = by
            return train_step(run)

        def loss(run, batch):
            if where == "overflow" and count in steps:
                first = next(run.network.parameters())  # a gradient of it that is added in the backward pass, before it is looked at
                step_loss = compute_loss(run, batch)
                return step_loss._replace(loss=step_loss.loss + (first.view(-1)[0] - first.view(-1)[0].detach()) * 1e38)
            if where == "batch" and count in steps:
                encode = run.encode
                run.encode = lambda b, s: encode(b, s).index_fill(0, torch.tensor([1]), by)
                try:
                    return compute_loss(run, batch)
                finally:
                    run.encode = encode
            step_loss = compute_loss(run, batch)
            return step_loss._replace(loss=step_loss.loss * (by if where == "loss" and count in steps else 1))

        def clipped(run):
            if where == "gradient" and count in steps:
                next(p for p in run.network.parameters() if p.grad is not None).grad.view(-1)[0] = by
            return clip_gradients(run)

        monkeypatch.setattr(loop, "train_step", counted)
        monkeypatch.setattr(loop, "compute_loss", loss)
        monkeypatch.setattr(loop, "clip_gradients", clipped)

    return plant


@pytest.mark.parametrize("where", ["batch", "gradient", "loss"])
@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_its_samples_are_named(digits, tmp_path, poison, monkeypatch, where, by):
    """As a run whose optimiser was not asked at that step; all else, its clocks, its average, goes on."""
    poison(where, 5, by=by)
    assert fit(digits, tmp_path / "run", *LOG) == 0
    (line,) = lines(tmp_path / "run/bad_steps.jsonl")
    assert line["step"] == 5 and line["keys"] == keys(digits, 5 * 16) and len(set(line["keys"])) == 16
    found = lines(tmp_path / "run/metrics.jsonl")
    assert [row["skipped_steps"] for row in found] == [0] * 5 + [1] * 7 and not (tmp_path / "run/rollbacks.jsonl").exists()
    assert all(math.isfinite(row["loss"]) for row in found if row["step"] != 6)
    monkeypatch.undo()
    optimizer_step = loop.optimizer_step

    def idle(run, loss, extras):
        step = run.optimizer.optimizer.step
        if run.step == 5:
            run.optimizer.optimizer.step = lambda *a: None
        optimizer_step(run, loss, extras)
        run.optimizer.optimizer.step = step

    monkeypatch.setattr(loop, "optimizer_step", idle)
    assert fit(digits, tmp_path / "idle", *LOG) == 0
    assert equal(tmp_path / "run/checkpoint-12", tmp_path / "idle/checkpoint-12")


def test_a_weight_that_is_not_a_number_leads_back_to_the_last_checkpoint_and_past_the_data(digits, tmp_path, poison, monkeypatch):
    """Four bad steps after the checkpoint of step 4: positions 64 to 143 are passed over. A run that goes on from that checkpoint with the
    evidence beside it is the same run, and one without it is another; a later checkpoint knows by itself what was passed over."""
    poison("weight", 5)
    assert fit(digits, tmp_path / "run", *LOG) == 0
    (line,) = lines(tmp_path / "run/rollbacks.jsonl")
    assert (line["from_step"], line["to_step"], line["positions"], line["cursor"]) == (9, 4, [64, 144], 144)
    assert [(row["step"], row["keys"]) for row in line["bad_steps"]] == [(n, keys(digits, 16 * n)) for n in (5, 6, 7, 8)]
    assert not lines(tmp_path / "run/bad_steps.jsonl"), "what was undone is told there alone"
    assert "4 steps in a row" in line["reason"] and [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == list(range(1, 13))
    state = json.loads((tmp_path / "run/checkpoint-12/state.json").read_text())
    assert state["images"] == 192 and state["cursor"] == 192 + 80
    monkeypatch.undo()
    for name, step, kept in (("same", 4, True), ("other", 4, False), ("later", 8, True)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(tmp_path / f"run/checkpoint-{step}", folder / f"checkpoint-{step}")
        if name == "same":
            shutil.copy(tmp_path / "run/rollbacks.jsonl", folder)
        assert fit(digits, folder, *LOG) == 0
        assert equal(folder / "checkpoint-12", tmp_path / "run/checkpoint-12") == kept
        found = json.loads((folder / "checkpoint-12/state.json").read_text())["guard"]
        assert (found == state["guard"]) == kept and found["skipped"] == 0 == found["row"], "steps undone count no more"


def test_a_resumed_run_judges_as_the_whole_one_would(digits, tmp_path, poison):
    """Step 3 is bad; the run ends at 5 and goes on: what the guard knows of the steps before comes from the checkpoint."""
    poison("batch", 3)
    assert fit(digits, tmp_path / "run", *LOG, "--train.max_steps=5") == 0
    assert fit(digits, tmp_path / "run", *LOG) == 0
    found = lines(tmp_path / "run/metrics.jsonl")
    assert [row["skipped_steps"] for row in found] == [0] * 3 + [1] * 9
    known = json.loads((tmp_path / "run/checkpoint-12/state.json").read_text())["guard"]
    assert known["losses"] == pytest.approx([row["loss"] for row in found if row["loss"] is not None]) and len(known["losses"]) == 11


def test_a_rollback_with_batches_of_several_shapes(shapes, tmp_path, poison, monkeypatch):  # noqa: F811
    """The run that goes on in the same process is the one that begins again beside the evidence."""
    poison("weight", 5)
    assert fit(shapes, tmp_path / "run", *BUCKETS, *LOG) == 0
    (line,) = lines(tmp_path / "run/rollbacks.jsonl")
    assert line["to_step"] == 4 and line["positions"] == [32, 72]
    monkeypatch.undo()
    (tmp_path / "same").mkdir()
    shutil.copytree(tmp_path / "run/checkpoint-4", tmp_path / "same/checkpoint-4")
    shutil.copy(tmp_path / "run/rollbacks.jsonl", tmp_path / "same")
    assert fit(shapes, tmp_path / "same", *BUCKETS, *LOG) == 0
    assert equal(tmp_path / "same/checkpoint-12", tmp_path / "run/checkpoint-12")


def test_a_spike_leads_back(digits, tmp_path, poison, capsys):
    """And TensorBoard, asked itself, shows each step once, as metrics.jsonl does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    poison("loss", 7, by=100.0)
    assert fit(digits, tmp_path / "run", *LOG, "--guard.window=5", "--log.report_to=tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("loss")
    kept = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines(tmp_path / "run/metrics.jsonl")]
    assert [(event.step, event.value) for event in events] == kept and len(kept) == 12
    (line,) = lines(tmp_path / "run/rollbacks.jsonl")
    assert (line["from_step"], line["to_step"]) == (8, 4) and "the loss" in line["reason"] and "over 5 times the median" in line["reason"]
    assert len(line["metrics"]) == 3 and "past the data of positions [64, 128]" in capsys.readouterr().out


def test_snapshots_of_the_course_that_was_undone_are_written_anew(digits, tmp_path, poison, monkeypatch):
    """Steps 5 and 6 had theirs before the spike led back to 4; what stays is that of a run that begins there."""
    words = (*LOG, "--guard.window=5", "--ema.power", "0.1")
    poison("loss", 6, by=100.0)
    assert fit(digits, tmp_path / "run", *words) == 0
    monkeypatch.undo()
    (tmp_path / "same").mkdir()
    shutil.copytree(tmp_path / "run/checkpoint-4", tmp_path / "same/checkpoint-4")
    shutil.copy(tmp_path / "run/rollbacks.jsonl", tmp_path / "same")
    assert fit(digits, tmp_path / "same", *words) == 0
    for step in (5, 6, 7, 12):
        assert equal(tmp_path / f"run/averages/checkpoint-{step}", tmp_path / f"same/averages/checkpoint-{step}"), step


def test_the_samples_named_are_those_of_the_step_done_again(digits, tmp_path, poison):
    """Step 8 is undone and done again on the data behind it, which are bad: both courses have a step 8."""
    poison("loss", 8, by=100.0)
    poison("batch", 9)
    assert fit(digits, tmp_path / "run", *LOG, "--guard.window=5") == 0
    (undone,), (line,) = lines(tmp_path / "run/rollbacks.jsonl"), lines(tmp_path / "run/bad_steps.jsonl")
    assert (undone["from_step"], undone["to_step"]) == (9, 8) and undone["bad_steps"] == []
    assert line["step"] == 8 and line["keys"] == keys(digits, 9 * 16)


def test_a_rollback_waits_for_the_checkpoint_under_way(digits, tmp_path, poison, monkeypatch):
    """That of step 4 is held back until the spike of step 5 has been judged: it is the last good one all the same."""
    gate, write, back = threading.Event(), saving.write_file, loop.roll_back

    def held(path, *rest):
        if path.parent.name.startswith(".tmp-4-"):
            assert gate.wait(60)
        return write(path, *rest)

    monkeypatch.setattr(saving, "write_file", held)
    monkeypatch.setattr(loop, "roll_back", lambda *given: (gate.set(), back(*given))[1])
    poison("loss", 5, by=100.0)
    assert fit(digits, tmp_path / "run", *LOG, "--guard.window=5") == 0
    (line,) = lines(tmp_path / "run/rollbacks.jsonl")
    assert (line["from_step"], line["to_step"]) == (6, 4)


def test_what_rollbacks_do_not_cure_ends_with_a_status_of_its_own_and_the_evidence(digits, tmp_path, poison, capsys):
    poison("batch", *range(6, 1000))
    assert fit(digits, tmp_path / "run", *LOG, "--guard.rollbacks=2", "--guard.skips=1") == EXIT_DIVERGED == 3
    text = "".join(capsys.readouterr())
    assert "after 2 rollback(s), guard.rollbacks=2" in text and "Lower train.learning_rate=0.001" in text
    assert len(lines(tmp_path / "run/rollbacks.jsonl")) == 2 and lines(tmp_path / "run/bad_steps.jsonl")
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-4"}
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "diverged" and status["exit_status"] == 3
    assert all(bool(t.isfinite().all()) for t in load_tensors(tmp_path / "run/checkpoint-4").values())


def test_a_fresh_run_forgets_the_evidence_of_another(tmp_path):
    (tmp_path / "rollbacks.jsonl").write_text('{"to_step": 0, "cursor": 99}\n{"torn')
    incidents = IncidentLog(tmp_path, main=False, start=0, fresh=False)
    assert incidents.cursor_after_rollback(0) == 99
    incidents.record_rollback({"to_step": 0, "cursor": 200})
    incidents.record_rollback({"to_step": 5, "cursor": 300})
    assert (incidents.cursor_after_rollback(0), incidents.cursor_after_rollback(5), incidents.cursor_after_rollback(3)) == (200, 300, 0), (
        "the last way back from a step passes over most"
    )
    (tmp_path / "bad_steps.jsonl").write_text("".join(f'{{"step": {n}, "keys": []}}\n' for n in (2, 3, 4)))
    IncidentLog(tmp_path, main=True, start=3, fresh=False)
    assert [line["step"] for line in lines(tmp_path / "bad_steps.jsonl")] == [2], "step 3 is the first to come again"
    assert (
        IncidentLog(tmp_path, main=True, start=0, fresh=True).cursor_after_rollback(0) == 0 and not (tmp_path / "rollbacks.jsonl").exists()
    )


def test_the_checks_of_a_step():
    """Bounds are over the median, which a spike before does not move; a window must be full; good steps end a row of bad ones."""
    guard = Guard(GuardConfig(window=4, loss_spike=3.0, norm_spike=6.0, skips=2))
    assert [guard.check(make_stats(loss=value)) for value in (1.0, 50.0, 1.2, 0.8)] == [""] * 4
    assert (
        "3.4 is over 3 times the median 1.1 of the last 4 steps" in guard.check(make_stats(loss=3.4))
        and guard.check(make_stats(loss=3.2)) == ""
    )
    assert "gradient's norm 6.1 is over 6" in guard.check(make_stats(norm=6.1)) and guard.check(make_stats(norm=5.9)) == ""
    assert [bool(guard.check(make_stats(bad=bad))) for bad in (True, True, False, True, True, True)] == [False] * 5 + [True]
    assert guard.skipped == 5
    other = Guard(GuardConfig(window=4))
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and list(other.losses) == list(guard.losses)
    other.restore({"losses": [3.0], "row": 1})
    assert other.state() == {"losses": [3.0], "norms": [], "row": 1, "overflows": 0, "skipped": 0}, "nothing of the course that was undone"
    assert not Guard(GuardConfig(window=2, loss_spike=0, norm_spike=0)).check(make_stats(loss=1e9))


def test_the_step_reducer_marks_a_bad_step_on_the_device():
    reducer = StepReducer(torch.device("cpu"), 1)
    one, nan = torch.tensor(1.0), torch.tensor(math.nan)
    flags = [
        float(reducer.reduce(i, a, b, stop=i == 3, writing=False))
        for i, (a, b) in enumerate([(one, one), (nan, one), (one, nan), (one, one)])
    ]
    assert flags == [0, 1, 1, 0]
    assert [(b.step, b.bad, b.stop) for b in reducer.read()] == [(0, False, False), (1, True, False), (2, True, False), (3, False, True)]
    assert reducer.read() == []
    scaled = StepReducer(torch.device("cpu"), 1, scaled=True)
    assert float(scaled.reduce(0, one, nan, stop=False, writing=False)) == 0, "fp16's scaler skips those itself"


def test_the_step_reducer_of_three_ranks(monkeypatch):
    """Means of losses and norms; bad, told to stop, still writing, without data: if any rank is."""
    one = torch.tensor(1.0)
    for others, said in (
        ([5.0, 2.0, 0, 0, 0, 0], (2.0, 1.0, False, False, False, False)),
        ([5.0, 2.0, 1, 0, 0, 0], (2.0, 1.0, True, False, False, False)),
        ([5.0, 2.0, 0, 1, 0, 0], (2.0, 1.0, False, True, False, False)),
        ([5.0, 2.0, 0, 0, 1, 0], (2.0, 1.0, False, False, True, False)),
        ([5.0, 2.0, 0, 0, 0, 1], (2.0, 1.0, False, False, False, True)),
    ):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda facts, others=others: facts.add_(torch.tensor(others)))
        reducer = StepReducer(torch.device("cpu"), 3)
        assert bool(reducer.reduce(7, one, one, stop=False, writing=False)) == said[2]
        assert reducer.read() == [StepStats(7, *said)]


def test_on_a_gpu_the_newest_step_is_not_waited_for():
    reducer, one = StepReducer(torch.device("cpu"), 1), torch.tensor(1.0)
    for step in range(3):
        reducer.reduce(step, one, one, stop=False, writing=False)
    reducer.device = torch.device("cuda")
    assert [b.step for b in reducer.read()] == [0, 1] and reducer.read() == [] and [b.step for b in reducer.read(all=True)] == [2]
    reducer.device = torch.device("cpu")
    reducer.reduce(3, one, one, stop=False, writing=False)
    reducer.clear()
    assert reducer.read(all=True) == []


def test_no_step_of_a_sound_run_is_called_a_spike(digits, tmp_path):
    """The first hundreds of steps, where losses and norms change most, in small batches, where they scatter most."""
    words = ("--train.max_steps=400", "--train.batch_size=8", "--checkpoint.every=1000", "--guard.window=20", "--log.every=100")
    assert fit(digits, tmp_path / "run", *words) == 0 and not (tmp_path / "run/rollbacks.jsonl").exists()
