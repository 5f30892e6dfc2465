"""Classifier guidance of a model by a small classifier that learns noisy images on the spot, from labelled shards.

The classifier is that of `classifier`, told the noise level as one more
channel. It is asked about x_t itself, so one more backward pass through it is
all that guidance costs; and it can tell classes to a model that knows none.
Source: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condot.core.printable import say

from ..evaluation.classifier import IMAGES_SEEN, Classifier, fit_classifier
from ..flow import Condition, Path, interpolate, widen
from ..flow.field import ConditionalField
from .flow_model import ClassifierGuide, FlowModel

MIN_TIME = 1e-3
"""Where on the path the classifier begins to learn: before, no image is left."""
MAX_LOG_SNR = 14.0
"""A level beyond is told as this one: its image is clean, or lost, to the eye of 8 bits."""


class NoiseClassifier(nn.Module):
    """`log p(y | x_t)` of images on a path.

    Args:
        channels: of the images.
        classes: how many.
        path: the Gaussian path that makes the noise.
    """

    def __init__(self, channels: int, classes: int, path: Path) -> None:
        super().__init__()
        self.network, self.path = Classifier(channels + 1, classes), path

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Log-probabilities, (B, classes), of points (B, C, H, W) at times (B,)."""
        c = self.path(widen(t, x))
        level = self.path.log_snr(t.double()).clamp(-MAX_LOG_SNR, MAX_LOG_SNR).to(x) / MAX_LOG_SNR
        inputs = torch.cat([x / torch.sqrt(c.a**2 + c.b**2), level.reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)
        return F.log_softmax(self.network(inputs)[1], 1)


def train_noise_classifier(images: Tensor, labels: Tensor, path: Path, *, seed: int = 0) -> NoiseClassifier:
    """Learn the classes of real images at every noise level of a path, each batch at levels of its own.

    Args:
        images: (N, C, H, W), -1..1, sides of 8 and more.
        labels: (N,), 0 and up.
        path: a Gaussian path.
        seed: of the weights, the order and the noise.

    Raises:
        ValueError: fewer than two classes, or images that are too small.
    """

    def noisy_loss(network: NoiseClassifier, rows: Tensor) -> Tensor:
        t = MIN_TIME + (1 - MIN_TIME) * torch.rand(len(rows))
        x, _ = interpolate(path, images[rows], torch.randn(images[rows].shape), t)
        return F.nll_loss(network(x, t), labels[rows])

    return fit_classifier(lambda classes: NoiseClassifier(images.shape[1], classes, path), labels, noisy_loss, seed)


def check_classifier_guidance(model: FlowModel, classes: int) -> None:
    """Raise ValueError for a model that a classifier of so many classes cannot lead: of latents, text, another prior or other classes."""
    if model.encode_text or model.pixels:
        what = "takes text" if model.encode_text else f"works in latents of {model.shape}"
        raise ValueError(f"--classifier_reference of a model that {what}: the classifier sees noisy pixels and tells classes.")
    if model.prior is not None:
        raise ValueError("--classifier_reference of a model whose path begins at a uniform prior: it has no score to add to. Use condot.")
    if model.num_classes not in (0, classes):
        raise ValueError(
            f"the model has {model.num_classes} classes, --classifier_reference {classes}: give shards of the classes it was trained on."
        )


def with_classifier(model: FlowModel, classifier: NoiseClassifier, classes: int, digest: str = "") -> FlowModel:
    """Return the model, led to its labels by a classifier; one without classes takes the classifier's then.

    Args:
        model: of samples that are images, with a normal prior.
        classifier: of its images on its path.
        classes: how many the classifier knows.
        digest: of what it has learned from.

    Raises:
        ValueError: as `check_classifier_guidance`.
    """
    check_classifier_guidance(model, classes)
    unconditional = model.num_classes == 0
    classifier = classifier.to(model.device)

    def log_likelihood_of(labels: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        known = (labels >= 0) & (labels < classes)  # what stands for none is no class of the classifier's: 0 of all of them

        def log_likelihood(x: Tensor, t: Tensor) -> Tensor:
            of_label = classifier(x.float(), t).gather(1, labels.clamp(0, classes - 1)[:, None])[:, 0]
            return torch.where(known, of_label, 0).to(x.dtype)

        return log_likelihood

    guided = replace(model, classifier=ClassifierGuide(log_likelihood_of, unconditional, digest))
    if not unconditional:
        return guided
    null, weak = model.null, model.weak
    assert isinstance(null, int), "it takes no text"
    return replace(
        guided, num_classes=classes, null=classes, field=_ignore_labels(model.field, null), weak=weak and _ignore_labels(weak, null)
    )


class LabelledShards(Protocol):
    """What is asked of a folder of labelled shards: see data.shards.Shards."""

    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def manifest(self) -> Any: ...


def with_trained_classifier(
    model: FlowModel, shards: LabelledShards, read: Callable[..., tuple[Tensor, Tensor]], reference: str
) -> FlowModel:
    """Return the model, led by a classifier that learns labelled images now: all of them, or IMAGES_SEEN of many, evenly spaced.

    Args:
        model: the model.
        shards: of the images.
        read: of (shards, channels, pixels a side, numbers, bit_depth=...): images, (N, C, H, W), -1..1, and their classes, (N,).
        reference: what the user calls them.

    Raises:
        ValueError: as `check_classifier_guidance` and `train_noise_classifier`.
    """
    classes, total = len(shards.manifest.class_names), sum(shards.counts)
    check_classifier_guidance(model, classes)
    numbers = range(0, total, max(1, math.ceil(total / IMAGES_SEEN)))
    images, labels = read(shards, model.shape[0], model.shape[-1], numbers, bit_depth=model.bit_depth)
    say(f"a classifier learns {len(images):,} images of {reference} at every noise level")
    return with_classifier(model, train_noise_classifier(images, labels, model.path), classes, shards.fingerprint)


def _ignore_labels(field: ConditionalField, null: int) -> ConditionalField:
    """Return a field that is told no class, whatever is asked for."""
    return lambda x, t, labels: field(x, t, torch.full_like(labels, null))
