"""Guidance: on mixtures with classes the ends are known, the middle is linear."""

import math

import oracles
import pytest
import torch

from pipeline.flow import autoguide, guide

MIXTURE = oracles.three()
CLASSES = [oracles.gaussian(m.tolist(), s.tolist()) for m, s in zip(MIXTURE.means, MIXTURE.covariances, strict=True)]
NULL = 3
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.full((6,), 0.6, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
NONE = torch.full_like(LABELS, NULL)


def field(x, t, labels):
    """The velocity of each sample's class, or of the whole mixture for the null class."""
    rows = []
    for i, label in enumerate(labels.tolist()):
        law = MIXTURE if label == NULL else CLASSES[label]
        rows.append(law.velocity(x[i : i + 1], *oracles.condot(t[i].item())))
    return torch.cat(rows)


def counted():
    sizes = []
    return sizes, lambda x, t, c: sizes.append(len(x)) or field(x, t, c)


def test_scale_one_is_the_conditional_field_and_zero_the_unconditional_one():
    for scale, labels in ((1.0, LABELS), (0.0, NONE)):
        sizes, watched = counted()
        assert torch.equal(guide(watched, LABELS, NONE, scale)(X, T), field(X, T, labels))
        assert sizes == [6]


@pytest.mark.parametrize("scale", [-1.0, 0.3, 1.5, 4.0])
def test_guidance_is_linear_in_one_evaluation_of_two_batches(scale):
    sizes, watched = counted()
    got = guide(watched, LABELS, NONE, scale)(X, T)
    torch.testing.assert_close(got, field(X, T, NONE) + scale * (field(X, T, LABELS) - field(X, T, NONE)))
    assert sizes == [12]


def test_a_negative_condition_takes_the_place_of_none():
    away = (LABELS + 1) % 3
    got = guide(field, LABELS, away, 2.0)(X, T)
    torch.testing.assert_close(got, 2 * field(X, T, LABELS) - field(X, T, away))


def test_guidance_in_an_interval_acts_inside_and_saves_outside():
    sizes, watched = counted()
    guided = guide(watched, LABELS, NONE, 3.0, interval=(0.2, 0.7))
    always = guide(field, LABELS, NONE, 3.0)
    torch.testing.assert_close(guided(X, T), always(X, T))
    late = torch.full_like(T, 0.71)
    assert torch.equal(guided(X, late), field(X, late, LABELS))
    assert sizes == [12, 6]
    mixed = torch.tensor([0.1, 0.2, 0.5, 0.7, 0.8, 0.9], dtype=torch.float64)
    inside = torch.tensor([False, True, True, True, False, False])[:, None]
    torch.testing.assert_close(guided(X, mixed), torch.where(inside, always(X, mixed), field(X, mixed, LABELS)))


def test_rescaling_brings_back_the_conditional_deviation():
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    good, lesser = images, images.roll(1, 0) * 0.5
    net = lambda x, t, c: torch.cat([good, lesser])  # noqa: E731
    t, c = torch.full((4,), 0.5, dtype=torch.float64), torch.zeros(4)
    plain = guide(net, c, c + 1, 4.0)(images, t)
    full = guide(net, c, c + 1, 4.0, rescale=1.0)(images, t)
    torch.testing.assert_close(full.flatten(1).std(1), good.flatten(1).std(1))
    half = guide(net, c, c + 1, 4.0, rescale=0.5)(images, t)
    torch.testing.assert_close(half, (plain + full) / 2)


def test_autoguidance_pushes_away_from_the_weak_model():
    strong, weak = (lambda x, t: field(x, t, LABELS)), (lambda x, t: 0.5 * field(x, t, LABELS) + 1)
    torch.testing.assert_close(autoguide(strong, weak, 2.0)(X, T), 1.5 * strong(X, T) - 1)
    torch.testing.assert_close(autoguide(strong, weak, 1.0)(X, T), strong(X, T))
    late = autoguide(strong, None, 2.0, interval=(0.0, 0.5))  # the weak model is not asked outside
    torch.testing.assert_close(late(X, T), strong(X, T))


BAD = {
    "shapes": (lambda: guide(field, LABELS, NONE[:2], 2.0), "6 conditions and 2 null ones differ"),
    "scale": (lambda: guide(field, LABELS, NONE, math.nan), r"guidance_scale=nan"),
    "interval": (lambda: guide(field, LABELS, NONE, 2.0, interval=(0.7, 0.2)), r"interval \(0\.7, 0\.2\)"),
    "rescale": (lambda: guide(field, LABELS, NONE, 2.0, rescale=1.5), r"rescale=1\.5"),
    "autoguide": (lambda: autoguide(field, field, math.inf), r"guidance_scale=inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
