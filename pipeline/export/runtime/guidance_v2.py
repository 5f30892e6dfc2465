"""Guidance as exported pipelines have it: of the network's own prediction, plain, projected or scaled, and its spread brought back.

It travels with exported models, written into the file of their pipeline. Licence: Apache-2.0.
Sources: Ho and Salimans, Classifier-Free Diffusion Guidance; Kynkaanniemi et al., Applying Guidance in a Limited
Interval; Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, section 3.4 (rescale); Sadat et al.,
Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models, algorithm 1 (APG); Fan et al.,
CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, algorithm 1.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch

SLACK = 1e-6
"""Times come from timesteps in float32: what is so near an end is the end."""
NOTHING = 1e-5
"""A guided prediction whose spread is so small a share of the good one's is the rounding of zero."""
GUIDANCE = ("cfg", "apg", "cfg_zero_star")
VELOCITIES = ("velocity", "flow_prediction")
"""Predictions that CFG-Zero* is made for."""


class Guidance(NamedTuple):
    """Away from a lesser prediction: how far, between which times (0 the noise, 1 the data), how much of the spread is undone, and how."""

    scale: float
    interval: Any = (0.0, 1.0)
    rescale: float = 0.0
    kind: str = "cfg"
    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0
    zero_init_steps: int = 0

    def check(self, prediction_type: str, steps: int) -> None:
        """Raise ValueError for numbers that cannot be, or that have no effect beside the others."""
        apg, said = self[4:7], f"guidance_scale={self.scale!r}, guidance_interval={self.interval!r}, guidance_rescale={self.rescale!r}"
        ends = tuple(self.interval) if hasattr(self.interval, "__len__") and len(self.interval) == 2 else (None, None)
        if not all(isinstance(number, Real) and not isinstance(number, bool) for number in (self.scale, *ends, self.rescale, *apg)):
            raise ValueError(f"{said}, apg_eta, apg_norm_threshold, apg_momentum={apg}: give numbers, two for the interval.")
        if not math.isfinite(self.scale) or not 0 <= ends[0] < ends[1] <= 1 or not 0 <= self.rescale <= 1:
            raise ValueError(f"{said}: a finite number, 1 for none; 0 <= first < last <= 1; from 0 (off) to 1.")
        if self.kind not in GUIDANCE:
            raise ValueError(f"guidance={self.kind!r} is unknown: choose one of {', '.join(GUIDANCE)}.")
        if self.kind != "cfg" and self.scale == 1:
            raise ValueError(f"guidance={self.kind!r} beside guidance_scale=1, which is none: give a guidance_scale such as 3.")
        if self.kind != "apg" and any(apg):
            raise ValueError(f"apg_eta, apg_norm_threshold, apg_momentum={apg} beside guidance={self.kind!r}: give guidance='apg'.")
        if not math.isfinite(self.eta) or not 0 <= self.norm_threshold < math.inf or not -1 < self.momentum < 1:
            raise ValueError(
                f"apg_eta, apg_norm_threshold, apg_momentum={apg}: finite; 0 (off) or more, finite; between -1 and 1. Use 0, 0, -0.5."
            )
        if self.zero_init_steps and self.kind != "cfg_zero_star":
            raise ValueError(f"zero_init_steps={self.zero_init_steps} beside guidance={self.kind!r}: give guidance='cfg_zero_star'.")
        if not 0 <= self.zero_init_steps < steps:
            raise ValueError(f"zero_init_steps={self.zero_init_steps} of {steps} steps: from 0 (off) to fewer than all.")
        if self.kind == "cfg_zero_star" and prediction_type not in VELOCITIES:
            raise ValueError(
                f"guidance='cfg_zero_star' is made for velocities, and the network predicts {prediction_type}: use cfg or apg."
            )

    def holds(self, t: float) -> bool:
        """Return whether guidance acts at a time, ends included; on an accelerator asking costs one wait."""
        return self.interval[0] - SLACK <= t <= self.interval[1] + SLACK


class Guide:
    """What guides one call: it keeps the direction of the last evaluation, for the momentum of APG.

    Args:
        guidance: how.
    """

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self._direction: Any = None

    def sharpen(self, good: torch.Tensor, lesser: torch.Tensor, x: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the guided prediction, (B, C, h, w), computed in float32 at least.

        Args:
            good, lesser: the network's predictions with the condition and without, (B, C, h, w).
            x: the point that it saw, (B, C, h, w).
            data: numbers p and q of the time at which the data prediction is p x + q times the network's.
        """
        how, kept = self.guidance, good.dtype
        good, lesser, x = (part.to(torch.promote_types(kept, torch.float32)) for part in (good, lesser, x))
        if how.kind == "apg":
            p, q = data
            found, around = p * x + q * good, q * (good - lesser)
            update, self._direction = normalized_guidance(found, around, self._direction, how.eta, how.norm_threshold, how.momentum)
            guided = good + (how.scale - 1) / q * update if q else good
        elif how.kind == "cfg_zero_star":
            lesser = cfg_zero_star_scale(good, lesser) * lesser
            guided = lesser + how.scale * (good - lesser)
        else:
            guided = torch.lerp(lesser, good, how.scale)
        return rescale_noise_cfg(guided, good, how.rescale).to(kept)


def rescale_noise_cfg(guided: torch.Tensor, good: torch.Tensor, share: float) -> torch.Tensor:
    """Return the guided prediction, (B, ...), a share of it brought back to the standard deviation of the good one, sample by sample.

    A guided prediction without any spread, but for rounding, stays as it is.
    """
    if not share:
        return guided
    wide = (-1, *[1] * (good.ndim - 1))
    wanted, found = good.flatten(1).std(1), guided.flatten(1).std(1)
    ratio = torch.where(found > NOTHING * wanted, wanted / found, 1.0)  # also 1 where either is not a number
    return guided * (1 + share * (ratio - 1)).reshape(wide)


def normalized_guidance(
    good: torch.Tensor, difference: torch.Tensor, before: Any, eta: float, norm_threshold: float, momentum: float
) -> Any:
    """Return APG's direction, (B, ...), and what to pass as `before` next time.

    Args:
        good: the data prediction with the condition, (B, ...).
        difference: so far it lies from the one without.
        before: what the last evaluation returned; None at the first.
        eta: factor on the part parallel to `good`, which is what oversaturates.
        norm_threshold: the direction is at most so long, sample by sample; 0 for no bound.
        momentum: factor on the last direction; negative to push away from it.
    """
    whole = difference if before is None or not momentum else difference + momentum * before
    flat, towards = whole.flatten(1), good.flatten(1)
    if norm_threshold:
        flat = flat * (norm_threshold / flat.norm(dim=1, keepdim=True)).clamp(max=1)
    towards = torch.nn.functional.normalize(towards, dim=1)
    parallel = (flat * towards).sum(1, keepdim=True) * towards
    return (flat + (eta - 1) * parallel).reshape(whole.shape), whole


def cfg_zero_star_scale(good: torch.Tensor, lesser: torch.Tensor) -> torch.Tensor:
    """Return the factor, (B, 1, ...), by which a lesser velocity, (B, ...), comes nearest to the good one; 0 of one that is zero."""
    dot, square = (good * lesser).flatten(1).sum(1), lesser.flatten(1).square().sum(1)
    return torch.where(square > 0, dot / square, 0.0).reshape(-1, *[1] * (good.ndim - 1))
