"""Evaluation: each figure against cases whose answer is known."""

import pytest
import torch

from pipeline.evaluate import classifier, diversity, evaluate, nearest


def blobs(count, seed, spread=0.05):
    """Two classes of 2 x 2 images around -0.5 and 0.5."""
    torch.manual_seed(seed)
    labels = torch.arange(count) % 2
    return (labels - 0.5)[:, None, None, None] + spread * torch.randn(count, 1, 2, 2), labels


def test_diversity_is_the_mean_distance_within_a_class():
    images = torch.tensor([0.0, 3.0, 6.0, 1.0, 1.0])[:, None, None, None]
    assert diversity(images, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx((4.0 + 0.0) / 2)
    with pytest.raises(ValueError, match="class 1 has one image"):
        diversity(images, torch.tensor([0, 0, 0, 0, 1]))


def test_gaussian_diversity():
    """Two draws of N(0, s^2 I) in d dimensions are 2 s Gamma((d+1)/2) / Gamma(d/2) apart on average."""
    images = 0.3 * torch.randn(3000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = 2 * 0.3 * torch.exp(torch.lgamma(torch.tensor(2.5)) - torch.lgamma(torch.tensor(2.0))).item()
    assert diversity(images, torch.zeros(3000)) == pytest.approx(expected, rel=0.02)


def test_nearest_is_the_smallest_distance():
    a, b = torch.tensor([[[[0.0]]], [[[5.0]]]]), torch.tensor([[[[1.0]]], [[[4.5]]]])
    assert nearest(a, b).tolist() == [1.0, 0.5]


def test_real_samples_pass_and_bad_ones_show():
    """Fresh real images have ratios near 1; copies, collapsed classes and swapped labels each show in their own figure."""
    train, held_out, fresh = blobs(400, 0), blobs(200, 1), blobs(400, 2)
    good = evaluate(*fresh, train, held_out)
    assert good.accuracy == good.accuracy_of_held_out == 1 and abs(good.diversity_ratio - 1) < 0.1 and abs(good.nearest_ratio - 1) < 0.2
    assert evaluate(*train, train, held_out).nearest_ratio == 0
    swapped = evaluate(fresh[0], 1 - fresh[1], train, held_out)
    assert swapped.accuracy == 0
    collapsed = evaluate(*blobs(400, 3, spread=0.005), train, held_out)
    assert collapsed.diversity_ratio < 0.2
    assert "ratio 0.1" in str(collapsed)


def test_the_classifier_learns_from_pixels():
    predict = classifier(*blobs(100, 0))
    images, labels = blobs(50, 9)
    assert torch.equal(predict(images), labels)
