"""Fields: a network's prediction, whatever its name, as the velocity that a solver follows.

A field is a function of (x, t); t has shape (B,). Solvers speak velocity only.
A field may also return a pair (velocity, score), from a network that was
trained for both; an SDE then takes the learned score, an ODE the velocity.
Source: docs/mathematics.md section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .parameterisation import Prediction, check_prediction_type, conversion_coefficients, convert
from .path import Coefficients, Path, widen

Field = Callable[[Tensor, Tensor], Any]  # (B, *S), (B,) -> velocity (B, *S), or (velocity, score)
ConditionalField = Callable[..., Any]  # the same with conditions (B, ...) after x and t


def velocity_field(model: ConditionalField, path: Path, predict: Prediction) -> ConditionalField:
    """A model of any prediction as a velocity field.

    Args:
        model: `model(x, t, *condition)` -> (B, *S), of the kind `predict`; or a
            pair (velocity, score), which is left as it is.
        path: the Gaussian path it was trained on.
        predict: what it predicts.

    Returns:
        `field(x, t, *condition)`, in at least float32. Not finite at the times
        where `is_singular` is true: begin or end the grid beside them.

    Raises:
        ValueError: an unknown prediction.
    """
    check_prediction_type(predict)

    def field(x: Tensor, t: Tensor, *condition: Any) -> Any:
        out = model(x, t, *condition)
        precise = torch.promote_types(x.dtype, torch.float32)
        if isinstance(out, tuple):
            return tuple(part.to(precise) for part in out)
        with torch.autocast(x.device.type, enabled=False):
            return convert(out.to(precise), predict, "velocity", x, path(widen(t, x)))

    return field


def is_singular(path: Path, predict: Prediction, t: float) -> bool:
    """Whether the velocity converted from such a prediction is not finite at `t`.

    At the start (noise or score on a path with alpha_0 = 0) begin the grid at
    1e-3 instead of 0; at the end (data on a path with beta_1 = 0, anything on
    VP) use a solver that does not evaluate there, or `last_euler=True`.
    """
    x_factor, prediction_factor = conversion_coefficients(predict, "velocity", path(torch.tensor(t, dtype=torch.float64)))
    return not (math.isfinite(x_factor.item()) and math.isfinite(prediction_factor.item()))


def velocity_and_score(out: Any) -> tuple[Tensor, Tensor | None]:
    """What a field returned, as a velocity and a learned score, if there is one."""
    return (out[0], out[1]) if isinstance(out, tuple) else (out, None)


def score_field(field: Field, path: Path) -> Field:
    """Return the score of (x, t), (B, *S), of a field: the learned one where the field returns a pair, else converted from its velocity.

    Converted, it is not finite where beta = 0.
    """

    def score(x: Tensor, t: Tensor) -> Tensor:
        velocity, learned = velocity_and_score(field(x, t))
        return convert(velocity, "velocity", "score", x, path(widen(t, x))) if learned is None else learned

    return score


def shift_data_prediction(out: Any, data_change: Tensor, c: Coefficients) -> Any:
    """Return what a field returned, moved as if its data prediction had moved, the point staying where it is.

    Of a data prediction that moves by d the noise moves by -(a / b) d, so the
    velocity by (da - db a / b) d and a learned score by (a / b^2) d.

    Args:
        out: a velocity, (B, *S), or a pair (velocity, score).
        data_change: d, (B, *S), data units.
        c: coefficients at t, each (B, 1, ..., 1).

    Returns:
        As `out`. Where beta is 0 the point is the datum and nothing moves.
    """
    velocity, score = velocity_and_score(out)
    noisy = c.b > 0
    b = torch.where(noisy, c.b, 1)
    moved = velocity + (torch.where(noisy, c.da - c.db * c.a / b, 0) * data_change).to(velocity.dtype)
    if score is None:
        return moved
    return moved, score + (torch.where(noisy, c.a / b**2, 0) * data_change).to(score.dtype)


def denoise(field: Field, x: Tensor, t: float, path: Path) -> Tensor:
    """The posterior mean E[z | x_t = x]: the clean end of a path whose last point keeps noise (VE, EDM, DDPM).

    Args:
        field: velocity of (x, t), or (velocity, score), whose velocity is taken; evaluated once.
        x: points at time `t`, (B, *S).
        t: where the solver ended, usually 1.
        path: the field's path; beta_t > 0.

    Returns:
        (B, *S), data units.
    """
    now = torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)
    velocity, _ = velocity_and_score(field(x, now))
    return convert(velocity, "velocity", "data", x, path(widen(now, x)))


def shift_score_prediction(out: Any, score_change: Tensor, c: Coefficients) -> Any:
    """Return what a field returned, moved as if its score had moved: the velocity by `(b^2 da / a - b db)` times as much.

    So the density is multiplied by what has this gradient of its logarithm.

    Args:
        out: a velocity, (B, *S), or a pair (velocity, score).
        score_change: (B, *S), 1 / data units.
        c: coefficients at t, each (B, 1, ..., 1); not finite where alpha = 0.
    """
    velocity, score = velocity_and_score(out)
    moved = velocity + ((c.b**2 * c.da / c.a - c.b * c.db) * score_change).to(velocity.dtype)
    return moved if score is None else (moved, score + score_change.to(score.dtype))


def clip_data_prediction(field: Field, path: Path, bound: float) -> Field:
    """A field whose data prediction stays within +-bound; the noise follows from it and from the point.

    Where the signal is faint a small error of predicted noise is a large one of
    the data (1 / alpha times); what is known of the data bounds it. A learned
    score has a data prediction of its own, `(x + b^2 score) / a`, and it is
    bounded alike: where neither is out of bounds, both stay as they were learned.

    Args:
        field: of (x, t), any condition bound.
        path: the field's path.
        bound: 1 for pixels, positive.

    Returns:
        A field of (x, t); where beta is 0 what the given one returns.

    Raises:
        ValueError: a bound that is not positive.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, whose code clips the data prediction in every step.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"bound={bound} of data predictions: positive and finite. Use 1 for images in -1..1.")

    def inside(x: Tensor, t: Tensor) -> Any:
        velocity, score = velocity_and_score(field(x, t))
        c = path(widen(t, x))
        data = convert(velocity, "velocity", "data", x, c)
        kept = shift_data_prediction(velocity, data.clamp(-bound, bound) - data, c)
        if score is None:
            return kept
        signal, limit = x + c.b**2 * score, c.a * bound  # alpha times the score's data prediction, finite where alpha = 0
        off = torch.minimum(torch.maximum(signal, -limit), limit) - signal
        b = torch.where(c.b > 0, c.b, 1)
        return kept, score + torch.where(c.b > 0, off / b**2, 0).to(score.dtype)

    return inside
