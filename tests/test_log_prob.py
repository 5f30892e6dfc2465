"""Log-probabilities of SDE steps: torch's normal law, the law of a trajectory in closed form, and the identity that REINFORCE rests on."""

import math
from itertools import pairwise

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    CondOT,
    Cosine,
    diffusion_coefficient,
    euler_maruyama,
    exponential,
    step_distribution,
    step_log_prob,
    trajectory_log_prob,
    uniform_grid,
)
from condot.pipeline.flow.sde import euler_maruyama_coefficients, exponential_coefficients

DRAW = torch.Generator().manual_seed(2)
X, MEAN = (torch.randn(3, 2, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
SOLVERS = {"exponential": (exponential, exponential_coefficients), "euler_maruyama": (euler_maruyama, euler_maruyama_coefficients)}


@pytest.mark.parametrize("std", [0.3, torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)[:, None, None]], ids=["one", "each"])
def test_it_is_torchs_normal_law(std):
    theirs = torch.distributions.Normal(MEAN, std).log_prob(X).flatten(1).sum(1)
    torch.testing.assert_close(step_log_prob(X, MEAN, std), theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step_log_prob(X, MEAN, std, reduction="mean"), theirs / 10, rtol=1e-12, atol=1e-12)


def test_many_values_are_summed_in_double_precision():
    """A million float32 values: within 1e-3 of the exact sum, where a float32 sum is a multiple of 0.06."""
    x = torch.randn(1, 1_000_000, generator=DRAW)
    exact = -(x.double().square().sum(1) + x.numel() * math.log(2 * math.pi)) / 2
    assert (step_log_prob(x, torch.zeros_like(x), 1.0) - exact).abs() < 1e-3 and step_log_prob(x, x, 1.0).dtype == torch.float64


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_steps_law_is_that_of_its_draws(solver):
    """What a solver does in one step, with its noise and without: mean and deviation of the plan."""
    solve, step_coefficients = SOLVERS[solver]
    law, times, sigma = oracles.three(), torch.tensor([0.3, 0.45, 1.0], dtype=torch.float64), diffusion_coefficient("noise", 0.8)
    seen, noise = [], torch.randn(5, 2, generator=DRAW, dtype=torch.float64)
    x = torch.randn(5, 2, generator=DRAW, dtype=torch.float64)
    solve(law.field(oracles.condot), x, times, CondOT(), sigma, lambda k: noise, step_callback=lambda x, t: seen.append(x) or x)
    u, score = law.velocity(x, *oracles.condot(0.3)), law.score(x, 0.3, 0.7)
    mean, std = step_distribution(step_coefficients(CondOT(), times, sigma), 0, x, u, score)
    torch.testing.assert_close(mean + std * noise, seen[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learned", [False, True], ids=["velocity", "both"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_sum_over_a_trajectory_is_its_law_in_closed_form(solver, learned):
    """Gaussian data in one dimension make every step linear, so all noisy points are jointly normal given the start."""
    gauss, times, sigma = oracles.gaussian([0.7], [[0.25]]), torch.linspace(0.1, 1, 5, dtype=torch.float64), diffusion_coefficient("noise")
    coefficients = lambda t: tuple(part.item() for part in Cosine()(torch.tensor(t, dtype=torch.float64)))  # noqa: E731

    def field(x, t):
        a, b, da, db = coefficients(t[0].item())
        return (gauss.velocity(x, a, b, da, db), gauss.score(x, a, b)) if learned else gauss.velocity(x, a, b, da, db)

    def ends(start, draws):
        points = [start]
        SOLVERS[solver][0](field, start, times, Cosine(), sigma, lambda k: draws[k], step_callback=lambda x, t: points.append(x) or x)
        return points

    start, zero = torch.full((1, 1), 0.4, dtype=torch.float64), torch.zeros(3, 1, 1, dtype=torch.float64)
    middle = torch.cat(ends(start, zero)[1:4]).flatten()
    units = torch.eye(3, dtype=torch.float64)[..., None, None]
    root = torch.stack([torch.cat(ends(start, one)[1:4]).flatten() - middle for one in units], 1)
    points = ends(start, torch.randn(3, 1, 1, generator=DRAW, dtype=torch.float64))
    joint = torch.distributions.MultivariateNormal(middle, root @ root.T).log_prob(torch.cat(points[1:4]).flatten())
    found = trajectory_log_prob(field, points, times, Cosine(), sigma, solver=solver)
    assert found.shape == (4, 1) and found[-1] == 0
    torch.testing.assert_close(found.sum(), joint, rtol=1e-9, atol=1e-9)


def test_expected_gradients_are_zero_and_lead_uphill():
    """E[grad log p] = 0 over a policy's own draws; E[r grad log p] is the gradient of E[r], here of the mean of the last noisy point."""
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    times, sigma, count = uniform_grid(3), diffusion_coefficient("noise", 1.5), 100_000
    generator = torch.Generator().manual_seed(7)

    def field(x, t):
        return theta * torch.ones_like(x) - 0.5 * x

    def points(noise):
        found = [torch.zeros(count if noise is None else 1, 1, dtype=torch.float64)]
        draw = lambda k: torch.randn(found[0].shape, generator=generator, dtype=torch.float64) if noise is None else noise  # noqa: E731
        exponential(field, found[0], times, CondOT(), sigma, draw, step_callback=lambda x, t: found.append(x) or x)
        return found

    drawn = [x.detach() for x in points(None)]
    logs = trajectory_log_prob(field, drawn, times, CondOT(), sigma).sum(0)
    reward = drawn[2].flatten()
    bump = 1e-4 * torch.ones(count, dtype=torch.float64)
    with torch.no_grad():
        each = []
        for sign in (1, -1):
            theta += sign * bump[0]
            each.append(trajectory_log_prob(field, drawn, times, CondOT(), sigma).sum(0))
            theta -= sign * bump[0]
        gradient = (each[0] - each[1]) / 2e-4  # of each trajectory
    (total,) = torch.autograd.grad(logs.sum(), theta)
    torch.testing.assert_close(total, gradient.sum(), rtol=1e-6, atol=1e-3)
    assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(count)
    (exact,) = torch.autograd.grad(points(torch.zeros(1, 1, dtype=torch.float64))[2].sum(), theta)  # linear: the mean's own gradient
    estimate = reward * gradient
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / math.sqrt(count) and exact > 0.1


GRID = uniform_grid(2)
BAD = {
    "shape": (lambda: step_log_prob(X, MEAN[:2], 1.0), r"x_next \(3, 2, 5\) and mean \(2, 2, 5\): both are of one shape"),
    "quiet": (
        lambda: step_log_prob(X, MEAN, 0.0),
        r"std=0\.0: the deviation of a step is positive and finite\. Leave noise-free steps out",
    ),
    "of nothing": (lambda: step_log_prob(X, MEAN, math.nan), r"std=nan"),
    "wide": (lambda: step_log_prob(X, MEAN, torch.ones(3)), r"std \(3,\) beside mean \(3, 2, 5\): one number, or \(B, 1"),
    "reduction": (lambda: step_log_prob(X, MEAN, 1.0, reduction="max"), r"reduction='max' is unknown: choose one of sum, mean"),
    "points": (
        lambda: trajectory_log_prob(lambda x, t: x, [X, X], GRID, CondOT(), diffusion_coefficient("noise")),
        r"2 points on a grid of 3 times",
    ),
    "no noise": (
        lambda: trajectory_log_prob(lambda x, t: x, [X] * 3, GRID, CondOT(), diffusion_coefficient("zero")),
        r"no step of this plan draws",
    ),
    "solver": (
        lambda: trajectory_log_prob(lambda x, t: x, [X] * 3, GRID, CondOT(), diffusion_coefficient("noise"), solver="stochastic_heun"),
        r"solver='stochastic_heun' has no log-probability: choose one of exponential, euler_maruyama",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_logarithm_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_of_points_are_taken_as_given():
    """Gradients reach the field's parameters, not the points."""
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    points = [p.clone().requires_grad_() for p in (X, MEAN, X)]
    found = trajectory_log_prob(lambda x, t: w * x, points, GRID, CondOT(), diffusion_coefficient("noise"))
    found.sum().backward()
    assert w.grad != 0 and all(p.grad is None for p, _ in pairwise(points))
