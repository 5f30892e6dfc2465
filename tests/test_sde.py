"""SDE solvers and Langevin dynamics: marginals, weak orders, agreement with the reverse-time SDE."""

import math

import oracles
import pytest
import torch
from sampling import stream, worst_statistic

from condot.pipeline.flow import (
    PATHS,
    SDE_SOLVERS,
    VE,
    CondOT,
    Purpose,
    convert,
    denoise,
    diffusion_coefficient,
    euler,
    euler_maruyama,
    exponential,
    forward_sde_coefficients,
    normal,
    scale_initial_noise,
    stochastic_heun,
    uniform_grid,
    widen,
)
from condot.pipeline.flow.sde import noise_kept_per_step

MIXTURE = oracles.three()


DIFFUSION_COEFFICIENTS = {
    "zero": diffusion_coefficient("zero"),
    "constant": diffusion_coefficient("constant", 0.8),
    "noise": diffusion_coefficient("noise", 2.0),
    "forward": diffusion_coefficient("forward"),
    "callable": lambda t, c: 1.5 * torch.sqrt(c.a * c.b),
}


@pytest.mark.parametrize("sigma", DIFFUSION_COEFFICIENTS)
@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "ve"])
def test_any_coefficient_keeps_the_marginals(name, sigma):
    """4000 samples are those of the mixture, whatever sigma_t: below 3.2, which chance passes with probability 3e-9.

    The noise-free last step and the grid are part of it; 160 steps, so that the bias of order h is a fraction of the noise.
    """
    path, start = PATHS[name](), 0.0
    x = scale_initial_noise(path, stream(11)(-1), start)
    scale = 6.0 if name == "ve" and sigma == "constant" else 1.0  # VE's noise falls from 50: a unit constant would do nothing
    chosen = diffusion_coefficient("constant", 0.01 * scale) if (name, sigma) == ("ve", "constant") else DIFFUSION_COEFFICIENTS[sigma]
    solution = exponential(MIXTURE.field(oracles.BY_HAND[name]), x, uniform_grid(160), path, chosen, stream(12))
    assert solution.evaluations == 160
    assert worst_statistic(solution.x) < 3.2


@pytest.mark.parametrize("solver", ["euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("sigma", ["zero", "constant", "noise", "callable"])
def test_other_integrators_keep_the_marginals(solver, sigma):
    x = stream(21)(-1)
    steps = 200 if solver == "euler_maruyama" else 80
    chosen = diffusion_coefficient("constant", 0.5) if sigma == "constant" else DIFFUSION_COEFFICIENTS[sigma]
    solution = SDE_SOLVERS[solver](MIXTURE.field(oracles.condot), x, uniform_grid(steps), CondOT(), chosen, stream(22))
    assert worst_statistic(solution.x) < 3.2


GAUSS = oracles.gaussian([0.7], [[0.3]])


def moments(solver, name, steps, sigma, start=0.0):
    """Mean and variance of a solver's result on Gaussian data, without sampling.

    Everything is linear in the start and in each step's noise: the response to each is found by solving once per unit vector.
    """
    path, field = PATHS[name](), GAUSS.field(oracles.BY_HAND[name])
    size = steps + 2
    x = torch.zeros(size, 1, dtype=torch.float64)
    x[1] = path(torch.tensor([start], dtype=torch.float64)).b

    def noise(k):
        unit = torch.zeros(size, 1, dtype=torch.float64)
        unit[k + 2] = 1
        return unit

    end = solver(field, x, uniform_grid(steps, start), path, sigma, noise).x[:, 0]
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


@pytest.mark.parametrize(("solver", "order"), [("euler_maruyama", 1), ("exponential", 1), ("stochastic_heun", 2)])
@pytest.mark.parametrize("sigma", ["zero", "noise", "callable"])
def test_weak_order(solver, order, sigma):
    """The errors of mean and variance fall as h^order: exact moments, no sampling."""
    chosen = DIFFUSION_COEFFICIENTS[sigma]
    errors = []
    for steps in (160, 320):
        mean, variance = moments(SDE_SOLVERS[solver], "condot", steps, chosen)
        errors.append((abs(mean - 0.7), abs(variance - 0.3)))
    for coarse, fine in zip(*errors, strict=True):
        if coarse > 1e-9:
            assert abs(math.log2(coarse / fine) - order) < 0.15
    assert max(errors[1]) < (0.02 if order == 1 else 1e-3)


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "sub_vp", "ve", "edm", "ddpm"])
@pytest.mark.parametrize("sigma", ["forward", "noise"])
def test_exponential_integrator_converges_on_every_path(name, sigma):
    """To the mean and variance of Gaussian data; `forward` from t = 0, where it is infinite on CondOT and cosine.

    VE and EDM, whose start neglects data of size 1 beside noise of 50 and 80, are off by that.
    """
    by_hand = dict(oracles.BY_HAND, ddpm=lambda t: tuple(v.item() for v in PATHS["ddpm"]()(torch.tensor(t, dtype=torch.float64))))
    oracles.BY_HAND.update(by_hand)
    mean, variance = moments(exponential, name, 800, DIFFUSION_COEFFICIENTS[sigma])
    end = PATHS[name]()(torch.ones(1, dtype=torch.float64))
    assert abs(mean - 0.7) < 0.02
    assert abs(variance - (0.3 * end.a.item() ** 2 + end.b.item() ** 2)) < 0.01


def test_exponential_step_is_exact_where_its_score_is():
    """All data at one point: the data prediction is constant, so any number of steps ends on it, and on the way the law is exact."""
    point = oracles.gaussian([0.7], [[0.0]])
    path, field = CondOT(), point.field(oracles.condot)
    for sigma in ("constant", "noise", "forward", "callable"):
        ends = []
        for steps in (2, 9):
            size = steps + 2
            x = torch.zeros(size, 1, dtype=torch.float64)
            x[1] = 1

            def noise(k, size=size):
                unit = torch.zeros(size, 1, dtype=torch.float64)
                unit[k + 2] = 1
                return unit

            seen = []
            ends.append(
                exponential(
                    field,
                    x,
                    uniform_grid(steps),
                    path,
                    DIFFUSION_COEFFICIENTS[sigma],
                    noise,
                    step_callback=lambda y, t, s=seen: s.append((t, y)) or y,
                )
            )
            for t, y in seen:
                mean, variance = y[0].item(), (y[1:] - y[0]).square().sum().item()
                assert abs(mean - 0.7 * t) < 1e-12 and abs(variance - (1 - t) ** 2) < 1e-12, (sigma, t)


def test_old_noise_decays_as_its_integral():
    """exp(-1/2 integral of sigma^2 / beta^2), by hand: constant and noise-proportional on CondOT, `forward` on any path."""
    times = torch.tensor([0.1, 0.25, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(
        noise_kept_per_step(diffusion_coefficient("constant", 0.8), CondOT(), times),
        torch.exp(-0.32 * (1 / (1 - times)).diff()),
        rtol=1e-7,
        atol=0,
    )
    torch.testing.assert_close(noise_kept_per_step(diffusion_coefficient("noise", 2.0), CondOT(), times), torch.exp(-2 * times.diff()))
    for name in ("condot", "vp"):
        c = PATHS[name]()(times)
        kept = noise_kept_per_step(diffusion_coefficient("forward"), PATHS[name](), times)
        torch.testing.assert_close(kept, (c.a[:-1] / c.b[:-1]) / (c.a[1:] / c.b[1:]))
        same = noise_kept_per_step(lambda t, c: torch.sqrt(2 * (c.b**2 * c.da / c.a - c.db * c.b)), PATHS[name](), times)
        torch.testing.assert_close(same, kept, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma", ["constant", "noise", "callable"])
def test_integrators_agree_on_how_much_of_the_start_is_left(sigma):
    """Marginals do not show sigma's size; the response of the end to the start does. 1600 steps, within 1 %."""
    chosen, left = diffusion_coefficient("constant", 0.5) if sigma == "constant" else DIFFUSION_COEFFICIENTS[sigma], []
    for solver in SDE_SOLVERS.values():
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        end = solver(
            GAUSS.field(oracles.condot), x, uniform_grid(1600), CondOT(), chosen, lambda k: torch.zeros(2, 1, dtype=torch.float64)
        ).x
        left.append((end[1] - end[0]).item())
    assert max(left) < 1.01 * min(left) and max(left) < 0.95 * math.sqrt(0.3)


def test_without_noise_the_exponential_step_is_eulers_on_condot():
    x, field = stream(1, 7)(0), MIXTURE.field(oracles.condot)
    end = exponential(field, x, uniform_grid(9), CondOT(), diffusion_coefficient("zero"), None).x
    torch.testing.assert_close(end, euler(field, x, uniform_grid(9)).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", oracles.BY_HAND)
def test_reverse_time_sde_is_the_case_forward(name):
    """With g^2 = sigma^2 the drift u + sigma^2 / 2 score is -(f x - g^2 score), Anderson's."""
    path, t = PATHS[name](), torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    f, g2 = forward_sde_coefficients(path, t)
    torch.testing.assert_close(diffusion_coefficient("forward")(t, path(t)) ** 2, g2)
    for i, time in enumerate(t.tolist()):
        a, b, da, db = oracles.BY_HAND[name](time)
        x = a * MIXTURE.means + b
        score = MIXTURE.score(x, a, b)
        ours = MIXTURE.velocity(x, a, b, da, db) + g2[i] / 2 * score
        theirs = -(f[i] * x - g2[i] * score)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_noising_process_is_that_of_the_papers():
    """VP: f = -rate / 2, g^2 = rate; VE: f = 0, g^2 = d sigma^2 / ds; and their moments solve dm = f m, dv = 2 f v + g^2."""
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    f, g2 = forward_sde_coefficients(PATHS["vp"](), t)
    rate = 0.1 + (1 - t) * 19.9
    torch.testing.assert_close(f, -rate / 2)
    torch.testing.assert_close(g2, rate)
    f, g2 = forward_sde_coefficients(VE(), t)
    torch.testing.assert_close(g2, 2 * math.log(5000) * VE()(t).b ** 2)
    assert not f.any()
    f, g2 = forward_sde_coefficients(CondOT(), t)
    torch.testing.assert_close(g2, 2 * (1 - t) / t)


@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_a_learned_score_takes_the_place_of_the_converted_one(solver):
    """Equal outputs when the learned score is the converted one; twice the score is not the same."""
    field, x, path = MIXTURE.field(oracles.condot), stream(1, 7)(0), CondOT()

    def pair(factor):
        def both(x, t):
            v = field(x, t)
            return v, factor * convert(v, "velocity", "score", x, path(widen(t, x)))

        return both

    arguments = (x, uniform_grid(9), path, diffusion_coefficient("noise", 1.5), stream(2, 7))
    plain = SDE_SOLVERS[solver](field, *arguments).x
    torch.testing.assert_close(SDE_SOLVERS[solver](pair(1.0), *arguments).x, plain, rtol=1e-10, atol=1e-10)
    assert (SDE_SOLVERS[solver](pair(2.0), *arguments).x - plain).norm() > 0.1


@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_samples_do_not_depend_on_their_batch(solver):
    field, path, grid = MIXTURE.field(oracles.condot), CondOT(), uniform_grid(5)

    def run(index):
        draw = lambda k: normal(3, Purpose.DIFFUSION, k, index, (2,)).double()  # noqa: E731
        return SDE_SOLVERS[solver](
            field, normal(3, Purpose.INITIAL, 0, index, (2,)).double(), grid, path, diffusion_coefficient("noise"), draw
        ).x

    torch.testing.assert_close(run(torch.arange(6)), torch.cat([run(torch.arange(2)), run(torch.arange(2, 6))]), rtol=1e-12, atol=1e-12)


def test_evaluations_are_counted():
    field, x = MIXTURE.field(oracles.condot), stream(1, 3)(0)
    for name, wanted in (("exponential", 6), ("euler_maruyama", 6), ("stochastic_heun", 11)):
        seen = []
        counted = lambda x, t, seen=seen: seen.append(t) or field(x, t)  # noqa: E731
        solution = SDE_SOLVERS[name](counted, x, uniform_grid(6), CondOT(), diffusion_coefficient("noise"), stream(2, 3))
        assert solution.evaluations == len(seen) == wanted


def test_the_last_step_draws_no_noise():
    for solver in SDE_SOLVERS.values():
        asked = []
        solver(
            MIXTURE.field(oracles.condot),
            stream(1, 3)(0),
            uniform_grid(4),
            CondOT(),
            diffusion_coefficient("noise"),
            lambda k, a=asked: a.append(k) or stream(2, 3)(k),
        )
        assert asked == [0, 1, 2]


def test_denoising_ends_clean_on_a_path_that_keeps_noise():
    """VE ends with noise 0.01 around a data point; `denoise` takes it off."""
    path, point = VE(), oracles.gaussian([0.7], [[0.0]])
    field = point.field(oracles.ve)
    end = exponential(
        field, scale_initial_noise(path, stream(1, 50, 1)(0)), uniform_grid(60), path, diffusion_coefficient("forward"), stream(2, 50, 1)
    ).x
    assert 1e-5 < (end - 0.7).abs().max() < 0.06
    torch.testing.assert_close(denoise(field, end, 1.0, path), torch.full_like(end, 0.7))


# bad input

FIELD = MIXTURE.field(oracles.condot)
START = torch.zeros(3, 2, dtype=torch.float64)
BAD = {
    "name": (lambda: diffusion_coefficient("brownian"), r"'brownian' is unknown: choose one of zero"),
    "scale": (lambda: diffusion_coefficient("noise", -1.0), r"sigma_scale=-1\.0"),
    "infinite scale": (lambda: diffusion_coefficient("noise", math.inf), r"sigma_scale=inf"),
    "negative": (lambda: exponential(FIELD, START, uniform_grid(4), CondOT(), lambda t, c: -c.b, stream(1, 3)), r"sigma_t=-1\.0 at t=0"),
    "infinite": (
        lambda: euler_maruyama(FIELD, START, uniform_grid(4), CondOT(), diffusion_coefficient("forward"), stream(1, 3)),
        r"sigma_t=inf at t=0.*exponential",
    ),
    "nan": (lambda: stochastic_heun(FIELD, START, uniform_grid(4), CondOT(), lambda t, c: t * math.nan, stream(1, 3)), r"sigma_t=nan"),
    "between": (
        lambda: exponential(
            FIELD, START, uniform_grid(1 + 4), CondOT(), lambda t, c: torch.where((t > 0.21) & (t < 0.39), -1.0, 1.0), stream(1, 3)
        ),
        r"sigma_t=-1",
    ),
    "grid": (
        lambda: exponential(FIELD, START, torch.tensor([0.5, 0.2]), CondOT(), diffusion_coefficient("zero"), stream(1, 3)),
        r"no grid",
    ),
    "start": (
        lambda: exponential(FIELD, START + math.nan, uniform_grid(2), CondOT(), diffusion_coefficient("zero"), stream(1, 3)),
        r"not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
