"""Random numbers: named, never repeated, of the right law, the same however they are batched."""

import math

import oracles
import pytest
import torch

from condot.pipeline.flow import Purpose, normal, rademacher, uniform

INDEX = torch.arange(5000)


def test_normal_numbers_have_normal_moments_and_law():
    x = normal(1, Purpose.NOISE, 0, INDEX, (41,)).double().flatten()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean().item() - moment) < 5.5 * math.sqrt(variance / n), power
    ordered = x.sort().values
    assert oracles.kolmogorov(ordered, torch.special.ndtr(ordered)) < 2.5


def test_uniform_numbers_are_uniform_inside_the_ends():
    u = torch.cat([uniform(1, Purpose.TIME, step, INDEX) for step in range(20)]).sort().values
    assert u.dtype == torch.float64 and u[0] > 0 and u[-1] < 1
    assert oracles.kolmogorov(u, u) < 2.5


def test_signs_are_even():
    x = rademacher(1, Purpose.PROBE, 0, INDEX, (20,))
    assert set(x.flatten().tolist()) == {-1.0, 1.0} and abs(x.mean().item()) < 5.5 / math.sqrt(x.numel())


def test_values_of_a_sample_and_of_samples_are_independent():
    """All correlations within a sample, and between neighbours in index, step, seed and purpose, are chance."""
    x = normal(1, Purpose.NOISE, 0, INDEX, (12,)).double()
    others = [normal(*name, (12,)).double() for name in (
        (1, Purpose.NOISE, 0, INDEX + 1), (1, Purpose.NOISE, 1, INDEX), (2, Purpose.NOISE, 0, INDEX), (1, Purpose.INITIAL, 0, INDEX),
    )]  # fmt: skip
    bound = 5.5 / math.sqrt(len(INDEX))
    within = x.T @ x / len(INDEX) - torch.eye(12, dtype=torch.float64)
    assert (within - within.diag().diag()).abs().max() < bound
    for other in others:
        assert (x.T @ other / len(INDEX)).abs().max() < bound
    squares = (x**2 - 1).T @ (x**2 - 1) / len(INDEX) / 2
    assert (squares - squares.diag().diag()).abs().max() < bound


def test_no_noise_is_repeated_over_many_steps_and_indices():
    """400,000 (step, index): the CPU generator's 32-bit seeds would repeat some of them; whole rows are compared."""
    rows = torch.cat([normal(7, Purpose.NOISE, step, torch.arange(1000), (2,)) for step in range(400)])
    assert len(torch.unique(rows.view(torch.int32).to(torch.int64)[:, 0] * 2**32 + rows.view(torch.int32)[:, 1])) >= 400_000 - 2
    u = torch.cat([uniform(7, Purpose.TIME, step, torch.arange(1000)) for step in range(400)])
    assert len(torch.unique(u)) == 400_000


def test_every_bit_of_a_name_counts():
    """Indices, steps and seeds that differ in one bit only, of all that fit."""
    names = [(0, 0, 0), *((1 << k, 0, 0) for k in range(63)), *((0, 1 << k, 0) for k in range(63)), *((0, 0, 1 << k) for k in range(63))]
    for draw in (lambda *name: uniform(*name, (2,)), lambda *name: normal(*name, (2,))):
        draws = {tuple(draw(seed, Purpose.NOISE, step, torch.tensor([index]))[0].tolist()) for seed, step, index in names}
        assert len(draws) == len(names)


@pytest.mark.parametrize("shape", [(3,), (1, 5, 7), (4, 8, 8)])
def test_draws_do_not_depend_on_the_batch(shape):
    """Bitwise: all at once, one by one, in odd slices, in another order."""
    index = torch.tensor([0, 3, 2**33, 17, 5, 999_999_999_999, 6])
    whole = normal(3, Purpose.NOISE, 12, index, shape)
    assert torch.equal(whole, torch.cat([normal(3, Purpose.NOISE, 12, one, shape) for one in index[:, None]]))
    assert torch.equal(whole, torch.cat([normal(3, Purpose.NOISE, 12, part, shape) for part in index.split(3)]))
    assert torch.equal(whole.flip(0), normal(3, Purpose.NOISE, 12, index.flip(0), shape))
    assert torch.equal(uniform(3, Purpose.TIME, 12, index)[2:4], uniform(3, Purpose.TIME, 12, index[2:4]))
    assert torch.equal(uniform(3, Purpose.TIME, 12, index, shape)[2:4], uniform(3, Purpose.TIME, 12, index[2:4], shape))


def test_negative_and_large_seeds_are_seeds():
    draws = [uniform(seed, Purpose.TIME, 0, torch.arange(2))[0].item() for seed in (0, 1, -1, 2**32, 2**62, -(2**63))]
    assert len(set(draws)) == 6


def test_bad_indices_are_refused():
    for bad in (torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"index has shape .*one whole number per sample"):
            uniform(0, Purpose.TIME, 0, bad)
