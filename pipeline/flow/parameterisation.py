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
says nothing about the rest: data at t = 1 (D = -b), noise and score at t = 0
(D = a). A velocity on CondOT has D = -1 everywhere; so nothing is singular
there but the score itself, which grows as 1 / b towards t = 1. Nothing is
clamped: where D = 0 the result is not finite.
Source: mathematics.md section 2; Holderrieth and Erives, Proposition 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .path import Coefficients

Prediction = Literal["data", "noise", "velocity", "score", "v"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def form(kind: Prediction, c: Coefficients) -> tuple[Tensor, Tensor]:
    """The weights (u, w) of data and noise in a prediction; each of the coefficients' shape.

    Raises:
        ValueError: a kind that is not one of PREDICTIONS.
    """
    zero, one = torch.zeros_like(c.a), torch.ones_like(c.a)
    if kind == "data":
        return one, zero
    if kind == "noise":
        return zero, one
    if kind == "velocity":
        return c.da, c.db
    if kind == "score":
        return zero, -1 / c.b
    if kind == "v":
        return -c.b, c.a
    raise ValueError(f"prediction {kind!r} is unknown: choose one of {', '.join(PREDICTIONS)}.")


def target(kind: Prediction, data: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
    """What a network of this kind is to output for known data and noise.

    Args:
        kind: the prediction's name.
        data: z, (B, *S).
        noise: eps, (B, *S).
        c: coefficients, each (B, 1, ..., 1).

    Returns:
        `u z + w eps`, (B, *S).
    """
    u, w = form(kind, c)
    return u * data + w * noise


def convert(prediction: Tensor, source: Prediction, target: Prediction, x: Tensor, c: Coefficients) -> Tensor:
    """Say a prediction in another name.

    Args:
        prediction: what the network gave, (B, *S).
        source: its kind.
        target: the kind wanted.
        x: the point on the path, (B, *S).
        c: coefficients there, each (B, 1, ..., 1).

    Returns:
        (B, *S). Not finite where the module's table says so.
    """
    if source == target:
        return prediction
    if source == "score":
        return convert(-c.b * prediction, "noise", target, x, c)
    if target == "score":
        return -convert(prediction, source, "noise", x, c) / c.b
    u, w = form(source, c)
    wanted_u, wanted_w = form(target, c)
    determinant = c.a * w - c.b * u
    return (wanted_u * w - wanted_w * u) / determinant * x + (c.a * wanted_w - c.b * wanted_u) / determinant * prediction
