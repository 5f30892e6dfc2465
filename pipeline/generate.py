"""From seeds to images: initial noise by (seed, index), a field, a solver, decoding, in batches.

The image of a (seed, index, label) does not depend on the others in its batch
nor on the batch's size, up to the rounding of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import FlowConfig
from .flow import (
    ODE_SOLVERS,
    PATHS,
    SDE_SOLVERS,
    Path,
    Prediction,
    Purpose,
    coefficient,
    convert,
    euler_maruyama,
    guide,
    normal,
    uniform_grid,
    widen,
)
from .flow.guidance import ConditionalField


@dataclass(frozen=True)
class Source:
    """A conditional velocity field and what it takes to start from noise and end in images."""

    field: ConditionalField
    """(x, t, labels) -> velocity, (B, *S)."""
    path: Path
    shape: tuple[int, ...]
    """Of one sample, (C, H, W)."""
    num_classes: int
    null: int
    """The label that stands for none."""
    device: torch.device
    decode: Callable[[Tensor], Tensor]
    """From the end of the path to images in -1..1, (B, C, H, W)."""
    predict: Prediction = "velocity"
    """What the network gives, which says where on the path the field is singular."""


def network_source(network: nn.Module, flow: FlowConfig, shape: tuple[int, ...], num_classes: int, decode: Callable[[Tensor], Tensor]) -> Source:
    """A network of ours as a source; its null class is `num_classes`."""
    device = next(network.parameters()).device
    return Source(velocity_field(network, flow), PATHS[flow.path](), shape, num_classes, num_classes, device, decode, flow.predict)


@dataclass(frozen=True)
class Sampler:
    """How a field is followed.

    Raises:
        ValueError: an unknown solver or coefficient, fewer than one step.
    """

    solver: str = "heun"
    steps: int = 25
    guidance_scale: float = 1.0
    sigma_t: str = "noise"
    sigma_scale: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        known = (*ODE_SOLVERS, *SDE_SOLVERS)
        if self.solver not in known:
            raise ValueError(f"solver={self.solver!r} is unknown: choose one of {', '.join(known)}.")
        coefficient(self.sigma_t, self.sigma_scale)
        uniform_grid(self.steps)
        if not 0 <= self.start < 1:
            raise ValueError(f"start={self.start}: sampling begins at a time from 0 (noise) to below 1 (data).")

    @property
    def evaluations(self) -> int:
        """Of the field, for each image; a guided one evaluates a batch of two."""
        return self.steps * (2 if self.solver == "heun" else 1)

    @property
    def times(self) -> Tensor:
        """The grid, (steps + 1,), from `start` to 1."""
        return self.start + (1 - self.start) * uniform_grid(self.steps)


def velocity_field(network: Callable[..., Tensor], flow: FlowConfig) -> ConditionalField:
    """A network's prediction as a velocity, in float32 path arithmetic.

    Args:
        network: `network(x, t, labels)` -> the prediction that `flow` names.
        flow: path and prediction.
    """
    path, kind = PATHS[flow.path](), flow.predict

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return to_velocity(network(x, t, labels).float(), kind, path, x, t)

    return field


def to_velocity(out: Tensor, kind: Prediction, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """A prediction at (x, t) as a velocity, (B, *S)."""
    return out if kind == "velocity" else convert(out, kind, "velocity", x, path(widen(t, x)))


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises ValueError for a class that the model does not have."""
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        known = f"has classes 0 to {num_classes - 1}" if num_classes else "has no classes"
        raise ValueError(f"class label {int(bad[0])} is out of range: the model {known}.")


@torch.no_grad()
def generate(source: Source, labels: Tensor, sampler: Sampler, *, seed: int, first: int = 0, batch_size: int = 256) -> Tensor:
    """Sample images.

    Args:
        source: the field.
        labels: class of each image, (N,), int64; for a model without classes all equal `source.null`.
        sampler: solver, steps, guidance, coefficient.
        seed: of the noise.
        first: index of the first image; the noise is a function of (seed, index).
        batch_size: images at once.

    Returns:
        (N, C, H, W), -1..1, float32, on the CPU.

    Raises:
        ValueError: a label out of range, guidance of a model without classes,
            a sample that is not finite.
    """
    if source.num_classes:
        check_labels(labels, source.num_classes)
    elif sampler.guidance_scale != 1:
        raise ValueError(f"guidance_scale={sampler.guidance_scale} on a model without classes: there is nothing to guide by, use 1.")
    images = []
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size].to(source.device)
        index = first + start + torch.arange(len(part), device=source.device)
        images.append(source.decode(_solve(source, part, sampler, seed, index)).float().cpu())
    result = torch.cat(images)
    if not bool(result.isfinite().all()):
        raise ValueError(f"the samples are not finite with solver={sampler.solver}, sigma_t={sampler.sigma_t}: take more steps, or a smaller sigma_scale.")
    return result


def _solve(source: Source, labels: Tensor, sampler: Sampler, seed: int, index: Tensor) -> Tensor:
    """The end of the path for one batch."""
    field = guide(source.field, labels, torch.full_like(labels, source.null), sampler.guidance_scale)
    x = normal(seed, Purpose.INITIAL, 0, index, source.shape)
    if sampler.solver in ODE_SOLVERS:
        return ODE_SOLVERS[sampler.solver](field, x, sampler.times).x
    sigma = coefficient(sampler.sigma_t, sampler.sigma_scale)

    def noise(step: int) -> Tensor:
        return normal(seed, Purpose.DIFFUSION, step, index, source.shape)

    return euler_maruyama(field, x, sampler.times, source.path, sigma, noise).x


def grid(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """Images side by side on white, a gap of one of their pixels between them.

    Args:
        images: (N, C, H, W), -1..1.
        columns: images in a row.
        scale: each pixel becomes so many a side.

    Returns:
        (C, height, width), -1..1.
    """
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    sheet = torch.ones(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for i in range(count):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = images[i]
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
