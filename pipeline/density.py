"""Bits per dimension: how well a model expects images of 8 or 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import (
    EXACT_LIMIT,
    Purpose,
    bits_per_dimension,
    dequantise,
    estimate,
    heun,
    log_density,
    rademacher,
    singular,
    uniform,
    uniform_grid,
)
from .generate import NEAR_NOISE, Source

BEFORE_DATA = 1 - 1e-3
"""Where the ODE is taken up if the field is singular at t = 1."""


@dataclass(frozen=True)
class Bits:
    """Bits per dimension of some images: mean, standard error, and how they came about."""

    mean: float
    error: float
    images: int
    dimensions: int
    exact: bool
    evaluations: int
    bit_depth: int = 8

    def __str__(self) -> str:
        how = "exact divergence" if self.exact else "Hutchinson's estimate, one probe an image"
        return (
            f"{self.mean:.4f} +- {self.error:.4f} bits per dimension ({self.images} images of {self.dimensions} values, {how}, "
            f"{self.evaluations} evaluations; of the {self.bit_depth}-bit lattice in -1..1, "
            f"dequantisation term {-math.log2(step_of(self.bit_depth)):.2f})"
        )


def step_of(bit_depth: int) -> float:
    """Return how far two values of so many bits lie apart in -1..1."""
    return 2 / (2**bit_depth - 1)


def bits(source: Source, images: Tensor, labels: Tensor, *, steps: int, seed: int, exact: bool, batch_size: int = 256) -> Bits:
    """Bits per dimension of images of the source's bit depth.

    Args:
        source: the model's field; its path starts at N(0, beta^2 I), or at the source's prior.
        images: (N, *S), on the lattice of that many bits in -1..1; spread over their bins by noise named by (seed, index).
        labels: condition of each, (N,).
        steps: Heun steps from data to noise.
        seed: of dequantisation and probes.
        exact: one derivative per dimension instead of a random probe.
        batch_size: images at once.

    Raises:
        ValueError: an exact divergence in too many dimensions, fewer than two images.
    """
    found, evaluations, step = [], 0, step_of(source.bit_depth)
    start = NEAR_NOISE if singular(source.path, source.predict, 0.0) else 0.0
    end = BEFORE_DATA if singular(source.path, source.predict, 1.0) else 1.0
    for first in range(0, len(images), batch_size):
        part, condition = images[first : first + batch_size].to(source.device), labels[first : first + batch_size].to(source.device)
        index = first + torch.arange(len(part), device=source.device)
        shape = tuple(part.shape[1:])
        x = dequantise(part, uniform(seed, Purpose.NOISE, 0, index, shape), step)
        result = log_density(
            lambda point, t, condition=condition: source.field(point, t, condition),  # type: ignore[misc]
            x,
            uniform_grid(steps, start, end),
            source.path,
            probe=None if exact else rademacher(seed, Purpose.PROBE, 0, index, shape),
            prior=None if source.prior is None else source.prior.log_density,
            solver=heun,
        )
        found.append(bits_per_dimension(result.log_density, part[0].numel(), step).cpu())
        evaluations = result.evaluations
    mean, error = estimate(torch.cat(found))
    return Bits(mean.item(), error.item(), len(images), images[0].numel(), exact, evaluations, source.bit_depth)


def affordable(shape: tuple[int, ...]) -> bool:
    """Whether an exact divergence is: at most EXACT_LIMIT dimensions."""
    return torch.Size(shape).numel() <= EXACT_LIMIT
