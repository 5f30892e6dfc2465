"""Guidance: from a field and a reference one, a sharper one.

`u = u_reference + w (u - u_reference)` on all channels. The reference field is the same
one without its condition (classifier-free guidance), with a condition to stay
away from (negative), or a weaker model (autoguidance). w = 1 is no guidance
and w = 0 the reference field; both need one evaluation, every other w one
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

from .condition import Condition, concat_conditions, num_samples
from .field import ConditionalField, Field
from .guidance_methods import APG, CFGZeroStar, Momentum, cfg_zero_star_scale, project_difference, rescale_factor
from .parameterisation import Prediction, check_prediction_type, conversion_coefficients
from .path import Coefficients, Path, widen

TIME_TOLERANCE = 1e-6
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
        `predict` is not (`is_singular`).

    Raises:
        ValueError: conditions of different make or number, a scale that is not finite,
            an interval outside [0, 1], a rescale outside [0, 1], no path where one is needed.
    """
    if num_samples(condition) != num_samples(null):
        raise ValueError(
            f"{num_samples(condition)} conditions and {num_samples(null)} null ones differ: give one null condition per sample."
        )
    settings = _GuidanceSettings(scale, interval, rescale, method, path, predict)
    if settings.is_identity:
        return lambda x, t: field(x, t, condition)
    if scale == 0 and interval == (0.0, 1.0) and rescale == 0 and method is None:
        return lambda x, t: field(x, t, null)
    both = concat_conditions(condition, null)

    def pair(x: Tensor, t: Tensor) -> tuple[Any, Any]:
        out = field(torch.cat([x, x]), torch.cat([t, t]), both)
        if isinstance(out, tuple):
            halves = [part.chunk(2) for part in out]
            return tuple(half[0] for half in halves), tuple(half[1] for half in halves)
        conditional, unconditional = out.chunk(2)
        return conditional, unconditional

    return _guided_field(lambda x, t: field(x, t, condition), pair, settings)


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
    settings = _GuidanceSettings(scale, interval, rescale, method, path, predict)
    return field if settings.is_identity else _guided_field(field, lambda x, t: (field(x, t), weak(x, t)), settings)


@dataclass(frozen=True)
class _GuidanceSettings:
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
        check_prediction_type(self.predict)
        if self.path is None and (isinstance(self.method, APG) or self.predict != "velocity"):
            what = "APG acts on data predictions" if isinstance(self.method, APG) else f"the network predicts {self.predict}"
            raise ValueError(f"guidance without a path, and {what}: pass path, the field's, to convert its velocity.")

    @property
    def zero_until(self) -> float:
        """Return the time before which the field stands still."""
        return self.method.zero_until if isinstance(self.method, CFGZeroStar) else 0.0

    @property
    def is_identity(self) -> bool:
        """Return whether the guided field is the good one."""
        return self.scale == 1 and self.zero_until == 0


class _EvaluationPoint(NamedTuple):
    """Where a field is asked, (B, *S) and (B,), the path's coefficients there, if known, and which samples are guided, None for all."""

    x: Tensor
    t: Tensor
    c: Coefficients | None
    inside: Tensor | None


def _guided_field(main: Field, pair: Callable[[Tensor, Tensor], tuple[Any, Any]], settings: _GuidanceSettings) -> Field:
    """Return the guided field; `main` is evaluated outside the interval, `pair` (main and reference) inside."""
    momentum = Momentum(settings.method.momentum if isinstance(settings.method, APG) else 0.0)

    def guided(x: Tensor, t: Tensor) -> Any:
        inside = (
            None
            if settings.interval == (0.0, 1.0)
            else (t >= settings.interval[0] - TIME_TOLERANCE) & (t <= settings.interval[1] + TIME_TOLERANCE)
        )
        if inside is not None and not bool(inside.any()):
            return _zero_before(main(x, t), t, settings.zero_until)
        main_output, reference_output = (out if isinstance(out, tuple) else (out,) for out in pair(x, t))
        point = _EvaluationPoint(x, t, None if settings.path is None else settings.path(widen(t, x)), inside)
        parts = []
        for output in range(num_outputs := min(len(main_output), len(reference_output))):
            part = _guide_output(
                main_output[output],
                reference_output[output],
                settings,
                point,
                output,
                settings.predict if num_outputs == 1 else "velocity",
                momentum,
            )
            parts.append(part if inside is None else torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), part, main_output[output]))
        return _zero_before(parts[0] if num_outputs == 1 else tuple(parts), t, settings.zero_until)

    return guided


def _guide_output(
    main: Tensor,
    reference: Tensor,
    settings: _GuidanceSettings,
    point: _EvaluationPoint,
    output: int,
    prediction_type: Prediction,
    momentum: Momentum,
) -> Tensor:
    """Return one output guided, (B, *S): a velocity (output 0) of a network that predicts `kind`, or a learned score (output 1)."""
    guided = torch.lerp(reference, main, settings.scale)
    if not settings.rescale and settings.method is None:
        return guided
    kept, precise = guided.dtype, torch.promote_types(main.dtype, torch.float32)
    main, reference, guided = main.to(precise), reference.to(precise), guided.to(precise)
    if isinstance(settings.method, APG):
        assert point.c is not None, "_How asks for a path"
        unit, towards = _data_scale_and_prediction(main, point.x, point.c, output)
        difference = momentum.add(output, main - reference, unit, point.t, point.inside)
        guided = main + (settings.scale - 1) * project_difference(difference, towards, settings.method, unit)
    # the network's prediction is p = A x + C v; what multiplies it by f adds (f - 1) p / C to v
    direct = output == 1 or prediction_type == "velocity" or point.c is None
    linear_type = "noise" if prediction_type == "score" else prediction_type
    x_factor, slope = (0.0, 1.0) if direct else conversion_coefficients("velocity", linear_type, point.c)  # type: ignore[arg-type]

    def prediction(velocity: Tensor) -> Tensor:
        return velocity if direct else x_factor * point.x + slope * velocity

    if isinstance(settings.method, CFGZeroStar):
        base = prediction(reference)
        guided = guided + (cfg_zero_star_scale(prediction(main), base) - 1) * (1 - settings.scale) * base / slope
    if settings.rescale:
        guided_prediction = prediction(guided)
        guided = guided + (rescale_factor(guided_prediction, prediction(main), settings.rescale) - 1) * guided_prediction / slope
    return guided.to(kept)


def _data_scale_and_prediction(main: Tensor, x: Tensor, c: Coefficients, output: int) -> tuple[Tensor, Tensor]:
    """Data units in one unit of a velocity, or of a score (output 1), and its data prediction up to a factor, finite at both ends."""
    if output:
        return c.b**2 / c.a, x + c.b**2 * main
    return conversion_coefficients("velocity", "data", c)[1], c.db * x - c.b * main


def _zero_before(out: Any, t: Tensor, start: float) -> Any:
    """Return what the field returns, zero before a time."""
    if not start:
        return out
    if isinstance(out, tuple):
        return tuple(_zero_before(part, t, start) for part in out)
    return torch.where((t < start - TIME_TOLERANCE).reshape(-1, *[1] * (out.ndim - 1)), 0, out)
