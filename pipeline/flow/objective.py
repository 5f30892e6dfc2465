"""Training objectives: what a network is asked for, as one loss per sample.

Conditional flow matching is the case `predict="velocity"`: its minimiser is
the marginal velocity, because the conditional and the marginal loss have the
same gradient. The other predictions give denoising score matching and the
losses of DDPM.
Source: mathematics.md section 3; Lipman et al., Theorem 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .parameterisation import Prediction, target
from .path import Path, interpolate


@dataclass(frozen=True)
class Objective:
    """Mean square error of a prediction along a path.

    A score is weighted by beta^2, since its target grows as 1 / beta.
    """

    path: Path
    predict: Prediction = "velocity"

    def __call__(self, model: Callable[..., Tensor], data: Tensor, noise: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """Loss of each sample.

        Args:
            model: `model(x, t, *condition)` -> (B, *S); x (B, *S), t (B,).
            data: z, (B, *S).
            noise: eps, (B, *S), standard normal.
            t: times, (B,), 0 to 1.
            condition: whatever else the model takes, each (B, ...).

        Returns:
            (B,), mean over the other dimensions, in at least float32 also
            under autocast.

        Raises:
            ValueError: shapes that differ, times outside [0, 1].
        """
        device = data.device.type
        with torch.autocast(device, enabled=False):
            x, c = interpolate(self.path, data, noise, t)
            wanted = target(self.predict, data, noise, c)
        out = model(x, t.to(x.dtype), *condition)
        if out.shape != wanted.shape:
            raise ValueError(f"the model gave shape {tuple(out.shape)} for x {tuple(x.shape)}: a prediction has the shape of its input.")
        error = out.to(wanted.dtype) - wanted
        if self.predict == "score":
            error = error * c.b
        return error.square().flatten(1).mean(1)
