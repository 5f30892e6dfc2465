"""Timestep distributions: quantile, density and their agreement; strata; importance weights."""

import math

import pytest
import torch

from condot.pipeline.flow import (
    EDM,
    TIMESTEP_DISTRIBUTIONS,
    VE,
    VP,
    CondOT,
    Cosine,
    CosMap,
    Discrete,
    LogitNormal,
    LogNormalSigma,
    Mode,
    Purpose,
    Shifted,
    Uniform,
    importance_weight,
    resolution_shift,
    sample_times,
    uniform,
)
from condot.pipeline.flow.timestep_distribution import shift_time

LAWS = {
    "uniform": Uniform(),
    "logit_normal": LogitNormal(-0.4, 0.8),
    "mode": Mode(),
    "dip": Mode(-0.7),
    "cosmap": CosMap(),
    "log_normal_sigma": LogNormalSigma(),
    "log_normal_sigma on EDM": LogNormalSigma(path=EDM()),
    "log_normal_sigma on VE, cut": LogNormalSigma(0.0, 3.0, VE(0.1, 5.0)),
    "shifted": Shifted(3.0),
    "shifted logit_normal": Shifted(2.0, LogitNormal()),
}


@pytest.mark.parametrize("name", LAWS)
def test_density_is_the_slope_of_the_inverse_quantile(name):
    u = torch.linspace(0.003, 0.997, 101, dtype=torch.float64, requires_grad=True)
    t = LAWS[name].quantile(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    assert bool((slope > 0).all()) and bool(((t > 0) & (t < 1)).all())
    torch.testing.assert_close(LAWS[name].density(t.detach()), 1 / slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_density_integrates_to_one(name):
    """The midpoint rule in s, t = s^3 (10 - 15 s + 6 s^2), which flattens the ends."""
    n = 200_000
    s = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t, width = s**3 * (10 - 15 * s + 6 * s**2), 30 * s**2 * (1 - s) ** 2 / n
    assert abs((LAWS[name].density(t) * width).nan_to_num(0.0).sum().item() - 1) < 1e-6


def test_laws_are_those_of_their_papers():
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.logit(LogitNormal(0.3, 1.7).quantile(torch.tensor([0.5], dtype=torch.float64))), torch.tensor([0.3], dtype=torch.float64)
    )
    theirs = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)  # Esser et al., eq. 20, t = 1 noise
    torch.testing.assert_close(Mode().quantile(u), 1 - theirs)
    torch.testing.assert_close(CosMap().quantile(u), 1 - 1 / (torch.tan(math.pi / 2 * u) + 1))
    torch.testing.assert_close(CondOT().log_snr(CosMap().quantile(u)), Cosine().log_snr(u))
    edm = LogNormalSigma(path=EDM(1e-6, 1e6))
    sigma = torch.exp(-EDM(1e-6, 1e6).log_snr(edm.quantile(u)) / 2)
    torch.testing.assert_close(torch.log(sigma), -1.2 - 1.2 * torch.special.ndtri(u), rtol=1e-6, atol=1e-6)


def test_shift_multiplies_the_noise_to_signal_ratio():
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    moved = shift_time(t, 3.0)
    torch.testing.assert_close((1 - moved) / moved, 3 * (1 - t) / t)
    torch.testing.assert_close(shift_time(moved, 1 / 3.0), t)
    assert resolution_shift(128 * 128) == 2.0


@pytest.mark.parametrize("name", LAWS)
def test_importance_weights_give_back_the_uniform_mean(name):
    """E_law[w(t) f(t)] is the mean of f under the uniform law; over the shares, by the midpoint rule."""
    n = 400_000
    distribution = LAWS[name]
    t = distribution.quantile((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    bump = t**2 * (1 - t) ** 2  # vanishes at the ends, where weights grow
    assert abs((importance_weight(distribution, t) * bump).mean().item() - 1 / 30) < 1e-3 / 30
    torch.testing.assert_close(importance_weight(distribution, t, distribution), torch.ones_like(t))


def test_discrete_times_are_the_steps():
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = 1000 * (1 - Discrete().quantile(u))
    torch.testing.assert_close(steps, steps.round(), atol=1e-9, rtol=0)
    assert steps.min() >= -1e-9 and steps.max() < 999.5
    levels = Discrete(0, 1, 10).quantile((torch.arange(10, dtype=torch.float64) + 0.5) / 10)
    torch.testing.assert_close(levels, torch.linspace(0, 1, 10, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 256, 1000])
@pytest.mark.parametrize("step", [0, 1, 99])
def test_strata_hold_one_sample_each(batch, step):
    """Sorted, the shares of a batch are one to each interval of width 1 / batch, up to a rotation of the circle."""
    u = sample_times(Uniform(), 3, step, torch.arange(batch), batch).double()
    rotation = uniform(3, Purpose.TIME, step, torch.tensor([-1])).item()
    strata = ((u - rotation) % 1 * batch).floor().long()
    assert sorted(strata.tolist()) == list(range(batch))


def test_strata_depend_on_the_global_index_alone():
    """Two ranks, four ranks, any slice: bitwise the same times; and other steps give others."""
    distribution, index = LogitNormal(), torch.arange(64)
    whole = sample_times(distribution, 5, 7, index, 64)
    for parts in (2, 4, 64):
        assert torch.equal(torch.cat([sample_times(distribution, 5, 7, part, 64) for part in index.chunk(parts)]), whole)
    assert not torch.equal(sample_times(distribution, 5, 8, index, 64), whole)
    assert torch.equal(sample_times(distribution, 5, 7, index), distribution.quantile(uniform(5, Purpose.TIME, 7, index)).float())


def test_strata_lower_the_variance_of_a_mean():
    """The mean of t over a batch of 64: standard deviation 0.036 independent, below 0.01 in strata; both unbiased."""
    plain, strata = (torch.stack([sample_times(Uniform(), 1, k, torch.arange(64), b).mean() for k in range(400)]) for b in (None, 64))
    assert abs(plain.std().item() - (1 / 12 / 64) ** 0.5) < 0.006 and strata.std() < 0.01
    assert abs(strata.mean().item() - 0.5) < 6 * strata.std().item() / 20
    first = torch.cat([sample_times(Uniform(), 1, k, torch.arange(1), 64) for k in range(2000)])  # one position sees all times
    assert abs(first.mean().item() - 0.5) < 6 * (1 / 12 / 2000) ** 0.5 and first.min() < 0.01 and first.max() > 0.99


STEEP = [
    *(distribution() for distribution in TIMESTEP_DISTRIBUTIONS.values()),
    LogitNormal(20.0, 3.0),
    LogitNormal(-900.0, 1.0),
    Mode(-1),
    Shifted(1e-12),
    Shifted(1e12),
]


@pytest.mark.parametrize("distribution", [*STEEP, LogNormalSigma(-30.0, 9.0), LogNormalSigma(3.0, 2.0, VP())], ids=repr)
def test_times_of_a_law_with_a_density_stay_inside_in_float32(distribution, monkeypatch):
    """The largest uniform numbers round to 1.0, and steep laws push others there or to 0: 2^-60 and 1 - 2^-24 are the ends."""
    shares = torch.tensor([2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr("condot.pipeline.flow.timestep_distribution.uniform", lambda *named: shares)
    t = sample_times(distribution, 0, 0, torch.arange(5))
    plain = distribution.quantile(shares).float()
    inside = (plain > 2.0**-60) & (plain < 1)
    assert t.dtype == torch.float32 and torch.equal(t[inside], plain[inside])
    if isinstance(distribution, Discrete):
        assert t.tolist()[-1] == 1.0
    else:
        assert (t.min() >= 2.0**-60) and (t.max() <= 1 - 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_and_importance_weights_at_the_ends(dtype):
    """A density has a limit there, a weight is a number or, where the law has no density and never draws, infinite."""
    t = torch.tensor([0.0, 2.0**-60, 1 - 2.0**-24, 1.0], dtype=dtype)
    distributions = [*STEEP, LogNormalSigma(-3.0, 0.5, Cosine()), LogNormalSigma(path=VP()), LogNormalSigma(path=EDM())]
    for distribution in distributions:
        assert bool((distribution.density(t) >= 0).all())
        torch.testing.assert_close(importance_weight(distribution, t, distribution), torch.ones(4, dtype=dtype))
        assert not bool(importance_weight(distribution, t).isnan().any()) and importance_weight(distribution, t).dtype == dtype
    assert importance_weight(LogitNormal(), t)[[0, 3]].tolist() == [math.inf] * 2 and importance_weight(CosMap(), t)[3] == math.pi / 2


BAD = {
    "std": (lambda: LogitNormal(std=0.0), r"std=0\.0"),
    "mode": (lambda: Mode(2.0), r"scale=2\.0"),
    "sigma": (lambda: LogNormalSigma(std=-1), r"std=-1"),
    "shift": (lambda: Shifted(0.0), r"shift=0\.0"),
    "discrete": (lambda: Discrete(0.5, 0.5, 3), r"first < last"),
    "resolution": (lambda: resolution_shift(0), r"values=0"),
    "index": (lambda: sample_times(Uniform(), 0, 0, torch.arange(9), 8), r"stratified over 8.*to 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_every_law_has_a_name_and_a_default():
    for distribution in TIMESTEP_DISTRIBUTIONS.values():
        assert 0 <= distribution().quantile(torch.tensor([0.3], dtype=torch.float64)).item() <= 1
