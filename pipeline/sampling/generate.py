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

from ..flow import (
    Condition,
    Solution,
    autoguide,
    classifier_guide,
    clip_data_prediction,
    denoise,
    guide,
    map_condition,
    num_samples,
    repeat_condition,
)
from ..flow.field import ConditionalField, Field
from ..flow.time_grid import intervals
from .flow_model import FlowModel, check_labels
from .sampler import Sampler
from .solve import initial_point, integrate

StepCallback = Callable[[Tensor, float, Field], None]
"""Sees points (B, *S), their time, and the guided field that leads on from there."""
MAX_FINAL_NOISE = 1e-6
"""A path that ends on more noise than this is ended by its data prediction."""
DATA_RANGE = 1.0
"""Images lie within plus and minus this."""


class Samples(NamedTuple):
    """Images, (N, C, H, W), -1..1, float32, on the CPU, and how often the field was evaluated for each."""

    images: Tensor
    evaluations: int


@torch.no_grad()
def generate(
    model: FlowModel,
    condition: Condition,
    sampler: Sampler,
    *,
    seed: int,
    first: int = 0,
    batch_size: int = 256,
    null: Condition | None = None,
    on_step: StepCallback | None = None,
) -> Samples:
    """Sample images.

    Args:
        model: the field.
        condition: of each image, (N, ...): classes, int64, for a model without classes all equal `model.null`; or text.
        sampler: solver, steps, guidance, coefficient.
        seed: of the noise.
        first: index of the first image; the noise is a function of (seed, index).
        batch_size: images at once.
        null: what guidance leads away from, of a model that takes text, one condition for all or one for each; by default none at all.
        on_step: sees each batch at every time of the grid but the last, by solvers that step from one to the next.

    Raises:
        ValueError: a label out of range, guidance of a model without classes
            by itself, a sample that is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one image at once.")
    if isinstance(condition, Tensor) and model.num_classes:
        check_labels(condition, model.num_classes)
    check_sampler(model, sampler)
    images, evaluations, total = [], 0, num_samples(condition)
    null = model.null if null is None else null
    for place in range(0, total, batch_size):
        index = first + torch.arange(place, min(place + batch_size, total), device=model.device)
        rows = slice(place, place + batch_size)
        negative = _rows(null, rows) if not isinstance(null, int) and num_samples(null) > 1 else null
        part = map_condition(_rows(condition, rows), lambda whole: whole.to(model.device))
        end, evaluations = _sample_batch(replace(model, null=negative), part, sampler, seed, index, on_step)
        images.append(model.decode(end).float().cpu())
    return Samples(torch.cat(images), evaluations)


def check_sampler(model: FlowModel, sampler: Sampler) -> None:
    """Raises ValueError for guidance or a grid of times that the model cannot be sampled with."""
    unconditional = model.classifier is not None and model.classifier.unconditional
    conditional = (model.num_classes > 0 and not unconditional) or not isinstance(model.null, int)
    if not conditional and model.weak is None and sampler.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale={sampler.guidance_scale} on a model without classes: there is nothing to guide by, use 1, or a weaker model."
        )
    intervals(times := sampler.times(model))
    sampler.check_guidance(model, sampler.guidance_scale, sampler.solver, times[0])
    guided_field(model, torch.zeros(1) if isinstance(model.null, int) else model.null, sampler)


def _rows(condition: Condition, rows: slice) -> Condition:
    return map_condition(condition, lambda whole: whole[rows])


def _sample_batch(
    model: FlowModel, condition: Condition, sampler: Sampler, seed: int, index: Tensor, on_step: StepCallback | None
) -> Solution:
    """The end of the path for one batch, and the evaluations it took."""
    times = sampler.times(model)
    field, callback_field = (
        clipped_field(model, with_classifier_guidance(model, guided_field(model, condition, sampler), condition, sampler), sampler)
        for _ in range(2)
    )
    x = initial_point(model, seed, index, float(times[0]))

    def call_on_step(x: Tensor, t: float) -> Tensor:
        if on_step is not None and t < float(times[-1]):
            on_step(x, t, callback_field)  # not the field itself: it may remember its evaluations
        return x

    call_on_step(x, float(times[0]))
    end = integrate(model, field, x, times, sampler, seed, index, step_callback=None if on_step is None else call_on_step)
    return remove_final_noise(model, field, end, float(times[-1]))


def guided_field(model: FlowModel, condition: Condition, sampler: Sampler, times: Tensor | None = None) -> Field:
    """Return the model's field with its condition, (B, ...), bound and guided as the sampler says, on a grid of times if not on its own.

    It is of one solve where guidance has momentum.
    """
    how: dict[str, Any] = {"interval": sampler.guidance_interval, "rescale": sampler.guidance_rescale}
    how |= {
        "method": sampler.guidance_method(sampler.times(model) if times is None else times),
        "path": model.path,
        "predict": model.predict,
    }
    if model.weak is not None:
        good, weak = (partial(_evaluate, field, condition) for field in (model.field, model.weak))
        return autoguide(good, weak, sampler.guidance_scale, **how)
    if isinstance(condition, Tensor):
        null: Condition = torch.full_like(condition, model.null)
    else:
        null = repeat_condition(map_condition(model.null, lambda part: part.to(model.device)), num_samples(condition))
    return guide(model.field, condition, null, sampler.guidance_scale, **how)


def _evaluate(field: ConditionalField, condition: Condition, x: Tensor, t: Tensor) -> Any:
    return field(x, t, condition)


def with_classifier_guidance(model: FlowModel, field: Field, condition: Condition, sampler: Sampler) -> Field:
    """Return the field, led to a condition, (B,), by the model's classifier if it has one; not to be differentiated any more."""
    if model.classifier is None:
        return field
    return classifier_guide(field, model.path, model.classifier.log_likelihood_of(condition), sampler.classifier_guidance_scale)


def clipped_field(model: FlowModel, field: Field, sampler: Sampler) -> Field:
    """The field with its data prediction kept in the range of images: if the sampler says so, or where noise is predicted in pixels."""
    on = sampler.clip == "on" or (sampler.clip == "auto" and model.predict == "noise" and not model.pixels)
    return clip_data_prediction(field, model.path, DATA_RANGE) if on else field


def remove_final_noise(model: FlowModel, field: Field, end: Solution, t: float) -> Solution:
    """A solution at time t without the noise that some paths (VE, EDM, DDPM) and Langevin dynamics end on."""
    if model.path(torch.tensor(t, dtype=torch.float64)).b > MAX_FINAL_NOISE:
        return Solution(denoise(field, end.x, t, model.path), end.evaluations + 1)
    return end
