"""Features of images that somebody's own function takes, for the Frechet distance."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

FeatureExtractor = Callable[[Tensor], Tensor]  # of images (B, C, H, W) in -1..1: numbers (B, D)


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
