"""Implicit score matching: learn a score from points alone, without the noise that made them.

`E[tr(grad s) + |s|^2 / 2]` is `E[|s - grad log p|^2] / 2` up to a constant, by
parts (explicit score matching, one product per dimension); the trace is the
mean of `v^T (grad s) v` over random v (sliced, one product).
Source: docs/mathematics.md section 3; Hyvärinen, Estimation of Non-Normalized
Statistical Models by Score Matching, theorem 1; Song et al., Sliced Score
Matching, eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .divergence import AutodiffMode, check_exact_divergence, divergence
from .linear_path import require_gaussian
from .path import Path, interpolate


@dataclass(frozen=True)
class ScoreMatching:
    """Implicit score matching of p_t along a path, weighted by beta^2.

    Args:
        path: a Gaussian path; at its data end p_t is the data itself.
        sliced: one random product instead of one per dimension.
        mode: how products are taken, as in `divergence`.

    Raises:
        ValueError: a path whose score is not defined; an unknown mode.
    """

    path: Path
    sliced: bool = True
    mode: AutodiffMode = "reverse"

    def __post_init__(self) -> None:
        require_gaussian(self.path, "score matching")
        if self.mode not in ("forward", "reverse"):
            raise ValueError(f"mode={self.mode!r} of derivative products: choose forward or reverse.")

    def check(self, shape: tuple[int, ...]) -> None:
        """A ValueError when one sample, of this shape, has too many dimensions for the explicit trace."""
        if not self.sliced:
            check_exact_divergence(shape, "Set sliced=True.")

    def __call__(
        self, model: Callable[..., Any], data: Tensor, noise: Tensor, t: Tensor, *condition: Any, probe: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample.

        Args:
            model: `model(x, t, *condition)` -> score, (B, *S).
            data, noise, t, condition: as in `Objective`.
            probe: v, (B, *S), of mean 0 and covariance I (normal or signs);
                needed when sliced.

        Returns:
            (B,), divided by the number of dimensions; may be negative.

        Raises:
            ValueError: too many dimensions, no probe, or one of another shape.
        """
        self.check(tuple(data.shape[1:]))
        if self.sliced and probe is None:
            raise ValueError("sliced score matching got no probe: one random vector per sample, of its shape. Draw it for Purpose.PROBE.")
        with torch.autocast(data.device.type, enabled=False):
            x, c = interpolate(self.path, data, noise, t)

        def score(points: Tensor) -> Tensor:
            out: Tensor = model(points, t.to(x), *condition)
            return out.to(x.dtype)

        value, trace = divergence(score, x, probe.to(x) if probe is not None and self.sliced else None, self.mode)
        half_square = value.square().flatten(1).sum(1) / 2
        return c.b.flatten() ** 2 * (trace + half_square) / x[0].numel()
