"""Guidance: from a field and a lesser one, a sharper one.

`u = u_lesser + w (u - u_lesser)` on all channels. The lesser field is the same
one without its condition (classifier-free guidance), with a condition to stay
away from (negative), or a weaker model (autoguidance). w = 1 is no guidance
and w = 0 the lesser field; both need one evaluation, every other w one
evaluation of a batch of 2 B. Fields are linear in their predictions, so
guiding a velocity guides data, noise and score alike; what is not linear
(rescaling, APG, CFG-Zero*; `guiders` has them) is done on the prediction that
it is defined for. A field of pairs (velocity, score) has both parts guided,
each as a prediction of its own.
Source: Ho and Salimans, Classifier-Free Diffusion Guidance, eq. 6, with w
counted so that 1 means none; Kynkäänniemi et al., Applying Guidance in a
Limited Interval; Karras et al., Guiding a Diffusion Model with a Bad Version
of Itself; docs/mathematics.md section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .condition import Condition, count, stack
from .field import ConditionalField, Field
from .guiders import APG, CFGZeroStar, Momentum, optimal_scale, projected, rescale_factor
from .parameterisation import Prediction, change, check_kind
from .path import Coefficients, Path, widen

ROUNDING = 1e-6
"""What is so near an end of an interval is the end: times are rounded on their way."""


def guide(
    field: ConditionalField,
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    method: APG | CFGZeroStar | None = None,
    path: Path | None = None,
    predict: Prediction = "velocity",
) -> Field:
    """Bind a condition to a field, guided.

    Args:
        field: `field(x, t, condition)` -> velocity (B, *S), or (velocity, score).
        condition: (B, ...), one per sample; a tensor, or a tuple of tensors.
        null: (B, ...), the condition that stands for none, or a negative one.
        scale: w above; 1 is the conditional field itself.
        interval: times at which guidance acts, ends included; elsewhere the
            conditional field alone, in one evaluation of B. On an accelerator
            an interval costs one wait per evaluation.
        rescale: share, 0 to 1, of the guided network's prediction that is
            brought back to the conditional one's standard deviation, sample by sample.
        method: None for plain guidance. With APG's momentum the field is of one solve:
            it remembers its evaluations.
        path: of the field; for what is done on another prediction than the velocity.
        predict: what the network behind the field predicts, which rescaling and
            CFG-Zero* act on; APG acts on the data prediction in any case.

    Returns:
        A field of (x, t). Not finite where the velocity converted from
        `predict` is not (`singular`).

    Raises:
        ValueError: conditions of different make or number, a scale that is not finite,
            an interval outside [0, 1], a rescale outside [0, 1], no path where one is needed.
    """
    if count(condition) != count(null):
        raise ValueError(f"{count(condition)} conditions and {count(null)} null ones differ: give one null condition per sample.")
    how = _How(scale, interval, rescale, method, path, predict)
    if how.idle:
        return lambda x, t: field(x, t, condition)
    if scale == 0 and interval == (0.0, 1.0) and rescale == 0 and method is None:
        return lambda x, t: field(x, t, null)
    both = stack(condition, null)

    def pair(x: Tensor, t: Tensor) -> tuple[Any, Any]:
        out = field(torch.cat([x, x]), torch.cat([t, t]), both)
        if isinstance(out, tuple):
            halves = [part.chunk(2) for part in out]
            return tuple(half[0] for half in halves), tuple(half[1] for half in halves)
        return out.chunk(2)

    return _guided(lambda x, t: field(x, t, condition), pair, how)


def autoguide(
    field: Field,
    weak: Field,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    method: APG | CFGZeroStar | None = None,
    path: Path | None = None,
    predict: Prediction = "velocity",
) -> Field:
    """Guide a field by a weaker model of the same data: smaller, or trained for less.

    Args:
        field, weak: fields of (x, t), their conditions bound. Where only one of
            them returns a score, the velocity alone is guided and returned.
        scale, interval, rescale, method, path, predict: as in `guide`.

    Returns:
        A field of (x, t); two evaluations, since the networks are two.

    Raises:
        ValueError: as `guide`.
    """
    how = _How(scale, interval, rescale, method, path, predict)
    return field if how.idle else _guided(field, lambda x, t: (field(x, t), weak(x, t)), how)


@dataclass(frozen=True)
class _How:
    """The numbers of `guide`, checked."""

    scale: float
    interval: tuple[float, float]
    rescale: float
    method: APG | CFGZeroStar | None
    path: Path | None
    predict: Prediction

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale={self.scale} is not finite: use 1 for none, 1.5 to 5 as a rule.")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(
                f"guidance interval {self.interval}: 0 <= first < last <= 1, t = 0 noise. Use (0.1, 0.9), or (0, 1) for always."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale={self.rescale}: a share from 0 (off) to 1. Use 0.7.")
        check_kind(self.predict)
        if self.path is None and (isinstance(self.method, APG) or self.predict != "velocity"):
            what = "APG acts on data predictions" if isinstance(self.method, APG) else f"the network predicts {self.predict}"
            raise ValueError(f"guidance without a path, and {what}: pass path, the field's, to convert its velocity.")

    @property
    def zero_until(self) -> float:
        """Return the time before which the field stands still."""
        return self.method.zero_until if isinstance(self.method, CFGZeroStar) else 0.0

    @property
    def idle(self) -> bool:
        """Return whether the guided field is the good one."""
        return self.scale == 1 and self.zero_until == 0


class _Point(NamedTuple):
    """Where a field is asked, (B, *S) and (B,), the path's coefficients there, if known, and which samples are guided, None for all."""

    x: Tensor
    t: Tensor
    c: Coefficients | None
    inside: Tensor | None


def _guided(good: Field, pair: Callable[[Tensor, Tensor], tuple[Any, Any]], how: _How) -> Field:
    """Return the guided field; `good` is evaluated outside the interval, `pair` (good and lesser) inside."""
    momentum = Momentum(how.method.momentum if isinstance(how.method, APG) else 0.0)

    def guided(x: Tensor, t: Tensor) -> Any:
        inside = None if how.interval == (0.0, 1.0) else (t >= how.interval[0] - ROUNDING) & (t <= how.interval[1] + ROUNDING)
        if inside is not None and not bool(inside.any()):
            return _asleep(good(x, t), t, how.zero_until)
        one, other = (out if isinstance(out, tuple) else (out,) for out in pair(x, t))
        point = _Point(x, t, None if how.path is None else how.path(widen(t, x)), inside)
        parts = []
        for output in range(few := min(len(one), len(other))):
            part = _sharpen(one[output], other[output], how, point, output, how.predict if few == 1 else "velocity", momentum)
            parts.append(part if inside is None else torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), part, one[output]))
        return _asleep(parts[0] if few == 1 else tuple(parts), t, how.zero_until)

    return guided


def _sharpen(good: Tensor, lesser: Tensor, how: _How, at: _Point, output: int, kind: Prediction, momentum: Momentum) -> Tensor:
    """Return one output guided, (B, *S): a velocity (output 0) of a network that predicts `kind`, or a learned score (output 1)."""
    guided = torch.lerp(lesser, good, how.scale)
    if not how.rescale and how.method is None:
        return guided
    kept, precise = guided.dtype, torch.promote_types(good.dtype, torch.float32)
    good, lesser, guided = good.to(precise), lesser.to(precise), guided.to(precise)
    if isinstance(how.method, APG):
        assert at.c is not None, "_How asks for a path"
        unit, towards = _of_data(good, at.x, at.c, output)
        difference = momentum.add(output, good - lesser, unit, at.t, at.inside)
        guided = good + (how.scale - 1) * projected(difference, towards, how.method, unit)
    # the network's prediction is p = A x + C v; what multiplies it by f adds (f - 1) p / C to v
    direct = output == 1 or kind == "velocity" or at.c is None
    of_x, slope = (0.0, 1.0) if direct else change("velocity", "noise" if kind == "score" else kind, at.c)  # type: ignore[arg-type]

    def prediction(velocity: Tensor) -> Tensor:
        return velocity if direct else of_x * at.x + slope * velocity

    if isinstance(how.method, CFGZeroStar):
        base = prediction(lesser)
        guided = guided + (optimal_scale(prediction(good), base) - 1) * (1 - how.scale) * base / slope
    if how.rescale:
        made = prediction(guided)
        guided = guided + (rescale_factor(made, prediction(good), how.rescale) - 1) * made / slope
    return guided.to(kept)


def _of_data(good: Tensor, x: Tensor, c: Coefficients, output: int) -> tuple[Tensor, Tensor]:
    """Data units in one unit of a velocity, or of a score (output 1), and its data prediction up to a factor, finite at both ends."""
    if output:
        return c.b**2 / c.a, x + c.b**2 * good
    return change("velocity", "data", c)[1], c.db * x - c.b * good


def _asleep(out: Any, t: Tensor, until: float) -> Any:
    """Return what the field returns, zero before a time."""
    if not until:
        return out
    if isinstance(out, tuple):
        return tuple(_asleep(part, t, until) for part in out)
    return torch.where((t < until - ROUNDING).reshape(-1, *[1] * (out.ndim - 1)), 0, out)
