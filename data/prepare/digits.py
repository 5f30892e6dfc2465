"""The handwritten digits that scikit-learn carries, as a source."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .source import ImageSource, RawSample, digest


@dataclass(frozen=True)
class DigitsSubset:
    """Some scans, 1 kB each, so they travel themselves."""

    numbers: np.ndarray
    scans: np.ndarray
    """(N, 8, 8), float, 0 to 16."""
    labels: np.ndarray

    def read(self, scratch: Path) -> Iterator[RawSample]:
        for number, scan, label in zip(self.numbers.tolist(), self.scans, self.labels.tolist(), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
            yield RawSample(f"digits/{number}", buffer.getvalue(), "png", label, f"a handwritten {label}")


def digits() -> ImageSource:
    """1,797 scans of 8 x 8 pixels in 17 grays, 10 classes.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
    Digits, UCI Machine Learning Repository, CC BY 4.0.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: `pip install scikit-learn`.") from error
    bunch = load_digits()
    return ImageSource(
        subset=lambda numbers: DigitsSubset(numbers, bunch.images[numbers], bunch.target[numbers]),
        name=lambda number: f"digits/{number}",
        rows=np.ones(len(bunch.images), np.int64),
        bytes=np.full(len(bunch.images), 110, np.int64),
        identity=digest("digits", bunch.images, bunch.target),
        class_names=tuple(str(name) for name in bunch.target_names),
        place="scikit-learn",
    )
