"""Fields of pairs: whatever takes a field takes (velocity, score), and what bounds or moves one moves the other as the identities say."""

import itertools
import math

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    PATHS,
    CondOT,
    Inpainting,
    clip_data_prediction,
    convert,
    denoise,
    diffusion_coefficient,
    exponential,
    heun,
    log_density,
    predictor_corrector,
    reconstruction_guidance,
    replacement_callback,
    score_field,
    shift_data_prediction,
    shift_score_prediction,
    uniform_grid,
    velocity_field,
    widen,
)

LAW = oracles.gaussian([0.3, -0.6], [[0.9, 0.2], [0.2, 0.5]])
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BY_HAND = {"condot": oracles.condot, "cosine": oracles.cosine, "ve": oracles.ve, "edm": oracles.edm}


def velocity_of(by_hand):
    return LAW.field(by_hand)


def pair_of(by_hand):
    """Velocity and score of one Gaussian law."""
    return lambda x, t: (LAW.velocity(x, *by_hand(t[0].item())), LAW.score(x, *by_hand(t[0].item())[:2]))


def now(t, count=6):
    return torch.full((count,), t, dtype=torch.float64)


@pytest.mark.parametrize(("name", "t"), list(itertools.product(BY_HAND, (0.05, 0.5, 0.9))))
def test_clipped_bounds_both_and_they_still_belong_together(name, t):
    """The clamped data prediction of the oracle, in both names; the velocity as without a score."""
    by_hand, path = BY_HAND[name], PATHS[name]()
    c = path(widen(now(t), X))
    velocity, score = clip_data_prediction(pair_of(by_hand), path, 0.4)(X, now(t))
    data = LAW.data(X, *by_hand(t)[:2]).clamp(-0.4, 0.4)
    assert bool((LAW.data(X, *by_hand(t)[:2]).abs() > 0.4).any())
    torch.testing.assert_close(convert(velocity, "velocity", "data", X, c), data, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score, convert(data, "data", "score", X, c), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip_data_prediction(velocity_of(by_hand), path, 0.4)(X, now(t)), velocity)


def test_clipped_leaves_what_is_in_bounds_as_it_was_learned():
    """A score that does not agree with the velocity is not replaced by a converted one."""
    learned = lambda x, t: (velocity_of(oracles.condot)(x, t), torch.full_like(x, 0.01))  # noqa: E731
    velocity, score = clip_data_prediction(learned, CondOT(), 50.0)(X, now(0.5))
    torch.testing.assert_close(velocity, velocity_of(oracles.condot)(X, now(0.5)))
    torch.testing.assert_close(score, torch.full_like(X, 0.01))


def test_clipped_is_finite_at_both_ends():
    """t = 0: the score is -x whatever the data are; t = 1: the point is the datum, and nothing moves."""
    field = lambda x, t: (5 * x, 7 * x)  # noqa: E731  data predictions far out of bounds
    velocity, score = clip_data_prediction(field, CondOT(), 0.4)(X, now(0.0))
    torch.testing.assert_close(score, -X)
    torch.testing.assert_close(convert(velocity, "velocity", "data", X, CondOT()(widen(now(0.0), X))), (6 * X).clamp(-0.4, 0.4))
    assert all(
        torch.equal(part, want) for part, want in zip(clip_data_prediction(field, CondOT(), 0.4)(X, now(1.0)), (5 * X, 7 * X), strict=True)
    )
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"bound={bound}"):
            clip_data_prediction(field, CondOT(), bound)


@pytest.mark.parametrize("name", BY_HAND)
def test_moves_of_data_and_of_the_score_are_the_identities(name):
    path, t = PATHS[name](), now(0.4)
    c, moved = path(widen(t, X)), X.flip(0)
    out = pair_of(BY_HAND[name])(X, t)
    velocity, score = shift_data_prediction(out, moved, c)
    for part, kind in ((velocity, "velocity"), (score, "score")):
        before = convert(out[0] if kind == "velocity" else out[1], kind, "data", X, c)
        torch.testing.assert_close(convert(part, kind, "data", X, c), before + moved, rtol=1e-6, atol=1e-6)
    velocity, score = shift_score_prediction(out, moved, c)
    torch.testing.assert_close(score, out[1] + moved)
    torch.testing.assert_close(convert(velocity, "velocity", "score", X, c), score, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shift_score_prediction(out[0], moved, c), velocity)


def test_the_score_of_a_field_is_the_learned_one_or_else_converted():
    t = now(0.4)
    torch.testing.assert_close(score_field(velocity_of(oracles.condot), CondOT())(X, t), LAW.score(X, 0.4, 0.6))
    assert torch.equal(score_field(lambda x, t: (x, 3 * x), CondOT())(X, t), 3 * X)


def test_all_that_takes_a_field_takes_a_pair():
    """Denoising, likelihood, the ODE, the SDE, predictor-corrector, replacement and reconstruction: as of the velocity alone."""
    pair, plain, path, grid = pair_of(oracles.condot), velocity_of(oracles.condot), CondOT(), uniform_grid(12, 1e-3, 1 - 1e-3)
    noise = lambda k: torch.randn(6, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64)  # noqa: E731
    sigma, measure, probe = diffusion_coefficient("noise"), Inpainting(torch.tensor([1.0, 0.0])), torch.ones_like(X)
    measure, y = Inpainting(torch.tensor([1.0, 0.0])), torch.tensor([[0.5, 0.0]], dtype=torch.float64).expand(6, 2)
    after = replacement_callback(measure, y, path, X)
    for act in (
        lambda field: denoise(field, X, 0.7, path),
        lambda field: log_density(field, X, grid, path, probe=probe).log_density,
        lambda field: heun(field, X, grid).x,
        lambda field: exponential(field, X, grid, path, sigma, noise).x,
        lambda field: predictor_corrector(field, X, grid, path, sigma, noise).x,
        lambda field: exponential(field, X, grid, path, sigma, noise, step_callback=after).x,
        lambda field: exponential(reconstruction_guidance(field, path, measure, y, noise_std=0.3), X, grid, path, sigma, noise).x,
        lambda field: exponential(clip_data_prediction(field, path, 0.5), X, grid, path, sigma, noise).x,
    ):
        torch.testing.assert_close(act(pair), act(plain), rtol=1e-6, atol=1e-6)


def test_reconstruction_guides_a_learned_score_to_the_exact_posterior():
    """Isotropic Gaussian data: velocity and score of N(m, s^2) given y, whose measured coordinate is N(m', s'^2)."""
    law, noise_std = oracles.gaussian([0.3, -0.6], [[0.49, 0.0], [0.0, 0.49]]), 0.4
    gain = 0.49 / (0.49 + noise_std**2)
    given = oracles.gaussian([0.3 + gain * (0.9 - 0.3), -0.6], [[0.49 * (1 - gain), 0.0], [0.0, 0.49]])
    y = torch.tensor([[0.9, 0.0]], dtype=torch.float64).expand(6, 2)
    pair = lambda x, t: (law.velocity(x, *oracles.condot(t[0].item())), law.score(x, t[0].item(), 1 - t[0].item()))  # noqa: E731
    field = reconstruction_guidance(pair, CondOT(), Inpainting(torch.tensor([1.0, 0.0])), y, noise_std=noise_std, data_std=0.7)
    for t in (0.2, 0.8):
        velocity, score = field(X, now(t))
        torch.testing.assert_close(velocity, given.velocity(X, *oracles.condot(t)))
        torch.testing.assert_close(score, given.score(X, t, 1 - t))


def test_half_precision_comes_out_in_single_also_as_a_pair():
    model = lambda x, t: (x.bfloat16(), x.bfloat16())  # noqa: E731
    out = velocity_field(model, CondOT(), "velocity")(X.bfloat16(), now(0.5).float())
    assert [part.dtype for part in out] == [torch.float32] * 2
