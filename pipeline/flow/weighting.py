"""Weightings: how much an error counts at each time, whatever the network predicts.

An error `d` in the data prediction is an error `-(D_p / b) d` in a prediction
p = u z + w eps, with `D_p = a w - b u`. So a weight W on |d|^2 is the weight
`W b^2 / D_p^2` on the squared error of p, and one formula per weighting serves
every prediction. W b^2 is:

    velocity     D_v^2, D_v = a db - b da          the error as an error of the velocity
    likelihood   -a D_v / b = b^2 SNR'(t) / 2      bounds the negative log-likelihood, nats, t uniform
    min_snr      min(a^2, gamma b^2)               SNR, but not above gamma
    edm          (b^2 + a^2 s^2) / s^2             one at every level for a Karras network, s = sigma_data

`none` counts the prediction's own error, except a score's, which it weights by
beta^2, since its target grows as 1 / beta. At the ends, b = 0 or a = 0, each
weight is its limit. Some limits are infinite: `likelihood` grows as 1 / b^3 on
CondOT's data prediction, and goes with a timestep distribution that stays off t = 1 only
(`infinite_loss_times` of objective.py says so for a loss).
Source: docs/mathematics.md section 3; Kingma et al., Variational Diffusion Models,
eq. 17; Song et al., Maximum Likelihood Training of Score-Based Diffusion
Models; Hang et al., Min-SNR Weighting, eq. 6; Karras et al., table 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .parameterisation import Prediction, prediction_coefficients
from .path import Coefficients

Weighting = Literal["none", "velocity", "likelihood", "min_snr", "edm"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def weight(name: Weighting, prediction_type: Prediction, c: Coefficients, gamma: float = 5.0, sigma_data: float = 0.5) -> Tensor:
    """Return the factor on the squared error of a prediction.

    Args:
        name: one of WEIGHTINGS.
        prediction_type: what the network predicts.
        c: coefficients, each of one shape.
        gamma: cap of the signal-to-noise ratio, for `min_snr`; > 0.
        sigma_data: standard deviation of the data, for `edm`; > 0.

    Returns:
        Of the coefficients' shape, >= 0; infinite where the limit is. Not a
        number only where b = 0 and its derivative is infinite (VP at t = 1),
        for a velocity or a score.

    Raises:
        ValueError: an unknown weighting.
    """
    check_weighting(name, gamma, sigma_data)
    if name == "none":
        return c.b**2 if prediction_type == "score" else torch.ones_like(c.b)
    velocity_determinant = c.a * c.db - c.b * c.da
    if prediction_type == "score":  # the noise times -1 / b: so formed, nothing is divided by b
        return -c.b * velocity_determinant / c.a if name == "likelihood" else c.b**2 * weight(name, "noise", c, gamma, sigma_data)
    u, w = prediction_coefficients(prediction_type, c)
    determinant = c.a * w - c.b * u
    if name == "velocity":
        return torch.ones_like(c.b) if prediction_type == "velocity" else velocity_determinant**2 / determinant**2
    if name == "likelihood":
        return torch.where(c.b > 0, -c.a * velocity_determinant / c.b / determinant**2, torch.inf)
    if name == "edm":
        return (c.b**2 + c.a**2 * sigma_data**2) / sigma_data**2 / determinant**2
    limit = gamma if prediction_type == "data" else 1.0  # min(SNR, gamma) at b = 0, min(1, gamma / SNR) at a = 0
    return torch.where(determinant == 0, limit, torch.minimum(c.a**2, gamma * c.b**2) / determinant**2)


def check_weighting(name: str, gamma: float, sigma_data: float) -> None:
    """A ValueError for a weighting that is unknown or has no positive parameter."""
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting {name!r} is unknown: choose one of {', '.join(WEIGHTINGS)}.")
    if not (0 < gamma < float("inf") and 0 < sigma_data < float("inf")):
        raise ValueError(f"gamma={gamma}, sigma_data={sigma_data}: both are positive and finite. Use 5 and 0.5.")
