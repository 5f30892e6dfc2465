"""Networks of two outputs, velocity and score: trained from a recipe, resumed, sampled by the learned score, exported and read back."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import fit
from diffusers import DiTPipeline, DiTTransformer2DModel

from condot.cli import sample
from condot.cli.assembly.trained_model import TrainedModel
from condot.core.text_states import TextStates
from condot.models import registry
from condot.models.convert import to_diffusers
from condot.models.dit.spec import DiTConfig
from condot.models.mmdit.spec import MMDiTConfig
from condot.models.unet.spec import UNetConfig
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.objective import TrainingObjective
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.flow import PATHS, JointObjective, widen
from condot.pipeline.sampling.flow_model import build_flow_model
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.sampler import Sampler

JOINT = FlowConfig(objective="joint", joint_balance=0.5)
MEAN, STD = 0.3, 0.4


class Affine(torch.nn.Module):
    """`w x + v` of each output, a weight and a bias for each of a grid of times: exact for Gaussian data at those times."""

    def __init__(self, times):
        super().__init__()
        self.times, self.parts = times, torch.nn.Parameter(torch.zeros(2, 2, len(times), dtype=torch.float64))

    def forward(self, x, t, condition, sizes=None):
        nearest = (t[:, None] - self.times).abs().argmin(1)
        w, v = self.parts[:, :, nearest].reshape(2, 2, -1, 1, 1, 1)
        return torch.cat([w[0] * x + v[0], w[1] * x + v[1]], 1)


def exact(path, x, t):
    """Velocity and score of N(MEAN, STD^2) on a path, by the formula for Gaussians."""
    c = path(widen(t, x))
    variance, away = (c.a * STD) ** 2 + c.b**2, x - c.a * MEAN
    return c.da * MEAN + (c.a * c.da * STD**2 + c.b * c.db) / variance * away, -away / variance


@pytest.mark.parametrize("path", ["condot", "cosine", "sub_vp"])
def test_the_pair_that_is_learned_is_exact_where_it_can_be(path):
    """Gaussian data, an affine network: least squares by the loss's own Hessian, one Newton step from zero, gives both in closed form."""
    times = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    network, objective = Affine(times), TrainingObjective(replace(JOINT, path=path), (1, 4, 4), 8)
    data = MEAN + STD * torch.randn(3000, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3000, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = objective.draw_random_inputs(0, 0, torch.arange(3000))._replace(noise=noise, t=times[torch.arange(3000) % 3])

    def loss(flat):
        wanted = torch.func.functional_call
        call = lambda *given: wanted(network, {"parts": flat.reshape(2, 2, 3)}, given)  # noqa: E731
        return objective.losses(call, data, draws, torch.zeros(3000, dtype=torch.int64)).mean()

    zero = torch.zeros(12, dtype=torch.float64)
    best = -torch.linalg.solve(torch.func.hessian(loss)(zero), torch.func.grad(loss)(zero))
    network.parts.data = best.reshape(2, 2, 3)
    x = torch.linspace(-1, 1, 3, dtype=torch.float64).reshape(3, 1, 1, 1)
    learned = objective.build_predictor(network)(x, times, None)
    for mine, its in zip(learned, exact(PATHS[path](), x, times), strict=True):
        torch.testing.assert_close(mine, its, rtol=0.05, atol=0.05)


def test_the_sde_goes_by_the_learned_score_and_the_ode_by_the_velocity():
    """A score that is wrong by a factor moves the SDE's samples, and the ODE's not; the exact pair gives the data by both."""
    path = PATHS["condot"]()

    def pair(factor):
        def network(x, t, labels, sizes=None):
            velocity, score = exact(path, x.double(), t.double())
            return torch.cat([velocity, factor * score], 1)

        network.parameters = lambda: iter([torch.zeros(1)])
        return build_flow_model(network, JOINT, (1, 8, 8), 0, lambda x: x)

    labels = torch.zeros(500, dtype=torch.int64)
    of = {
        (solver, factor): generate(pair(factor), labels, Sampler(solver, 100, sigma_t="noise"), seed=1, batch_size=500).images
        for solver in ("exponential", "heun")
        for factor in (1.0, 2.0)
    }
    for solver in ("exponential", "heun"):
        images = of[solver, 1.0]
        assert abs(images.mean() - MEAN) < 0.02 and abs(images.std() - STD) < 0.02
    assert torch.equal(of["heun", 1.0], of["heun", 2.0]) and abs(of["exponential", 2.0].std() - STD) > 0.04


@pytest.fixture(scope="module")
def joint(digits, tmp_path_factory):
    """A run of 12 steps with previews and its export."""
    folder = tmp_path_factory.mktemp("joint") / "run"
    words = ("--flow.objective=joint", "--export=true", "--log.sample_every=12", "--log.sample_steps=2", "--log.guidance_scale=1")
    assert fit(digits, folder, *words) == 0
    return folder


def test_a_recipe_trains_resumes_and_exports_both_outputs(joint, digits, tmp_path):
    """Bitwise the same stopped and resumed; the export is a stock DiT of twice the channels, whose first half DiTPipeline draws with."""
    config = json.loads((joint / "export" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel" and (config["in_channels"], config["out_channels"]) == (1, 2)
    assert list((joint / "samples").glob("*.png"))
    words = ("--flow.objective=joint",)
    assert fit(digits, tmp_path / "again", *words, "--train.max_steps=8") == 0 and fit(digits, tmp_path / "again", *words) == 0
    whole, again = (TrainedModel(folder) for folder in (joint, tmp_path / "again"))
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    stock = DiTTransformer2DModel.from_pretrained(joint / "export" / "transformer")
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0, 3, 1000])
    theirs = stock(x, timestep=1000 * (1 - t), class_labels=labels, return_dict=False)[0]
    torch.testing.assert_close(-theirs, whole.network(x, t, labels.clamp(max=10)), rtol=1e-4, atol=1e-5)
    images = DiTPipeline.from_pretrained(joint / "export")([1], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape[1:3] == (8, 8)


@pytest.mark.parametrize("solver", ["heun", "exponential"])
def test_a_folder_read_back_draws_what_its_run_draws(joint, solver):
    """Velocity and score come back with the factor of the export undone: the ODE and the SDE by the learned score."""
    run, folder = TrainedModel(joint).build_model("cpu"), load_flow_model(joint / "export")
    labels, sampler = torch.tensor([0, 3, 7]), Sampler(solver, 6)
    mine, its = (generate(source, labels, sampler, seed=2).images for source in (run, folder))
    torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    velocity, score = folder.field(torch.zeros(1, 1, 8, 8), torch.tensor([0.5]), labels[:1])
    assert velocity.shape == score.shape == (1, 1, 8, 8) and not torch.equal(velocity, score)


def test_the_command_samples_and_measures_them(joint, digits, tmp_path, capsys):
    words = ["--run", str(joint), "--output", str(tmp_path / "a.png"), "--num_inference_steps", "3", "--solver", "exponential"]
    assert sample.main([*words, "--guidance_scale", "1"]) == 0 and (tmp_path / "a.png").exists()
    words = ["likelihood", "--pipeline", str(joint / "export"), "--reference", str(digits), "--num_images", "2", "--estimate", "true"]
    assert sample.main([*words, "--tolerance", "1e-2"]) == 0 and "bits per dimension" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dit", "unet", "mmdit", "cross_dit"])
def test_every_network_gives_both_outputs(kind):
    small = {"patch_size": 2, "width": 32, "depth": 1, "heads": 2}
    text = {"text_width": 8, "pooled_width": 8}
    options = {"dit": {**small, "num_classes": 3}, "unet": {"block_channels": (32, 32), "num_classes": 3}}.get(kind, {**small, **text})
    one, two = (registry.build(kind, seed=0, channels=3, resolution=8, outputs=n, **options) for n in (1, 2))
    condition = torch.tensor([0, 3]) if kind in ("dit", "unet") else TextStates(torch.randn(2, 4, 8), None, torch.randn(2, 8))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    assert one(x, t, condition).shape == x.shape and two(x, t, condition).shape == (2, 6, 8, 8)
    torch.manual_seed(0)
    for parameter in two.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    exported = to_diffusers(two, -1.0)
    assert exported.config.out_channels == 6
    if kind == "dit":
        theirs = exported(x, timestep=1000 * (1 - t), class_labels=torch.tensor([0, 1000]), return_dict=False)[0]
        torch.testing.assert_close(theirs, -two(x, t, condition), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ({"predict": "score"}, "Set flow.predict=velocity"),
        ({"weighting": "min_snr"}, "flow.weighting=min_snr"),
        ({"prior": "uniform"}, "flow.prior=uniform"),
        ({"precondition": True}, "the scaled network predicts data"),
        ({"path": "vp", "time": "discrete"}, "trains at t=1"),
    ],
)
def test_what_a_pair_cannot_be_is_refused(flow, message):
    with pytest.raises(ValueError, match=message):
        TrainingObjective(FlowConfig(objective="joint", **flow), (1, 4, 4), 8)


def test_a_balance_is_finite_and_not_negative():
    with pytest.raises(ValueError, match=r"flow.joint_balance=-1"):
        FlowConfig(objective="joint", joint_balance=-1)
    assert TrainingObjective(JOINT, (1, 4, 4), 8).loss_function == JointObjective(PATHS["condot"](), 0.5)


@pytest.mark.parametrize("words", [("--model.style=modern",), ("--model.micro_conditions=true",)])
def test_an_export_that_nothing_draws_with_is_refused_before_training(digits, tmp_path, words, capsys):
    assert fit(digits, tmp_path / "run", "--flow.objective=joint", "--export=true", *words) != 0
    told = capsys.readouterr().err
    assert "flow.objective=joint is exported of networks on classes" in told and "Give --export=false" in told and "Traceback" not in told
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_options_of_one_output_are_those_of_before():
    for config in (DiTConfig(), UNetConfig(), MMDiTConfig()):
        plain = build_model_kwargs(config, (3, 8, 8), 2, (8, 8))
        assert "outputs" not in plain and build_model_kwargs(config, (3, 8, 8), 2, (8, 8), "joint") == plain | {"outputs": 2}


def test_the_first_half_is_the_velocity_and_the_second_the_score():
    """A network that gives both exactly, for a datum and a noise that are known, has no loss; with its halves swapped it has."""
    objective = TrainingObjective(FlowConfig(objective="joint"), (2, 4, 4), 3)
    data = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = objective.draw_random_inputs(0, 0, torch.arange(3))
    away = 1 - draws.t.reshape(-1, 1, 1, 1)
    velocity, score = data - draws.noise, -draws.noise / away
    labels = torch.zeros(3, dtype=torch.int64)
    losses = [
        objective.losses(lambda x, t, y, out=out: torch.cat(out, 1), data, draws, labels) for out in ((velocity, score), (score, velocity))
    ]
    assert losses[0].max() < 1e-9 and losses[1].min() > 0.01
