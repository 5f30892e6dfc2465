"""Paths: their coefficients, derivatives, levels and points."""

import math

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    DDPM,
    EDM,
    PATHS,
    VE,
    VP,
    CondOT,
    LinearPath,
    NormalPrior,
    UniformPrior,
    empirical_velocity_field,
    heun,
    interpolate,
    scale_initial_noise,
    step_variances,
    uniform_grid,
    widen,
)

INSIDE = torch.linspace(0.013, 0.987, 41, dtype=torch.float64)


@pytest.mark.parametrize("name", oracles.BY_HAND)
def test_coefficients_are_those_of_the_table(name):
    times = torch.tensor([0.0, 0.001, 0.3, 0.77, 0.999], dtype=torch.float64)
    by_hand = torch.tensor([oracles.BY_HAND[name](t) for t in times.tolist()], dtype=torch.float64).T
    torch.testing.assert_close(torch.stack(list(PATHS[name]()(times))), by_hand, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_autograd(name):
    """da and db are the derivatives of alpha and beta."""
    t = INSIDE.clone().requires_grad_()
    c = PATHS[name]()(t)
    da = torch.autograd.grad(c.a.sum(), t, retain_graph=True)[0] if c.a.requires_grad else torch.zeros_like(t)
    db = torch.autograd.grad(c.b.sum(), t)[0]
    torch.testing.assert_close(c.da.detach(), da, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c.db.detach(), db, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_log_snr_rises_and_its_inverse_undoes_it(name):
    path = PATHS[name]()
    c, levels = path(INSIDE), path.log_snr(INSIDE)
    torch.testing.assert_close(levels, 2 * torch.log(c.a / c.b), rtol=1e-10, atol=1e-10)
    assert bool((levels.diff() > 0).all())
    torch.testing.assert_close(path.time_from_log_snr(levels), INSIDE, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", PATHS)
def test_single_precision_is_within_rounding_of_double(name):
    """No cancellation on [1e-3, 1 - 1e-3]: relative error of every coefficient below 3e-6 (of EDM's db: 7 powers of one rounding)."""
    t = torch.linspace(1e-3, 1 - 1e-3, 997)
    for single, double in zip(PATHS[name]()(t), PATHS[name]()(t.double()), strict=True):
        assert single.dtype == torch.float32
        assert ((single - double).abs() <= 3e-6 * double.abs()).all()


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "sub_vp"])
def test_paths_end_clean(name):
    c = PATHS[name]()(torch.ones(1, dtype=torch.float64))
    assert c.a.item() == 1 and c.b.item() == 0


def test_variance_exploding_levels_are_geometric():
    levels = VE(0.01, 50.0)(uniform_grid(9)).b
    torch.testing.assert_close(levels[1:] / levels[:-1], torch.full((9,), (0.01 / 50) ** (1 / 9), dtype=torch.float64))


def test_edm_levels_are_karras_grid():
    i, n = torch.arange(18, dtype=torch.float64), 18
    karras = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM()(uniform_grid(17)).b, karras)


VARIANCES = [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]


@pytest.mark.parametrize(("ours", "theirs"), VARIANCES)
def test_ddpm_adds_noise_as_diffusers_does_at_every_timestep(ours, theirs):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs)
    path, steps = DDPM(ours), torch.arange(1000)
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(2, 1000, 3, generator=generator, dtype=torch.float64).unbind()
    x, _ = interpolate(path, data, noise, path.time(steps))
    torch.testing.assert_close(x, scheduler.add_noise(data, noise, steps), rtol=0, atol=3e-5)
    single, _ = interpolate(path, data.float(), noise.float(), path.time(steps).float())
    torch.testing.assert_close(single, scheduler.add_noise(data.float(), noise.float(), steps), rtol=0, atol=3e-5)
    torch.testing.assert_close(path(path.time(steps)).a ** 2, scheduler.alphas_cumprod.double(), rtol=3e-4, atol=1e-7)
    assert torch.equal(path.timestep(path.time(steps).float()), steps)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_ddpm_alphas_are_products_of_the_step_variances(kind):
    path = DDPM(kind)
    expected = torch.cumprod(1 - step_variances(kind), 0)
    torch.testing.assert_close(path(path.time(torch.arange(1000))).a ** 2, expected, rtol=1e-12, atol=0)


def test_linear_step_variances_are_the_continuous_path():
    """With 1000 steps of b(s) / 1000 DDPM is VP (0.1, 20) up to O(1 / N)."""
    gap = (DDPM()(INSIDE).a - VP()(INSIDE).a).abs().max()
    assert 1e-5 < gap < 4e-3


def test_times_widen_over_samples_even_when_the_batch_is_as_wide_as_the_image():
    """B = W = 5: sample i is mixed at t_i, not column i."""
    data, noise = torch.ones(5, 2, 3, 5, dtype=torch.float64), torch.zeros(5, 2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    x, c = interpolate(CondOT(), data, noise, t)
    assert c.a.shape == (5, 1, 1, 1)
    assert all(bool((x[i] == t[i]).all()) for i in range(5))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (4, 4), (3, 1, 1, 3), (2, 2, 2, 2, 2)])
def test_a_batch_is_its_samples_one_by_one(name, shape):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    t = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    whole, _ = interpolate(PATHS[name](), data, noise, t)
    single = [interpolate(PATHS[name](), data[i : i + 1], noise[i : i + 1], t[i : i + 1])[0] for i in range(shape[0])]
    assert torch.equal(whole, torch.cat(single))


def test_half_precision_points_are_mixed_in_single():
    data = torch.full((2, 3), 1.5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, c = interpolate(CondOT(), data, torch.zeros_like(data), torch.tensor([1 / 3, 0.5], dtype=torch.bfloat16))
    assert x.dtype == c.a.dtype == torch.float32


def test_a_solver_starts_where_the_path_does():
    noise = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scale_initial_noise(CondOT(), noise), noise)
    torch.testing.assert_close(scale_initial_noise(VE(), noise), 50 * noise)
    torch.testing.assert_close(scale_initial_noise(CondOT(), noise, 0.25), 0.75 * noise)


# the general linear path


@pytest.mark.parametrize("prior", [NormalPrior(), UniformPrior(0, 2)])
def test_general_path_has_the_velocity_of_its_formula(prior):
    """Along a bridge the conditional velocity is d/dt x_t; a curved mean and scale, checked by differences."""
    path = LinearPath(prior, mean=lambda t, z: torch.sin(math.pi / 2 * t) * z**3 * t + (1 - t) * t * z, scale=lambda t: (1 - t) ** 2)
    generator = torch.Generator().manual_seed(3)
    data, start = torch.rand(2, 5, 2, 3, generator=generator, dtype=torch.float64).unbind()
    t, h = torch.linspace(0.1, 0.8, 5, dtype=torch.float64), 1e-5
    x, velocity, _ = path.interpolate_with_target(data, start, t)
    difference = (path.interpolate_with_target(data, start, t + h)[0] - path.interpolate_with_target(data, start, t - h)[0]) / (2 * h)
    torch.testing.assert_close(velocity, difference, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.conditional_velocity(x, data, t), velocity)


def test_general_path_with_a_normal_prior_is_condot():
    path, generator = LinearPath(), torch.Generator().manual_seed(4)
    data, noise = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64).unbind()
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    x, c = interpolate(CondOT(), data, noise, t)
    torch.testing.assert_close(path.interpolate_with_target(data, noise, t)[0], x)
    torch.testing.assert_close(path.conditional_score(x, data, t), -noise / c.b)
    points = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    exact = torch.cat([oracles.finite(points).velocity(x[i : i + 1], *oracles.condot(t[i].item())) for i in range(6)])
    torch.testing.assert_close(empirical_velocity_field(path, points)(x, t), exact)


def test_a_score_with_another_prior_is_refused():
    x = torch.zeros(2, 3)
    for ask in (lambda p: p.conditional_score(x, x, torch.rand(2)), lambda p: p.interpolate_with_target(x, x, torch.rand(2), "score")):
        with pytest.raises(ValueError, match=r"prior UniformPrior.*Predict the velocity"):
            ask(LinearPath(UniformPrior(0, 2)))


def test_uniform_prior_example_ends_on_the_three_points():
    """Data {0.5, 0.5, 1.2, 1.7}, prior uniform on [0, 2]: the field led from evenly spaced starts ends in proportion 2 : 1 : 1."""
    path = LinearPath(UniformPrior(0, 2, softness=1e-3))
    points = torch.tensor([[0.5], [0.5], [1.2], [1.7]], dtype=torch.float64)
    start = (torch.arange(400, dtype=torch.float64)[:, None] + 0.5) / 200
    end = heun(empirical_velocity_field(path, points), start, uniform_grid(400, end=0.999)).x
    distance = (end - torch.tensor([[0.5, 1.2, 1.7]], dtype=torch.float64)).abs()
    assert distance.min(1).values.max() < 0.005
    share = torch.bincount(distance.argmin(1), minlength=3) / 400
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.25]), atol=0.01, rtol=0)


def test_soft_edges_keep_the_density_normalised():
    x = torch.linspace(-4, 6, 200_001, dtype=torch.float64)[:, None]
    density = torch.exp(UniformPrior(0, 2, softness=0.1).log_density(x))
    assert abs(torch.trapezoid(density, x[:, 0]).item() - 1) < 1e-9
    draws = UniformPrior(0, 2, softness=0.1).sample(0, 0, torch.arange(40_000), (1,)).double().sort(0).values
    cdf = torch.cumulative_trapezoid(density, x[:, 0])[torch.searchsorted(x[:, 0].contiguous(), draws[:, 0]) - 1]
    assert oracles.kolmogorov(draws[:, 0], cdf) < 3.2


def test_prior_densities():
    x = torch.tensor([[0.5, 1.0], [2.5, 1.0]], dtype=torch.float64)
    assert UniformPrior(0, 2).log_density(x).tolist() == [-2 * math.log(2), -math.inf]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(NormalPrior().log_density(x), expected)
    draws = UniformPrior(-1, 3).sample(0, 0, torch.arange(4000), (2,))
    assert draws.shape == (4000, 2) and -1 < draws.min() < -0.99 and 2.99 < draws.max() < 3
    assert abs(draws.mean().item() - 1) < 6 * (4 / math.sqrt(12)) / math.sqrt(8000)


# bad input


def bad_calls():
    x = torch.zeros(3, 2)
    yield "outside", lambda: widen(torch.tensor([0.0, 0.5, 1.1]), x), r"0\.0 to 1\.1.*\[0, 1\]"
    yield "negative", lambda: widen(torch.tensor([-1e-3, 0.5, 1.0]), x), r"times lie in"
    yield "nan", lambda: widen(torch.tensor([0.1, math.nan, 1.0]), x), r"times lie in"
    yield "wide", lambda: widen(torch.zeros(3, 1), x), r"\(3, 1\).*one time per sample.*torch\.full"
    yield "scalar", lambda: widen(torch.tensor(0.5), x), r"one time per sample"
    yield "short", lambda: widen(torch.zeros(2), x), r"one time per sample"
    yield "shapes", lambda: interpolate(CondOT(), x, x[:, :1], torch.zeros(3)), r"\(3, 2\).*\(3, 1\).*differ"
    yield "infinite", lambda: interpolate(CondOT(), x + math.inf, x, torch.zeros(3)), r"data holds 6 values that are not finite"
    yield "nan noise", lambda: interpolate(CondOT(), x, x + math.nan, torch.zeros(3)), r"noise holds 6"
    yield "bytes", lambda: interpolate(CondOT(), x.byte(), x, torch.zeros(3)), r"dtype torch\.uint8.*127\.5"
    yield "vp", lambda: VP(2.0, 1.0), r"beta_min=2\.0"
    yield "ve", lambda: VE(0.0, 1.0), r"sigma_min=0\.0"
    yield "rho", lambda: EDM(rho=0.0), r"rho=0\.0"
    yield "variances", lambda: DDPM("sigmoid"), r"'sigmoid' are unknown"
    yield "variance", lambda: DDPM(last=1.5), r"inside \(0, 1\)"
    yield "steps", lambda: DDPM(steps=1), r"two steps or more"
    yield "prior", lambda: UniformPrior(1, 1), r"low < high"
    yield "kind", lambda: LinearPath().interpolate_with_target(x, x, torch.zeros(3), "v"), r"'v' on a general"
    yield "bridge", lambda: LinearPath().interpolate_with_target(x, x[:2], torch.zeros(3)), r"differ"


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=i) for i, c, m in bad_calls()])
def test_bad_input_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()
