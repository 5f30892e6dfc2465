"""Probability paths: how signal and noise are mixed at each time.

A Gaussian path is `p_t(x | z) = N(alpha_t z, beta_t^2 I)`, so that
`x_t = alpha_t z + beta_t eps`. Time runs from t = 0 (noise) to t = 1 (data).
Source: mathematics.md sections 0 and 1; Holderrieth and Erives, MIT 6.S184.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """alpha, beta and their time derivatives, all of one shape."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


class Path(Protocol):
    """A pair of functions of time; every path offers these three."""

    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at `t`, any shape, 0 <= t <= 1."""
        ...

    def log_snr(self, t: Tensor) -> Tensor:
        """`log(alpha^2 / beta^2)`: -inf at t = 0 and +inf at t = 1."""
        ...

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        ...


@dataclass(frozen=True)
class CondOT:
    """`alpha = t, beta = 1 - t`: straight lines, the optimal transport between N(0, I) and a point.

    Source: Lipman et al., Flow Matching for Generative Modeling, example II.
    """

    def __call__(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.logit(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


@dataclass(frozen=True)
class Cosine:
    """`alpha = sin(pi t / 2), beta = cos(pi t / 2)`: alpha^2 + beta^2 = 1 at every time.

    Source: Albergo and Vanden-Eijnden, Building Normalizing Flows with
    Stochastic Interpolants (the trigonometric, or GVP, interpolant).
    """

    def __call__(self, t: Tensor) -> Coefficients:
        w = math.pi / 2
        a, b = torch.sin(w * t), torch.cos(w * t)
        return Coefficients(a, b, w * b, -w * a)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.log(torch.tan(math.pi / 2 * t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(log_snr / 2))


PATHS: dict[str, type[CondOT] | type[Cosine]] = {"condot": CondOT, "cosine": Cosine}


def widen(t: Tensor, x: Tensor) -> Tensor:
    """Shape times `(B,)` as `(B, 1, ..., 1)`, so that they broadcast over samples.

    The only place where times widen: `(B,)` against `(B, C, H, W)` with B = W
    would broadcast over the width without an error.

    Args:
        t: times, (B,), 0 to 1.
        x: what they go with, (B, *S).

    Returns:
        (B, 1, ..., 1), at least float32, on the device of `x`.

    Raises:
        ValueError: a shape that is not (B,), or, where it can be seen
            without waiting for an accelerator, a time outside [0, 1].
    """
    if t.ndim != 1 or x.ndim < 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"t has shape {tuple(t.shape)} beside x {tuple(x.shape)}: one time per sample, shape (B,) = ({x.shape[0]},). "
            f"For one time for all, pass torch.full((B,), t)."
        )
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t reaches from {t.min().item()} to {t.max().item()}: times lie in [0, 1], t = 0 noise, t = 1 data.")
    t = t.to(device=x.device, dtype=torch.promote_types(t.dtype, torch.float32))
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(path: Path, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Coefficients]:
    """The point `x_t = alpha z + beta eps` and the coefficients there.

    Args:
        path: a Gaussian path.
        data: z, (B, *S).
        noise: eps, (B, *S), standard normal.
        t: times, (B,).

    Returns:
        x_t, (B, *S), and coefficients of shape (B, 1, ..., 1), in at least float32.

    Raises:
        ValueError: data and noise of different shapes.
    """
    if data.shape != noise.shape:
        raise ValueError(f"data {tuple(data.shape)} and noise {tuple(noise.shape)} differ: draw one noise per datum, of its shape.")
    c = path(widen(t, data))
    return c.a * data + c.b * noise, c
