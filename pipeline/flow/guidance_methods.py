"""Guidance methods: what becomes of a prediction and a reference one, sample by sample, each in one function.

With the conditional prediction c, the reference one u and w counted so that 1
means no guidance:

    CFG          g = u + w (c - u)
    CFG-Zero*    g = s u + w (c - s u),  s = <c, u> / |u|^2
    APG          g = c + (w - 1) (d - p + eta p),  d = c - u, p its part along c, on data predictions
    rescale      g (1 + r (std(c) / std(g) - 1)), after any of them

`guidance` binds them to fields; velocities come in the affine form of their
network's prediction, so that nothing is divided by what vanishes at an end.
Source: Fan et al., CFG-Zero*, eq. 7 and section 4.2; Sadat et al., Eliminating
Oversaturation and Artifacts of High Guidance Scales in Diffusion Models,
algorithm 1; Lin et al., Common Diffusion Noise Schedules and Sample Steps are
Flawed, section 3.4. All three are those of diffusers, with two differences:
APG starts at c (diffusers by default at u), and a field of zeros stays finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ZERO_STD_RATIO = 1e-5
"""A guided prediction whose deviation is so small a share of the conditional one's is zero, and rounding."""


@dataclass(frozen=True, kw_only=True)
class APG:
    """Adaptive projected guidance, on the data prediction.

    Args:
        eta: share kept of what the guidance adds along the conditional data
            prediction, which saturates images; 1 keeps all, 0, the paper's, none.
        norm_threshold: longest difference of data predictions of one sample,
            data units, Euclidean; 0 for no limit. The paper has 2.5 to 15.
        momentum: share of earlier differences that is added to each; negative
            to turn away from them (the paper has -0.5 and -0.75), in (-1, 1).

    Raises:
        ValueError: a number out of its range.
    """

    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta) or not 0 <= self.norm_threshold < math.inf or not -1 < self.momentum < 1:
            raise ValueError(
                f"apg_eta={self.eta}, apg_norm_threshold={self.norm_threshold}, apg_momentum={self.momentum}: a finite number; "
                f"not negative, 0 for no limit; between -1 and 1. Use 0, 0 and -0.5."
            )


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar:
    """CFG-Zero*: guidance away from the best multiple of the reference prediction, after a start that stands still.

    Args:
        zero_until: the field is zero at times before this one, 0 to 1: the
            time that the first steps end at (the paper: 4 % of the steps).

    Raises:
        ValueError: a time outside [0, 1).
    """

    zero_until: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.zero_until < 1:
            raise ValueError(f"zero_until={self.zero_until} of CFG-Zero*: a time from 0 to below 1, t = 0 noise. Use 0.04.")


def rescale_factor(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Return what brings a guided prediction back to the conditional one's standard deviation, (B, 1, ..., 1).

    Args:
        guided, conditional: predictions of one kind, (B, *S).
        share: of the way, 0 to 1.

    Returns:
        1 where the guided one has no deviation but for rounding, or is one value: nothing there can be scaled.
    """
    if guided[0].numel() < 2:
        return torch.ones(len(guided), *[1] * (guided.ndim - 1), device=guided.device, dtype=guided.dtype)
    variances = [part.flatten(1).var(1) for part in (guided, conditional)]
    # a square root has no gradient at 0, and where() passes the NaN of a branch that it does not take
    guided_std, conditional_std = (torch.where(v > 0, torch.where(v > 0, v, 1).sqrt(), 0) for v in variances)
    known = guided_std > ZERO_STD_RATIO * conditional_std
    ratio = torch.where(known, conditional_std / torch.where(known, guided_std, 1), 1)
    return (1 + share * (ratio - 1)).reshape(-1, *[1] * (guided.ndim - 1))


def cfg_zero_star_scale(conditional: Tensor, reference: Tensor) -> Tensor:
    """Return CFG-Zero*'s `s = <c, u> / |u|^2`, the multiple of u nearest to c, (B, 1, ..., 1); 0 where u is 0."""
    square = _dot(reference, reference)
    return torch.where(square > 0, _dot(conditional, reference) / torch.where(square > 0, square, 1), 0)


def project_difference(difference: Tensor, data: Tensor, method: APG, unit: Tensor | float = 1.0) -> Tensor:
    """Return the difference that APG guides by: limited, and without (1 - eta) of its part along the data prediction.

    Args:
        difference: d, momentum included, (B, *S), in any units proportional to data.
        data: the conditional data prediction up to a factor, (B, *S).
        method: eta and the norm's limit.
        unit: data units in one of `difference`'s, (B, 1, ..., 1).
    """
    if method.norm_threshold:
        size = torch.sqrt(_dot(difference, difference))
        size = torch.where(size > 0, size * torch.as_tensor(unit).abs(), 0)  # a unit may be infinite where nothing differs
        difference = difference * (method.norm_threshold / size.clamp(min=method.norm_threshold))
    square = _dot(data, data)
    along = torch.where(square > 0, _dot(difference, data) / torch.where(square > 0, square, 1), 0)
    return difference + (method.eta - 1) * along * data


@dataclass(eq=False)
class Momentum:
    """The running sum `d + momentum * before` of the differences of one solve, data units, one for each output of the network.

    It counts evaluations, not steps. A time that falls, or another number of
    samples, begins a new solve.
    """

    share: float
    _previous: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, output: int, difference: Tensor, unit: Tensor, t: Tensor, inside: Tensor | None) -> Tensor:
        """Return the difference with its momentum, in its own units.

        Args:
            output: number of the network's output, 0 or 1.
            difference: (B, *S).
            unit: data units in one of its units, (B, 1, ..., 1); where it is 0 the past has no measure there and is left out.
            t: times, (B,).
            inside: which samples are guided, (B,), whose sum alone moves; None for all.
        """
        if not self.share:
            return difference
        wide = (-1, *[1] * (difference.ndim - 1))
        before, last = self._previous.get(output, (None, None))
        if before is None or last is None or before.shape != difference.shape:
            before, last = torch.zeros_like(difference), t
        before = torch.where((t < last).reshape(wide), 0, before)
        known = (unit != 0) & unit.isfinite()
        total = difference + self.share * torch.where(known, before / torch.where(known, unit, 1), 0)
        now = torch.where(known, total * torch.where(known, unit, 1), 0)
        self._previous[output] = ((now if inside is None else torch.where(inside.reshape(wide), now, before)).detach(), t)
        return total


def _dot(p: Tensor, q: Tensor) -> Tensor:
    return (p * q).flatten(1).sum(1).reshape(-1, *[1] * (p.ndim - 1))
