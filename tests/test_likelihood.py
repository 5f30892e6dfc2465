"""Likelihood: the exact log-density of a mixture, Hutchinson's mean, bits per dimension."""

import math

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    PATHS,
    CondOT,
    Purpose,
    bits_per_dimension,
    dequantise,
    divergence,
    dormand_prince,
    heun,
    likelihood_end_time,
    log_density,
    mean_and_standard_error,
    normal,
    rademacher,
    rk4,
    target,
    uniform,
    uniform_grid,
    velocity_field,
    widen,
)
from condot.pipeline.sampling.flow_model import FlowModel
from condot.pipeline.sampling.likelihood import compute_bits_per_dimension

MIXTURE = oracles.three()
FIELD = MIXTURE.field(oracles.condot)
X = MIXTURE.sample(20, torch.Generator().manual_seed(0))


def wave(x, t):
    """A field that is not a mixture's, of any shape: its flow keeps no closed form, but its divergence has one."""
    return torch.sin(2 * x) * t.reshape(-1, *[1] * (x.ndim - 1)) + 0.3 * x.roll(1, -1)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_log_density_of_a_mixture_is_exact(mode):
    result = log_density(FIELD, X, uniform_grid(40), CondOT(), solver=rk4, mode=mode)
    torch.testing.assert_close(result.log_density, MIXTURE.log_density(X), rtol=0, atol=4e-4)
    assert result.evaluations == 160
    forth = rk4(FIELD, result.initial_point, uniform_grid(40)).x
    torch.testing.assert_close(forth, X, rtol=0, atol=4e-4)


@pytest.mark.parametrize("name", ["cosine", "vp", "sub_vp", "ve"])
def test_log_density_on_every_kind_of_path(name):
    """Ending at 1 - 1e-3 where the velocity is singular: there the density is p_t's; VE's start is N(0, 50^2) but for data of size 1."""
    end = 1.0 if name in ("cosine", "ve") else 1 - 1e-3
    a, b, *_ = oracles.BY_HAND[name](end)
    field = MIXTURE.field(oracles.BY_HAND[name])
    result = log_density(
        field, X, uniform_grid(1, end=end), PATHS[name](), solver=lambda f, x, t: dormand_prince(f, x, t, rtol=1e-7, atol=1e-7)
    )
    torch.testing.assert_close(result.log_density, MIXTURE.log_density(X, a, b), rtol=0, atol=0.02 if name != "cosine" else 1e-4)


STEP = 2 / 255
KINDS = {
    **{"condot": "velocity", "cosine": "v", "vp": "noise", "sub_vp": "velocity", "ve": "noise", "edm": "data", "ddpm": "noise"},
    **{"condot data": "data", "vp velocity": "velocity", "ddpm_cosine": "v", "condot score": "score"},
}


def pixels(name, std, count=8):
    """A source of independent pixels N(0.3, std^2) by its exact predictions, images of it, and their exact mean bits at a time."""
    path, kind, mean = PATHS[name.split()[0]](), KINDS[name], 0.3

    def network(x, t, labels):
        c = path(widen(t, x))
        variance = c.a**2 * std**2 + c.b**2
        away = x - c.a * mean
        if kind == "score":
            return -away / variance
        return target(kind, mean + c.a * std**2 / variance * away, c.b / variance * away, c)

    x = mean + std * normal(3, Purpose.INITIAL, 0, torch.arange(count), (1, 2, 3)).double()

    def exact(t):
        c = path(torch.tensor(t, dtype=torch.float64))
        variance = std**2 + (c.b / c.a) ** 2
        spread = dequantise(x, uniform(0, Purpose.NOISE, 0, torch.arange(count), (1, 2, 3)), STEP)
        nats = (spread - mean) ** 2 / (2 * variance) + torch.log(2 * math.pi * variance) / 2
        return (nats.mean() / math.log(2) - math.log2(STEP)).item()

    source = FlowModel(velocity_field(network, path, kind), path, (1, 2, 3), 0, 0, torch.device("cpu"), lambda x: x, kind)
    return source, x, exact, likelihood_end_time(path, kind, STEP / 10)


@pytest.mark.parametrize("std", [1 / 255, 0.02])
@pytest.mark.parametrize("name", KINDS)
def test_bits_of_sharp_pixels_are_exact_and_the_printed_error_covers_theirs(name, std):
    """Half an 8-bit step to 2.5 steps wide: a uniform Heun grid errs by up to 5 bits there, and the error that is printed says so.

    0.004 bits hold what else there is: N(0, beta_0^2) for p_0, in which 48 values of CondOT at 1e-3 or VE are 0.001 off.
    """
    source, x, exact, end = pixels(name, std)
    labels = torch.zeros(len(x), dtype=torch.int64)
    for how in ({"exact": True}, {"exact": False}, {"exact": False, "tolerance": 1e-3}, {"exact": False, "solver": "heun", "steps": 50}):
        found = compute_bits_per_dimension(source, x, labels, seed=0, **how)
        off = abs(found.mean - exact(end))
        assert off < found.solver_error + 0.004, (how, found.mean, exact(end), found.solver_error)
        if how in ({"exact": True}, {"exact": False}):
            assert off < 0.004 and found.solver_error < 0.02 and found.evaluations < 260
    c = source.path(torch.tensor(end, dtype=torch.float64))
    assert found.noise == pytest.approx(float(c.b / c.a)) and found.noise < 1.3 * STEP
    if found.noise < 1.01 * STEP / 10:  # what is measured is then the density of the data
        assert abs(exact(end) - exact(1.0)) < 0.012


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "sub_vp", "ve", "edm"])
def test_the_log_density_of_a_sharp_mixture_is_exact(name):
    """Two components of half an 8-bit step and one of ten, correlated; over log-SNR where both ends have one."""
    sharp = torch.tensor([[[1.0, 0.6], [0.6, 1.0]], [[1.0, 0.0], [0.0, 4.0]], [[400.0, 0.0], [0.0, 100.0]]], dtype=torch.float64)
    law = oracles.Mixture(MIXTURE.weights, MIXTURE.means / 2, sharp / 255**2)
    x, path, a_b = law.sample(12, torch.Generator().manual_seed(1)), PATHS[name](), oracles.BY_HAND[name]
    end = likelihood_end_time(path, "velocity", STEP / 10)
    assert (end < 1) == (name == "vp") and (name != "vp" or abs(a_b(end)[1] - STEP / 10) < 1e-9)
    ends = torch.tensor([0.0, end], dtype=torch.float64)
    integration_variable = "log_snr" if name in ("vp", "ve", "edm") else "time"
    found = log_density(law.field(a_b), x, ends, path, integration_variable=integration_variable)
    torch.testing.assert_close(found.log_density, law.log_density(x, *a_b(end)[:2]), rtol=0, atol=0.03 if name in ("ve", "edm") else 0.01)


def test_a_float32_network_is_asked_in_float32_at_times_of_float64():
    """Times near 1 rounded to float32 would make CondOT's beta 4e-5 wrong at a tenth of a step, and VP's 1 %."""
    seen = []
    found = log_density(lambda x, t: seen.append((x.dtype, t.dtype)) or x, torch.ones(2, 3), uniform_grid(1), CondOT(), solver=heun)
    assert set(seen) == {(torch.float32, torch.float64)} and found.log_density.dtype == torch.float64


def test_hutchinson_is_right_in_the_mean_with_one_probe_a_solve():
    """The mean over probes is the exact value, for signs and normal numbers; an adaptive solver keeps its tolerances."""
    n, size = 3000, (2, 2, 3)
    x = 0.5 * normal(0, Purpose.INITIAL, 0, torch.arange(1), size).double()
    many = x.expand(n, *size).contiguous()
    exact = log_density(wave, x, uniform_grid(20), CondOT(), solver=rk4).log_density
    for draw in (rademacher, normal):
        probe = draw(1, Purpose.PROBE, 0, torch.arange(n), size).double()
        values = log_density(wave, many, uniform_grid(20), CondOT(), probe=probe, solver=rk4).log_density
        assert abs(values.mean().item() - exact.item()) < 5.5 * values.std().item() / math.sqrt(n)
        assert values.std() > 0.1
    adaptive = log_density(
        wave, many[:4], uniform_grid(1), CondOT(), probe=probe[:4], solver=lambda f, x, t: dormand_prince(f, x, t, rtol=1e-8, atol=1e-8)
    )
    torch.testing.assert_close(adaptive.log_density, values[:4], rtol=1e-4, atol=1e-4)
    assert adaptive.evaluations < 1000


def test_rescaling_changes_bits_per_dimension_by_the_right_constant():
    """y = s x has log p_y = log p_x - D log s, so at one and the same bin it takes log2(s) more bits, and none when the bin grows too."""
    s, small = 1.7, oracles.Mixture(MIXTURE.weights, 1.7 * MIXTURE.means, 1.7**2 * MIXTURE.covariances)
    here = log_density(FIELD, X, uniform_grid(80), CondOT(), solver=rk4).log_density
    there = log_density(small.field(oracles.condot), s * X, uniform_grid(80), CondOT(), solver=rk4).log_density
    torch.testing.assert_close(
        bits_per_dimension(there, 2) - bits_per_dimension(here, 2), torch.full((20,), math.log2(s), dtype=torch.float64), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(bits_per_dimension(there, 2, 0.01 * s), bits_per_dimension(here, 2, 0.01), rtol=0, atol=1e-4)


def test_uniform_images_take_eight_bits():
    """Density of the uniform law over 256 bins of width 2 / 255: log2(256) bits, by the stated term; a term of 8 bits less is 1 bin."""
    step, dims = 2 / 255, 12
    flat = torch.full((3,), -dims * math.log(256 * step), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dimension(flat, dims), torch.full((3,), 8.0, dtype=torch.float64))
    assert abs(-math.log2(step) - 6.99) < 0.01


def test_dequantised_values_fill_their_bins():
    data = (torch.randint(0, 256, (500, 2, 3), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()
    spread = dequantise(data, uniform(0, Purpose.PROBE, 0, torch.arange(500), (2, 3)))
    inside = ((spread - data) * 127.5 + 0.5).flatten().sort().values
    assert oracles.kolmogorov(inside, inside) < 2.5
    assert torch.equal(((spread + 1) * 127.5).round(), ((data + 1) * 127.5).round())


def test_bits_of_a_discrete_law_are_bounded_from_above():
    """For 8-bit values with a known law, the dequantised density's mean bits are at least the entropy (Jensen), and nearly it."""
    law = oracles.gaussian([0.1], [[0.04]])
    pixels = (law.sample(4000, torch.Generator().manual_seed(1)) * 127.5 + 127.5).round() / 127.5 - 1
    spread = dequantise(pixels, uniform(0, Purpose.PROBE, 0, torch.arange(4000), (1,)))
    bits = mean_and_standard_error(bits_per_dimension(law.log_density(spread), 1))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.04) - math.log2(2 / 255)
    assert abs(bits.mean.item() - entropy) < 5.5 * bits.standard_error.item()
    assert abs(bits.standard_error.item() - math.sqrt(0.5) / math.log(2) / math.sqrt(4000)) < 0.002


def test_shapes_and_no_gradient_left():
    x = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    result = log_density(wave, x, uniform_grid(5), CondOT(), solver=heun)
    assert result.log_density.shape == (1,) and result.initial_point.shape == x.shape and not result.log_density.requires_grad
    net = torch.nn.Linear(3, 3)
    inside = log_density(lambda x, t: net(x), x, uniform_grid(5), CondOT())
    assert not inside.log_density.requires_grad and all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        assert torch.equal(log_density(lambda x, t: net(x), x, uniform_grid(5), CondOT()).log_density, inside.log_density)


BAD = {
    "clock": (
        lambda: log_density(wave, torch.zeros(2, 3), uniform_grid(2), CondOT(), integration_variable="log_snr"),
        r"from t=0 to t=1, where it is -inf and inf",
    ),
    "size": (lambda: log_density(wave, torch.zeros(1, 3, 5, 5), uniform_grid(2), CondOT()), r"75 dimensions.*limit is 64.*Pass a probe"),
    "probe": (lambda: log_density(wave, torch.zeros(2, 3), uniform_grid(2), CondOT(), probe=torch.zeros(2, 1)), r"probe \(2, 1\)"),
    "nan": (lambda: log_density(wave, torch.zeros(2, 3) * math.nan, uniform_grid(2), CondOT()), r"x holds 6 values"),
    "grid": (lambda: log_density(wave, torch.zeros(2, 3), torch.tensor([1.0, 0.0]), CondOT()), r"no grid"),
    "bits": (lambda: bits_per_dimension(torch.zeros(1), 0), r"dimensions=0"),
    "step": (lambda: bits_per_dimension(torch.zeros(1), 3, 0.0), r"step=0\.0"),
    "estimate": (lambda: mean_and_standard_error(torch.zeros(1)), r"1 values have no standard error"),
    "mode": (lambda: divergence(torch.sin, torch.zeros(1, 2), mode="both"), r"'both'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
