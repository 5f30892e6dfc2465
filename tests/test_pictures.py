"""The lecture's scenes are what they say, and the table of rounding errors is what the theory page states."""

import math

import oracles
import pytest
import torch

from condot.pipeline.flow import PREDICTIONS
from docs.figures import scenes
from docs.figures.table import worst_errors


def test_checkerboard_is_uniform_on_the_dark_squares():
    x = scenes.checkerboard(0, torch.arange(16_000))
    square = (x + 2).floor().long()
    assert bool(((square >= 0) & (square < 4)).all()) and bool((square.sum(1) % 2 == 0).all())
    counts = torch.bincount(4 * square[:, 0] + square[:, 1], minlength=16)
    dark = counts[counts > 0]
    assert len(dark) == 8 and ((dark - 2000).abs() < 6 * math.sqrt(2000)).all()


def test_five_modes_have_the_score_of_the_oracle():
    law, sigma = scenes.five_modes(0.3), 0.3
    parts = scenes.five_modes().component_distribution.base_dist
    mixture = oracles.Mixture(
        scenes.five_modes().mixture_distribution.probs.double(), parts.loc.double(), torch.diag_embed(parts.scale.double() ** 2)
    )
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(scenes.score_of(law)(x).double(), mixture.score(x.double(), 1.0, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["condot", "vp", "edm"])
def test_rounding_is_bounded_and_autocast_is_not_felt(name):
    """Single precision: the error of a conversion is at most a few roundings times its stated growth, 1e3 and for the score of data 1e6."""
    for source in PREDICTIONS:
        for wanted in PREDICTIONS:
            if source != wanted:
                single, under, half = worst_errors(name, source, wanted, times=199)
                assert single == under < 2e-4
                assert single < half


def test_charts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from docs.figures import charts

    charts.schedules(tmp_path)
    assert (tmp_path / "paths.png").stat().st_size > 20_000


def test_a_small_network_learns_the_moons():
    """200 steps, two seconds: samples of the ODE lie nearer to the moons than noise does, by a factor of three."""
    from condot.pipeline.flow import heun, normal, uniform_grid
    from condot.pipeline.flow.counter_rng import Purpose

    model = scenes.train(scenes.moons, 200, batch=512)
    start = normal(0, Purpose.INITIAL, 0, torch.arange(500), (2,))
    end, data = heun(model, start, uniform_grid(20)).x, scenes.moons(1, torch.arange(2000))
    near = [torch.cdist(x, data).min(1).values.mean().item() for x in (start, end)]
    assert near[1] < near[0] / 3
