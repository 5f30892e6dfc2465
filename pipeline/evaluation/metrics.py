"""How good samples are, measured beside real images: right class, as varied, as distributed, and not copied.

For small labelled images, where a classifier learnt on the spot is a fair judge.
Source of the memorisation measure: distances to the nearest training image, as
in Carlini et al., Extracting Training Data from Diffusion Models, compared with
those of held-out real images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .classifier import train_classifier
from .frechet import FeatureMoments, frechet_distance

FeatureExtractor = Callable[[Tensor], Tensor]  # of images (B, C, H, W) in -1..1: numbers (B, D)
MAX_DIVERSITY_IMAGES = 1000
"""Images of a class that `diversity` compares, half a million pairs; more would cost minutes and move no third digit."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Figures of samples, each beside the real one it is read against."""

    samples: int
    accuracy: float
    """Share of samples that a classifier, trained on real images, puts into their class."""
    accuracy_of_held_out: float
    diversity: float
    """Mean distance between samples of a class; pixels in -1..1, Euclidean; mean over classes."""
    diversity_of_real: float
    nearest: float
    """Median distance from a sample to the nearest training image."""
    nearest_of_held_out: float
    frechet: float
    """Frechet distance of samples to held-out images, of features; too large by about a constant over the number of images."""
    frechet_of_train: float
    """Of as many training images to the same held-out ones."""
    feature_width: int
    few: bool
    """There are too few images for so many features: their covariance is singular."""

    @property
    def diversity_ratio(self) -> float:
        """Of samples to real images."""
        return self.diversity / self.diversity_of_real

    @property
    def nearest_ratio(self) -> float:
        """Of samples to held-out real images; far below 1 means copies of training images."""
        return self.nearest / self.nearest_of_held_out

    def meets(self, accuracy: float, diversity_ratio: float, nearest_ratio: float) -> bool:
        """Whether no figure is below these."""
        return self.accuracy >= accuracy and self.diversity_ratio >= diversity_ratio and self.nearest_ratio >= nearest_ratio

    def as_dict(self) -> dict[str, Any]:
        """The results and the two ratios."""
        return {**asdict(self), "diversity_ratio": self.diversity_ratio, "nearest_ratio": self.nearest_ratio}

    def __str__(self) -> str:
        rows = [
            ("accuracy of a classifier", f"{self.accuracy:.1%}", f"{self.accuracy_of_held_out:.1%} on held-out images", ""),
            (
                "distance within a class",
                f"{self.diversity:.3f}",
                f"{self.diversity_of_real:.3f} of real images",
                f"ratio {self.diversity_ratio:.2f}",
            ),
            (
                "distance to nearest training image",
                f"{self.nearest:.3f}",
                f"{self.nearest_of_held_out:.3f} of held-out images",
                f"ratio {self.nearest_ratio:.2f}",
            ),
            (
                "Frechet distance to held-out images",
                f"{self.frechet:.3f}",
                f"{self.frechet_of_train:.3f} of training images",
                f"{self.feature_width} features",
            ),
        ]
        lines = [f"{self.samples:,} samples"] + [f"  {a:36} {b:>8}   beside {c:28} {d}" for a, b, c, d in rows]
        if self.few:
            lines.append(f"  too few images for {self.feature_width} features, their covariance is singular: take more, read ratios only")
        return "\n".join(lines)


def evaluate(
    samples: Tensor, labels: Tensor, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], features: FeatureExtractor | None = None
) -> EvaluationResult:
    """Compare samples with real images.

    Args:
        samples: (N, C, H, W), -1..1.
        labels: the classes asked for, (N,).
        train: images the model was trained on, and their classes.
        held_out: images it was not.
        features: for the Frechet distance; by default those of the classifier,
            which has seen the training images, and no others.

    Raises:
        ValueError: a class with fewer than two images anywhere, features that are none.
    """
    real, real_labels = train
    classifier = train_classifier(real, real_labels)
    extract = features or classifier.features
    as_many = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: len(samples)]
    sample_moments, train_moments, held_out_moments = (
        FeatureMoments.from_batches(map(extract, images.split(256))) for images in (samples, real[as_many], held_out[0])
    )
    return EvaluationResult(
        samples=len(samples),
        accuracy=(classifier.predict(samples) == labels).double().mean().item(),
        accuracy_of_held_out=(classifier.predict(held_out[0]) == held_out[1]).double().mean().item(),
        diversity=diversity(samples, labels),
        diversity_of_real=diversity(real, real_labels),
        nearest=nearest(samples, real).median().item(),
        nearest_of_held_out=nearest(held_out[0], real).median().item(),
        frechet=frechet_distance(sample_moments, held_out_moments),
        frechet_of_train=frechet_distance(train_moments, held_out_moments),
        feature_width=len(sample_moments.mean),
        few=sample_moments.is_singular or train_moments.is_singular or held_out_moments.is_singular,
    )


def load_features(place: str) -> FeatureExtractor:
    """Somebody's own features: a function in a Python file, which is run.

    Args:
        place: FILE.py:NAME; the function takes images (B, C, H, W) in -1..1 and
            gives numbers (B, D).

    Raises:
        ValueError: no such file or name.
    """
    file, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("condot_features", file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"--features={place}: no Python file there. Give FILE.py:NAME, of a function from images in -1..1 to features.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"--features={place}: {file} has no function {name}. Give FILE.py:NAME.")
    return lambda images: found(images).detach().flatten(1)


def check_features(features: FeatureExtractor | None, images: Tensor, place: str) -> None:
    """Raises ValueError for features that cannot be had of some images, (B, C, H, W); `place` is what names them."""
    try:
        if features:
            features(images)
    except Exception as error:  # whatever somebody's own code raises
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--features={place}: it fails on images of {images.shape[1]} channel(s), {tuple(images.shape)} ({type(error).__name__}: "
            f"{text}). It gets the model's images as they are: choose the channels that it needs inside it, or leave --features out."
        ) from error


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
