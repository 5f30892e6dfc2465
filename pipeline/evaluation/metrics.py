"""How good samples are, measured beside real images by a table of metrics: right class, as varied, as distributed, and not copied.

For small labelled images, where a classifier learnt on the spot is a fair judge.
Source of the memorisation measure: distances to the nearest training image, as
in Carlini et al., Extracting Training Data from Diffusion Models, compared with
those of held-out real images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from condot.core.registry import Registry

from .classifier import Classifier, train_classifier
from .features import FeatureExtractor
from .frechet import FeatureMoments, frechet_distance

MAX_DIVERSITY_IMAGES = 1000
"""Images of a class that `diversity` compares, half a million pairs; more would cost minutes and move no third digit."""


@dataclass(frozen=True)
class EvaluationData:
    """What a metric is computed from; images are (N, C, H, W) in -1..1, labels (N,)."""

    samples: Tensor
    labels: Tensor
    """The classes that were asked for."""
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classifier: Classifier
    """Trained on the training images."""
    features: FeatureExtractor


class MetricRow(NamedTuple):
    """What is shown of a metric, as texts."""

    label: str
    value: str
    """Of the samples."""
    beside: str
    """Of real images, to read it against."""
    note: str = ""
    card_label: str = ""
    """On the model card; "" is the label."""
    warning: str = ""
    """A line below the table, where the figure is not to be trusted."""


class Metric(Protocol):
    """A figure of samples beside the same of real images: one line of `evaluate`, of evaluation.json and of the model card."""

    keys: ClassVar[tuple[str, ...]]
    """The names of its figures in evaluation.json."""

    def compute(self, data: EvaluationData) -> dict[str, Any]:
        """Return the figures, finite numbers, by their keys."""
        ...

    def row(self, figures: Mapping[str, Any]) -> MetricRow:
        """Return what is shown of the figures."""
        ...


METRICS: Registry[Callable[[], Metric]] = Registry("metric")
"""Every metric that `evaluate` computes, in the order of its lines."""


@METRICS.register("accuracy")
class Accuracy:
    """The share of samples that a classifier, trained on real images, puts into their class."""

    keys: ClassVar = ("accuracy", "accuracy_of_held_out")

    def compute(self, data: EvaluationData) -> dict[str, Any]:
        """Return the share of right answers on samples and on held-out images."""
        pairs = ((data.samples, data.labels), (data.held_out, data.held_out_labels))
        shares = [(data.classifier.predict(images) == labels).double().mean().item() for images, labels in pairs]
        return dict(zip(self.keys, shares, strict=True))

    def row(self, figures: Mapping[str, Any]) -> MetricRow:
        """Return percentages."""
        value, beside = f"{figures['accuracy']:.1%}", f"{figures['accuracy_of_held_out']:.1%} of held-out images"
        return MetricRow("accuracy of a classifier", value, beside, card_label="a classifier puts it into its class")


@METRICS.register("diversity")
class Diversity:
    """The mean distance between samples of a class; Euclidean over pixels, mean over classes."""

    keys: ClassVar = ("diversity", "diversity_of_real")

    def compute(self, data: EvaluationData) -> dict[str, Any]:
        """Return that of samples and of training images."""
        return dict(zip(self.keys, (diversity(data.samples, data.labels), diversity(data.train, data.train_labels)), strict=True))

    def row(self, figures: Mapping[str, Any]) -> MetricRow:
        """Return both, and their ratio."""
        one, real = (figures[key] for key in self.keys)
        beside, note = f"{real:.3f} of real images", f"ratio {one / real:.2f}"
        return MetricRow("distance within a class", f"{one:.3f}", beside, note, "mean distance within a class")


@METRICS.register("nearest")
class Nearest:
    """The median distance from a sample to the nearest training image."""

    keys: ClassVar = ("nearest", "nearest_of_held_out")

    def compute(self, data: EvaluationData) -> dict[str, Any]:
        """Return that of samples and of held-out images."""
        found = (nearest(images, data.train).median().item() for images in (data.samples, data.held_out))
        return dict(zip(self.keys, found, strict=True))

    def row(self, figures: Mapping[str, Any]) -> MetricRow:
        """Return both, and their ratio."""
        one, real = (figures[key] for key in self.keys)
        beside, note = f"{real:.3f} of held-out images", f"ratio {one / real:.2f}"
        return MetricRow("distance to nearest training image", f"{one:.3f}", beside, note, "median distance to the nearest training image")


@METRICS.register("frechet")
class Frechet:
    """The Frechet distance of samples to held-out images, of features; too large by about a constant over the number of images."""

    keys: ClassVar = ("frechet", "frechet_of_train", "feature_width", "few")

    def compute(self, data: EvaluationData) -> dict[str, Any]:
        """Return that of samples, that of as many training images, how many features, and whether their covariance is singular."""
        as_many = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: len(data.samples)]
        samples, train, held_out = (
            FeatureMoments.from_batches(map(data.features, images.split(256)))
            for images in (data.samples, data.train[as_many], data.held_out)
        )
        distances = (frechet_distance(samples, held_out), frechet_distance(train, held_out))
        few = samples.is_singular or train.is_singular or held_out.is_singular
        return dict(zip(self.keys, (*distances, len(samples.mean), few), strict=True))

    def row(self, figures: Mapping[str, Any]) -> MetricRow:
        """Return both distances."""
        label, width = "Frechet distance to held-out images", figures["feature_width"]
        few = f"too few images for {width} features, their covariance is singular: take more, read ratios only" if figures["few"] else ""
        beside = f"{figures['frechet_of_train']:.3f} of training images"
        return MetricRow(label, f"{figures['frechet']:.3f}", beside, f"{width} features", f"{label}, {width} features", few)


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of samples, each beside the real one it is read against."""

    figures: dict[str, Any]
    """By their keys, the number of `samples` among them."""

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") or key == "figures" or key not in self.figures:
            raise AttributeError(key)
        return self.figures[key]

    @property
    def diversity_ratio(self) -> float:
        """Return the diversity of samples over that of real images."""
        return float(self.figures["diversity"] / self.figures["diversity_of_real"])

    @property
    def nearest_ratio(self) -> float:
        """Return the nearest distance of samples over that of held-out real images; far below 1 means copies of training images."""
        return float(self.figures["nearest"] / self.figures["nearest_of_held_out"])

    def meets(self, accuracy: float, diversity_ratio: float, nearest_ratio: float) -> bool:
        """Whether no figure is below these."""
        ratios = self.diversity_ratio >= diversity_ratio and self.nearest_ratio >= nearest_ratio
        return bool(self.figures["accuracy"] >= accuracy and ratios)

    def rows(self) -> dict[str, MetricRow]:
        """Return what is shown of each metric, by its name."""
        return {name: metric.row(self.figures) for name, metric in build_metrics().items() if set(metric.keys) <= set(self.figures)}

    def as_dict(self) -> dict[str, Any]:
        """The figures, the two ratios, and the card's rows of metrics that a plugin brought: a card is written without it."""
        found = {**self.figures, "diversity_ratio": self.diversity_ratio, "nearest_ratio": self.nearest_ratio}
        own = [[row.card_label or row.label, row.value, row.beside] for name, row in self.rows().items() if METRICS.source(name)]
        return found | ({"plugin_rows": own} if own else {})

    def __str__(self) -> str:
        rows = self.rows().values()
        lines = [f"{self.figures['samples']:,} samples"]
        lines += [f"  {row.label:36} {row.value:>8}   beside {row.beside:28} {row.note}" for row in rows]
        return "\n".join([*lines, *(f"  {row.warning}" for row in rows if row.warning)])


def build_metrics() -> dict[str, Metric]:
    """Return every metric of the table, by name."""
    return {name: build() for name, build in METRICS.items()}


def evaluate(
    samples: Tensor, labels: Tensor, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], features: FeatureExtractor | None = None
) -> EvaluationResult:
    """Compare samples with real images, by every metric of the table.

    Args:
        samples: (N, C, H, W), -1..1.
        labels: the classes asked for, (N,).
        train: images the model was trained on, and their classes.
        held_out: images it was not.
        features: for the Frechet distance; by default those of the classifier,
            which has seen the training images, and no others.

    Raises:
        ValueError: a class with fewer than two images anywhere, features or figures that are none.
    """
    classifier = train_classifier(*train)
    data = EvaluationData(samples, labels, *train, *held_out, classifier, features or classifier.features)
    figures: dict[str, Any] = {"samples": len(samples)}
    for name, metric in build_metrics().items():
        found = metric.compute(data)
        bad = [key for key in {*metric.keys, *found} if key in figures or key not in metric.keys or not _is_figure(found.get(key))]
        if bad:
            raise ValueError(
                f"metric {name}: {bad[0]}={found.get(bad[0])!r:.80}; it returns a finite number for each of its keys, "
                f"{', '.join(metric.keys)}, and no other metric has one of that name."
            )
        figures |= found
    return EvaluationResult(figures)


def _is_figure(value: Any) -> bool:
    """Return whether JSON and a table can hold a figure."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def diversity(images: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of a class, the first thousand of it, then the mean over classes.

    Args:
        images: (N, C, H, W).
        labels: (N,).

    Raises:
        ValueError: a class with one image.
    """
    means = []
    for label in labels.unique().tolist():
        members = images[labels == label][:MAX_DIVERSITY_IMAGES].flatten(1)
        if len(members) < 2:
            raise ValueError(f"class {label} has one image: diversity needs two or more of each class.")
        means.append(torch.pdist(members).mean())
    return torch.stack(means).mean().item()


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """Distance from each image to the nearest of the others, (N,); Euclidean over pixels."""
    others = others.flatten(1)
    return torch.cat([torch.cdist(some, others).amin(1) for some in images.flatten(1).split(256)])
