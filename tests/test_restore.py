"""Restoring through the command's own function: exact posteriors, clean ends, clipping, guidance, captions, counts, refusals."""

import dataclasses
import math

import oracles
import pytest
import torch
from test_inverse import exact_posterior, gaussian_field
from test_methods import gaussian_source

from condot.cli import sample
from condot.pipeline.flow import PATHS, CondOT, convert, widen
from condot.pipeline.flow.linear_path import UniformPrior
from condot.pipeline.sampling.flow_model import with_autoguidance
from condot.pipeline.sampling.restore import RestorationMethod, measurement, restore
from condot.pipeline.sampling.sampler import Sampler

HALF = torch.zeros(8, 8, dtype=torch.bool)
HALF[:, 4:] = True
MEASURE = measurement("inpaint", (1, 8, 8), HALF, 2)
SEEN = MEASURE(torch.full((1, 1, 8, 8), 0.6))[0]


def hidden(images):
    return images[..., 4:]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("solver", "steps"), [("heun", 100), ("dormand_prince", 25)])
def test_the_exact_form_has_the_exact_posterior_of_correlated_data(monkeypatch, solver, steps):
    """Mean and covariance of p(z | y): the solve is affine, so unit starts in place of noise are all of it. Without iterations: off."""
    shape, size = (1, 2, 4), 8
    root = draw(size, size, seed=5) / 2
    mean, covariance = draw(size, seed=6), root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
    measure = measurement("inpaint", shape, mask, 2)
    y = measure(draw(1, *shape, seed=1))[0]
    field = gaussian_field(mean, covariance, CondOT())
    source = dataclasses.replace(gaussian_source("condot", "velocity"), shape=shape, field=lambda x, t, c: field(x, t))
    starts = torch.cat([torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)]).reshape(-1, *shape)
    monkeypatch.setattr("condot.pipeline.sampling.restore.initial_point", lambda *given: starts)
    exact = exact_posterior(measure, mean, covariance, y[None], 0.3, shape)
    wrong = []
    for iterations in (0, 8):
        remedy = RestorationMethod(noise_std=0.3, data_std=1.0, iterations=iterations)
        end = restore(source, measure, y, Sampler(solver, steps, tolerance=1e-6), remedy, count=size + 1, seed=0).images.double().flatten(1)
        response = end[1:] - end[0]
        wrong.append([(end[0] - exact[0]).abs().max(), (response.T @ response - exact[1]).abs().max()])
    assert max(wrong[1]) < 0.02 and wrong[0][1] > 0.05, wrong


@pytest.mark.parametrize("path", ["ve", "edm", "ddpm"])
@pytest.mark.parametrize("method", ["reconstruction", "replacement"])
def test_paths_that_end_on_noise_end_clean(path, method):
    """Data at 0.3 to 1e-5: what differs from it is noise that was left, 0.01, 0.002 and 0.01 without the last step."""
    p = PATHS[path]()

    def network(x, t, labels):
        x, t = x.double(), t.double()
        c = p(widen(t, x))
        z = 0.3 + c.a * 1e-10 / (c.a**2 * 1e-10 + c.b**2) * (x - c.a * 0.3)
        return convert(z, "data", "velocity", x, c)

    source = dataclasses.replace(gaussian_source(path, "data"), field=network)
    calls = []
    counted = dataclasses.replace(source, field=lambda *given: calls.append(1) or network(*given))
    y = MEASURE(torch.full((1, 1, 8, 8), 0.3))[0]
    sampler, remedy = Sampler("euler", 60, grid="rho" if path != "ddpm" else "uniform"), RestorationMethod(method=method)
    made, evaluations = restore(counted, MEASURE, y, sampler, remedy, count=20, seed=1)
    assert (hidden(made) - 0.3).abs().max() < 1e-3 and evaluations == len(calls) == 61


@pytest.mark.parametrize("method", ["reconstruction", "replacement"])
@pytest.mark.parametrize(("clip", "predict", "kept"), [("on", "velocity", True), ("off", "noise", False), ("auto", "noise", True)])
def test_clip_is_honoured(method, clip, predict, kept):
    """Of N(0.3, 0.4^2) 4 % lie beyond 1; bounded, none."""
    source = gaussian_source("condot", predict)
    made = restore(source, MEASURE, SEEN, Sampler("euler", 40, clip=clip), RestorationMethod(method=method), count=60, seed=1).images
    beyond = (hidden(made).abs() > 1 + 1e-4).double().mean()
    assert (beyond == 0) if kept else beyond > 0.01


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "exponential", "predictor_corrector", "dormand_prince"])
def test_every_solver_that_is_allowed_restores_and_counts(solver):
    """The hidden half is the data's, the seen one agrees, and evaluations are counted as they happen."""
    source, calls = gaussian_source("condot", "velocity"), []
    counted = dataclasses.replace(source, field=lambda *given: calls.append(1) or source.field(*given))
    remedy = RestorationMethod(noise_std=0.05, data_std=0.4)
    made, evaluations = restore(counted, MEASURE, SEEN, Sampler(solver, 80), remedy, count=150, seed=1)
    assert evaluations == len(calls)
    assert (MEASURE(made) - SEEN).square().mean().sqrt() < 0.1
    assert abs(hidden(made).mean() - 0.3) < 0.03 and abs(hidden(made).std() - 0.4) < 0.05


def test_a_batch_is_as_large_as_asked_for_and_changes_nothing():
    source, sizes = gaussian_source("condot", "velocity"), []
    watched = dataclasses.replace(source, field=lambda x, t, c: sizes.append(len(x)) or source.field(x, t, c))
    whole = restore(watched, MEASURE, SEEN, Sampler("euler", 5), RestorationMethod(), count=7, seed=1).images
    assert set(sizes) == {7}
    torch.testing.assert_close(
        restore(watched, MEASURE, SEEN, Sampler("euler", 5), RestorationMethod(), count=7, seed=1, batch_size=3).images, whole
    )
    assert set(sizes) == {7, 3, 1}


# --- conditions


def shifted(text):
    """Gaussian data whose mean is told: 0.1 times the class, 0 for none; or by text, as a tensor in a tuple."""

    def network(x, t, condition):
        mean = (condition[0][:, 0] if text else torch.where(condition == 3, 0.0, 0.1 * condition))[:, None, None, None].double()
        c = CondOT()(widen(t.double(), x))
        z = mean + c.a * 0.16 / (c.a**2 * 0.16 + c.b**2) * (x.double() - c.a * mean)
        return convert(z, "data", "velocity", x.double(), c)

    read = (lambda words: (torch.tensor([[0.1 * len(word)] for word in words]),)) if text else None
    base = dataclasses.replace(gaussian_source("condot", "velocity"), field=network)
    return (
        dataclasses.replace(base, encode_text=read, null=read([""]), num_classes=0)
        if text
        else dataclasses.replace(base, num_classes=3, null=3)
    )


@pytest.mark.parametrize("method", ["reconstruction", "replacement"])
def test_guidance_acts_on_what_is_hidden(method):
    """Two Gaussians of one spread: guided by w the mean is mean_0 + w (mean_c - mean_0); class 0 is a class."""
    for text, told in ((False, {"label": 2}), (True, {"prompt": "aa"})):
        remedy = RestorationMethod(method=method, noise_std=0.05, data_std=0.4)
        sampler = Sampler("euler", 60, guidance_scale=3.0)
        made = restore(shifted(text), MEASURE, SEEN, sampler, remedy, count=200, seed=1, **told).images
        assert abs(hidden(made).mean() - 0.6) < 0.03
    away = restore(shifted(True), MEASURE, SEEN, sampler, remedy, count=200, seed=1, prompt="aa", negative_prompt="a").images
    assert abs(hidden(away).mean() - 0.4) < 0.03, "0.1 + 3 (0.2 - 0.1)"
    plain = restore(shifted(True), MEASURE, SEEN, Sampler("euler", 60), remedy, count=200, seed=1).images
    assert abs(hidden(plain).mean()) < 0.03, "no caption at all"


def test_apg_begins_anew_with_every_batch():
    """Momentum is of one solve: images do not depend on how many went before them."""
    source = shifted(False)
    sampler = Sampler("euler", 8, guidance_scale=3.0, guidance="apg", apg_momentum=-0.5)
    whole = restore(source, MEASURE, SEEN, sampler, RestorationMethod(), label=1, count=4, seed=1).images
    parts = restore(source, MEASURE, SEEN, sampler, RestorationMethod(), label=1, count=4, seed=1, batch_size=2).images
    torch.testing.assert_close(parts, whole)


def test_a_learned_score_is_guided_by_the_measurement_too():
    """A field of pairs, followed by an SDE, which takes the score: the same law as by the velocity alone."""
    base = gaussian_source("condot", "velocity")

    def pair(x, t, c):
        velocity = base.field(x, t, c)
        return velocity, convert(velocity, "velocity", "score", x.double(), CondOT()(widen(t.double().clamp(max=1 - 1e-6), x)))

    remedy = RestorationMethod(noise_std=0.05, data_std=0.4)
    one, other = (
        restore(dataclasses.replace(base, field=field), MEASURE, SEEN, Sampler("exponential", 60), remedy, count=20, seed=1).images
        for field in (base.field, pair)
    )
    torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


SOURCE = gaussian_source("condot", "velocity")
CLASSES = shifted(False)
TEXT = shifted(True)
REFUSED = {
    "langevin": (SOURCE, Sampler("langevin"), {}, "langevin cannot restore"),
    "annealed": (SOURCE, Sampler("annealed_langevin"), {}, "annealed_langevin cannot restore"),
    "adaptive": (SOURCE, Sampler("dormand_prince"), {"method": "replacement"}, "dormand_prince cannot restore by replacement"),
    "none is no class": (CLASSES, Sampler(), {"label": 3}, "class label 3 is out of range"),
    "no classes": (SOURCE, Sampler(), {"label": 0}, "the model has no classes"),
    "text for classes": (CLASSES, Sampler(), {"prompt": "a"}, "--prompt 'a' of a model that takes no text"),
    "class for text": (TEXT, Sampler(), {"label": 1}, "--class_label 1 of a model that takes text"),
    "nothing to guide by": (CLASSES, Sampler(guidance_scale=2.0), {}, r"--guidance_scale 2\.0 without --class_label"),
    "no caption to guide by": (TEXT, Sampler(guidance_scale=2.0), {}, r"--guidance_scale 2\.0 without --prompt"),
    "no classes to guide by": (SOURCE, Sampler(guidance_scale=2.0), {}, "on a model without classes"),
    "negative alone": (TEXT, Sampler(), {"prompt": "a", "negative_prompt": "b"}, "--negative_prompt 'b' has no effect"),
    "prior": (dataclasses.replace(SOURCE, prior=UniformPrior(-1, 1)), Sampler(), {}, "begins at a uniform prior needs a score"),
    "from noise": (SOURCE, Sampler(given_times=(0.0, 0.5, 1.0)), {}, r"--given_times 0 \.\.\.: nothing of an image"),
    "none": (SOURCE, Sampler(), {"count": 0}, "--num_images 0"),
    "iterations": (SOURCE, Sampler(), {"iterations": -1}, "--iterations -1: not negative"),
    "iterations of replacement": (SOURCE, Sampler(), {"iterations": 2, "method": "replacement"}, "no effect with --method replacement"),
    "noise": (SOURCE, Sampler(), {"noise_std": math.nan}, "--noise_std nan"),
    "data": (SOURCE, Sampler(), {"data_std": 0.0}, r"--data_std 0\.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_restored_is_refused_with_the_reason(case):
    source, sampler, more, message = REFUSED[case]
    how = {name: value for name, value in more.items() if name in ("method", "iterations", "noise_std", "data_std")}
    told = {name: value for name, value in more.items() if name not in how}
    with pytest.raises(ValueError, match=message):
        restore(source, MEASURE, SEEN, sampler, RestorationMethod(**how), **{"count": 1, "seed": 0} | told)


def test_a_weaker_model_guides_without_a_class():
    """0.3 + (w - 1) (0.3 - 0.5): led away from a mean of 0.5."""
    weak = dataclasses.replace(SOURCE, field=lambda x, t, c: SOURCE.field(x - 0.2 * t[:, None, None, None], t, c) + 0.2)
    sampler, remedy = Sampler("euler", 60, guidance_scale=2.0), RestorationMethod(noise_std=0.05, data_std=0.4)
    made = restore(with_autoguidance(SOURCE, weak), MEASURE, SEEN, sampler, remedy, count=200, seed=1).images
    assert abs(hidden(made).mean() - 0.1) < 0.03


def test_factors_and_masks_that_cannot_be_are_refused(tmp_path, capsys):
    for factor in (0, 1, -2, 3):
        with pytest.raises(ValueError, match=f"--factor {factor} does not divide"):
            measurement("super_resolution", (1, 8, 8), None, factor)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    words = ["restore", "--run", "/nowhere", "--input", str(picture), "--task", "colourise"]
    for more, message in ((["--mask", str(picture)], "has no effect with --task colourise"), (["--iterations", "-1"], "--iterations -1")):
        assert sample.main([*words, *more]) == 2 and message in capsys.readouterr().err


def test_oracles_of_this_file_agree():
    """The shifted field is that of its Gaussian, by the oracle."""
    law, x = oracles.gaussian([0.2], [[0.16]]), draw(5, 1)
    got = CLASSES.field(x[:, :, None, None], torch.full((5,), 0.4, dtype=torch.float64), torch.full((5,), 2))
    torch.testing.assert_close(got[:, :, 0, 0], law.velocity(x, *oracles.condot(0.4)))
