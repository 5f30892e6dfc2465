"""Langevin dynamics: stationary laws, transitions, far modes, predictor and corrector."""

import math

import oracles
import pytest
import torch
from sampling import stream, worst_statistic

from condot.pipeline.flow import (
    PATHS,
    VE,
    CondOT,
    annealed_langevin,
    convert,
    denoise,
    diffusion_coefficient,
    exponential,
    langevin,
    predictor_corrector,
    scale_initial_noise,
    uniform_grid,
    widen,
)
from condot.pipeline.flow.langevin import langevin_steps_per_level

MIXTURE = oracles.three()
FIELD = MIXTURE.field(oracles.condot)
START = torch.zeros(3, 2, dtype=torch.float64)


def test_langevin_keeps_a_gaussian():
    """Stationary law of x' = (1 - h / 2s) x + sqrt(h) xi: mean m, variance s / (1 - h / 4s) exactly."""
    s, h, n = 0.3, 0.06, 20_000
    x = langevin(lambda x: -(x - 0.7) / s, torch.zeros(n, 1, dtype=torch.float64), h, 150, stream(5, n, 1)).x
    variance = s / (1 - h / (4 * s))
    assert abs(x.mean().item() - 0.7) < 6 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) < 6 * variance * math.sqrt(2 / n)


def test_ornstein_uhlenbeck_transition():
    """After time T the mean is exp(-T / 2s) x0 and the variance s (1 - exp(-T / s)): many small Langevin steps."""
    s, h, n, steps = 0.5, 0.002, 4000, 150
    x = langevin(lambda x: -x / s, torch.full((n, 1), 2.0, dtype=torch.float64), h, steps, stream(6, n, 1)).x
    mean, variance = 2 * math.exp(-steps * h / (2 * s)), s * (1 - math.exp(-steps * h / s))
    assert abs(x.mean().item() - mean) < 6 * math.sqrt(variance / n) + 0.002
    assert abs(x.var().item() - variance) < 6 * variance * math.sqrt(2 / n) + 0.002


FAR = oracles.Mixture(
    torch.tensor([0.2, 0.8], dtype=torch.float64),
    torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64),
    torch.eye(2, dtype=torch.float64).expand(2, 2, 2).contiguous(),
)


def test_annealed_langevin_finds_far_modes_in_proportion_where_plain_langevin_does_not():
    """Weights 0.2 and 0.8, started uniformly on [-8, 8]^2: annealed 0.80, plain about 0.5. Exact scores, so only the sampler is tested."""
    n, index = 2000, torch.arange(2000)
    start = 16 * torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (1, 2)], 1) - 8
    plain = langevin(FAR.score, start, 0.1, 500, stream(7, n)).x
    path = VE(0.1, 20.0)
    score = lambda x, t: FAR.score(x, 1.0, path(t[:1]).b.item())  # noqa: E731
    annealed = annealed_langevin(score, start, uniform_grid(29), path, 0.002, 20, stream(8, n))
    share = (annealed.x.sum(1) > 0).double().mean().item()
    assert annealed.evaluations == 600 and len(index) == n
    assert abs(share - 0.8) < 6 * math.sqrt(0.16 / n)
    assert abs((plain.sum(1) > 0).double().mean().item() - 0.5) < 0.1


def test_annealed_langevin_keeps_the_law_of_its_last_level():
    n, path, point = 4000, VE(0.1, 5.0), oracles.gaussian([0.7], [[0.04]])
    score = lambda x, t: point.score(x, 1.0, path(t[:1]).b.item())  # noqa: E731
    x = annealed_langevin(score, scale_initial_noise(path, stream(9, n, 1)(-1)), uniform_grid(11), path, 0.002, 60, stream(10, n, 1)).x
    assert abs(x.mean().item() - 0.7) < 0.02 and abs(x.var().item() - 0.0505) < 0.0505 * 6 * math.sqrt(2 / n)


def law(name):
    """Path, exact field and score of N(0.7, 0.5^2) on it."""
    path, point = PATHS[name](), oracles.gaussian([0.7], [[0.25]])
    field = point.field(lambda t: tuple(v.item() for v in path(torch.tensor(t, dtype=torch.float64))))
    return path, field, lambda x, t: convert(field(x, t), "velocity", "score", x, path(widen(t, x)))


def response(solve, first, draws):
    """Mean and variance of an end that is linear in a start N(0, first^2) and `draws` normal numbers, without sampling."""
    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = first
    end = solve(x, lambda k: torch.eye(draws + 2, dtype=torch.float64)[:, k + 2 : k + 3])
    return end[0, 0].item(), (end[1:] - end[0]).square().sum().item()


@pytest.mark.parametrize("name", PATHS)
def test_annealed_langevin_follows_alpha_on_every_path(name):
    """N(0.7, 0.5^2) by its exact score: the mean is 0.7, exactly as computed; unscaled, x lags at 0.26 to 0.69.

    The deviation keeps what annealing in finite time leaves, the same on every path.
    """
    path, field, score = law(name)
    times = uniform_grid(24, 0.0, 0.99)
    many = langevin_steps_per_level(path, times, 0.5)

    def solve(x, noise):
        end = annealed_langevin(score, x, times, path, 0.5 * path(times[-1]).b.item() ** 2, many, noise)
        assert end.evaluations == sum(many) == len(x) - 2
        return denoise(field, end.x, 0.99, path)

    mean, variance = response(solve, path(times[0]).b.item(), sum(many))
    assert abs(mean - 0.7) < 0.003 and 0.5 < math.sqrt(variance) < 0.62


def test_annealed_langevin_on_ve_is_as_it_was_to_the_bit():
    """Levels of one alpha: the loop of the paper, unscaled."""
    path, times, x = VE(0.1, 5.0), uniform_grid(7), stream(3, 9, 1)(-1)
    score, noise = (lambda x, t: -(x - 0.7) / (0.04 + path(t[:1]).b ** 2)), stream(4, 9, 1)
    found = annealed_langevin(score, x, times, path, 0.002, 3, noise).x
    sizes = (0.002 * (path(times).b / path(times).b[-1]) ** 2).tolist()
    for k in range(24):
        t = torch.full((9,), times[k // 3].item(), dtype=torch.float64)
        x = torch.add(torch.add(x, score(x, t), alpha=sizes[k // 3] / 2), noise(k), alpha=math.sqrt(sizes[k // 3]))
    assert torch.equal(found, x)


@pytest.mark.parametrize("name", PATHS)
def test_predictor_and_corrector_end_on_the_law_on_every_path(name):
    """Its predictor moves alpha: mean exactly, variance of N(0.7, 0.5^2) up to the order of its steps."""
    path, field, _ = law(name)

    def solve(x, noise):
        end = predictor_corrector(field, x, uniform_grid(160), path, diffusion_coefficient("zero"), noise).x
        return denoise(field, end, 1.0, path) if path(torch.ones(1)).b > 1e-6 else end

    mean, variance = response(solve, path(torch.zeros(1, dtype=torch.float64)).b.item(), 159)
    assert abs(mean - 0.7) < 0.005 and abs(math.sqrt(variance) - 0.5) < 0.03


@pytest.mark.parametrize("sigma", ["zero", "noise"])
def test_predictor_corrector_keeps_the_marginals(sigma):
    x = stream(31)(-1)
    solution = predictor_corrector(MIXTURE.field(oracles.condot), x, uniform_grid(100), CondOT(), diffusion_coefficient(sigma), stream(32))
    assert worst_statistic(solution.x) < 3.2


def test_a_corrector_mends_a_coarse_predictor():
    """Ten steps from the wrong start (half the spread): corrected samples come nearer to the law."""
    x, field = 0.5 * stream(33)(-1), MIXTURE.field(oracles.condot)
    bare = exponential(field, x, uniform_grid(10), CondOT(), diffusion_coefficient("zero"), None).x
    mended = predictor_corrector(field, x, uniform_grid(10), CondOT(), diffusion_coefficient("zero"), stream(34), snr=0.3, corrections=5).x
    assert worst_statistic(mended) < worst_statistic(bare) / 2


def test_evaluations_of_predictor_and_corrector_are_counted():
    field, x = FIELD, stream(1, 3)(0)
    seen = []
    counted = lambda x, t: seen.append(t) or field(x, t)  # noqa: E731
    solution = predictor_corrector(counted, x, uniform_grid(6), CondOT(), diffusion_coefficient("noise"), stream(2, 3), corrections=2)
    assert solution.evaluations == len(seen) == 6 + 5 * 2


BAD = {
    "langevin step": (lambda: langevin(FAR.score, START, 0.0, 5, stream(1, 3)), r"step=0\.0"),
    "langevin steps": (lambda: langevin(FAR.score, START, 0.1, 0, stream(1, 3)), r"steps=0"),
    "levels": (lambda: annealed_langevin(FIELD, START, torch.tensor([1.0, 0.0]), VE(), 0.1, 5, stream(1, 3)), r"no grid"),
    "numbers": (lambda: annealed_langevin(FIELD, START, uniform_grid(2), VE(), 0.1, [1, 2], stream(1, 3)), r"2 numbers of steps for 3"),
    "share": (lambda: langevin_steps_per_level(VE(), uniform_grid(2), 2.0), r"langevin_step=2\.0"),
    "snr": (
        lambda: predictor_corrector(FIELD, START, uniform_grid(2), CondOT(), diffusion_coefficient("zero"), stream(1, 3), snr=0.0),
        r"step=0\.0",
    ),
    "diverged": (lambda: langevin(lambda x: x * 1e30, START + 1, 1.0, 50, stream(1, 3)), r"end point is not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
