"""Retrieval on cases whose figures are known beforehand."""

import math

import pytest
import torch
from scipy.stats import binomtest

from condot.pipeline.evaluation.retrieval import retrieve, wilson_interval

LINE = torch.arange(50.0)[:, None]
"""Fifty images on a line, one apart."""


def test_each_at_its_own_place():
    found = retrieve(LINE + 0.2, LINE, torch.arange(50))
    assert (found.top1, found.top5, found.mean_reciprocal_rank) == (1, 1, 1)
    assert (found.chance, found.chance_of_five) == (0.02, 0.1) and found.samples == found.candidates == 50
    assert found.top1_interval[1] == 1 and found.top1_interval[0] == pytest.approx(50 / (50 + 1.96**2), abs=1e-3)


def test_ranks_are_counted_in_images():
    """A sample k + 0.1 right of its own: the next 2 k images lie nearer, k before it and k behind."""
    own = torch.tensor([10, 20, 30, 40, 25])
    step = torch.tensor([0, 1, 2, 3, 0])
    found = retrieve((own + step + 0.1)[:, None], LINE, own)
    ranks = [1 + 2 * k for k in (0, 1, 2, 3, 0)]
    assert found.top1 == 2 / 5 and found.top5 == 4 / 5
    assert found.mean_reciprocal_rank == pytest.approx(sum(1 / r for r in ranks) / 5)


def test_samples_that_are_all_alike_are_at_chance():
    """As those of a model that ignores its captions."""
    found = retrieve(torch.full((50, 1), 7.3), LINE, torch.arange(50))
    assert found.top1 == found.chance and found.top5 == found.chance_of_five
    assert found.mean_reciprocal_rank == pytest.approx(found.chance_of_rank)


def test_images_that_are_all_alike_are_at_chance():
    """Ties are shared, not won: neither a broken feature nor two captions of one picture flatters."""
    found = retrieve(torch.randn(30, 3, 4, 4), torch.zeros(10, 3, 4, 4), torch.arange(30) % 10)
    assert found.top1 == pytest.approx(0.1) and found.top5 == pytest.approx(0.5)
    assert found.mean_reciprocal_rank == pytest.approx(sum(1 / k for k in range(1, 11)) / 10) == found.chance_of_rank
    twins = retrieve(torch.tensor([[0.0], [9.0]]), torch.tensor([[1.0], [1.0], [9.0]]), torch.tensor([0, 2]))
    assert twins.top1 == 0.75 and twins.mean_reciprocal_rank == (0.75 + 1) / 2 and twins.top5 == 1


def test_distance_is_euclidean_over_all_values():
    """Nearest by the sum of squares, not by the largest value nor by the sum."""
    candidates = torch.tensor([[[3.0, 0.0]], [[2.0, 2.0]]])
    assert retrieve(torch.zeros(1, 1, 2), candidates, torch.tensor([1])).top1 == 1
    assert retrieve(torch.zeros(1, 1, 2), torch.tensor([[[1.9, 1.9]], [[0.0, 2.5]]]), torch.tensor([1])).top1 == 1


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (50, 50), (1, 50), (31, 50), (3, 7)])
def test_interval_is_wilsons(hits, trials):
    expected = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson_interval(hits / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_report_says_chance_beside():
    text = str(retrieve(LINE + 0.2, LINE, torch.arange(50)))
    assert "chance 2.0%" in text and "chance 10.0%" in text and "100.0%" in text
    assert retrieve(LINE, LINE, torch.arange(50)).as_dict()["chance"] == 0.02


@pytest.mark.parametrize(
    ("samples", "candidates", "own", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, dtype=torch.int64), "of one size"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64), "one index for each"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 4]), "own=0..4 of 4"),
        (torch.zeros(2, 3), torch.zeros(1, 3), torch.tensor([0, 0]), "at least two"),
        (torch.full((2, 3), math.nan), torch.zeros(4, 3), torch.tensor([0, 1]), "not finite"),
        (torch.zeros(0, 3), torch.zeros(4, 3), torch.zeros(0, dtype=torch.int64), "at least one sample"),
    ],
)
def test_what_does_not_fit_is_refused(samples, candidates, own, said):
    with pytest.raises(ValueError, match=said):
        retrieve(samples, candidates, own)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0.5, 0)
