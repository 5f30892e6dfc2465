"""Parameterisations: five names for one prediction, exactly exchangeable."""

import itertools

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    PATHS,
    PREDICTIONS,
    CondOT,
    clip_data_prediction,
    conversion_coefficients,
    convert,
    interpolate,
    is_singular,
    precondition,
    target,
    velocity_field,
    widen,
)
from condot.pipeline.flow import denoise as finish

PAIRS = list(itertools.product(PREDICTIONS, PREDICTIONS))


def drawn(name, shape=(7, 2, 3, 7)):
    """A batch as wide as its images, at its own times."""
    generator = torch.Generator().manual_seed(5)
    data, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    t = 0.02 + 0.96 * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return (data, noise, t, *interpolate(PATHS[name](), data, noise, t))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("source", "wanted"), PAIRS)
def test_conversions_are_exact(name, source, wanted):
    """From known data and noise: the target of one kind converts to the target of every other."""
    data, noise, _, x, c = drawn(name)
    exact = target(wanted, data, noise, c)
    got = convert(target(source, data, noise, c), source, wanted, x, c)
    assert (got - exact).norm() <= 1e-9 * exact.norm()


@pytest.mark.parametrize("name", PATHS)
def test_targets_are_their_definitions(name):
    data, noise, _, _, c = drawn(name)
    torch.testing.assert_close(target("velocity", data, noise, c), c.da * data + c.db * noise)
    torch.testing.assert_close(target("score", data, noise, c), -noise / c.b)
    torch.testing.assert_close(target("v", data, noise, c), c.a * noise - c.b * data)
    assert torch.equal(target("data", data, noise, c), data) and torch.equal(target("noise", data, noise, c), noise)


@pytest.mark.parametrize("name", oracles.BY_HAND)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.93])
def test_marginal_fields_of_a_mixture_convert_into_one_another(name, t):
    """Posterior means obey the same identities: score, velocity and data of docs/mathematics.md section 8, all from the velocity."""
    mixture, (a, b, da, db) = oracles.three(), oracles.BY_HAND[name](t)
    x = a * mixture.sample(9, torch.Generator().manual_seed(1)) + b * torch.randn(
        9, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    c = PATHS[name]()(widen(torch.full((9,), t, dtype=torch.float64), x))
    velocity = mixture.velocity(x, a, b, da, db)
    for kind, exact in (("score", mixture.score(x, a, b)), ("data", mixture.data(x, a, b)), ("noise", mixture.noise(x, a, b))):
        got = convert(velocity, "velocity", kind, x, c)
        assert (got - exact).norm() <= 1e-8 * exact.norm(), kind
        assert (convert(exact, kind, "velocity", x, c) - velocity).norm() <= 1e-8 * velocity.norm(), kind


def test_the_oracle_score_is_the_gradient_of_the_oracle_density():
    mixture = oracles.three()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture.log_density(x, 0.6, 0.4).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach(), 0.6, 0.4), gradient)


def test_a_noise_error_grows_by_the_stated_factor():
    """db - da b / a: an error d in eps is this much in the velocity."""
    c = CondOT()(torch.tensor([0.01, 0.3], dtype=torch.float64))
    torch.testing.assert_close(conversion_coefficients("noise", "velocity", c)[1], c.db - c.da * c.b / c.a)


SINGULAR = {  # (path, prediction) -> at t = 0, at t = 1
    ("condot", "velocity"): (False, False),
    ("condot", "data"): (False, True),
    ("condot", "noise"): (True, False),
    ("condot", "score"): (True, False),
    ("condot", "v"): (False, False),
    ("cosine", "data"): (False, True),
    ("vp", "noise"): (False, True),
    ("vp", "velocity"): (False, False),
    ("ve", "noise"): (False, False),
    ("edm", "data"): (False, False),
    ("ddpm", "noise"): (False, False),
}


@pytest.mark.parametrize(("name", "kind"), SINGULAR)
def test_singularities_are_where_the_table_says(name, kind):
    path = PATHS[name]()
    assert (is_singular(path, kind, 0.0), is_singular(path, kind, 1.0)) == SINGULAR[name, kind]
    assert not is_singular(path, kind, 0.5)


GROWTH = {("data", "velocity"): (0, 1), ("data", "score"): (0, 2), ("noise", "velocity"): (1, 0), ("noise", "data"): (1, 0),
          ("velocity", "score"): (0, 1), ("score", "velocity"): (1, 0), ("v", "score"): (0, 1), ("velocity", "data"): (0, 0)}  # fmt: skip


@pytest.mark.parametrize("pair", GROWTH)
@pytest.mark.parametrize("name", ["condot", "cosine"])
def test_errors_grow_as_fast_as_the_table_says(name, pair):
    """The power of 1 / t at the start and of 1 / (1 - t) at the end, read off two times."""
    path = PATHS[name]()
    near = conversion_coefficients(*pair, path(torch.tensor([1e-5, 1e-4, 1 - 1e-4, 1 - 1e-5], dtype=torch.float64)))[1].abs()
    start, end = torch.log10(near[0] / near[1]).item(), torch.log10(near[3] / near[2]).item()
    assert abs(max(start, 0) - GROWTH[pair][0]) < 0.01 and abs(max(end, 0) - GROWTH[pair][1]) < 0.01


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_model_of_any_kind_becomes_the_same_velocity_field(kind):
    mixture = oracles.three()

    def model(x, t):
        a, b, da, db = oracles.cosine(t[0].item())
        known = {"data": mixture.data(x, a, b), "noise": mixture.noise(x, a, b), "score": mixture.score(x, a, b)}
        known["velocity"], known["v"] = da * known["data"] + db * known["noise"], a * known["noise"] - b * known["data"]
        return known[kind]

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((5,), 0.37, dtype=torch.float64)
    torch.testing.assert_close(velocity_field(model, PATHS["cosine"](), kind)(x, t), mixture.velocity(x, *oracles.cosine(0.37)))
    torch.testing.assert_close(
        finish(velocity_field(model, PATHS["cosine"](), kind), x, 0.37, PATHS["cosine"]()), mixture.data(x, *oracles.cosine(0.37)[:2])
    )


def test_conversion_stays_in_single_precision_under_autocast():
    data, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, c = interpolate(CondOT(), data, noise, torch.tensor([0.1, 0.5, 0.9]))
        got = convert((data - noise).bfloat16(), "velocity", "data", x, c)
        field = velocity_field(lambda x, t: (data - noise).bfloat16(), CondOT(), "velocity")(x, torch.tensor([0.1, 0.5, 0.9]))
    assert got.dtype == field.dtype == torch.float32


@pytest.mark.parametrize("name", PATHS)
def test_karras_preconditioning_has_unit_input_and_unit_target(name):
    """For data of standard deviation sigma_data the wrapped network sees unit variance, and a unit error weighs one at every time."""
    sigma, generator = 0.5, torch.Generator().manual_seed(1)
    data, noise = (
        sigma * torch.randn(40_000, generator=generator, dtype=torch.float64),
        torch.randn(40_000, generator=generator, dtype=torch.float64),
    )
    for time in (0.02, 0.5, 0.98):
        t = torch.full((40_000,), time, dtype=torch.float64)
        x, c = interpolate(PATHS[name](), data[:, None], noise[:, None], t)
        seen = []
        skip = precondition(lambda x, t, seen=seen: seen.append(x) or torch.zeros_like(x), PATHS[name](), sigma)(x, t)
        out = precondition(lambda x, t: torch.ones_like(x), PATHS[name](), sigma)(x, t) - skip
        bound = 6 * (2 / 40_000) ** 0.5
        assert abs(seen[0].var().item() - 1) < bound
        assert abs(((data[:, None] - skip) / out).var().item() - 1) < bound
        sd2, s2 = sigma**2, (c.b / c.a) ** 2
        torch.testing.assert_close(skip, sd2 / (s2 + sd2) * x / c.a)  # Karras' own formulas, at sigma = b / a
        torch.testing.assert_close(out, (s2 * sd2 / (s2 + sd2)).sqrt())


def test_bad_input_is_refused_with_the_reason():
    x, c = torch.zeros(3, 2), CondOT()(torch.full((3, 1), 0.5))
    with pytest.raises(ValueError, match=r"'epsilon' is unknown: choose one of data"):
        convert(x, "epsilon", "data", x, c)
    with pytest.raises(ValueError, match=r"'flow' is unknown"):
        target("flow", x, x, c)
    with pytest.raises(ValueError, match=r"coefficients \(3,\).*widen"):
        convert(x, "data", "noise", x, CondOT()(torch.full((3,), 0.5)))
    with pytest.raises(ValueError, match=r"prediction \(3, 1\)"):
        convert(x[:, :1], "data", "noise", x, c)
    with pytest.raises(ValueError, match=r"sigma_data=0"):
        precondition(lambda x, t: x, CondOT(), 0.0)
    with pytest.raises(ValueError, match=r"unknown"):
        velocity_field(lambda x, t: x, CondOT(), "eps")


@pytest.mark.parametrize("name", PATHS)
def test_a_clipped_field_goes_to_the_clamped_data(name):
    """Its velocity is that of the clamped data and of the noise which the point then holds; in range it is the given one's."""
    path = PATHS[name]()
    _, _, t, x, c = drawn(name)
    noise = torch.sin(2 * x)
    field = velocity_field(lambda x, t: torch.sin(2 * x), path, "noise")
    data = (x - c.b * noise) / c.a
    kept = data.clamp(-1, 1)
    wanted = c.da * kept + c.db * (x - c.a * kept) / c.b
    got = clip_data_prediction(field, path, 1.0)(x, t)
    assert (data != kept).double().mean() > 0.05
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(clip_data_prediction(field, path, 1e6)(x, t), field(x, t), rtol=1e-6, atol=1e-6)
