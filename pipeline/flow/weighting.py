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
beta^2, since its target grows as 1 / beta. `likelihood` grows as 1 / b^3 on
CondOT's data prediction: combine it with a law of t that stays off t = 1.
Source: mathematics.md section 3; Kingma et al., Variational Diffusion Models,
eq. 17; Song et al., Maximum Likelihood Training of Score-Based Diffusion
Models; Hang et al., Min-SNR Weighting, eq. 6; Karras et al., table 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .parameterisation import Prediction, form
from .path import Coefficients

Weighting = Literal["none", "velocity", "likelihood", "min_snr", "edm"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def weight(name: Weighting, kind: Prediction, c: Coefficients, gamma: float = 5.0, sigma_data: float = 0.5) -> Tensor:
    """The factor on the squared error of a prediction.

    Args:
        name: one of WEIGHTINGS.
        kind: what the network predicts.
        c: coefficients, each of one shape.
        gamma: cap of the signal-to-noise ratio, for `min_snr`; > 0.
        sigma_data: standard deviation of the data, for `edm`; > 0.

    Returns:
        Of the coefficients' shape, >= 0.

    Raises:
        ValueError: an unknown weighting.
    """
    check_weighting(name, gamma, sigma_data)
    if name == "none":
        return c.b**2 if kind == "score" else torch.ones_like(c.b)
    u, w = form(kind, c)
    of_kind = c.a * w - c.b * u
    of_velocity = c.a * c.db - c.b * c.da
    if name == "velocity":
        wanted = of_velocity**2
    elif name == "likelihood":
        wanted = -c.a * of_velocity / c.b
    elif name == "min_snr":
        wanted = torch.minimum(c.a**2, gamma * c.b**2)
    else:
        wanted = (c.b**2 + c.a**2 * sigma_data**2) / sigma_data**2
    return wanted / of_kind**2


def check_weighting(name: str, gamma: float, sigma_data: float) -> None:
    """A ValueError for a weighting that is unknown or has no positive parameter."""
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting {name!r} is unknown: choose one of {', '.join(WEIGHTINGS)}.")
    if not (0 < gamma < float("inf") and 0 < sigma_data < float("inf")):
        raise ValueError(f"gamma={gamma}, sigma_data={sigma_data}: both are positive and finite. Use 5 and 0.5.")
