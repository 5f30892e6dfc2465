"""Training objectives by regression: what a network is asked for, as one loss per sample.

Conditional flow matching is the case `predict="velocity"`: its minimiser is
the marginal velocity, because the conditional and the marginal loss have the
same gradient. The other predictions give denoising score matching (`score`;
on VE, at its levels, NCSN) and the losses of DDPM (`noise`, `data`, `v`).
Source: mathematics.md section 3; Lipman et al., Theorem 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear import LinearPath, require_gaussian
from .parameterisation import Prediction, check_kind, target
from .path import Path, interpolate
from .weighting import Weighting, check_weighting, weight


@dataclass(frozen=True)
class Objective:
    """Weighted mean square error of a prediction along a path.

    Args:
        path: a Gaussian path, or a general linear one, whose prior `noise` is
            then drawn from.
        predict: what the network is asked for.
        weighting: how errors count over time; only `none` on a general path.
        gamma, sigma_data: parameters of `min_snr` and `edm`.

    Raises:
        ValueError: an unknown name; a combination that cannot be right.
    """

    path: Path | LinearPath
    predict: Prediction = "velocity"
    weighting: Weighting = "none"
    gamma: float = 5.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_kind(self.predict)
        check_weighting(self.weighting, self.gamma, self.sigma_data)
        if isinstance(self.path, LinearPath):
            self.path.check(self.predict)
            if self.weighting != "none":
                raise ValueError(
                    f"weighting {self.weighting!r} needs the coefficients of a Gaussian path: use none on a general linear path."
                )

    def check(self, shape: tuple[int, ...]) -> None:
        """Whether data of this shape can be trained on: all can."""

    def __call__(
        self, model: Callable[..., Any], data: Tensor, noise: Tensor, t: Tensor, *condition: Any, probe: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample.

        Args:
            model: `model(x, t, *condition)` -> (B, *S); x (B, *S), t (B,).
            data: z, (B, *S).
            noise: eps, (B, *S), standard normal, or drawn from the prior.
            t: times, (B,), 0 to 1.
            condition: whatever else the model takes, each (B, ...).
            probe: unused here.

        Returns:
            (B,), mean over the other dimensions, in at least float32 also
            under autocast.

        Raises:
            ValueError: shapes that differ, times outside [0, 1], values that
                are not finite (on the CPU).
        """
        with torch.autocast(data.device.type, enabled=False):
            x, wanted, factor = self._regression(data, noise, t)
        return factor * square_error(model(x, t.to(x), *condition), wanted)

    def _regression(self, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input and the target, (B, *S), and the weight, (B,)."""
        if isinstance(self.path, LinearPath):
            x, wanted, s = self.path.bridge(data, noise, t, self.predict)
            factor = s**2 if self.predict == "score" else torch.ones_like(s)
            return x, wanted, factor.flatten()
        x, c = interpolate(self.path, data, noise, t)
        factor = weight(self.weighting, self.predict, c, self.gamma, self.sigma_data)
        return x, target(self.predict, data, noise, c), factor.flatten()


@dataclass(frozen=True)
class JointObjective:
    """One network with two outputs, velocity and score: the sum of both losses, the score's weighted by beta^2.

    Args:
        path: a Gaussian path.
        balance: factor on the score's loss, >= 0.

    Raises:
        ValueError: a path without a score; a negative balance.
    """

    path: Path
    balance: float = 1.0

    def __post_init__(self) -> None:
        require_gaussian(self.path, "a joint objective")
        if not 0 <= self.balance < float("inf"):
            raise ValueError(f"balance={self.balance} between velocity and score: finite and not negative. Use 1.")

    def check(self, shape: tuple[int, ...]) -> None:
        """Whether data of this shape can be trained on: all can."""

    def __call__(
        self, model: Callable[..., Any], data: Tensor, noise: Tensor, t: Tensor, *condition: Any, probe: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample, (B,). As `Objective`, but `model` returns a pair (velocity, score), each (B, *S)."""
        with torch.autocast(data.device.type, enabled=False):
            x, c = interpolate(self.path, data, noise, t)
            velocity, score = target("velocity", data, noise, c), target("score", data, noise, c)
        out = model(x, t.to(x), *condition)
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                f"a joint objective needs a pair (velocity, score) from the model, not {type(out).__name__}: give it two outputs."
            )
        return square_error(out[0], velocity) + self.balance * c.b.flatten() ** 2 * square_error(out[1], score)


def square_error(out: Tensor, wanted: Tensor) -> Tensor:
    """Mean square error of each sample, (B,); a ValueError where the shapes differ."""
    if out.shape != wanted.shape:
        raise ValueError(f"the model gave shape {tuple(out.shape)} for x {tuple(wanted.shape)}: a prediction has the shape of its input.")
    return (out.to(wanted.dtype) - wanted).square().flatten(1).mean(1)
