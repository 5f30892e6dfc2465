"""From seeds to images: initial noise by (seed, index), a field, a solver, decoding, in batches.

The image of a (seed, index, label) does not depend on the others in its batch
nor on the batch's size, up to the rounding of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .flow import (
    ODE_SOLVERS,
    SDE_SOLVERS,
    Condition,
    Path,
    Purpose,
    Solution,
    annealed_langevin,
    autoguide,
    classifier_guide,
    clipped,
    coefficient,
    convert,
    count,
    denoise,
    each,
    guide,
    initial,
    langevin,
    normal,
    predictor_corrector,
    repeat,
    singular,
    widen,
)
from .flow import grid as time_grid
from .flow.field import ConditionalField, Field
from .flow.grid import intervals
from .flow.solver import After
from .guidance_options import GuidanceOptions
from .source import Source, check_labels

Watch = Callable[[Tensor, float, Field], None]
"""Sees points (B, *S), their time, and the guided field that leads on from there."""
LEFT_NOISE = 1e-6
"""A path that ends on more noise than this is ended by its data prediction."""
LAST_LEVEL = 0.99
"""Where Langevin dynamics end: at the last time the score is finite at, nearly; the noise left there is taken off at once."""
LANGEVIN_SOLVERS = ("langevin", "annealed_langevin", "predictor_corrector")
RANGE = 1.0
"""Images lie within plus and minus this."""
NEAR_NOISE = 1e-3
"""Where sampling begins if the field is singular at t = 0, as one that predicts noise is: diffusers' own first step is there too."""


@dataclass(frozen=True)
class Sampler(GuidanceOptions):
    """How a field is followed; `options.Sampling` explains each field.

    Raises:
        ValueError: an unknown solver, coefficient or grid, fewer than one step.
    """

    solver: str = "heun"
    steps: int = 25
    guidance_scale: float = 1.0
    sigma_t: str = "noise"
    sigma_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    grid: str = "uniform"
    grid_shift: float = 3.0
    grid_rho: float = 7.0
    given_times: tuple[float, ...] = ()
    tolerance: float = 1e-5
    corrections: int = 1
    langevin_step: float = 0.2
    snr: float = 0.16
    clip: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        known = (*ODE_SOLVERS, *SDE_SOLVERS, *LANGEVIN_SOLVERS)
        if self.solver not in known:
            raise ValueError(f"solver={self.solver!r} is unknown: choose one of {', '.join(known)}.")
        coefficient(self.sigma_t, self.sigma_scale)
        time_grid(self.grid, self.steps, shift=self.grid_shift, rho=self.grid_rho)
        super().__post_init__()

    def times(self, source: Source, off_noise: bool = False) -> Tensor:
        """The grid, (steps + 1,): the caller's, or from 0, or NEAR_NOISE where the field is singular at 0, to 1.

        An adaptive solver chooses inside; Langevin dynamics end at LAST_LEVEL.
        `off_noise` begins at NEAR_NOISE in any case.
        """
        if self.given_times:
            return torch.tensor(self.given_times, dtype=torch.float64)
        off_noise = off_noise or source.classifier is not None  # as of every inverse problem
        begin = NEAR_NOISE if off_noise or singular(source.path, source.predict, 0.0) else 0.0
        if self.solver == "dormand_prince":
            inner = [1 - NEAR_NOISE] if singular(source.path, source.predict, 1.0) else []
            return torch.tensor([begin, *inner, 1.0], dtype=torch.float64)
        end = LAST_LEVEL if self.solver in ("langevin", "annealed_langevin") else 1.0
        return time_grid(self.grid, self.steps, path=source.path, shift=self.grid_shift, rho=self.grid_rho, start=begin, end=end)


class Samples(NamedTuple):
    """Images, (N, C, H, W), -1..1, float32, on the CPU, and how often the field was evaluated for each."""

    images: Tensor
    evaluations: int


@torch.no_grad()
def generate(
    source: Source,
    condition: Condition,
    sampler: Sampler,
    *,
    seed: int,
    first: int = 0,
    batch_size: int = 256,
    null: Condition | None = None,
    watch: Watch | None = None,
) -> Samples:
    """Sample images.

    Args:
        source: the field.
        condition: of each image, (N, ...): classes, int64, for a model without classes all equal `source.null`; or text.
        sampler: solver, steps, guidance, coefficient.
        seed: of the noise.
        first: index of the first image; the noise is a function of (seed, index).
        batch_size: images at once.
        null: what guidance leads away from, of a model that takes text, one condition for all or one for each; by default none at all.
        watch: sees each batch at every time of the grid but the last, by solvers that step from one to the next.

    Raises:
        ValueError: a label out of range, guidance of a model without classes
            by itself, a sample that is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one image at once.")
    if isinstance(condition, Tensor) and source.num_classes:
        check_labels(condition, source.num_classes)
    check_sampler(source, sampler)
    images, evaluations, total = [], 0, count(condition)
    null = source.null if null is None else null
    for start in range(0, total, batch_size):
        index = first + torch.arange(start, min(start + batch_size, total), device=source.device)
        rows = slice(start, start + batch_size)
        away = _rows(null, rows) if not isinstance(null, int) and count(null) > 1 else null
        part = each(_rows(condition, rows), lambda whole: whole.to(source.device))
        end, evaluations = _solve(replace(source, null=away), part, sampler, seed, index, watch)
        images.append(source.decode(end).float().cpu())
    return Samples(torch.cat(images), evaluations)


def check_sampler(source: Source, sampler: Sampler) -> None:
    """Raises ValueError for guidance or a grid of times that the source cannot be sampled with."""
    blind = source.classifier is not None and source.classifier.alone
    told = (source.num_classes > 0 and not blind) or not isinstance(source.null, int)
    if not told and source.weak is None and sampler.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale={sampler.guidance_scale} on a model without classes: there is nothing to guide by, use 1, or a weaker model."
        )
    intervals(times := sampler.times(source))
    sampler.check_guidance(source, sampler.guidance_scale, sampler.solver, times[0])
    guided(source, torch.zeros(1) if isinstance(source.null, int) else source.null, sampler)


def _rows(condition: Condition, rows: slice) -> Condition:
    return each(condition, lambda whole: whole[rows])


def _solve(source: Source, condition: Condition, sampler: Sampler, seed: int, index: Tensor, watch: Watch | None) -> Solution:
    """The end of the path for one batch, and the evaluations it took."""
    times = sampler.times(source)
    field, looked = (bounded(source, led(source, guided(source, condition, sampler), condition, sampler), sampler) for _ in range(2))
    x = start(source, seed, index, float(times[0]))

    def seen(x: Tensor, t: float) -> Tensor:
        if watch is not None and t < float(times[-1]):
            watch(x, t, looked)  # not the field itself: it may remember its evaluations
        return x

    seen(x, float(times[0]))
    end = follow(source, field, x, times, sampler, seed, index, after=None if watch is None else seen)
    return cleaned(source, field, end, float(times[-1]))


def guided(source: Source, condition: Condition, sampler: Sampler, times: Tensor | None = None) -> Field:
    """The source's field with its condition, (B, ...), bound and guided as the sampler says, on a grid of times if not on its own.

    It is of one solve where guidance has momentum.
    """
    how: dict[str, Any] = {"interval": sampler.guidance_interval, "rescale": sampler.guidance_rescale}
    how |= {
        "method": sampler.guidance_method(sampler.times(source) if times is None else times),
        "path": source.path,
        "predict": source.predict,
    }
    if source.weak is not None:
        good, weak = (partial(_told, field, condition) for field in (source.field, source.weak))
        return autoguide(good, weak, sampler.guidance_scale, **how)
    if isinstance(condition, Tensor):
        null: Condition = torch.full_like(condition, source.null)
    else:
        null = repeat(each(source.null, lambda part: part.to(source.device)), count(condition))
    return guide(source.field, condition, null, sampler.guidance_scale, **how)


def _told(field: ConditionalField, condition: Condition, x: Tensor, t: Tensor) -> Any:
    return field(x, t, condition)


def led(source: Source, field: Field, condition: Condition, sampler: Sampler) -> Field:
    """The field, led to a condition, (B,), by the source's classifier if it has one; not to be differentiated any more."""
    if source.classifier is None:
        return field
    return classifier_guide(field, source.path, source.classifier.told(condition), sampler.classifier_guidance_scale)


def bounded(source: Source, field: Field, sampler: Sampler) -> Field:
    """The field with its data prediction kept in the range of images: if the sampler says so, or where noise is predicted in pixels."""
    on = sampler.clip == "on" or (sampler.clip == "auto" and source.predict == "noise" and not source.pixels)
    return clipped(field, source.path, RANGE) if on else field


def cleaned(source: Source, field: Field, end: Solution, t: float) -> Solution:
    """A solution at time t without the noise that some paths (VE, EDM, DDPM) and Langevin dynamics end on."""
    if source.path(torch.tensor(t, dtype=torch.float64)).b > LEFT_NOISE:
        return Solution(denoise(field, end.x, t, source.path), end.evaluations + 1)
    return end


def start(source: Source, seed: int, index: Tensor, t: float) -> Tensor:
    """Where a solver starts at time t: (B, *S), a function of (seed, index)."""
    if source.prior is not None:
        return source.prior.draw(seed, 0, index, source.shape)
    return initial(source.path, normal(seed, Purpose.INITIAL, 0, index, source.shape), t)


def follow(
    source: Source,
    field: Field,
    x: Tensor,
    times: Tensor,
    sampler: Sampler,
    seed: int,
    index: Tensor,
    *,
    last_euler: bool = False,
    after: After | None = None,
) -> Solution:
    """Solve the ODE or the SDE; arguments as in flow.solver and flow.sde.

    Raises:
        ValueError: an SDE solver for a source without a score; what the solver refuses.
    """
    if sampler.solver in ODE_SOLVERS:
        last = last_euler or singular(source.path, source.predict, 1.0)
        more = {"rtol": sampler.tolerance, "atol": sampler.tolerance} if sampler.solver == "dormand_prince" else {}
        return ODE_SOLVERS[sampler.solver](field, x, times, last_euler=last, after=after, **more)
    if source.prior is not None:
        raise ValueError(
            f"solver={sampler.solver} needs a score, which a path from a uniform prior has not: use heun, or another of the ODE."
        )

    def noise(step: int) -> Tensor:
        return normal(seed, Purpose.DIFFUSION, step, index, source.shape)

    if sampler.solver in ("langevin", "annealed_langevin"):
        return _relax(source.path, field, x, times, sampler, noise)
    sigma = coefficient(sampler.sigma_t, sampler.sigma_scale)
    if sampler.solver == "predictor_corrector":
        snr, corrections = sampler.snr, sampler.corrections
        return predictor_corrector(field, x, times, source.path, sigma, noise, snr=snr, corrections=corrections, after=after)
    return SDE_SOLVERS[sampler.solver](field, x, times, source.path, sigma, noise, after=after)


def _relax(path: Path, field: Field, x: Tensor, times: Tensor, sampler: Sampler, noise: Callable[[int], Tensor]) -> Solution:
    """Langevin dynamics at the last time of a grid, or at every one in turn; steps in units of the last level's variance."""

    def score(point: Tensor, t: Tensor) -> Tensor:
        return convert(field(point, t), "velocity", "score", point, path(widen(t, point)))

    step = sampler.langevin_step * float(path(times[-1]).b) ** 2
    if sampler.solver == "annealed_langevin":
        return annealed_langevin(score, x, times, path, step, sampler.corrections, noise)
    last = torch.full((len(x),), float(times[-1]), device=x.device, dtype=x.dtype)
    return langevin(lambda point: score(point, last), x, step, sampler.steps, noise)
