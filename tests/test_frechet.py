"""The Frechet distance against what is known of Gaussians, and moments against those of all samples at once."""

import math

import numpy as np
import pytest
import torch

from condot.pipeline.evaluation.frechet import FeatureMoments, frechet_distance

COUNT = 10_001


def gaussian(mean, covariance):
    """Exact moments, as if of many samples."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    return FeatureMoments(COUNT, torch.as_tensor(mean, dtype=torch.float64), covariance * (COUNT - 1))


def rotation(width, seed):
    """An orthogonal matrix."""
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def covariance(width, seed, rank=None):
    """Of a given rank, with eigenvalues from 1e-3 to 10."""
    turn, values = rotation(width, seed), torch.logspace(-3, 1, width, dtype=torch.float64)
    values[: width - (rank or width)] = 0
    return (turn * values) @ turn.T


def test_equal_covariances_leave_the_distance_of_the_means():
    spread = covariance(7, 0)
    one, other = torch.arange(7.0).double(), torch.arange(7.0).double().flip(0) / 3
    expected = (one - other).square().sum().item()
    assert frechet_distance(gaussian(one, spread), gaussian(other, spread)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("m", "s", "n", "r"), [(0.3, 2.0, -1.0, 0.5), (0.0, 0.0, 0.0, 3.0), (1.0, 1.0, 1.0, 1.0)])
def test_one_dimension(m, s, n, r):
    """(m1 - m2)^2 + (s1 - s2)^2."""
    found = frechet_distance(gaussian([m], [[s**2]]), gaussian([n], [[r**2]]))
    assert found == pytest.approx((m - n) ** 2 + (s - r) ** 2, abs=1e-12)


def test_commuting_covariances():
    """With one set of axes the distance adds up over them."""
    turn = rotation(6, 1)
    a, b = torch.linspace(0.1, 4, 6, dtype=torch.float64), torch.linspace(3, 0, 6, dtype=torch.float64)
    found = frechet_distance(gaussian(torch.zeros(6), (turn * a) @ turn.T), gaussian(torch.ones(6), (turn * b) @ turn.T))
    assert found == pytest.approx(6 + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-12)


def test_two_by_two_by_hand():
    """For 2 x 2 matrices tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 S2)): covariances that do not commute."""
    one, other = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    assert not np.allclose(one @ other, other @ one)
    root = math.sqrt(np.trace(one @ other) + 2 * math.sqrt(np.linalg.det(one @ other)))
    expected = 0.25 + np.trace(one) + np.trace(other) - 2 * root
    assert frechet_distance(gaussian([0.5, 0.0], one), gaussian([0.0, 0.0], other)) == pytest.approx(expected, rel=1e-12)


def test_it_is_the_published_formula():
    """With scipy's square root of S1 S2, as pytorch-fid and the FID of Heusel et al. compute it."""
    from scipy.linalg import sqrtm

    one, other = covariance(12, 2), covariance(12, 3)
    expected = 1.0 + (one.trace() + other.trace()).item() - 2 * np.trace(sqrtm((one @ other).numpy())).real
    mean = torch.zeros(12)
    mean[4] = 1
    assert frechet_distance(gaussian(mean, one), gaussian(torch.zeros(12), other)) == pytest.approx(expected, rel=1e-9)


def test_turning_and_swapping_change_nothing():
    turn, a, b = rotation(9, 4), covariance(9, 5), covariance(9, 6, rank=4)
    m, n = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    straight = frechet_distance(gaussian(m, a), gaussian(n, b))
    assert frechet_distance(gaussian(turn @ m, turn @ a @ turn.T), gaussian(turn @ n, turn @ b @ turn.T)) == pytest.approx(
        straight, rel=1e-10
    )
    assert frechet_distance(gaussian(n, b), gaussian(m, a)) == pytest.approx(straight, rel=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_nothing_is_nothing_away_from_itself(rank):
    """Singular covariances too: rounding of 1e-16 is not made 1e-8 by a root."""
    for seed in range(8):
        same = gaussian(torch.arange(64.0), 100 * covariance(64, seed, rank=rank))
        assert 0 <= frechet_distance(same, same) < 1e-10, "and never below nothing"


def test_covariances_on_different_axes_share_nothing():
    """Two lines at a right angle: the whole of both spreads."""
    assert frechet_distance(gaussian([0, 0], [[4.0, 0], [0, 0]]), gaussian([0, 0], [[0, 0], [0, 9.0]])) == pytest.approx(13.0, rel=1e-12)


def test_the_covariance_is_numpys():
    """Divided by N - 1, the field's choice; float32 features far from 0 lose no digits."""
    features = 1000 + torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    moments = FeatureMoments.from_features(features)
    np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)
    np.testing.assert_allclose(moments.mean, features.double().mean(0), rtol=1e-14)


@pytest.mark.parametrize("sizes", [(1, 99), (37, 62, 1), (50, 50), (1,) * 100])
def test_moments_of_parts_are_those_of_the_whole(sizes):
    """In any parts and any order, as batches and ranks come; also with parts far from one another."""
    features = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + torch.arange(100.0)[:, None]
    whole, parts = FeatureMoments.from_features(features), list(features.split(sizes))
    for from_batches in (
        FeatureMoments.from_batches(parts),
        FeatureMoments.from_batches(reversed(parts)),
        FeatureMoments.from_features(parts[0]) + FeatureMoments.from_batches(parts[1:]),
    ):
        assert from_batches.count == 100 and not from_batches.is_singular
        torch.testing.assert_close(from_batches.mean, whole.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(from_batches.covariance, whole.covariance, rtol=1e-11, atol=1e-11)


def test_samples_of_two_gaussians_come_near_their_distance():
    """From N samples the estimate is a little too large, by about a constant over N."""
    generator = torch.Generator().manual_seed(3)
    exact, found = 4 * 0.5**2 + 4 * (2 - 1) ** 2, {}
    for count in (200, 20_000):
        a = torch.randn(count, 4, generator=generator)
        found[count] = frechet_distance(
            FeatureMoments.from_features(a), FeatureMoments.from_features(0.5 + 2 * torch.randn(count, 4, generator=generator))
        )
    assert found[20_000] == pytest.approx(exact, rel=0.03)
    halves = [
        frechet_distance(
            FeatureMoments.from_features(torch.randn(n, 16, generator=generator)),
            FeatureMoments.from_features(torch.randn(n, 16, generator=generator)),
        )
        for n in (100, 1000)
    ]
    assert 5 < halves[0] / halves[1] < 20


def test_too_few_samples_and_bad_ones_are_said():
    assert FeatureMoments.from_features(torch.randn(5, 5)).is_singular and not FeatureMoments.from_features(torch.randn(6, 5)).is_singular
    assert FeatureMoments.from_features(torch.ones(1, 2)).covariance.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="not all finite"):
        FeatureMoments.from_features(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match="at least one batch"):
        FeatureMoments.from_batches([])
    with pytest.raises(ValueError, match="rows of numbers"):
        FeatureMoments.from_features(torch.zeros(0, 3))
    for together in (frechet_distance, FeatureMoments.__add__):
        with pytest.raises(ValueError, match="of 2 and of 3 numbers"):
            together(FeatureMoments.from_features(torch.zeros(4, 2)), FeatureMoments.from_features(torch.zeros(4, 3)))
