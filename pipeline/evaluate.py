"""How good samples are, measured beside real images: right class, as varied, and not copied.

For small labelled images, where a classifier on pixels is a fair judge.
Source of the memorisation measure: distances to the nearest training image, as
in Carlini et al., Extracting Training Data from Diffusion Models, compared with
those of held-out real images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Report:
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

    @property
    def diversity_ratio(self) -> float:
        """Of samples to real images."""
        return self.diversity / self.diversity_of_real

    @property
    def nearest_ratio(self) -> float:
        """Of samples to held-out real images; far below 1 means copies of training images."""
        return self.nearest / self.nearest_of_held_out

    def as_dict(self) -> dict[str, float]:
        """The figures and the two ratios."""
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
        ]
        return "\n".join([f"{self.samples:,} samples"] + [f"  {a:36} {b:>8}   beside {c:28} {d}" for a, b, c, d in rows])


def evaluate(samples: Tensor, labels: Tensor, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Report:
    """Compare samples with real images.

    Args:
        samples: (N, C, H, W), -1..1.
        labels: the classes asked for, (N,).
        train: images the model was trained on, and their classes.
        held_out: images it was not.

    Raises:
        ValueError: scikit-learn is missing, or a class with fewer than two images anywhere.
    """
    real, real_labels = train
    predict = classifier(real, real_labels)
    return Report(
        samples=len(samples),
        accuracy=(predict(samples) == labels).double().mean().item(),
        accuracy_of_held_out=(predict(held_out[0]) == held_out[1]).double().mean().item(),
        diversity=diversity(samples, labels),
        diversity_of_real=diversity(real, real_labels),
        nearest=nearest(samples, real).median().item(),
        nearest_of_held_out=nearest(held_out[0], real).median().item(),
    )


def classifier(images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A support vector machine on pixels: a function from (N, C, H, W) to (N,) classes.

    Raises:
        ValueError: scikit-learn is missing.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ValueError(
            "evaluation needs scikit-learn: install it with `pip install condot[eval]`, or `pip install scikit-learn`."
        ) from error
    machine = SVC(C=10, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())
    return lambda x: torch.from_numpy(machine.predict(x.flatten(1).numpy()))


def diversity(images: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of a class, then the mean over classes.

    Args:
        images: (N, C, H, W).
        labels: (N,).

    Raises:
        ValueError: a class with one image.
    """
    means = []
    for label in labels.unique().tolist():
        members = images[labels == label].flatten(1)
        if len(members) < 2:
            raise ValueError(f"class {label} has one image: diversity needs two or more of each class.")
        means.append(torch.pdist(members).mean())
    return torch.stack(means).mean().item()


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """Distance from each image to the nearest of the others, (N,); Euclidean over pixels."""
    return torch.cdist(images.flatten(1), others.flatten(1)).amin(1)
