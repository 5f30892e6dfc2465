"""From seeds to images: initial noise by (seed, index), a field, a solver, decoding, in batches.

The image of a (seed, index, label) does not depend on the others in its batch
nor on the batch's size, up to the rounding of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flow import Condition, Solution, autoguide, classifier_guide, clipped, count, denoise, each, guide, repeat
from ..flow.field import ConditionalField, Field
from ..flow.time_grid import intervals
from .flow_model import Source, check_labels
from .sampler import Sampler
from .solve import follow, start

Watch = Callable[[Tensor, float, Field], None]
"""Sees points (B, *S), their time, and the guided field that leads on from there."""
LEFT_NOISE = 1e-6
"""A path that ends on more noise than this is ended by its data prediction."""
RANGE = 1.0
"""Images lie within plus and minus this."""


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
    for place in range(0, total, batch_size):
        index = first + torch.arange(place, min(place + batch_size, total), device=source.device)
        rows = slice(place, place + batch_size)
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
    """Return the source's field with its condition, (B, ...), bound and guided as the sampler says, on a grid of times if not on its own.

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
    """Return the field, led to a condition, (B,), by the source's classifier if it has one; not to be differentiated any more."""
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
