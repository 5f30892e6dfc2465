"""Recipes of the section `flow`: each combination trains and samples, and what cannot be right is refused."""

import dataclasses
import itertools

import pytest
import torch
from conftest import fit

from condot.cli import sample
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.config.objective import RandomInputs, TrainingObjective
from condot.pipeline.flow import PATHS, WEIGHTINGS, support
from condot.pipeline.sampling.flow_model import FlowModel
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.sampler import Sampler

PREDICTIONS = ("velocity", "noise", "data", "score", "v")
LAWS = ("uniform", "logit_normal", "mode", "cosmap", "log_normal_sigma", "discrete")


CLEAN = {("data", "velocity"), ("data", "edm"), *((predict, "likelihood") for predict in PREDICTIONS)}
INFINITE = {  # at t = 1 of paths that end clean: (prediction, weighting)
    "condot": CLEAN,
    "cosine": CLEAN,
    "sub_vp": CLEAN,
    "vp": CLEAN | {*itertools.product(PREDICTIONS, ["velocity"]), *itertools.product(["velocity"], WEIGHTINGS)},
}


def flow_of(path, predict, weighting="none", time="uniform", **more):
    predict = "data" if path == "edm" else predict
    return FlowConfig(path=path, predict=predict, weighting=weighting, time=time, **more)


def refused(path, predict, weighting, time):
    return time == "discrete" and (predict, weighting) in INFINITE.get(path, ())


def loss_and_gradient(objective, t, dtype):
    """Of an affine network at one time."""
    part = torch.tensor([[[[0.3, -0.7], [1.1, 0.2]]]], dtype=dtype)
    weights = torch.nn.Parameter(torch.tensor([0.4, 0.2], dtype=dtype))
    draws = RandomInputs(part.flip(3), torch.tensor([t], dtype=dtype), torch.ones(1), torch.ones_like(part))
    loss = objective.losses(lambda x, t, y: weights[0] * x + weights[1], part / 2, draws, torch.zeros(1, dtype=torch.int64))
    return torch.cat([loss.detach(), torch.autograd.grad(loss[0], weights)[0]])


@pytest.mark.parametrize("path", PATHS)
def test_at_the_ends_of_every_law_losses_are_finite_or_the_recipe_is_refused(path):
    """Every accepted combination at the smallest and largest time of its law, in float32 and float64; at t = 1 the limit is the value.

    What is refused is listed above by hand: there the limit is infinite.
    """
    for predict, weighting, time, objective in itertools.product(PREDICTIONS, WEIGHTINGS, LAWS, ("regression", "explicit", "sliced")):
        if (path == "edm" and predict != "data") or (objective != "regression" and (predict != "score" or weighting != "none")):
            continue
        for precondition in {False, predict == "data"}:
            flow = flow_of(path, predict, weighting, time, objective=objective, precondition=precondition)
            if refused(path, predict, weighting, time):
                with pytest.raises(
                    ValueError, match=rf"flow.time=discrete trains at t=1, .*flow.weighting={weighting} on flow.path={path}"
                ):
                    TrainingObjective(flow, (1, 2, 2), 6)
                continue
            law = TrainingObjective(flow, (1, 2, 2), 6)
            ends = support(law.timestep_distribution)
            assert ends == ((torch.tensor(0.001).item(), 1.0) if time == "discrete" else (2.0**-60, 1 - 2.0**-24))
            for t, dtype in itertools.product((*ends, 1 - 2.0**-24), (torch.float32, torch.float64)):
                assert bool(loss_and_gradient(law, t, dtype).isfinite().all()), (flow, t, dtype)
            if time == "discrete":
                here, beside = (loss_and_gradient(law, t, torch.float64) for t in (1.0, 1 - 1e-9))
                torch.testing.assert_close(here, beside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flow", "remedy"),
    [
        ({"predict": "velocity", "path": "vp"}, "flow.predict=v"),
        ({"predict": "velocity", "path": "vp", "weighting": "edm"}, "flow.predict=v"),
        ({"predict": "data", "weighting": "edm"}, "flow.weighting=none"),
    ],
)
def test_the_remedy_of_an_infinite_loss_is_one(flow, remedy):
    with pytest.raises(ValueError, match=f"Set flow.time=uniform, which stays inside, or {remedy}"):
        TrainingObjective(FlowConfig(time="discrete", **flow), (1, 2, 2), 6)
    name, value = remedy.removeprefix("flow.").split("=")
    TrainingObjective(FlowConfig(**{"time": "uniform", **flow}), (1, 2, 2), 6)
    TrainingObjective(FlowConfig(**{"time": "discrete", **flow, "weighting": "none", name: value}), (1, 2, 2), 6)


@pytest.mark.parametrize(("path", "predict"), list(itertools.product(PATHS, PREDICTIONS)))
def test_every_combination_has_finite_losses_and_gradients(path, predict):
    """Path x prediction, each with every weighting and every timestep distribution, on a linear network."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    data = torch.randn(6, 1, 5, 4) / 2
    for weighting, time in itertools.product(WEIGHTINGS, LAWS):
        if refused(path, "data" if path == "edm" else predict, weighting, time):
            continue
        objective = TrainingObjective(flow_of(path, predict, weighting, time, stratified=True), (1, 5, 4), 6)
        draws = objective.draw_random_inputs(0, 3, torch.arange(6))
        losses = objective.losses(lambda x, t, y: network(x), data, draws, torch.zeros(6, dtype=torch.int64))
        assert losses.shape == (6,) and bool(losses.isfinite().all()) and bool((losses >= 0).all()), (weighting, time)
    network.zero_grad()
    losses.mean().backward()
    assert bool(network.weight.grad.isfinite().all())


def gaussian_source(path, predict):
    """The exact predictions for data N(m, s^2) as a network, through the same doors as a trained one."""
    from condot.pipeline.flow import convert, velocity_field, widen

    mean, std = 0.3, 0.4
    p = PATHS[path]()

    def network(x, t, labels):
        x, t = x.double(), t.double().clamp(max=1 - 1e-6)
        c = p(widen(t, x))
        z = mean + c.a * std**2 / (c.a**2 * std**2 + c.b**2) * (x - c.a * mean)
        return convert(z, "data", predict, x, c) if predict != "data" else z

    return FlowModel(velocity_field(network, p, predict), p, (1, 8, 8), 0, 0, torch.device("cpu"), lambda x: x, predict)


@pytest.mark.parametrize(("path", "predict"), [(p, k) for p in PATHS for k in PREDICTIONS if not (p == "edm" and k != "data")])
@pytest.mark.parametrize("solver", ["heun", "exponential"])
def test_every_combination_samples_its_data(path, predict, solver):
    """Gaussian data and the exact field: mean and deviation of the samples are the data's, by ODE and SDE.

    32,000 values: 5 sigma is 0.011.
    """
    sampler = Sampler(
        solver,
        100,
        sigma_t="noise" if path not in ("ve", "edm") else "zero",
        grid="rho" if path in ("ve", "edm") else "uniform",
        clip="off",
    )
    images = generate(gaussian_source(path, predict), torch.zeros(500, dtype=torch.int64), sampler, seed=1, batch_size=500).images
    assert abs(images.mean() - 0.3) < 0.02 and abs(images.std() - 0.4) < 0.02


@pytest.mark.parametrize(
    ("clip", "predict", "latents", "kept"),
    [
        ("auto", "noise", False, True),
        ("auto", "noise", True, False),
        ("auto", "velocity", False, False),
        ("on", "velocity", False, True),
        ("on", "noise", True, True),
        ("off", "noise", False, False),
    ],
)
def test_noise_in_pixels_is_drawn_in_their_range_and_what_else_is_asked_for(clip, predict, latents, kept):
    """Of N(0.3, 0.4^2) 4.1% lie beyond 1 in either direction, 5 sigma is 0.6%; clipped, the last Euler step ends on clamped data."""
    source = dataclasses.replace(gaussian_source("condot", predict), pixels=(3, 16, 16) if latents else ())
    images = generate(source, torch.zeros(500, dtype=torch.int64), Sampler("euler", 50, clip=clip), seed=1, batch_size=500).images
    beyond = (images.abs() > 1 + 1e-4).double().mean()
    assert (beyond == 0) if kept else abs(beyond - 0.041) < 0.012, beyond


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [
        (Sampler("predictor_corrector", 60), 0.02),
        (Sampler("annealed_langevin", 60, corrections=10), 0.05),
        (Sampler("dormand_prince", tolerance=1e-4), 0.02),
        (Sampler("multistep", 40, grid="shifted"), 0.02),
        (Sampler(), 0.02),
        (Sampler("dpmpp_2m_sde", 40, sigma_t=(1.0, 0.6, 0.0)), 0.02),
        (Sampler("dpmpp_2m_sde", 40, sigma_t=lambda t, c: c.b), 0.02),
        (Sampler("heun", 40, churn=10.0, grid="log_snr"), 0.02),
        (Sampler("langevin", 25), 0.02),
        (Sampler("stochastic_heun", 40), 0.02),
        (Sampler("rk4", given_times=(0.0, 0.1, 0.3, 0.6, 0.9, 1.0)), 0.02),
    ],
)
def test_every_sampler_samples_its_data(sampler, tolerance):
    """Gaussian data and the exact velocity on CondOT; evaluations are counted as they happen."""
    source, calls = gaussian_source("condot", "velocity"), []

    def counted(x, t, labels):
        calls.append(len(x))
        return source.field(x, t, labels)

    found = generate(dataclasses.replace(source, field=counted), torch.zeros(500, dtype=torch.int64), sampler, seed=1, batch_size=500)
    assert abs(found.images.mean() - 0.3) < tolerance and abs(found.images.std() - 0.4) < tolerance
    assert found.evaluations == len(calls)


@pytest.mark.parametrize("solver", ["rk4", "heun", "midpoint", "multistep", "dormand_prince", "dpmpp_2m"])
def test_a_data_prediction_is_evaluated_beside_the_end_and_counted(solver):
    """Not at t = 1, where its velocity is not finite, once at 1 - 1e-3; from 0.5 given as the last time nothing is singular."""
    source, calls = gaussian_source("condot", "data"), []

    def counted(x, t, labels):
        calls.append(float(t[0]))
        return source.field(x, t, labels)

    spied, labels = dataclasses.replace(source, field=counted), torch.zeros(50, dtype=torch.int64)
    found = generate(spied, labels, Sampler(solver, 12), seed=1)
    assert found.evaluations == len(calls) and max(calls) < 1 and bool(found.images.isfinite().all())
    assert max(calls) == pytest.approx(11 / 12 if solver == "dpmpp_2m" else 1 - 1e-3)
    calls.clear()
    half = generate(spied, labels, Sampler(solver, given_times=(0.0, 0.25, 0.5)), seed=1)
    assert half.evaluations == len(calls) and max(calls) == 0.5


def test_a_plain_drift_is_wider_than_the_data():
    """dX = u dt + dW of a flow's velocity: without the score nothing takes the noise off again."""
    images = generate(
        gaussian_source("condot", "velocity"),
        torch.zeros(200, dtype=torch.int64),
        Sampler("euler_maruyama", 100, sigma_t="constant", drift="plain"),
        seed=1,
    ).images
    assert images.std() > 0.5


def test_plain_langevin_relaxes_to_the_density_of_its_time():
    """At t = 1/2 N(m, s^2) has become N(m / 2, (s^2 + 1) / 4); its denoised points have mean m and deviation s^2 / sqrt(s^2 + 1)."""
    sampler = Sampler("langevin", 300, langevin_step=0.1, given_times=(0.0, 0.5))
    images = generate(gaussian_source("condot", "velocity"), torch.zeros(200, dtype=torch.int64), sampler, seed=1).images
    assert abs(images.mean() - 0.3) < 0.02 and abs(images.std() - 0.16 / 1.16**0.5) < 0.01


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ({"prior": "uniform", "predict": "score"}, "only where the prior is normal"),
        ({"prior": "uniform", "path": "cosine"}, "goes with the straight line"),
        ({"objective": "explicit", "predict": "score"}, "limit is 64"),
        ({"objective": "sliced"}, "set flow.predict=score"),
        ({"path": "edm"}, "Set flow.predict=data"),
        ({"coupling": "optimal_transport", "coupling_group": 1}, "at least two images"),
        ({"weighting": "edm", "prior": "uniform"}, "use none on a general linear path"),
    ],
)
def test_what_cannot_be_right_is_refused_at_the_start(flow, message):
    with pytest.raises(ValueError, match=message):
        TrainingObjective(FlowConfig(**flow), (3, 16, 16), 8)


@pytest.mark.parametrize(
    "words",
    [
        ("--flow.path=edm", "--flow.predict=data", "--flow.weighting=edm", "--flow.time=log_normal_sigma", "--flow.time_mean=-1.2"),
        ("--flow.path=sub_vp", "--flow.predict=score", "--flow.time=cosmap", "--flow.stratified=true"),
        ("--flow.prior=uniform", "--flow.coupling=optimal_transport", "--flow.coupling_group=8"),
        ("--flow.objective=sliced", "--flow.predict=score", "--flow.path=ve", "--flow.precondition=false"),
    ],
)
def test_unusual_recipes_train_and_sample_from_their_runs(digits, tmp_path, capsys, words):
    assert fit(digits, tmp_path / "run", *words) == 0
    words = ["--run", str(tmp_path / "run"), "--num_inference_steps", "6", "--solver", "midpoint", "--output", str(tmp_path / "a.png")]
    assert sample.main(words) == 0 and (tmp_path / "a.png").exists()


def test_optimal_transport_straightens_and_keeps_ranks_alike():
    """Coupled pairs are nearer than drawn ones; groups of fixed places give the same pairs in one batch and in two."""
    objective = TrainingObjective(FlowConfig(coupling="optimal_transport", coupling_group=4), (2, 2, 2), 16)
    draws, data = objective.draw_random_inputs(0, 1, torch.arange(16)), torch.randn(16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 2
    whole = objective.couple_noise(data, draws.noise, labels)
    halves = torch.cat([objective.couple_noise(data[s], draws.noise[s], labels[s]) for s in (slice(0, 8), slice(8, 16))])
    assert torch.equal(whole, halves) and (data - whole).square().sum() < (data - draws.noise).square().sum()
    assert sorted(whole.flatten(1).sum(1).tolist()) == sorted(draws.noise.flatten(1).sum(1).tolist()), "no noise twice"
    with pytest.raises(ValueError, match="does not divide the micro-batch of 6 images"):
        objective.couple_noise(data[:6], draws.noise[:6], labels[:6])
