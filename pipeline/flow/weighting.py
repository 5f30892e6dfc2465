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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condot.core.registry import Registry

from .parameterisation import Prediction, prediction_coefficients
from .path import Coefficients


class Weighting(Protocol):
    """A factor on the squared error of a prediction, as a function of time."""

    def __call__(self, prediction_type: Prediction, c: Coefficients) -> Tensor:
        """Return the factor, >= 0, of the coefficients' shape; infinite where the limit is.

        Args:
            prediction_type: what the network predicts; a score's error is asked for as b^2 times that of the noise.
            c: coefficients, each of one shape.
        """
        ...


def from_data_error(data_weight: Tensor, prediction_type: Prediction, c: Coefficients) -> Tensor:
    """Return the factor on a prediction's squared error that is `W` on that of the data prediction; `data_weight` is `W b^2`.

    Any weighting of one's own is this line: not a number where D_p = 0, unless it takes the limit there.
    """
    if prediction_type == "score":
        return c.b**2 * from_data_error(data_weight, "noise", c)
    return data_weight / _determinant(prediction_type, c) ** 2


@dataclass(frozen=True)
class Unweighted:
    """The prediction's own error, a score's times beta^2."""

    def __call__(self, prediction_type: Prediction, c: Coefficients) -> Tensor:
        return c.b**2 if prediction_type == "score" else torch.ones_like(c.b)


@dataclass(frozen=True)
class VelocityWeighting:
    """The error as an error of the velocity."""

    def __call__(self, prediction_type: Prediction, c: Coefficients) -> Tensor:
        if prediction_type == "velocity":
            return torch.ones_like(c.b)
        return from_data_error((c.a * c.db - c.b * c.da) ** 2, prediction_type, c)


@dataclass(frozen=True)
class LikelihoodWeighting:
    """A bound of the negative log-likelihood, in nats, where t is uniform."""

    def __call__(self, prediction_type: Prediction, c: Coefficients) -> Tensor:
        velocity_determinant = c.a * c.db - c.b * c.da
        if prediction_type == "score":  # the noise times -1 / b: so formed, nothing is divided by b
            return -c.b * velocity_determinant / c.a
        return torch.where(c.b > 0, -c.a * velocity_determinant / c.b / _determinant(prediction_type, c) ** 2, torch.inf)


@dataclass(frozen=True)
class MinSNR:
    """The signal-to-noise ratio, but not above gamma."""

    gamma: float = 5.0  # signal-to-noise ratio at which the weight is capped

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise ValueError(f"gamma={self.gamma} of the weighting min_snr: positive and finite. Use 5.")

    def __call__(self, prediction_type: Prediction, c: Coefficients) -> Tensor:
        if prediction_type == "score":
            return c.b**2 * self("noise", c)
        determinant = _determinant(prediction_type, c)
        limit = self.gamma if prediction_type == "data" else 1.0  # min(SNR, gamma) at b = 0, min(1, gamma / SNR) at a = 0
        return torch.where(determinant == 0, limit, torch.minimum(c.a**2, self.gamma * c.b**2) / determinant**2)


@dataclass(frozen=True)
class EDMWeighting:
    """One at every level for a network that is scaled the Karras way."""

    sigma_data: float = 0.5  # standard deviation of the data

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"sigma_data={self.sigma_data} of the weighting edm: positive and finite. Use 0.5.")

    def __call__(self, prediction_type: Prediction, c: Coefficients) -> Tensor:
        return from_data_error((c.b**2 + c.a**2 * self.sigma_data**2) / self.sigma_data**2, prediction_type, c)


WEIGHTINGS: Registry[Callable[..., Weighting]] = Registry(
    "weighting",
    {
        "none": Unweighted,
        "velocity": VelocityWeighting,
        "likelihood": LikelihoodWeighting,
        "min_snr": MinSNR,
        "edm": EDMWeighting,
    },
)
"""Every weighting that a recipe can name; the fields of its dataclass are its options."""


def build_weighting(weighting: str | Weighting, gamma: float = 5.0, sigma_data: float = 0.5) -> Weighting:
    """Return a weighting by its name, or one that is built already.

    Args:
        weighting: one of WEIGHTINGS, or the thing itself.
        gamma: cap of the signal-to-noise ratio, for `min_snr`; > 0.
        sigma_data: standard deviation of the data, for `edm`; > 0.

    Raises:
        ValueError: an unknown name, parameters that are not positive and finite.
    """
    if not isinstance(weighting, str):
        return weighting
    if not (0 < gamma < float("inf") and 0 < sigma_data < float("inf")):
        raise ValueError(f"gamma={gamma}, sigma_data={sigma_data}: both are positive and finite. Use 5 and 0.5.")
    given = {"min_snr": {"gamma": gamma}, "edm": {"sigma_data": sigma_data}}.get(weighting, {})
    return WEIGHTINGS.lookup(weighting)(**given)


def weight(weighting: str | Weighting, prediction_type: Prediction, c: Coefficients, gamma: float = 5.0, sigma_data: float = 0.5) -> Tensor:
    """Return the factor on the squared error of a prediction.

    Args:
        weighting: one of WEIGHTINGS, or the thing itself.
        prediction_type: what the network predicts.
        c: coefficients, each of one shape.
        gamma, sigma_data: as in `build_weighting`.

    Returns:
        Of the coefficients' shape, >= 0; infinite where the limit is. Not a
        number only where b = 0 and its derivative is infinite (VP at t = 1),
        for a velocity or a score.

    Raises:
        ValueError: as `build_weighting`.
    """
    return build_weighting(weighting, gamma, sigma_data)(prediction_type, c)


def _determinant(prediction_type: Prediction, c: Coefficients) -> Tensor:
    """Return `D_p = a w - b u`."""
    u, w = prediction_coefficients(prediction_type, c)
    return c.a * w - c.b * u
