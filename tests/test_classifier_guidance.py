"""Classifier guidance: with the exact classifier the guided field is the conditional one, and at any scale that of the tilted density."""

import dataclasses

import oracles
import pytest
import torch
from test_methods import gaussian_source

from condot.cli import sample
from condot.pipeline.flow import PATHS, CondOT, classifier_guide, convert, heun, uniform_grid, widen
from condot.pipeline.flow.linear_path import UniformPrior
from condot.pipeline.sampling.classifier_guidance import NoiseClassifier, train_noise_classifier, with_classifier
from condot.pipeline.sampling.flow_model import with_autoguidance
from condot.pipeline.sampling.generate import check_sampler, generate
from condot.pipeline.sampling.restore import RestorationMethod, measurement, restore
from condot.pipeline.sampling.sampler import Sampler

MIXTURE = oracles.three()
CLASSES = [oracles.gaussian(m.tolist(), s.tolist()) for m, s in zip(MIXTURE.means, MIXTURE.covariances, strict=True)]
X = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = (0.05, 0.5, 0.9, 1.0)


def posterior(label, by_hand):
    """log p(class | x_t), exactly: its component's share of the density."""

    def log_likelihood(x, t):
        a, b = by_hand(t[0].item())[:2]
        return MIXTURE.weights[label].log() + CLASSES[label].log_density(x, a, b) - MIXTURE.log_density(x, a, b)

    return log_likelihood


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "ve"])
@pytest.mark.parametrize("label", [0, 2])
def test_scale_one_with_the_exact_classifier_is_the_conditional_field(name, label):
    by_hand, path = oracles.BY_HAND[name], PATHS[name]()
    for t in TIMES[:3] if name == "vp" else TIMES:
        guided = classifier_guide(MIXTURE.field(by_hand), path, posterior(label, by_hand))
        now = torch.full((7,), t, dtype=torch.float64)
        torch.testing.assert_close(guided(X, now), CLASSES[label].velocity(X, *by_hand(t)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.5])
def test_any_scale_is_the_score_of_the_tilted_density(scale):
    """`log p_t(x) + w log p(y | x)`, differentiated; a learned score is moved alike."""
    by_hand, path, t = oracles.condot, CondOT(), torch.full((7,), 0.6, dtype=torch.float64)
    field = MIXTURE.field(by_hand)
    pair = lambda x, t: (field(x, t), MIXTURE.score(x, *by_hand(t[0].item())[:2]))  # noqa: E731
    point = X.clone().requires_grad_()
    tilted = MIXTURE.log_density(point, 0.6, 0.4) + scale * posterior(1, by_hand)(point, t)
    (score,) = torch.autograd.grad(tilted.sum(), point)
    velocity, learned = classifier_guide(pair, path, posterior(1, by_hand), scale)(X, t)
    torch.testing.assert_close(learned, score)
    torch.testing.assert_close(convert(velocity, "velocity", "score", X, path(widen(t, X))), score)
    torch.testing.assert_close(classifier_guide(field, path, posterior(1, by_hand), scale)(X, t), velocity)


def test_the_guided_ode_ends_in_the_class():
    """From all of the mixture's noise into one component: its mean and covariance."""
    guided = classifier_guide(MIXTURE.field(oracles.condot), CondOT(), posterior(0, oracles.condot))
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = heun(guided, noise, uniform_grid(60, 1e-3)).x
    torch.testing.assert_close(end.mean(0), MIXTURE.means[0], atol=0.04, rtol=0)
    torch.testing.assert_close(torch.cov(end.T), MIXTURE.covariances[0], atol=0.03, rtol=0)


def test_a_classifier_of_clean_data_is_exact_where_its_logarithm_is_linear():
    """Gaussian data N(m, S) times exp(c.z) is N(m + S c, S); the data prediction carries c through its own derivative."""
    law = oracles.gaussian([0.4, -0.2], [[0.5, 0.2], [0.2, 0.3]])
    c = torch.tensor([0.7, -0.4], dtype=torch.float64)
    moved = oracles.gaussian((law.means[0] + law.covariances[0] @ c).tolist(), law.covariances[0].tolist())
    guided = classifier_guide(law.field(oracles.condot), CondOT(), lambda z, t: z @ c, clean=True)
    for t in TIMES[:3]:
        now = torch.full((7,), t, dtype=torch.float64)
        torch.testing.assert_close(guided(X, now), moved.velocity(X, *oracles.condot(t)))


BAD = {
    "scale": (lambda: classifier_guide(MIXTURE.field(oracles.condot), CondOT(), None, float("inf")), "scale=inf"),
    "shape": (
        lambda: classifier_guide(MIXTURE.field(oracles.condot), CondOT(), lambda x, t: x)(X, torch.full((7,), 0.5)),
        r"shape \(7, 2\) for 7 samples",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# --- the way in: a classifier that learns on the spot


def two_kinds(path, predict="velocity"):
    """An exact model without classes of images that are dark, N(-0.5, 0.2^2), or bright, N(0.5, 0.2^2), all 64 values together."""
    p, means = PATHS[path](), torch.tensor([-0.5, 0.5], dtype=torch.float64)

    def network(x, t, labels):
        assert bool((labels == 0).all()), "it is told no class"
        x, t = x.double(), t.double().clamp(max=1 - 1e-6)
        c = p(widen(t, x))
        variance = (c.a * 0.2) ** 2 + c.b**2
        left = [x - c.a * m for m in means]
        share = torch.softmax(torch.stack([-(d**2 / variance).flatten(1).sum(1) / 2 for d in left], 1), 1)
        parts = [m + c.a * 0.04 / variance * d for m, d in zip(means, left, strict=True)]
        z = sum(share[:, k, None, None, None] * part for k, part in enumerate(parts))
        return convert(z, "data", "velocity", x, c)

    return dataclasses.replace(gaussian_source(path, predict), field=network)


@pytest.fixture(scope="module")
def learned():
    """The classifier of those images on the straight path, and the images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    images = (labels - 0.5)[:, None, None, None] + 0.2 * torch.randn(600, 1, 8, 8, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("condot.pipeline.evaluation.classifier.MAX_EPOCHS", 20)
        return train_noise_classifier(images, labels, CondOT())


def test_the_classifier_knows_what_noise_leaves(learned):
    """Of 64 values the log-odds are 2 a m sum(x) / variance: certain at t = 0.8, an even guess at t = 0."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(400) % 2
    clean = (labels - 0.5)[:, None, None, None] + 0.2 * torch.randn(400, 1, 8, 8, generator=generator)
    for t, least, most in ((0.8, 0.99, 1.0), (0.001, 0.0, 0.6)):
        x = t * clean + (1 - t) * torch.randn(400, 1, 8, 8, generator=generator)
        sure = learned(x, torch.full((400,), t)).exp().max(1).values.mean()
        right = (learned(x, torch.full((400,), t)).argmax(1) == labels).double().mean()
        assert least <= right and sure <= most + 0.2 and learned(x, torch.full((400,), t)).exp().sum(1).allclose(torch.ones(400))


@pytest.mark.parametrize("solver", ["heun", "exponential"])
def test_a_model_without_classes_is_led_to_them(learned, solver):
    """A class for every sample, dark or bright; without the classifier as many of both, whatever is asked."""
    source = with_classifier(two_kinds("condot"), learned, 2)
    labels = torch.arange(80) % 2
    made = generate(source, labels, Sampler(solver, 30, classifier_guidance_scale=1.5), seed=0).images.mean((1, 2, 3))
    assert ((made > 0).long() == labels).double().mean() > 0.95
    plain = generate(source, labels, Sampler(solver, 30, classifier_guidance_scale=0.0), seed=0).images.mean((1, 2, 3))
    assert 0.3 < ((plain > 0).long() == labels).double().mean() < 0.7
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 on a model without classes"):
        check_sampler(source, Sampler(guidance_scale=2.0))
    with pytest.raises(ValueError, match="class label 2 is out of range: the model has classes 0 to 1"):
        generate(source, labels + 1, Sampler(), seed=0)


def test_a_restored_image_is_led_to_its_class_too(learned):
    """Nothing of these images is seen but one value in the middle, 0: the class decides."""
    source, mask = with_classifier(two_kinds("condot"), learned, 2), torch.ones(8, 8, dtype=torch.bool)
    mask[0, 0] = False
    measure = measurement("inpaint", (1, 8, 8), mask, 2)
    y = torch.zeros(1, 8, 8)
    for label in (0, 1):
        made = restore(source, measure, y, Sampler("euler", 40), RestorationMethod(noise_std=1.0), label=label, count=20, seed=3).images
        assert ((made.mean((1, 2, 3)) > 0) == label).double().mean() > 0.9
    with pytest.raises(ValueError, match="--classifier_reference without --class_label"):
        restore(source, measure, y, Sampler("euler", 40), RestorationMethod(), count=1, seed=3)


def test_a_conditional_model_is_led_too_and_none_is_no_class(learned):
    base = dataclasses.replace(gaussian_source("condot", "velocity"), num_classes=2, null=2)
    source = with_classifier(base, learned, 2)
    x, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    told = source.classifier.log_likelihood_of(torch.tensor([0, 1, 2]))(x, t)
    assert told[2] == 0 and told[:2].allclose(learned(x.float(), t).double()[[0, 1], [0, 1]])
    weak = with_classifier(with_autoguidance(two_kinds("condot"), two_kinds("condot")), learned, 2)
    assert weak.weak is not None and weak.weak(x, t, torch.tensor([0, 1, 2])).shape == x.shape, "the guide is told no class either"


def test_what_a_classifier_cannot_lead_is_refused(learned):
    base, text = gaussian_source("condot", "velocity"), lambda words: (torch.ones(len(words), 2),)
    for source, message in (
        (dataclasses.replace(base, pixels=(3, 16, 16)), "works in latents"),
        (dataclasses.replace(base, encode_text=text, null=text([""])), "takes text"),
        (dataclasses.replace(base, prior=UniformPrior(-1, 1)), "begins at a uniform prior"),
        (dataclasses.replace(base, num_classes=10, null=10), "the model has 10 classes, --classifier_reference 2"),
    ):
        with pytest.raises(ValueError, match=message):
            with_classifier(source, learned, 2)
    with pytest.raises(ValueError, match=r"classifier_guidance_scale=2\.0 without a classifier"):
        check_sampler(base, Sampler(classifier_guidance_scale=2.0))
    source = with_classifier(base, learned, 2)
    with pytest.raises(ValueError, match=r"given_times begin at 0: a classifier knows nothing"):
        check_sampler(source, Sampler(given_times=(0.0, 1.0)))
    with pytest.raises(ValueError, match="1 class in the reference"):
        train_noise_classifier(torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64), CondOT())


def test_a_user_leads_a_run_by_labelled_shards(trained, digits, tmp_path, capsys, monkeypatch):
    """The command of the README; a folder of images goes on only where the classifier has learned the same."""
    monkeypatch.setattr("condot.pipeline.evaluation.classifier.MAX_EPOCHS", 1)
    words = ["--run", str(trained), "--class_labels", "3", "--num_images", "2", "--num_inference_steps", "2"]
    led = ["--classifier_reference", str(digits), "--classifier_guidance_scale", "2"]
    assert sample.main([*words, *led, "--output", str(tmp_path / "a.png")]) == 0
    assert "a classifier learns 1," in capsys.readouterr().out and (tmp_path / "a.png").is_file()
    folder = ["--output", str(tmp_path / "many/")]
    assert sample.main([*words, *led, *folder]) == 0 and sample.main([*words, *led, *folder]) == 0
    assert sample.main([*words, *folder]) == 2
    assert "images of other settings" in capsys.readouterr().err
    assert sample.main([*words, "--classifier_guidance_scale", "2", *folder]) == 2
    assert "give --classifier_reference too" in capsys.readouterr().err


def test_the_noise_classifier_sees_the_level(learned):
    """The same point at another level is judged otherwise: it is told apart by one channel."""
    x = torch.full((1, 1, 8, 8), 0.1)
    early, late = (learned(x, torch.tensor([t])) for t in (0.05, 0.9))
    assert (early - late).abs().max() > 0.05 and isinstance(learned, NoiseClassifier)
