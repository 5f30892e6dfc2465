"""Bits per dimension: how well a model expects images of 8 or 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..flow import (
    MAX_EXACT_DIMENSIONS,
    ODE_SOLVERS,
    LogDensityResult,
    Purpose,
    bits_per_dimension,
    dequantise,
    dormand_prince,
    is_singular,
    likelihood_end_time,
    log_density,
    mean_and_standard_error,
    rademacher,
    uniform,
    uniform_grid,
)
from .flow_model import FlowModel
from .sampler import FIRST_TIME

LIKELIHOOD_SOLVERS = ("dormand_prince", "rk4", "heun", "midpoint")
"""What likelihoods are solved with: by tolerance, or on a uniform grid."""
NUM_CHECKED = 32
"""The first so many images are solved for twice, to estimate the error of the solver."""
TOLERANCE_FACTOR = 10.0
"""... the second time by dormand_prince at a tolerance so many times as small; twice the difference is told, since that one errs too."""
LAST_NOISE_SHARE = 0.1
"""Where the velocity is not finite at t = 1, the density is taken where beta is this share of a step of the lattice."""


@dataclass(frozen=True)
class BitsPerDimension:
    """Bits per dimension of some images: mean, standard error, error of the solver, and how they came about."""

    mean: float
    error: float
    """Standard error of the mean: images, dequantisation and probes."""
    solver_error: float
    """How far the solver is off on average: twice its difference from a stricter solve of the first images."""
    images: int
    dimensions: int
    exact: bool
    evaluations: int
    noise: float
    """beta / alpha where the density is taken, data units."""
    bit_depth: int = 8

    def __str__(self) -> str:
        how = "exact divergence" if self.exact else "Hutchinson's estimate, one probe an image"
        end = f"density of images with noise {self.noise:.2g}, where the path ends; " if self.noise else ""
        return (
            f"{self.mean:.4f} +- {self.error:.4f} (sampling) +- {self.solver_error:.4f} (solver) bits per dimension "
            f"({self.images} images of {self.dimensions} values, {how}, {self.evaluations} evaluations; {end}"
            f"of the {self.bit_depth}-bit lattice in -1..1, dequantisation term {-math.log2(lattice_step(self.bit_depth)):.2f})"
        )


def lattice_step(bit_depth: int) -> float:
    """Return how far two values of so many bits lie apart in -1..1."""
    return 2 / float(2**bit_depth - 1)


def compute_bits_per_dimension(
    model: FlowModel,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    exact: bool,
    solver: str = "dormand_prince",
    tolerance: float = 1e-5,
    steps: int = 50,
    batch_size: int = 256,
) -> BitsPerDimension:
    """Return the bits per dimension of images of the model's bit depth.

    Args:
        model: the model's field; its path starts at N(0, beta^2 I), or at the model's prior.
        images: (N, *S), on the lattice of that many bits in -1..1; spread over their bins by noise named by (seed, index).
        labels: condition of each, (N,).
        seed: of dequantisation and probes.
        exact: one derivative per dimension instead of a random probe.
        solver: one of LIKELIHOOD_SOLVERS.
        tolerance: relative and absolute, of dormand_prince; a tenth of it is what every solver is compared with.
        steps: of the other solvers.
        batch_size: images at once.

    Raises:
        ValueError: an unknown solver, a tolerance that is not positive or cannot be met, an exact divergence in too many
            dimensions, fewer than two images.
    """
    if solver not in LIKELIHOOD_SOLVERS:
        raise ValueError(f"solver={solver!r} of a likelihood is unknown: choose one of {', '.join(LIKELIHOOD_SOLVERS)}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: between 0 and 1, relative and absolute. Use 1e-5.")
    if len(images) < 2:
        raise ValueError(f"{len(images)} images have no standard error: give two or more (--num_images).")

    def part(rows: slice, solver: str, tolerance: float) -> tuple[Tensor, int]:
        data, condition = images[rows].to(model.device), labels[rows].to(model.device)
        result = _log_densities(model, data, condition, rows.start, seed, exact, solver, tolerance, steps)
        return bits_per_dimension(result.log_density, data[0].numel(), lattice_step(model.bit_depth)).cpu(), result.evaluations

    parts = [part(slice(first, first + batch_size), solver, tolerance) for first in range(0, len(images), batch_size)]
    per_image = torch.cat([values for values, _ in parts])
    other, _ = part(slice(0, min(NUM_CHECKED, batch_size)), "dormand_prince", tolerance / TOLERANCE_FACTOR)
    solver_error = 2 * (per_image[: len(other)] - other).abs().mean().item()
    mean, error = mean_and_standard_error(per_image)
    end = model.path(torch.tensor(_time_range(model)[1], dtype=torch.float64))
    noise = (end.b / end.a).item()
    evaluations = max(count for _, count in parts)
    return BitsPerDimension(
        mean.item(), error.item(), solver_error, len(images), images[0].numel(), exact, evaluations, noise, model.bit_depth
    )


def _time_range(model: FlowModel) -> tuple[float, float]:
    """Return the times between which the ODE is solved."""
    start = FIRST_TIME if is_singular(model.path, model.predict, 0.0) else 0.0
    return start, likelihood_end_time(model.path, model.predict, LAST_NOISE_SHARE * lattice_step(model.bit_depth))


def _log_densities(
    model: FlowModel, data: Tensor, condition: Tensor, first: int, seed: int, exact: bool, solver: str, tolerance: float, steps: int
) -> LogDensityResult:
    """Return the log-densities of some images, the first of them the `first` of all, spread over their bins."""
    index = first + torch.arange(len(data), device=model.device)
    shape = tuple(data.shape[1:])
    time_range = torch.tensor(_time_range(model), dtype=torch.float64)
    adaptive = partial(dormand_prince, rtol=tolerance, atol=tolerance)
    signal = model.path(time_range[1]).a.item()
    result = log_density(
        lambda point, t: model.field(point, t, condition),
        signal * dequantise(data, uniform(seed, Purpose.NOISE, 0, index, shape), lattice_step(model.bit_depth)),
        time_range if solver == "dormand_prince" else uniform_grid(steps, *time_range.tolist()),
        model.path,
        probe=None if exact else rademacher(seed, Purpose.PROBE, 0, index, shape),
        prior=None if model.prior is None else model.prior.log_density,
        solver=adaptive if solver == "dormand_prince" else ODE_SOLVERS[solver],
        integration_variable="log_snr" if bool(model.path.log_snr(time_range).isfinite().all()) else "time",
    )
    return result._replace(log_density=result.log_density + data[0].numel() * math.log(signal))  # of x / alpha


def is_exact_affordable(shape: tuple[int, ...]) -> bool:
    """Whether an exact divergence is: at most EXACT_LIMIT dimensions."""
    return torch.Size(shape).numel() <= MAX_EXACT_DIMENSIONS
