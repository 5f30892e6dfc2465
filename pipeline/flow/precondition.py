"""Karras preconditioning: a network whose input, output and error all have unit size.

EDM wraps its network F as `D(x; sigma) = c_skip x + c_out F(c_in x)` to predict
data on the path alpha = 1. Every Gaussian path is that one at sigma = b / a
after x -> x / a; written through, with var = a^2 s^2 + b^2 and s = sigma_data,

    D(x, t) = (a s^2 / var) x + (b s / sqrt(var)) F(x / sqrt(var), t)

which stays regular at a = 0 and b = 0.
Source: Karras et al., Elucidating the Design Space of Diffusion-Based
Generative Models, eq. 7 and table 1. One deviation: F is told t, as all our
networks are, and not log(sigma) / 4; on the EDM path t is a function of sigma
that spreads the levels as the sampling grid does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .path import Path, widen


def precondition(model: Callable[..., Tensor], path: Path, sigma_data: float = 0.5) -> Callable[..., Tensor]:
    """Wrap a network so that it predicts data, the Karras way.

    Train it with `Objective(path, "data", "edm")`: then F sees an unweighted
    loss of unit size at every level.

    Args:
        model: F, `model(x, t, *condition)` -> (B, *S).
        path: a Gaussian path.
        sigma_data: standard deviation of the data, data units; > 0.

    Returns:
        `data_prediction(x, t, *condition)` -> (B, *S), at least float32.

    Raises:
        ValueError: a sigma_data that is not positive and finite.
    """
    if not 0 < sigma_data < float("inf"):
        raise ValueError(
            f"sigma_data={sigma_data}: the data's standard deviation is positive and finite. Measure it; 0.5 for images in [-1, 1]."
        )

    def data_prediction(x: Tensor, t: Tensor, *condition: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            c = path(widen(t, x))
            variance = (c.a * sigma_data) ** 2 + c.b**2
            skip, size = c.a * sigma_data**2 / variance, torch.rsqrt(variance)
            scaled = size * x
        out = model(scaled.to(torch.promote_types(x.dtype, torch.float32)), t, *condition)  # t may be wider than x
        return skip * x + c.b * sigma_data * size * out.to(scaled.dtype)

    return data_prediction
