"""Objectives: their minimisers are the marginal fields, exactly on finite data and by training on a mixture."""

import math

import oracles
import pytest
import torch
from torch import nn

from condot.pipeline.flow import (
    PATHS,
    PREDICTIONS,
    WEIGHTINGS,
    CondOT,
    Cosine,
    Discrete,
    JointObjective,
    LinearPath,
    Objective,
    Purpose,
    ScoreMatching,
    Shifted,
    Uniform,
    UniformPrior,
    convert,
    divergence,
    infinite_loss_times,
    interpolate,
    rademacher,
    target,
    weight,
)

POINTS = torch.tensor([[-1.0, 0.3], [0.2, 1.1], [0.8, -0.9], [1.4, 0.5]], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# what the losses are


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_the_mean_square_error_of_the_target(name, kind):
    """Per sample, over odd shapes, a batch as wide as its images."""
    data, noise = draw(5, 3, 2, 5), draw(5, 3, 2, 5, seed=1)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, c = interpolate(PATHS[name](), data, noise, t)
    seen = []
    loss = Objective(PATHS[name](), kind)(lambda x, t, y: seen.append((x, t, y)) or torch.zeros_like(x), data, noise, t, torch.arange(5))
    wanted = target(kind, data, noise, c)
    if kind == "score":
        wanted = wanted * c.b
    torch.testing.assert_close(loss, wanted.square().mean((1, 2, 3)))
    assert torch.equal(seen[0][0], x) and torch.equal(seen[0][1], t) and seen[0][2].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["condot", "vp", "edm"])
@pytest.mark.parametrize("weighting", ["velocity", "likelihood", "min_snr", "edm"])
def test_a_weighting_means_the_same_for_every_prediction(name, weighting):
    """Models that make the same error in different names have the same loss."""
    path, data, noise = PATHS[name](), draw(6, 3), draw(6, 3, seed=1)
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    x, c = interpolate(path, data, noise, t)
    wrong = data + 0.1 * draw(6, 3, seed=2)
    losses = [
        Objective(path, kind, weighting)(lambda x, t, kind=kind: convert(wrong, "data", kind, x, c), data, noise, t) for kind in PREDICTIONS
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-12)
    snr = (c.a / c.b).flatten() ** 2
    plain = (wrong - data).square().mean(1)
    if weighting == "min_snr":
        torch.testing.assert_close(losses[0], plain * snr.clamp(max=5))
    if weighting == "edm":
        torch.testing.assert_close(losses[0], plain * (1 / snr + 0.25) / (0.25 / snr))  # (sigma^2 + s^2) / (sigma s)^2
    if weighting == "likelihood":
        moment = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.exp(path.log_snr(moment)).sum(), moment)
        torch.testing.assert_close(losses[0], plain * slope / 2)
    if weighting == "velocity":
        moved = convert(wrong, "data", "velocity", x, c) - target("velocity", data, noise, c)
        torch.testing.assert_close(losses[0], moved.square().mean(1))


def test_likelihood_weighting_is_half_g_squared_times_the_score_error():
    c = CondOT()(torch.tensor([0.3, 0.6], dtype=torch.float64))
    g2 = 2 * (c.b**2 * c.da / c.a - c.db * c.b)
    torch.testing.assert_close(weight("likelihood", "score", c), g2 / 2)


def test_min_snr_weights_of_its_paper():
    """min(SNR, 5) on data, / SNR on noise, / (SNR + 1) on v of a variance-preserving path."""
    c = Cosine()(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    snr = (c.a / c.b) ** 2
    torch.testing.assert_close(weight("min_snr", "data", c), snr.clamp(max=5))
    torch.testing.assert_close(weight("min_snr", "noise", c), snr.clamp(max=5) / snr)
    torch.testing.assert_close(weight("min_snr", "v", c), snr.clamp(max=5) / (snr + 1))


# the ends of the path


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weight_at_an_end_of_the_path_is_its_limit(name, kind):
    """At t = 0 and 1 of CondOT, where alpha or beta is 0: what it tends to from inside, infinity included."""
    for end, beside in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        here, near = (weight(name, kind, CondOT()(torch.tensor([t], dtype=torch.float64))).item() for t in (end, beside))
        if name == "likelihood" and kind in ("noise", "score") and end == 0:
            continue  # 1 / (a b) at a = 0: no law but Discrete(0, ...) comes there, and that is refused
        assert (here == math.inf and near > 1e8) or abs(here - near) < 1e-6 * max(1.0, near), (end, here, near)


@pytest.mark.parametrize("path", [CondOT(), Cosine(), PATHS["vp"](), PATHS["sub_vp"]()])
def test_a_score_is_weighed_as_noise_where_beta_vanishes(path):
    """At t = 1 the loss of a score is |0 s + eps|^2, of pairs the velocity's besides, on a general path |0 s + x_init|^2."""
    data, noise, t = draw(3, 2), draw(3, 2, seed=1), torch.ones(3, dtype=torch.float64)
    for objective in (Objective(path, "score"), Objective(LinearPath(), "score")):
        torch.testing.assert_close(objective(lambda x, t: 5 + x, data, noise, t), noise.square().mean(1))
    if path == PATHS["vp"]():
        assert infinite_loss_times(JointObjective(path), Discrete()) == (1.0,)
        return
    c = path(t[:, None])
    wanted = target("velocity", data, noise, c).square().mean(1) + 0.3 * noise.square().mean(1)
    torch.testing.assert_close(JointObjective(path, 0.3)(lambda x, t: (0 * x, 5 + x), data, noise, t), wanted)


def test_a_law_is_asked_whether_it_comes_where_a_loss_is_infinite():
    likely = Objective(CondOT(), "noise", "likelihood")
    assert infinite_loss_times(likely, Discrete(0, 1, 5)) == (0.0, 1.0) and infinite_loss_times(likely, Discrete(0.1, 0.9, 5)) == ()
    assert infinite_loss_times(likely, Shifted(3.0, Discrete())) == (1.0,) and infinite_loss_times(likely, Shifted(3.0, Uniform())) == ()
    assert infinite_loss_times(ScoreMatching(CondOT()), Discrete(0, 1, 5)) == ()


# the minimiser


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "ve"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_minimiser_is_the_marginal_field(name, kind):
    """By enumeration: at x each z_k has a known probability and one noise; the weighted mean of the targets is the marginal one."""
    path, time = PATHS[name](), 0.6
    a, b, da, db = oracles.BY_HAND[name](time)
    law, x = oracles.finite(POINTS), a * POINTS[:1] + b * torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    noise = (x - a * POINTS) / b
    probability = torch.softmax(-noise.square().sum(1) / 2, 0)
    guess = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    t = torch.full((4,), time, dtype=torch.float64)
    loss = Objective(path, kind)(lambda x, t: guess.expand(4, 2), POINTS, noise, t)
    (gradient,) = torch.autograd.grad((probability * loss).sum(), guess)
    scale = b**2 if kind == "score" else 1.0
    minimiser = -gradient / scale  # the loss is scale |guess - target|^2 / 2 in two dimensions
    v = {"data": law.data(x, a, b), "noise": law.noise(x, a, b), "score": law.score(x, a, b), "velocity": law.velocity(x, a, b, da, db)}
    v["v"] = a * v["noise"] - b * v["data"]
    torch.testing.assert_close(minimiser, v[kind], rtol=1e-9, atol=1e-9)


def test_gradients_of_conditional_and_marginal_flow_matching_agree():
    """For an affine model on a Gaussian, over 400,000 draws: the same gradient, within 6 standard errors."""
    n, law = 400_000, oracles.gaussian([0.7, -0.2], [[0.3, 0.1], [0.1, 0.2]])
    data = law.sample(n, torch.Generator().manual_seed(1))
    noise, t = draw(n, 2, seed=2), torch.full((n,), 0.4, dtype=torch.float64)
    x, _ = interpolate(CondOT(), data, noise, t)
    out, conditional, marginal = 0.3 * x - 0.1, data - noise, law.velocity(x, *oracles.condot(0.4))
    for slope in (x, torch.ones_like(x)):  # of the output in the factor 0.3 and in the offset
        gap = (out - conditional) * slope - (out - marginal) * slope
        assert (gap.mean(0).abs() < 6 * gap.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("which", ["denoising", "explicit", "sliced normal", "sliced signs"])
def test_explicit_sliced_and_denoising_score_matching_have_one_minimiser(which):
    """On Gaussian data with a linear score model all give W = -C^-1, w = C^-1 m; 20,000 draws, within 3 %."""
    n, law, t0 = 20_000, oracles.gaussian([0.7, -0.2], [[0.5, 0.2], [0.2, 0.3]]), 0.6
    data = law.sample(n, torch.Generator().manual_seed(1))
    noise, t = draw(n, 2, seed=2), torch.full((n,), t0, dtype=torch.float64)
    probe = draw(n, 2, seed=3)
    if which == "sliced signs":
        probe = rademacher(0, Purpose.PROBE, 0, torch.arange(n), (2,)).double()
    objective = (
        Objective(CondOT(), "score") if which == "denoising" else ScoreMatching(CondOT(), sliced=which != "explicit", mode="forward")
    )

    parameters = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def gradient(p):
        loss = objective(lambda x, t: x @ p[:4].reshape(2, 2).T + p[4:], data, noise, t, probe=probe).mean()
        return torch.autograd.grad(loss, p)[0]

    start = gradient(parameters)
    columns = [gradient((parameters + unit).detach().requires_grad_()) - start for unit in torch.eye(6, dtype=torch.float64)]
    found = -torch.linalg.solve(torch.stack(columns, 1), start)
    c = t0**2 * law.covariances[0] + (1 - t0) ** 2 * torch.eye(2, dtype=torch.float64)
    precision = torch.linalg.inv(c)
    exact = torch.cat([-precision.flatten(), precision @ (t0 * law.means[0])])
    assert (found - exact).norm() < (0.05 if which == "denoising" else 0.03 if which == "explicit" else 0.05) * exact.norm()


def test_explicit_loss_is_half_the_squared_distance_up_to_a_constant():
    """E[tr grad s + |s|^2 / 2] - E[|s - grad log p|^2] / 2 is the same number, -E|grad log p|^2 / 2, for every s."""
    n, t0, law = 100_000, 0.6, oracles.three()
    data, noise, t = law.sample(n, torch.Generator().manual_seed(1)), draw(n, 2, seed=2), torch.full((100_000,), 0.6, dtype=torch.float64)
    x, c = interpolate(CondOT(), data, noise, t)
    score = law.score(x, t0, 1 - t0)
    constant = -score.square().sum(1) / 2
    for model in (lambda x, t: -0.7 * x + 0.3, lambda x, t: torch.sin(2 * x) - x.flip(1)):
        explicit = ScoreMatching(CondOT(), sliced=False)(model, data, noise, t).detach() * 2 / c.b.flatten() ** 2
        gap = explicit - (model(x, t) - score).square().sum(1) / 2 - constant
        assert abs(gap.mean().item()) < 6 * gap.std().item() / math.sqrt(n)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_divergence_is_the_trace_of_the_jacobian(mode):
    weights = draw(2 * 3 * 2, 2 * 3 * 2)

    def function(x):
        return torch.tanh(x.flatten(1) @ weights).reshape(x.shape) * x.square()

    x = draw(5, 2, 3, 2, seed=1)
    value, trace = divergence(function, x, mode=mode)
    for i in range(5):
        jacobian = torch.func.jacrev(lambda p: function(p[None])[0])(x[i]).reshape(12, 12)
        torch.testing.assert_close(trace[i], jacobian.trace())
        probe = draw(5, 2, 3, 2, seed=2)
        torch.testing.assert_close(divergence(function, x, probe, mode)[1][i], probe[i].flatten() @ jacobian @ probe[i].flatten())
    torch.testing.assert_close(value, function(x))


# dtypes, refusals


def test_losses_are_single_precision_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = nn.Linear(3, 3)
        data, noise = draw(4, 3).float(), draw(4, 3, seed=1).float()
        loss = Objective(CondOT(), "score", "likelihood")(lambda x, t: linear(x), data, noise, torch.tensor([0.1, 0.4, 0.6, 0.999]))
        assert linear(data).dtype == torch.bfloat16 and loss.dtype == torch.float32
        low = Objective(CondOT())(lambda x, t: linear(x), data.bfloat16(), noise.bfloat16(), torch.tensor([0.1, 0.4, 0.6, 0.999]))
        assert low.dtype == torch.float32


def test_general_path_objective_reaches_its_target():
    path = LinearPath(UniformPrior(0, 2))
    data, start, t = draw(3, 2), torch.rand(3, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    assert Objective(path)(lambda x, t: data - start, data, start, t).abs().max() < 1e-20


ZERO = torch.zeros(2, 100)
HALF = torch.full((2,), 0.5)
BAD = {
    "prediction": (lambda: Objective(CondOT(), "epsilon"), r"'epsilon' is unknown"),
    "weighting": (lambda: Objective(CondOT(), weighting="snr"), r"'snr' is unknown: choose one of none"),
    "gamma": (lambda: Objective(CondOT(), weighting="min_snr", gamma=0.0), r"gamma=0\.0"),
    "score of a uniform prior": (lambda: Objective(LinearPath(UniformPrior()), "score"), r"score with the prior Uniform"),
    "weighting of a general path": (lambda: Objective(LinearPath(), weighting="edm"), r"'edm' needs the coefficients"),
    "joint": (lambda: JointObjective(LinearPath()), r"needs the score of a Gaussian path"),
    "balance": (lambda: JointObjective(CondOT(), -1.0), r"balance=-1\.0"),
    "one output": (lambda: JointObjective(CondOT())(lambda x, t: x, ZERO, ZERO, HALF), r"pair \(velocity, score\).*Tensor"),
    "shape": (lambda: Objective(CondOT())(lambda x, t: x[:, :1], ZERO, ZERO, HALF), r"gave shape \(2, 1\)"),
    "explicit at image size": (
        lambda: ScoreMatching(CondOT(), sliced=False).check((3, 32, 32)),
        r"3072 dimensions.*limit is 64.*sliced=True",
    ),
    "explicit call": (lambda: ScoreMatching(CondOT(), sliced=False)(lambda x, t: x, ZERO, ZERO, HALF), r"100 dimensions"),
    "no probe": (lambda: ScoreMatching(CondOT())(lambda x, t: x, ZERO, ZERO, HALF), r"no probe"),
    "probe": (lambda: ScoreMatching(CondOT())(lambda x, t: x, ZERO, ZERO, HALF, probe=ZERO[:1]), r"probe \(1, 100\)"),
    "mode": (lambda: ScoreMatching(CondOT(), mode="sideways"), r"'sideways'"),
    "score matching": (lambda: ScoreMatching(LinearPath()), r"needs the score of a Gaussian path"),
    "times": (lambda: Objective(CondOT())(lambda x, t: x, ZERO, ZERO, HALF[:, None]), r"one time per sample"),
    "nan": (lambda: Objective(CondOT())(lambda x, t: x, ZERO * math.nan, ZERO, HALF), r"data holds 200 values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_every_weighting_is_positive_everywhere():
    c = CondOT()(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    for name in WEIGHTINGS:
        for kind in PREDICTIONS:
            assert (weight(name, kind, c) > 0).all()
