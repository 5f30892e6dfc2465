"""Evaluation: each figure against cases whose answer is known."""

import json
from pathlib import Path

import frozen
import pytest
import torch

from condot.cli import evaluate as evaluate_command
from condot.cli import sample
from condot.data.loader.read_samples import read_images
from condot.data.storage.shard_reader import Shards
from condot.pipeline.evaluation.classifier import _batches, train_classifier
from condot.pipeline.evaluation.features import load_features
from condot.pipeline.evaluation.frechet import FeatureMoments, frechet_distance
from condot.pipeline.evaluation.metrics import EvaluationResult, diversity, evaluate, nearest
from condot.pipeline.sampling.generate import Samples
from condot.pipeline.sampling.sampler import Sampler

ROOT = Path(__file__).resolve().parent.parent


def blobs(count, seed, spread=0.05, channels=1, side=4):
    """Two classes of images around -0.5 and 0.5."""
    torch.manual_seed(seed)
    labels = torch.arange(count) % 2
    return (labels - 0.5)[:, None, None, None] + spread * torch.randn(count, channels, side, side), labels


def pixels(images):
    """Features that need no network: the four mean pixels of the corners."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def quick(monkeypatch):
    """Two classes far apart are learnt in a few epochs."""
    monkeypatch.setattr("condot.pipeline.evaluation.classifier.MAX_EPOCHS", 4)


@pytest.fixture(scope="module")
def real(digits):
    """The digits: images and classes to train on, and held out."""
    return tuple(read_images(Shards(str(digits), split), 1, 8) for split in ("train", "val"))


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


def test_nearest_of_many_is_that_of_few():
    """In parts as in one."""
    a, b = torch.randn(300, 1, 2, 2), torch.randn(40, 1, 2, 2)
    expected = torch.stack([(x - b).square().sum((1, 2, 3)).min().sqrt() for x in a])
    torch.testing.assert_close(nearest(a, b), expected, rtol=1e-4, atol=1e-4)


def test_real_samples_pass_and_bad_ones_show(quick):
    """Fresh real images have ratios near 1; copies, collapsed classes and swapped labels each show in their own figure."""
    train, held_out, fresh = blobs(400, 0), blobs(200, 1), blobs(400, 2)
    good = evaluate(*fresh, train, held_out, pixels)
    assert good.accuracy == good.accuracy_of_held_out == 1 and abs(good.diversity_ratio - 1) < 0.1 and abs(good.nearest_ratio - 1) < 0.2
    assert good.frechet < 0.02 and good.frechet_of_train < 0.02 and good.feature_width == 4 and not good.few
    assert evaluate(*train, train, held_out, pixels).nearest_ratio == 0
    swapped = evaluate(fresh[0], 1 - fresh[1], train, held_out, pixels)
    assert swapped.accuracy == 0 and swapped.frechet == good.frechet
    collapsed = evaluate(*blobs(400, 3, spread=0.005), train, held_out, pixels)
    assert collapsed.diversity_ratio < 0.2
    assert "ratio 0.1" in str(collapsed)


def test_the_frechet_distance_is_to_held_out_images_beside_as_many_training_ones(quick):
    """Every figure recomputed from the features; one class alone is half the classes' distance away."""
    train, held_out, samples = blobs(400, 0), blobs(100, 1), blobs(300, 2)
    half = samples[0][samples[1] == 1][:50], samples[1][samples[1] == 1][:50]
    report = evaluate(*half, train, held_out, pixels)
    fresh = FeatureMoments.from_features(pixels(held_out[0]))
    assert report.frechet == pytest.approx(frechet_distance(FeatureMoments.from_features(pixels(half[0])), fresh), rel=1e-9)
    known = pixels(train[0][torch.randperm(400, generator=torch.Generator().manual_seed(0))[:50]])
    assert report.frechet_of_train == pytest.approx(frechet_distance(FeatureMoments.from_features(known), fresh), rel=1e-9)
    assert report.frechet > 10 * report.frechet_of_train and report.frechet == pytest.approx(4 * 0.5**2 + 4 * 0.5**2, rel=0.2)


def test_too_few_images_for_the_features_are_said(quick):
    train, held_out, samples = blobs(400, 0), blobs(200, 1), blobs(16, 2)
    report = evaluate(*samples, train, held_out, lambda images: images.flatten(1))
    assert report.few and "too few images for 16 features" in str(report) and report.as_dict()["few"]
    assert not evaluate(*blobs(18, 2), train, held_out, lambda images: images.flatten(1)).few


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 33), (3, 64)])
def test_the_classifier_learns_from_pixels(quick, channels, side):
    judge = train_classifier(*blobs(100, 0, channels=channels, side=side))
    images, labels = blobs(50, 9, channels=channels, side=side)
    assert torch.equal(judge.predict(images), labels) and judge.features(images).shape == (50, 64)


def test_the_classifier_is_as_good_a_judge_as_a_support_vector_machine(real):
    """On the digits, held out; and the same judge twice, leaving the random numbers alone."""
    from sklearn.svm import SVC

    (images, labels), (fresh, expected) = real
    machine = SVC(C=10, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())
    least = (machine.predict(fresh.flatten(1).numpy()) == expected.numpy()).mean()
    torch.manual_seed(5)
    judge = train_classifier(images, labels)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert (judge.predict(fresh) == expected).double().mean() >= least > 0.98
    few = images[:50], labels[:50]
    again = train_classifier(*few), torch.rand(1), train_classifier(*few)
    assert torch.equal(again[0].features(fresh), again[2].features(fresh))
    noisy = images[:180] + 0.6 * torch.randn(180, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    known, held_out = FeatureMoments.from_features(judge.features(images[:180])), FeatureMoments.from_features(judge.features(fresh[::2]))
    other = FeatureMoments.from_features(judge.features(fresh[1::2]))
    assert frechet_distance(known, held_out) < 1.5 * frechet_distance(other, held_out), (
        "having learnt from images makes them hardly farther"
    )
    assert frechet_distance(FeatureMoments.from_features(judge.features(noisy)), held_out) > 3 * frechet_distance(known, held_out)
    assert frechet_distance(
        FeatureMoments.from_features(judge.features(fresh[1::2][expected[1::2] < 5])), held_out
    ) > 10 * frechet_distance(known, held_out)


@pytest.mark.parametrize(("count", "steps", "size"), [(50, 300, 5), (1437, 420, 100), (60_000, 1200, 100), (200_000, 2000, 100)])
def test_few_images_are_seen_in_small_steps_and_many_but_once(count, steps, size):
    """At least ten steps an epoch, thirty epochs at most; an epoch at least."""
    batches = list(_batches(count))
    assert len(batches) == steps and {len(rows) for rows in batches} == {size}
    epoch = torch.cat(batches[: count // size])
    assert len(epoch.unique()) == len(epoch) == count // size * size


def test_a_class_alone_is_refused():
    with pytest.raises(ValueError, match="1 class in the reference"):
        train_classifier(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))


def test_evaluate_as_a_user_does(quick, trained, digits, tmp_path, capsys):
    """Figures on the screen and as JSON, with features of the user's own."""
    (tmp_path / "mine.py").write_text("def corners(images):\n    return images[:, :, ::7, ::7].reshape(len(images), -1)\n")
    words = [
        "evaluate",
        "--pipeline",
        str(trained / "export"),
        "--reference",
        str(digits),
        "--num_images",
        "20",
        "--num_inference_steps",
        "2",
    ]
    output = ["--output", str(tmp_path / "figures.json")]
    assert sample.main([*words, *output, "--features", f"{tmp_path / 'mine.py'}:corners"]) == 0
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert "Frechet distance to held-out images" in out and "4 features" in out
    assert figures["feature_width"] == 4 and figures["frechet"] > figures["frechet_of_train"] > 0 and not figures["few"]
    for wrong, said in (("gone.py:corners", "no Python file there"), (f"{tmp_path / 'mine.py'}:edges", "has no function edges")):
        assert sample.main([*words, *output, "--features", wrong]) == 2
        assert said in capsys.readouterr().err


def test_evaluate_compares_what_the_command_names_and_fails_below_its_goals(trained, real, digits, tmp_path, monkeypatch):
    """Every class alike, samples within black and white, training and held-out images; figures at a goal pass, below it fail."""
    seen, asked = [], []
    figures = {"samples": 25, "accuracy": 0.5, "accuracy_of_held_out": 1.0, "diversity": 1.2, "diversity_of_real": 2.0, "nearest": 2.1,
               "nearest_of_held_out": 3.0, "frechet": 1.0, "frechet_of_train": 1.0, "feature_width": 4, "few": False}  # fmt: skip
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *given: seen.append(given) or EvaluationResult(figures))

    def bright(source, labels, sampler, **more):
        asked.append((sampler, more))
        return Samples(torch.full((len(labels), 1, 8, 8), 1.5), 1)

    monkeypatch.setattr(evaluate_command, "generate", bright)
    words = ["evaluate", "--run", str(trained), "--reference", str(digits), "--num_images", "25", "--seed", "6", "--batch_size", "9"]
    for goals, status in (([0.5, 0.6, 0.7], 0), ([0.51, 0, 0], 1), ([0, 0.61, 0], 1), ([0, 0, 0.71], 1)):
        least = [
            word for name, goal in zip(("accuracy", "diversity", "nearest"), goals, strict=True) for word in (f"--min_{name}", str(goal))
        ]
        assert sample.main([*words, "--output", str(tmp_path / "e.json"), *least]) == status
    samples, labels, train, held_out, features = seen[0]
    assert (samples == 1).all() and labels.tolist() == [*range(10), *range(10), *range(5)] and features is None
    assert all(torch.equal(a, b) for pair in zip((train, held_out), real, strict=True) for a, b in zip(*pair, strict=True))
    assert asked[0] == (Sampler(guidance_scale=2.0), {"seed": 6, "batch_size": 9})


def test_a_reference_of_other_classes_is_refused(trained, tmp_path, capsys):
    words = ["evaluate", "--run", str(trained), "--reference", str(frozen.shards(tmp_path / "shards")), "--held_out_split", "train"]
    assert sample.main(words) == 2
    assert "the model has 10 classes" in (error := capsys.readouterr().err) and "has 2: give its own shards" in error


def test_features_of_real_networks(shared_data):
    """What the README of those weights says: 0.12 between train and test images of CIFAR-10; noise is far away."""
    look = load_features(f"{ROOT / 'benchmarks' / 'features.py'}:cifar")
    noise = torch.rand(8, 1, 28, 28) * 2 - 1
    assert look(noise).shape == (8, 64)
    assert load_features(f"{ROOT / 'benchmarks' / 'features.py'}:squeezenet")(noise).shape == (8, 512)
