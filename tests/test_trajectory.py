"""Trajectories of any shape: the linear path as a case, known densities, characteristics against the continuity equation, training."""

import math

import pytest
import torch

from condot.pipeline.flow import (
    LinearPath,
    NormalPrior,
    Trajectory,
    TrajectoryMatching,
    UniformPrior,
    empirical_marginal,
    empirical_velocity_field,
    rk4,
    uniform_grid,
)

STRAIGHT = Trajectory(lambda t, x0, z: t * z + (1 - t) * x0)
POINTS = torch.tensor([[0.5], [0.5], [1.2], [1.7]], dtype=torch.float64)  # the source's worked example


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swirl(t, x0, z):
    """Bent, then turned by a quarter circle, and scaled by z's own first coordinate on the way. At t = 0 x0, at t = 1 z."""
    wave = t[:, 0] * torch.sin(2 * x0[:, 0])
    bent = torch.stack([x0[:, 0] + 0.3 * wave, x0[:, 1] + wave], 1)
    angle = math.pi / 2 * t[:, 0]
    turned = torch.stack([bent[:, 0] * angle.cos() - bent[:, 1] * angle.sin(), bent[:, 0] * angle.sin() + bent[:, 1] * angle.cos()], 1)
    return t * z + (1 - t) * torch.exp(t * z[:, :1]) * turned


def cubic(t, x0, z):
    """In one dimension: `x0 + x0^3 t` before it shrinks; its inverse is Cardano's."""
    return t * z + (1 - t) * (x0 + t * x0**3)


def cubic_inverse(t, x, z):
    y = (x - t * z) / (1 - t)
    p, q = 1 / t, -y / t
    root = torch.sqrt(q**2 / 4 + p**3 / 27)
    return torch.copysign((-q / 2 + root).abs() ** (1 / 3), -q / 2 + root) + torch.copysign((-q / 2 - root).abs() ** (1 / 3), -q / 2 - root)


def test_the_straight_trajectory_is_the_linear_path():
    """Point, velocity, conditional velocity; density `p_init / (1 - t)^D` (Su, eq. 19)."""
    z, x0, t = draw(4, 2, 3), draw(4, 2, 3, seed=1), torch.tensor([0.0, 0.3, 0.6, 0.95], dtype=torch.float64)
    path = LinearPath()
    x, velocity = STRAIGHT.interpolate_with_target(z, x0, t)
    torch.testing.assert_close((x, velocity), path.interpolate_with_target(z, x0, t)[:2])
    torch.testing.assert_close(STRAIGHT.initial_point(x, z, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(STRAIGHT.conditional_velocity(x, z, t), path.conditional_velocity(x, z, t), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(STRAIGHT.conditional_log_density(x, z, t), NormalPrior().log_density(x0) - 6 * torch.log(1 - t))


def test_the_sources_worked_example():
    """Uniform prior on [0, 2], data {.5, .5, 1.2, 1.7}: the field and density of its own code, and the ODE ends on the data, 2 : 1 : 1."""
    trajectory = Trajectory(STRAIGHT.phi, UniformPrior(0.0, 2.0))
    x = torch.linspace(0.0513, 1.9471, 39, dtype=torch.float64)[:, None]
    for time in (0.1, 0.5, 0.8):
        t = torch.full((39,), time, dtype=torch.float64)
        velocity, logs = empirical_marginal(trajectory, POINTS, x, t)
        s = 1 - time  # the source's time
        start = (x - POINTS.T) / s + POINTS.T
        p = ((start >= 0) & (start <= 2)).double() / 2 / s
        toward = (p * -(x - POINTS.T) / s).sum(1) / p.sum(1)
        seen = p.sum(1) > 0
        torch.testing.assert_close(velocity[seen, 0], toward[seen])
        torch.testing.assert_close(logs.exp(), p.mean(1))
    soft = Trajectory(STRAIGHT.phi, UniformPrior(0.0, 2.0, 1e-3), lambda t, x, z: (x - t * z) / (1 - t))
    start = (torch.arange(40, dtype=torch.float64)[:, None] + 0.5) / 20
    end = rk4(lambda x, t: empirical_marginal(soft, POINTS, x, t)[0], start, uniform_grid(50, 0.0, 0.98)).x
    nearest = (end - POINTS[[0, 2, 3]].T).abs()
    assert nearest.min(1).values.max() < 0.06
    assert torch.bincount(nearest.argmin(1)).tolist() == pytest.approx([20, 10, 10], abs=1)


def test_the_marginal_of_a_linear_trajectory_is_the_linear_paths():
    points, x, t = draw(5, 3), draw(6, 3, seed=1), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    torch.testing.assert_close(
        empirical_marginal(STRAIGHT, points, x, t)[0], empirical_velocity_field(LinearPath(), points)(x, t), rtol=1e-8, atol=1e-8
    )


def test_a_curved_trajectory_has_the_density_of_its_jacobian():
    """The cubic's Jacobian is `(1 - t)(1 + 3 t x0^2)`, its inverse Cardano's; each conditional density integrates to one."""
    z, x0, t = draw(50, 1), draw(50, 1, seed=1), torch.linspace(0.02, 0.95, 50, dtype=torch.float64)
    by_newton, by_hand = Trajectory(cubic), Trajectory(cubic, inverse=cubic_inverse)
    x, velocity = by_newton.interpolate_with_target(z, x0, t)
    expected = NormalPrior().log_density(x0) - torch.log((1 - t) * (1 + 3 * t * x0[:, 0] ** 2))
    wide = t[:, None]
    by_calculus = z - (x0 + wide * x0**3) + (1 - wide) * x0**3
    for trajectory in (by_newton, by_hand):
        torch.testing.assert_close(trajectory.initial_point(x, z, t), x0, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(trajectory.conditional_log_density(x, z, t), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(trajectory.conditional_velocity(x, z, t), by_calculus, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(velocity, by_calculus)
    line = torch.linspace(-60, 60, 24001, dtype=torch.float64)[:, None]
    for time in (0.1, 0.7):
        each = by_hand.conditional_log_density(line, torch.full_like(line, 0.4), torch.full((len(line),), time, dtype=torch.float64))
        assert torch.trapezoid(each.exp(), line[:, 0]).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("conditional", [True, False])
def test_densities_and_fields_satisfy_the_continuity_equation(conditional):
    """`d/dt log p + u . grad log p + div u = 0` (Su, eq. 9), by central differences, for one datum and for four."""
    trajectory, points = Trajectory(swirl), 0.7 * draw(4, 2)

    def parts(x, t):
        if conditional:
            z = points[:1].expand(len(x), 2)
            return trajectory.conditional_velocity(x, z, t), trajectory.conditional_log_density(x, z, t)
        return empirical_marginal(trajectory, points, x, t)

    x, h = 0.8 * draw(7, 2, seed=2), 1e-4
    t = torch.linspace(0.1, 0.8, 7, dtype=torch.float64)
    u, _ = parts(x, t)
    change = (parts(x, t + h)[1] - parts(x, t - h)[1]) / (2 * h)
    for axis in range(2):
        step = h * torch.nn.functional.one_hot(torch.tensor(axis), 2)
        (u_up, p_up), (u_down, p_down) = parts(x + step, t), parts(x - step, t)
        change = change + u[:, axis] * (p_up - p_down) / (2 * h) + (u_up - u_down)[:, axis] / (2 * h)
    assert change.abs().max() < 1e-4


def test_the_ode_carries_the_prior_onto_the_marginal():
    """On a line the flow keeps the order: a start's share below it, of the prior, is its end's, of the marginal density."""
    trajectory, points = Trajectory(cubic, inverse=cubic_inverse), torch.tensor([[-0.9], [0.6], [1.1]], dtype=torch.float64)
    start = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    end = rk4(lambda x, t: empirical_marginal(trajectory, points, x, t)[0], start, uniform_grid(20, 1e-3, 0.6)).x
    line = torch.linspace(-40, 40, 16001, dtype=torch.float64)[:, None]
    density = empirical_marginal(trajectory, points, line, torch.full((len(line),), 0.6, dtype=torch.float64))[1].exp()
    below = torch.cumulative_trapezoid(density, line[:, 0])
    shares = below[torch.searchsorted(line[1:, 0].contiguous(), end[:, 0].contiguous())]
    torch.testing.assert_close(shares, torch.special.ndtr(start[:, 0]), rtol=0, atol=3e-3)


def test_the_minimiser_of_matching_is_the_marginal_field():
    """By enumeration: at x each z_k has a known probability and one x_init; the weighted gradient vanishes at the marginal velocity."""
    trajectory, points = Trajectory(swirl), 0.7 * draw(4, 2)
    x, t = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.full((4,), 0.6, dtype=torch.float64)
    initial = trajectory.initial_point(x.expand(4, 2), points, t)
    share = torch.softmax(trajectory.conditional_log_density(x.expand(4, 2), points, t), 0)
    guess = empirical_marginal(trajectory, points, x, t[:1])[0].requires_grad_()
    loss = TrajectoryMatching(trajectory)(lambda x, t: guess.expand(4, 2), points, initial, t)
    (gradient,) = torch.autograd.grad((share * loss).sum(), guess)
    assert gradient.abs().max() < 1e-9 and loss.min() > 1e-3


BAD = {
    "shapes": (lambda: STRAIGHT.interpolate_with_target(draw(3, 2), draw(3, 1), torch.zeros(3)), r"\(3, 2\) and initial \(3, 1\) differ"),
    "size": (lambda: STRAIGHT.initial_point(draw(1, 65), draw(1, 65), torch.zeros(1)), r"65 dimensions.*Give the trajectory its inverse"),
    "inverse": (
        lambda: Trajectory(lambda t, x0, z: x0**2).initial_point(-torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0.5])),
        r"is phi invertible there",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
