"""Probability paths: how signal and noise are mixed at each time.

A Gaussian path is `p_t(x | z) = N(alpha_t z, beta_t^2 I)`, so that
`x_t = alpha_t z + beta_t eps`. Time runs from t = 0 (noise) to t = 1 (data).
Here are the two paths that end on both sides exactly; those of the diffusion
literature are in `diffusion` and `ddpm`, any other prior in `linear`.
Source: docs/mathematics.md sections 0 and 1; Holderrieth and Erives, MIT 6.S184.
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
        """`log(alpha^2 / beta^2)`, rising with t; infinite where alpha or beta vanish."""
        ...

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`; outside [0, 1] for a level the path does not reach."""
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

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


@dataclass(frozen=True)
class Cosine:
    """`alpha = sin(pi t / 2), beta = cos(pi t / 2)`: alpha^2 + beta^2 = 1 at every time.

    Source: Albergo and Vanden-Eijnden, Building Normalizing Flows with
    Stochastic Interpolants (the trigonometric, or GVP, interpolant).
    """

    def __call__(self, t: Tensor) -> Coefficients:
        w = math.pi / 2
        a, b = torch.sin(w * t), torch.sin(w * (1 - t))  # cos(w t) would miss 0 at t = 1
        return Coefficients(a, b, w * b, -w * a)

    def log_snr(self, t: Tensor) -> Tensor:
        c = self(t)
        return 2 * torch.log(c.a / c.b)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(log_snr / 2))


def require_finite(name: str, x: Tensor) -> None:
    """A ValueError unless `x` is of a floating type and, where it can be seen without waiting for an accelerator, finite."""
    if not x.is_floating_point():
        raise ValueError(
            f"{name} has dtype {x.dtype}: points are floating numbers. Scale images to data units first, e.g. x.float() / 127.5 - 1."
        )
    if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} holds {bad} values that are not finite, of {x.numel()}: all must be. Look for NaN where it was made.")


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
        batch = x.shape[0] if x.ndim else "?"
        raise ValueError(
            f"t has shape {tuple(t.shape)} beside x {tuple(x.shape)}: one time per sample, shape (B,) = ({batch},). "
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
        ValueError: data and noise of different shapes, not floating or (on
            the CPU) not finite; times as in `widen`.
    """
    if data.shape != noise.shape:
        raise ValueError(f"data {tuple(data.shape)} and noise {tuple(noise.shape)} differ: draw one noise per datum, of its shape.")
    require_finite("data", data)
    require_finite("noise", noise)
    c = path(widen(t, data))
    return c.a * data + c.b * noise, c


def scale_initial_noise(path: Path, noise: Tensor, t: float = 0.0) -> Tensor:
    """Where a solver starts: `beta_t eps`, with the signal, if any is left at `t`, left out.

    Exact at t = 0 on CondOT and cosine; on VP, DDPM and VE the signal left in
    p_0 is alpha_0 = 0.0066, 0.006 and beta_0 / 50 of data, and is neglected as
    everyone does.

    Args:
        path: a Gaussian path.
        noise: standard normal, (B, *S).
        t: the first time of the grid, in [0, 1).

    Returns:
        (B, *S), in the dtype of `noise`.
    """
    return noise * path(torch.tensor(t, dtype=torch.float64)).b.item()
