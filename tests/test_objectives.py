"""Objectives, regularisers and callbacks of one's own: registered from outside, named in a recipe, logged, resumed."""

import json
import math
import signal
from dataclasses import dataclass

import pytest
import torch
from conftest import arguments, fit, launch
from test_guard import equal

from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.config.objective import RandomInputs, TrainingObjective
from condot.pipeline.config.parse import config_from_mapping, config_to_mapping, parse
from condot.pipeline.config.schema import Config
from condot.pipeline.flow import CondOT, JointObjective, Objective, interpolate, target
from condot.pipeline.objectives.regularisers import REGULARISERS, Regulariser
from condot.pipeline.objectives.step_objective import StepBatch, StepLoss, StepObjective
from condot.pipeline.objectives.table import OBJECTIVES
from condot.pipeline.training.callbacks import CALLBACKS
from condot.pipeline.training.resume_rules import find_differences

LOG = ("--log.every=1", "--flow.regularisers.energy.weight=0.25", "--flow.regularisers.energy.power=3")


@pytest.fixture
def energy():
    """A term of one's own: the mean power of the prediction, and of noise that it draws."""

    @REGULARISERS.register("energy")
    @dataclass(frozen=True, kw_only=True)
    class Energy(Regulariser):
        power: float = 2.0  # of the prediction

        def __call__(self, network, batch, flow):
            shaken = network.last.prediction + 0.1 * batch.normal("energy")
            return shaken.abs().pow(self.power).flatten(1).mean(1)

    yield Energy
    REGULARISERS.discard("energy")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def batch_of(n=6, shape=(2, 3, 4)):
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(n, *shape, generator=generator) for _ in range(2))
    return data, RandomInputs(noise, torch.linspace(0.1, 0.9, n), torch.ones(n), noise.sign())


PLACE = torch.arange(6)


def network(x, t, labels):
    return 0.3 * x + 0.1


# --- the sum


def test_a_weighted_term_is_added_and_each_part_is_named(energy):
    """By hand: the loss of flow/objective.py, a weight times a mean, and both without it."""
    data, draws = batch_of()
    labels = torch.zeros(6, dtype=torch.int64)
    flow = parse(Config, list(LOG)).flow
    found = TrainingObjective(flow, (2, 3, 4), 6)(network, data, draws, labels, seed=5, step=7, indices=PLACE)
    plain = Objective(CondOT())(network, data, draws.noise, draws.t, labels)
    t = draws.t.view(-1, 1, 1, 1)
    shaken = 0.3 * (t * data + (1 - t) * draws.noise) + 0.1
    shaken = shaken + 0.1 * StepBatch(data, draws.noise, draws.t, seed=5, step=7, indices=PLACE).normal("energy")
    term = shaken.abs().pow(3).mean((1, 2, 3))
    assert set(found.extras) == {"loss/regression", "loss/energy"}
    torch.testing.assert_close(found.extras["loss/energy"], term)
    assert torch.equal(found.extras["loss/regression"], plain)
    torch.testing.assert_close(found.loss, plain + 0.25 * term)


def test_numbers_of_ones_own_are_those_of_the_place_and_of_the_name():
    data, draws = batch_of()
    whole = StepBatch(data, draws.noise, draws.t, seed=5, step=7, indices=PLACE)
    half = StepBatch(data[3:], draws.noise[3:], draws.t[3:], seed=5, step=7, indices=PLACE[3:])
    assert torch.equal(whole.normal("a")[3:], half.normal("a")) and torch.equal(whole.uniform("a")[3:], half.uniform("a"))
    assert not torch.equal(whole.normal("a"), whole.normal("b")) and not torch.equal(whole.normal("a"), whole.normal("a") * 0)
    assert not torch.equal(whole.normal("a"), StepBatch(data, draws.noise, draws.t, seed=5, step=8, indices=PLACE).normal("a"))


def test_a_joint_objective_tells_both_errors():
    data, draws = batch_of()
    labels = torch.zeros(6, dtype=torch.int64)
    found = TrainingObjective(FlowConfig(objective="joint", joint_balance=0.5), (2, 3, 4), 6)(
        lambda x, t, y: torch.cat([0.3 * x, 0.2 * x], 1), data, draws, labels
    )
    assert torch.equal(found.loss, found.extras["loss/velocity"] + 0.5 * found.extras["loss/score"])
    loss = JointObjective(CondOT(), 0.5)(lambda x, t, y: (0.3 * x, 0.2 * x), data, draws.noise, draws.t, labels)
    assert torch.equal(found.loss, loss)


def test_a_term_of_the_wrong_shape_is_refused(energy, monkeypatch):
    data, draws = batch_of()
    monkeypatch.setattr(energy, "__call__", lambda self, network, batch, flow: network.last.prediction)
    with pytest.raises(ValueError, match=r"regulariser 'energy' gave shape \(6, 2, 3, 4\) for 6 samples: one number a sample, \(6,\)"):
        TrainingObjective(parse(Config, list(LOG)).flow, (2, 3, 4), 6)(network, data, draws, torch.zeros(6, dtype=torch.int64))


# --- the recipe


def test_a_recipe_names_it_and_a_run_records_it_where_it_has_a_weight(energy, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("flow: {regularisers: {energy: {weight: 0.25, power: 3}}}")
    config = parse(Config, ["--config", str(tmp_path / "a.yaml")])
    assert config == parse(Config, list(LOG[1:])) != parse(Config, [])
    saved = config_to_mapping(config)
    assert saved["flow"]["regularisers"] == {"energy": {"weight": 0.25, "power": 3.0}}
    assert config_from_mapping(Config, saved) == config
    assert "regularisers" not in config_to_mapping(Config())["flow"], "what nobody uses is no part of a run"
    (difference,) = find_differences(config_to_mapping(Config()), saved)
    assert difference.startswith("flow.regularisers is None there and {'energy'")
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert "--flow.regularisers.energy.power" in text and "of the prediction" in text


def test_an_objective_of_ones_own_has_options_and_trains(digits, tmp_path):
    """A loss with a corner far away: within it half of regression's, and so named in the recipe and among the facts."""

    @OBJECTIVES.register("huber")
    @dataclass(frozen=True, kw_only=True)
    class Huber(StepObjective):
        delta: float = 1.0  # where the square becomes a line

        def __call__(self, network, batch, flow):
            x, c = interpolate(flow.path, batch.data, batch.noise, batch.t)
            wanted = target(flow.predict, batch.data, batch.noise, c)
            error = torch.nn.functional.huber_loss(network(x, batch.t, *batch.condition), wanted, reduction="none", delta=self.delta)
            return StepLoss(error.flatten(1).mean(1), {"far": (error > self.delta).float().mean()})

    try:
        data, draws = batch_of()
        labels = torch.zeros(6, dtype=torch.int64)
        (tmp_path / "a.yaml").write_text("flow: {objective: {kind: huber, delta: 100}}")
        config = parse(Config, ["--config", str(tmp_path / "a.yaml")])
        assert config_to_mapping(config)["flow"]["objective"] == {"kind": "huber", "delta": 100.0}
        found, plain = (TrainingObjective(flow, (2, 3, 4), 6)(network, data, draws, labels) for flow in (config.flow, FlowConfig()))
        torch.testing.assert_close(found.loss, plain.loss / 2)
        assert fit(digits, tmp_path / "run", "--flow.objective=huber", "--flow.objective.delta=0.5") == 0
        assert all(0 < line["far"] < 1 for line in lines(tmp_path / "run"))
    finally:
        OBJECTIVES.discard("huber")
    with pytest.raises(ValueError, match=r"flow.objective=huber: .*unknown"):
        FlowConfig(objective="huber")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--flow.regularisers.energi.weight=1", "regulariser 'energi' is unknown"),
        ("--flow.regularisers.energy.powr=1", "unknown key 'flow.regularisers.energy.powr': did you mean 'flow.regularisers.energy.power'"),
        ("--flow.regularisers.energy.power=much", "much"),
    ],
)
def test_mistakes_are_told(energy, word, message):
    with pytest.raises(ValueError, match=message):
        parse(Config, [word])


@pytest.mark.parametrize("weight", ["-1", "inf", "nan"])
def test_a_weight_is_positive_and_finite(energy, weight):
    with pytest.raises(ValueError, match=r"flow.regularisers.energy.weight=.*: 0 \(left out\) or a positive, finite factor"):
        TrainingObjective(parse(Config, [f"--flow.regularisers.energy.weight={weight}"]).flow, (1, 2, 2), 6)


# --- the run


class Stops:
    """A signal in the middle of a log interval, where no checkpoint is due."""

    def due(self, run):
        return run.step == 7

    def act(self, run):
        run.interrupt.received = signal.SIGINT


def test_a_run_logs_it_resumes_bitwise_and_is_another_without_it(energy, digits, tmp_path, capsys):
    """Cut in the middle of a log interval: the sums of the extras are in the checkpoint."""
    more = (*LOG[1:], "--log.every=4", "--checkpoint.every=3", "--train.gradient_accumulation_steps=2")
    assert fit(digits, tmp_path / "whole", *more) == 0
    CALLBACKS.add("stops", Stops)
    try:
        assert fit(digits, tmp_path / "parts", *more) == 128 + signal.SIGINT
    finally:
        CALLBACKS.discard("stops")
    assert fit(digits, tmp_path / "parts", *more) == 0
    assert equal(tmp_path / "whole/checkpoint-12", tmp_path / "parts/checkpoint-12")
    keys = ("loss", "loss/regression", "loss/energy")
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [[line[key] for key in keys] for line in whole] == [[line[key] for key in keys] for line in parts]
    for line in whole:
        assert line["loss"] == pytest.approx(line["loss/regression"] + 0.25 * line["loss/energy"], rel=1e-6)
    assert fit(digits, tmp_path / "plain", *more[2:]) == 0
    assert not equal(tmp_path / "whole/checkpoint-12", tmp_path / "plain/checkpoint-12")
    assert "loss/energy" not in lines(tmp_path / "plain")[0]
    assert fit(digits, tmp_path / "parts", *more, "--flow.regularisers.energy.weight=0.5") != 0
    assert "flow.regularisers.energy.weight is 0.25 there and 0.5 here" in "".join(capsys.readouterr())


def test_the_dry_run_counts_it(energy, digits, tmp_path, capsys):
    assert fit(digits, tmp_path / "run", *LOG, "--dry_run") == 0
    assert not (tmp_path / "run/metrics.jsonl").exists()


SCRIPT = """
import sys
from dataclasses import dataclass

from condot.core.process import take_signals
import torch

take_signals("the same command goes on")
from condot.cli import train
from condot.pipeline.objectives.regularisers import REGULARISERS, Regulariser
from condot.pipeline.training.callbacks import CALLBACKS


@REGULARISERS.register("energy")
@dataclass(frozen=True, kw_only=True)
class Energy(Regulariser):
    def __call__(self, network, batch, flow):
        again = network(batch.normal("x"), batch.t, *batch.condition)  # a second pass in one step
        return again.square().flatten(1).mean(1) + network.last.x.mean()


@CALLBACKS.register("together")
class Together:
    def due(self, run):
        return run.step == 5

    def act(self, run):
        ranks = run.accelerator.reduce(torch.ones(1), reduction="sum")
        run.log.say(f"together {int(ranks)}")
        raise RuntimeError("on all ranks")


sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.faults
@pytest.mark.usefixtures("one_thread")
def test_on_two_processes_it_is_the_term_of_one(digits, tmp_path):
    """Losses and extras of each step, though a term asks the network again; a callback that fails on both ranks ends nothing."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    more = ("--log.every=1", "--flow.regularisers.energy.weight=0.5", "--train.gradient_accumulation_steps=2")
    for ranks in (1, 2):
        run = arguments(digits, tmp_path / str(ranks), *more)
        done = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(tmp_path / "mine.py"), *run)
        assert done.returncode == 0, done.stderr[-3000:]
        told = done.stdout + done.stderr
        assert f"together {ranks}" in told and told.count("the callback together failed, and training goes on (RuntimeError: on all") == 1
    one, two = lines(tmp_path / "1"), lines(tmp_path / "2")
    for key in ("loss", "loss/regression", "loss/energy"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5)
    assert len(two) == 12 and one[0]["loss/energy"] > 0.01


# --- callbacks


def test_callbacks_act_when_due_in_order_and_their_failures_end_nothing(digits, tmp_path, capsys):
    """The house's own first: at step 4 a checkpoint is under way when ours acts."""
    seen = []

    @CALLBACKS.register("looks")
    class Looks:
        needs_checked_step = True

        def due(self, run):
            return run.step % 4 == 0

        def act(self, run):
            saved = run.checkpoints.pending is not None or run.last_saved_step == run.step
            seen.append((run.step, run.step == 12 or saved, len(lines(tmp_path / "run"))))

    @CALLBACKS.register("fails")
    class Fails:
        def due(self, run):
            return run.step in (3, 5)

        def act(self, run):
            raise RuntimeError("no such thing")

    try:
        assert fit(digits, tmp_path / "run") == 0
    finally:
        CALLBACKS.discard("looks")
        CALLBACKS.discard("fails")
    assert seen == [(4, True, 2), (8, True, 4), (12, True, 6)]
    told = capsys.readouterr().out
    assert told.count("the callback fails failed, and training goes on (RuntimeError: no such thing)") == 1
    assert "2 times: the callback fails: RuntimeError: no such thing" in told
    assert list(CALLBACKS) == ["log", "snapshot", "checkpoint", "preview"]
    assert fit(digits, tmp_path / "plain") == 0
    assert equal(tmp_path / "run/checkpoint-12", tmp_path / "plain/checkpoint-12")


def test_every_objective_of_the_table_has_finite_losses():
    assert list(OBJECTIVES) == ["regression", "joint", "explicit", "sliced"]
    data, draws = batch_of()
    for name in OBJECTIVES:
        flow = FlowConfig(objective=name, predict="score" if name in ("explicit", "sliced") else "velocity")
        model = (lambda x, t, y: torch.cat([x, x], 1)) if name == "joint" else network
        loss = TrainingObjective(flow, (2, 3, 4), 6)(model, data, draws, torch.zeros(6, dtype=torch.int64)).loss
        assert loss.shape == (6,) and all(map(math.isfinite, loss.tolist())), name
