"""Fields: a network's prediction, whatever its name, as the velocity that a solver follows.

A field is a function of (x, t); t has shape (B,). Solvers speak velocity only.
A field may also return a pair (velocity, score), from a network that was
trained for both; an SDE then takes the learned score, an ODE the velocity.
Source: mathematics.md section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .parameterisation import Prediction, change, check_kind, convert
from .path import Path, widen

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
        where `singular` is true: begin or end the grid beside them.

    Raises:
        ValueError: an unknown prediction.
    """
    check_kind(predict)

    def field(x: Tensor, t: Tensor, *condition: Any) -> Any:
        out = model(x, t, *condition)
        if isinstance(out, tuple):
            return tuple(part.to(x.dtype) for part in out)
        with torch.autocast(x.device.type, enabled=False):
            return convert(out.to(torch.promote_types(x.dtype, torch.float32)), predict, "velocity", x, path(widen(t, x)))

    return field


def singular(path: Path, predict: Prediction, t: float) -> bool:
    """Whether the velocity converted from such a prediction is not finite at `t`.

    At the start (noise or score on a path with alpha_0 = 0) begin the grid at
    1e-3 instead of 0; at the end (data on a path with beta_1 = 0, anything on
    VP) use a solver that does not evaluate there, or `last_euler=True`.
    """
    of_x, of_prediction = change(predict, "velocity", path(torch.tensor(t, dtype=torch.float64)))
    return not (math.isfinite(of_x.item()) and math.isfinite(of_prediction.item()))


def velocity_and_score(out: Any) -> tuple[Tensor, Tensor | None]:
    """What a field returned, as a velocity and a learned score, if there is one."""
    return (out[0], out[1]) if isinstance(out, tuple) else (out, None)


def denoise(field: Field, x: Tensor, t: float, path: Path) -> Tensor:
    """The posterior mean E[z | x_t = x]: the clean end of a path whose last point keeps noise (VE, EDM, DDPM).

    Args:
        field: velocity of (x, t); evaluated once.
        x: points at time `t`, (B, *S).
        t: where the solver ended, usually 1.
        path: the field's path; beta_t > 0.

    Returns:
        (B, *S), data units.
    """
    now = torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)
    velocity, _ = velocity_and_score(field(x, now))
    return convert(velocity, "velocity", "data", x, path(widen(now, x)))


def clipped(field: Field, path: Path, bound: float) -> Field:
    """A field whose data prediction stays within +-bound; the noise follows from it and from the point.

    Where the signal is faint a small error of predicted noise is a large one of
    the data (1 / alpha times); what is known of the data bounds it.

    Args:
        field: of (x, t), any condition bound; a learned score is left out.
        path: the field's path.
        bound: 1 for pixels, positive.

    Returns:
        A field of (x, t); where beta is 0 the given one's velocity as it is.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, whose code clips the data prediction in every step.
    """

    def inside(x: Tensor, t: Tensor) -> Tensor:
        velocity, _ = velocity_and_score(field(x, t))
        c = path(widen(t, x))
        data = convert(velocity, "velocity", "data", x, c)
        pull = torch.where(c.b > 0, c.da - c.db * c.a / c.b.clamp(min=torch.finfo(c.b.dtype).tiny), 0)  # of v with z, x staying
        return velocity + (pull * (data.clamp(-bound, bound) - data)).to(velocity.dtype)

    return inside
