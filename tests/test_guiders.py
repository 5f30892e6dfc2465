"""Guidance methods against diffusers' guiders and `rescale_noise_cfg`, on every prediction, and at the ends where they used to be NaN."""

import itertools
import math

import oracles
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg

from condot.pipeline.export.runtime.guidance_v1 import Guidance
from condot.pipeline.flow import (
    APG,
    EDM,
    PATHS,
    CFGZeroStar,
    Coefficients,
    CondOT,
    Cosine,
    autoguide,
    convert,
    euler,
    guide,
    heun,
    rescale_factor,
    uniform_grid,
    widen,
)

SHAPE = (3, 4, 5)
PREDICTIONS = ("velocity", "noise", "data", "score", "v")
T = torch.tensor([0.15, 0.4, 0.6, 0.9], dtype=torch.float64)
ON, OFF = torch.zeros(4), torch.ones(4)


def draw(seed, dtype=torch.float64):
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X, DATA, LESSER = draw(0), draw(1) * 0.5 + 0.2, draw(2) * 0.4


def coefficients(path, t=T):
    return path(widen(t, X[: len(t)]))


def field_of(good, lesser):
    """The field whose conditional and null values are these."""
    return lambda x, t, c: torch.cat([good, lesser]) if len(c) == 2 * len(good) else good


def velocities(path):
    """The velocities that belong to the two data predictions."""
    c = coefficients(path)
    return [convert(data, "data", "velocity", X, c) for data in (DATA, LESSER)]


@pytest.mark.parametrize(("path", "predict"), list(itertools.product(("condot", "cosine", "vp", "ve"), PREDICTIONS)))
@pytest.mark.parametrize(("scale", "share"), [(5.0, 1.0), (5.0, 0.7), (0.0, 0.5), (-1.0, 0.4)])
def test_rescaling_is_of_the_networks_prediction_as_in_diffusers_and_in_exports(path, predict, scale, share):
    """`rescale_noise_cfg` of the predictions, then converted; and what exported pipelines have done since their first version."""
    path = PATHS[path]()
    c, (good, lesser) = coefficients(path), velocities(path)
    got = guide(field_of(good, lesser), ON, OFF, scale, rescale=share, path=path, predict=predict)(X, T)
    mine, its = (convert(v, "velocity", predict, X, c) for v in (good, lesser))
    expected = rescale_noise_cfg(its + scale * (mine - its), mine, share)
    torch.testing.assert_close(convert(got, "velocity", predict, X, c), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Guidance(scale, 0.0, 1.0, share).sharpen(mine, its), expected)
    weak = autoguide(lambda x, t: good, lambda x, t: lesser, scale, rescale=share, path=path, predict=predict)(X, T)
    torch.testing.assert_close(weak, got)


def test_rescaling_data_is_not_rescaling_velocities():
    """What two meanings were worth: at w = 5 they are far apart, so that the test above can tell them."""
    field = field_of(*velocities(CondOT()))
    of_velocity = guide(field, ON, OFF, 5.0, rescale=1.0)(X, T)
    of_data = guide(field, ON, OFF, 5.0, rescale=1.0, path=CondOT(), predict="data")(X, T)
    assert (of_velocity - of_data).norm() / of_velocity.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_a_constant_field_is_rescaled_without_a_nan_and_has_gradients(dtype, level):
    """Standard deviation 0: there is nothing to scale, and the field stays what guidance made of it."""
    still = torch.full((4, *SHAPE), level, dtype=dtype)
    for scale in (0.0, 3.0, -1.0):
        got = guide(field_of(still, still / 2), ON, OFF, scale, rescale=1.0)(X.to(dtype), T)
        torch.testing.assert_close(got, torch.lerp(still / 2, still, scale))
    good = draw(1, torch.float32)
    cancelled = guide(field_of(good, 1.5 * good), ON, OFF, 3.0, rescale=1.0)(X.float(), T)  # 1.5 + 3 (1 - 1.5) = 0
    assert cancelled.abs().max() < 1e-5, "rounding is not blown up to the size of an image"
    point = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    rescale_factor(point, point * 2, 0.5).sum().backward()
    assert bool(point.grad.isfinite().all())
    single = guide(lambda x, t, c: torch.ones(4, 1), torch.zeros(2), torch.ones(2), 3.0, rescale=1.0)(torch.zeros(2, 1), T[:2])
    assert torch.equal(single, torch.ones(2, 1)), "one value has no deviation at all"


def test_rescaling_in_half_precision_is_that_of_single_precision():
    """Values whose squares float16 cannot hold: deviations are taken in float32."""
    for dtype, size in ((torch.float16, 400.0), (torch.bfloat16, 1.0)):
        good, lesser = ((size * draw(seed)).to(dtype) for seed in (1, 2))
        got = guide(field_of(good, lesser), ON, OFF, 2.0, rescale=0.7)(X.to(dtype), T)
        exact = guide(field_of(good.double(), lesser.double()), ON, OFF, 2.0, rescale=0.7)(X, T)
        assert got.dtype is dtype and bool(got.isfinite().all())
        torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.02 * size)


# --- APG


@pytest.mark.parametrize("path", ["condot", "cosine", "vp", "edm"])
@pytest.mark.parametrize(("eta", "threshold", "scale"), [(0.0, 0.0, 4.0), (1.0, 2.5, 4.0), (0.3, 2.5, -1.0), (0.0, 100.0, 0.0)])
def test_apg_is_diffusers_on_data_predictions(path, eta, threshold, scale):
    """The paper's form: from the conditional prediction, w - 1 times the projected difference."""
    path = PATHS[path]()
    method = APG(eta=eta, norm_threshold=threshold)
    got = guide(field_of(*velocities(path)), ON, OFF, scale, method=method, path=path)(X, T)
    expected = normalized_guidance(DATA, LESSER, scale - 1, None, eta, threshold, use_original_formulation=True)
    torch.testing.assert_close(convert(got, "velocity", "data", X, coefficients(path)), expected, rtol=1e-9, atol=1e-9)


def test_apg_that_keeps_all_is_plain_guidance_and_scale_one_the_conditional_field():
    field = field_of(*velocities(CondOT()))
    plain = guide(field, ON, OFF, 4.0)(X, T)
    torch.testing.assert_close(guide(field, ON, OFF, 4.0, method=APG(eta=1.0), path=CondOT())(X, T), plain)
    assert torch.equal(guide(field, ON, OFF, 1.0, method=APG(), path=CondOT())(X, T), velocities(CondOT())[0])


def test_apgs_momentum_runs_over_the_evaluations_of_a_solve_and_begins_anew_with_the_next():
    """Diffusers' buffer along the same three times; a time that falls, another batch, or a field of its own starts at zero."""
    path, method, buffer = CondOT(), APG(eta=0.2, norm_threshold=3.0, momentum=-0.6), MomentumBuffer(-0.6)
    pairs = [(draw(10 + k), draw(20 + k)) for k in range(3)]
    now = iter([])

    def field(x, t, c):
        c = path(widen(t[: len(x) // 2], x[: len(x) // 2]))
        return torch.cat([convert(data, "data", "velocity", x[: len(x) // 2], c) for data in next(now)])

    guided = guide(field, ON, OFF, 4.0, method=method, path=path)
    for _ in range(2):  # the second solve begins at an earlier time
        now, buffer = iter(pairs), MomentumBuffer(-0.6)
        for k, (good, lesser) in enumerate(pairs):
            t = torch.full((4,), 0.1 + 0.3 * k, dtype=torch.float64)
            expected = normalized_guidance(good, lesser, 3.0, buffer, 0.2, 3.0, use_original_formulation=True)
            got = convert(guided(X, t), "velocity", "data", X, coefficients(path, t))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_apgs_momentum_rests_outside_the_interval_and_is_left_out_where_data_have_no_velocity():
    path, method = CondOT(), APG(momentum=0.5)
    field = field_of(*velocities(path))
    guided = guide(field, ON, OFF, 3.0, method=method, path=path, interval=(0.3, 0.7))
    alone = guide(field, ON, OFF, 3.0, method=method, path=path)
    times = lambda t: torch.full((4,), t, dtype=torch.float64)  # noqa: E731
    guided(X, times(0.1))
    torch.testing.assert_close(guided(X, times(0.5)), alone(X, times(0.5)))
    end = alone(X, times(1.0))  # a heun step looks at t = 1, where the data prediction is x and has no velocity
    assert bool(end.isfinite().all())
    torch.testing.assert_close(end, guide(field, ON, OFF, 3.0, method=APG(), path=path)(X, times(1.0)))


def test_a_solve_with_apg_stays_finite_at_both_ends():
    """Of velocities on the straight path, t = 0 and t = 1 included; zero fields and zero data too."""
    mixture = oracles.three()
    law = oracles.gaussian([0.9, 1.1], [[0.08, -0.03], [-0.03, 0.15]])
    both = lambda x, t, c: torch.cat(  # noqa: E731
        [one.velocity(part, *oracles.condot(t[0].item())) for one, part in zip((law, mixture), x.chunk(2), strict=True)]
    )
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.zeros(50)
    method = APG(norm_threshold=1.0, momentum=-0.5)
    end = heun(guide(both, labels, labels + 1, 3.0, method=method, path=CondOT()), x, uniform_grid(20)).x
    assert (end.mean(0) - torch.tensor([0.9, 1.1])).abs().max() < 0.5
    zero = guide(lambda x, t, c: torch.zeros_like(x), ON, OFF, 3.0, method=method, path=CondOT(), rescale=1.0)
    assert torch.equal(zero(torch.zeros_like(X), T), torch.zeros_like(X))


# --- CFG-Zero*


@pytest.mark.parametrize(("path", "predict"), list(itertools.product(("condot", "cosine", "ve"), ("velocity", "noise", "data", "v"))))
@pytest.mark.parametrize("scale", [4.0, 0.0, -1.0])
def test_cfg_zero_star_is_diffusers_on_the_networks_prediction(path, predict, scale):
    path = PATHS[path]()
    c, pair = coefficients(path), velocities(path)
    got = guide(field_of(*pair), ON, OFF, scale, method=CFGZeroStar(), path=path, predict=predict, rescale=0.5)(X, T)
    mine, its = (convert(v, "velocity", predict, X, c) for v in pair)
    its = cfg_zero_star_scale(mine.flatten(1), its.flatten(1))[..., None, None] * its
    expected = rescale_noise_cfg(its + scale * (mine - its), mine, 0.5)
    torch.testing.assert_close(convert(got, "velocity", predict, X, c), expected, rtol=1e-5, atol=1e-5)


def test_cfg_zero_star_stands_still_for_its_first_steps():
    """Euler on a field of ones in ten steps, two of them zero: x moves by 0.8; so it does at scale 1; a zero lesser field is no NaN."""
    ones = lambda x, t, c: torch.ones_like(x)  # noqa: E731
    method = CFGZeroStar(zero_until=uniform_grid(10)[2].item())
    for dtype, scale in itertools.product((torch.float64, torch.float32), (1.0, 3.0)):
        end = euler(guide(ones, ON, OFF, scale, method=method, interval=(0.5, 1.0)), X.to(dtype), uniform_grid(10)).x
        torch.testing.assert_close(end, X.to(dtype) + 0.8)
    good = draw(1)
    got = guide(field_of(good, torch.zeros_like(good)), ON, OFF, 3.0, method=CFGZeroStar())(X, T)
    torch.testing.assert_close(got, 3 * good)


# --- pairs of velocity and score


JOINT = [(torch.stack(list(pair))) for pair in ((draw(3), draw(4)), (draw(5), draw(6)))]


def joint(x, t, c):
    """Velocities and scores that do not agree, as a network's that learned both."""
    (good_v, good_s), (lesser_v, lesser_s) = JOINT
    return torch.cat([good_v, lesser_v]), torch.cat([good_s, lesser_s])


def test_both_parts_of_a_pair_are_guided():
    (good_v, good_s), (lesser_v, lesser_s) = JOINT
    velocity, score = guide(joint, ON, OFF, 3.0)(X, T)
    torch.testing.assert_close(velocity, 3 * good_v - 2 * lesser_v)
    torch.testing.assert_close(score, 3 * good_s - 2 * lesser_s)
    velocity, score = guide(joint, ON, OFF, 3.0, rescale=0.7)(X, T)
    torch.testing.assert_close(velocity, rescale_noise_cfg(3 * good_v - 2 * lesser_v, good_v, 0.7))
    torch.testing.assert_close(score, rescale_noise_cfg(3 * good_s - 2 * lesser_s, good_s, 0.7))
    inside = torch.tensor([False, True, True, False])[:, None, None, None]
    mixed = guide(joint, ON, OFF, 3.0, interval=(0.3, 0.7))(X, T)
    torch.testing.assert_close(mixed[1], torch.where(inside, 3 * good_s - 2 * lesser_s, good_s))
    one, other = ((lambda x, t, pair=pair: tuple(pair)) for pair in JOINT)
    torch.testing.assert_close(autoguide(one, other, 3.0)(X, T)[1], 3 * good_s - 2 * lesser_s)
    plain = autoguide(one, lambda x, t: lesser_v, 3.0)(X, T)
    torch.testing.assert_close(plain, 3 * good_v - 2 * lesser_v)


def test_apg_of_a_pair_is_that_of_each_ones_data_prediction():
    path, method = Cosine(), APG(eta=0.3, norm_threshold=2.0, momentum=0.4)
    c, got = coefficients(path), guide(joint, ON, OFF, 3.0, method=method, path=path)(X, T)
    for part, kind in enumerate(("velocity", "score")):
        mine, its = (convert(pair[part], kind, "data", X, c) for pair in JOINT)
        expected = normalized_guidance(mine, its, 2.0, MomentumBuffer(0.4), 0.3, 2.0, use_original_formulation=True)
        torch.testing.assert_close(convert(got[part], kind, "data", X, c), expected)
    start = guide(joint, ON, OFF, 3.0, method=method, path=path)(X, torch.zeros(4, dtype=torch.float64))
    assert all(bool(part.isfinite().all()) for part in start), "alpha = 0: the score tells nothing of the data"


def test_an_exact_pair_guided_is_exact_in_both():
    """Velocity and score of one law: guided, they still belong together, as `convert` says."""
    path, c = CondOT(), coefficients(CondOT())
    pair = [(v, convert(v, "velocity", "score", X, c)) for v in velocities(path)]
    both = lambda x, t, k: tuple(torch.cat(parts) for parts in zip(*pair, strict=True))  # noqa: E731
    for method in (None, APG(eta=0.2)):
        velocity, score = guide(both, ON, OFF, 3.0, method=method, path=path)(X, T)
        torch.testing.assert_close(score, convert(velocity, "velocity", "score", X, c))


# --- ends of an interval, and what is refused


def test_the_ends_of_an_interval_count_whatever_rounding_brought_them():
    """0.1 + 0.2 is more than 0.3, and 0.7 in float32 less than 0.7: both are ends."""
    field = field_of(*velocities(CondOT()))
    full = guide(field, ON, OFF, 3.0)(X, T)
    for t in (torch.full((4,), 0.1 + 0.2, dtype=torch.float64), torch.full((4,), 0.7).double(), torch.full((4,), 0.7)):
        torch.testing.assert_close(guide(field, ON, OFF, 3.0, interval=(0.3, 0.7))(X, t), full)


BAD = {
    "eta": (lambda: APG(eta=math.nan), "apg_eta=nan"),
    "threshold": (lambda: APG(norm_threshold=-1.0), r"apg_norm_threshold=-1\.0"),
    "momentum": (lambda: APG(momentum=1.0), r"apg_momentum=1\.0"),
    "zero": (lambda: CFGZeroStar(zero_until=1.0), r"zero_until=1\.0"),
    "no path": (lambda: guide(joint, ON, OFF, 2.0, method=APG()), "APG acts on data predictions: pass path"),
    "no path for noise": (lambda: guide(joint, ON, OFF, 2.0, predict="noise"), "the network predicts noise: pass path"),
    "kind": (lambda: guide(joint, ON, OFF, 2.0, path=EDM(), predict="image"), "'image' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_coefficients_are_those_of_the_path():
    """The oracle's own numbers, so that the tests above do not lean on one sign error twice."""
    c = coefficients(CondOT())
    assert isinstance(c, Coefficients) and torch.equal(c.a.flatten(), T) and torch.equal(c.b.flatten(), 1 - T)
