"""Guidance: from a field and a lesser one, a sharper one.

`u = u_lesser + w (u - u_lesser)` on all channels. The lesser field is the same
one without its condition (classifier-free guidance), with a condition to stay
away from (negative), or a weaker model (autoguidance). w = 1 is no guidance
and w = 0 the lesser field; both need one evaluation, every other w one
evaluation of a batch of 2 B. Fields are linear in their predictions, so
guiding a velocity guides data, noise and score alike.
Source: Ho and Salimans, Classifier-Free Diffusion Guidance, eq. 6, with w
counted so that 1 means none; Kynkäänniemi et al., Applying Guidance in a
Limited Interval; Lin et al., Common Diffusion Noise Schedules and Sample Steps
are Flawed, section 3.4; Karras et al., Guiding a Diffusion Model with a Bad
Version of Itself; mathematics.md section 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .condition import Condition, count, stack
from .field import ConditionalField, Field


def guide(
    field: ConditionalField,
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Field:
    """Bind a condition to a field, guided.

    Args:
        field: `field(x, t, condition)` -> (B, *S).
        condition: (B, ...), one per sample; a tensor, or a tuple of tensors.
        null: (B, ...), the condition that stands for none, or a negative one.
        scale: w above; 1 is the conditional field itself.
        interval: times at which guidance acts, ends included; elsewhere the
            conditional field alone, in one evaluation of B. On an accelerator
            an interval costs one wait per evaluation.
        rescale: share, 0 to 1, of the guided field that is brought back to the
            conditional one's standard deviation, sample by sample.

    Returns:
        A field of (x, t).

    Raises:
        ValueError: conditions of different make or number, a scale that is not finite,
            an interval outside [0, 1], a rescale outside [0, 1].
    """
    if count(condition) != count(null):
        raise ValueError(f"{count(condition)} conditions and {count(null)} null ones differ: give one null condition per sample.")
    _check(scale, interval, rescale)
    if scale == 1:
        return lambda x, t: field(x, t, condition)
    if scale == 0 and interval == (0.0, 1.0) and rescale == 0:
        return lambda x, t: field(x, t, null)
    both = stack(condition, null)

    def guided(x: Tensor, t: Tensor) -> Any:
        inside = _inside(t, interval)
        if inside is not None and not bool(inside.any()):
            return field(x, t, condition)
        conditional, lesser = field(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return _sharpen(conditional, lesser, scale, inside, rescale)

    return guided


def autoguide(field: Field, weak: Field, scale: float, *, interval: tuple[float, float] = (0.0, 1.0), rescale: float = 0.0) -> Field:
    """Guide a field by a weaker model of the same data: smaller, or trained for less.

    Args:
        field, weak: fields of (x, t), their conditions bound.
        scale, interval, rescale: as in `guide`.

    Returns:
        A field of (x, t); two evaluations, since the networks are two.

    Raises:
        ValueError: as `guide`.
    """
    _check(scale, interval, rescale)
    if scale == 1:
        return field

    def guided(x: Tensor, t: Tensor) -> Any:
        inside = _inside(t, interval)
        if inside is not None and not bool(inside.any()):
            return field(x, t)
        return _sharpen(field(x, t), weak(x, t), scale, inside, rescale)

    return guided


def _check(scale: float, interval: tuple[float, float], rescale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale} is not finite: use 1 for none, 1.5 to 5 as a rule.")
    if not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance interval {interval}: 0 <= first < last <= 1, t = 0 noise. Use (0.1, 0.9), or (0, 1) for always.")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale={rescale}: a share from 0 (off) to 1. Use 0.7.")


def _inside(t: Tensor, interval: tuple[float, float]) -> Tensor | None:
    """Which samples are guided, (B,); None for all."""
    return None if interval == (0.0, 1.0) else (t >= interval[0]) & (t <= interval[1])


def _sharpen(good: Tensor, lesser: Tensor, scale: float, inside: Tensor | None, rescale: float) -> Tensor:
    """The guided field, (B, *S); outside the interval the good one."""
    guided = torch.lerp(lesser, good, scale)
    if rescale:
        size = good.flatten(1).std(1) / guided.flatten(1).std(1)
        guided = guided * (1 + rescale * (size - 1)).reshape(-1, *[1] * (good.ndim - 1))
    if inside is None:
        return guided
    return torch.where(inside.reshape(-1, *[1] * (good.ndim - 1)), guided, good)
