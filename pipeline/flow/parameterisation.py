"""Data, noise, velocity, score: four names for one prediction, and how to change between them.

With `x = a z + b eps`, each prediction is a linear form `p = u z + w eps`:

    data      u = 1    w = 0
    noise     u = 0    w = 1
    velocity  u = da   w = db
    score     u = 0    w = -1 / b     (treated as noise times -1 / b)
    v         u = -b   w = a          (diffusers' `v_prediction`)

Two linear forms of (z, eps) fix the third: from `x` and `p` follows every
other form `q = U z + W eps = A x + C p`, where `A a + C u = U` and
`A b + C w = W`. The same holds for posterior means, because they are linear
too; that is why one network serves both ODE and SDE.

The division is by `D = a w - b u`, which vanishes only where the prediction
says nothing about the rest. With n = 1 - t, on CondOT (cosine alike, n and t
up to a factor):

    from, to   data      noise     velocity  score     v
    data         -         1 / n     1 / n     1 / n^2   1 / n
    noise        1 / t     -         1 / t     1 / n     1 / t
    velocity     none      none      -         1 / n     none
    score        n^2 / t   none      n / t     -         n / t
    v            none      none      none      1 / n     -

Each entry is the factor on an error of the prediction, so 1 / n is singular
at t = 1 and 1 / t at t = 0. On VP and DDPM, beta grows as sqrt(n) and the
velocity itself as 1 / sqrt(n) towards t = 1. On VE and EDM alpha = 1 and
beta > 0: nothing is singular. A velocity on CondOT has D = -1 everywhere.
Nothing is clamped: where D = 0 the result is not finite.
Source: docs/mathematics.md section 2; Holderrieth and Erives, Proposition 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .path import Coefficients

Prediction = Literal["data", "noise", "velocity", "score", "v"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def prediction_coefficients(prediction_type: Prediction, c: Coefficients) -> tuple[Tensor, Tensor]:
    """The weights (u, w) of data and noise in a prediction; each of the coefficients' shape.

    Raises:
        ValueError: a kind that is not one of PREDICTIONS.
    """
    zero, one = torch.zeros_like(c.a), torch.ones_like(c.a)
    if prediction_type == "data":
        return one, zero
    if prediction_type == "noise":
        return zero, one
    if prediction_type == "velocity":
        return c.da, c.db
    if prediction_type == "score":
        return zero, -1 / c.b
    check_prediction_type(prediction_type)
    return -c.b, c.a


def target(prediction_type: Prediction, data: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
    """What a network of this kind is to output for known data and noise.

    Args:
        prediction_type: the prediction's name.
        data: z, (B, *S).
        noise: eps, (B, *S).
        c: coefficients, each (B, 1, ..., 1).

    Returns:
        `u z + w eps`, (B, *S).
    """
    u, w = prediction_coefficients(prediction_type, c)
    return u * data + w * noise


def conversion_coefficients(source: Prediction, target: Prediction, c: Coefficients) -> tuple[Tensor, Tensor]:
    """The numbers (A, C) with `target = A x + C source`; each of the coefficients' shape.

    Not finite where the module's table says so; C is the factor on an error.
    """
    if source == target:
        return torch.zeros_like(c.a), torch.ones_like(c.a)
    if source == "score":
        x_factor, noise_factor = conversion_coefficients("noise", target, c)
        return x_factor, -c.b * noise_factor
    if target == "score":
        x_factor, prediction_factor = conversion_coefficients(source, "noise", c)
        return -x_factor / c.b, -prediction_factor / c.b
    u, w = prediction_coefficients(source, c)
    target_u, target_w = prediction_coefficients(target, c)
    determinant = c.a * w - c.b * u
    return (target_u * w - target_w * u) / determinant, (c.a * target_w - c.b * target_u) / determinant


def convert(prediction: Tensor, source: Prediction, target: Prediction, x: Tensor, c: Coefficients) -> Tensor:
    """Say a prediction in another name.

    Args:
        prediction: what the network gave, (B, *S).
        source: its kind.
        target: the kind wanted.
        x: the point on the path, (B, *S).
        c: coefficients there, each (B, 1, ..., 1), at least float32.

    Returns:
        (B, *S), in at least float32 unless there is nothing to do. Not finite
        where the module's table says so.

    Raises:
        ValueError: an unknown kind; a prediction that has not the shape of x;
            coefficients that are not widened.
    """
    if prediction.shape != x.shape or c.a.ndim != x.ndim:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, x {tuple(x.shape)}, coefficients {tuple(c.a.shape)}: the first two are alike "
            f"and the coefficients (B, 1, ..., 1). Take them from interpolate, or path(widen(t, x))."
        )
    for prediction_type in (source, target):
        check_prediction_type(prediction_type)
    if source == target:
        return prediction
    x_factor, prediction_factor = conversion_coefficients(source, target, c)
    return x_factor * x + prediction_factor * prediction


def check_prediction_type(prediction_type: str) -> None:
    """A ValueError unless `kind` is one of PREDICTIONS."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction {prediction_type!r} is unknown: choose one of {', '.join(PREDICTIONS)}.")
