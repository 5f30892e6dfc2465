"""Does a sample show what its caption says: does it lie nearest to the real image of that caption, among others?

The measure needs no network that knows both pictures and words: distances are
Euclidean, over pixels or over any features. It is told captions apart, not
quality: a blurred picture of the right thing is found.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

NORMAL_95 = 1.959963984540054
"""Two-sided 95 % quantile of N(0, 1)."""


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a probability seen as a share of independent trials; sensible at 0 and 1 too.

    Raises:
        ValueError: no trial, or a share that is none.

    Source: Wilson, Probable inference, the law of succession, and statistical
    inference, 1927.
    """
    if trials < 1 or not 0 <= share <= 1:
        raise ValueError(f"share={share} of trials={trials}: at least one trial, a share in 0 to 1.")
    spread = NORMAL_95**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """How often samples find their own caption's image, beside chance."""

    samples: int
    candidates: int
    """Images among which each sample looks, M."""
    top1: float
    """Share of samples that lie nearest to their own."""
    top1_interval: tuple[float, float]
    """95 %, Wilson's; for independent samples, so too narrow where a caption has several."""
    top5: float
    """Share with their own among the five nearest."""
    top5_interval: tuple[float, float]
    mean_reciprocal_rank: float
    """Mean of 1 / rank of their own; 1 at best."""

    @property
    def chance(self) -> float:
        """top1 of samples that have nothing to do with their captions."""
        return 1 / self.candidates

    @property
    def chance_of_five(self) -> float:
        """Return the top5 of guesses by chance."""
        return min(5, self.candidates) / self.candidates

    @property
    def chance_of_rank(self) -> float:
        """Return the mean_reciprocal_rank of guesses by chance."""
        return sum(1 / k for k in range(1, self.candidates + 1)) / self.candidates

    def as_dict(self) -> dict[str, Any]:
        """The results and chance."""
        chance = {"chance": self.chance, "chance_of_five": self.chance_of_five, "chance_of_rank": self.chance_of_rank}
        return {**asdict(self), **chance}

    def __str__(self) -> str:
        """Three lines under a head."""
        rows = [
            ("nearest to its own caption's image", self.top1, self.top1_interval, self.chance),
            ("its own among the nearest five", self.top5, self.top5_interval, self.chance_of_five),
        ]
        lines = [
            f"  {name:36} {share:>8.1%}   ({low:.1%} to {high:.1%})   chance {chance:.1%}" for name, share, (low, high), chance in rows
        ]
        rank = f"  {'mean reciprocal rank':36} {self.mean_reciprocal_rank:>8.3f}   chance {self.chance_of_rank:.3f}"
        return "\n".join([f"{self.samples:,} samples among {self.candidates:,} images", *lines, rank])


def retrieve(samples: Tensor, candidates: Tensor, own: Tensor) -> RetrievalResult:
    """Rank the candidates of each sample by distance.

    Candidates that are exactly as far as a sample's own (two captions with one
    picture, or samples that are all alike) share their ranks: the results are
    the means over every order of the tied, so that chance stays chance.

    Args:
        samples: images or features, (N, *S).
        candidates: of the real images, one a caption, (M, *S).
        own: index of each sample's own candidate, (N,), int64.

    Raises:
        ValueError: shapes that do not fit, fewer than two candidates, an index of none.
    """
    if samples.shape[1:] != candidates.shape[1:] or samples.ndim < 2:
        raise ValueError(f"samples {tuple(samples.shape)} and candidates {tuple(candidates.shape)}: (N, *S) and (M, *S), of one size.")
    if own.shape != (len(samples),) or not len(samples):
        raise ValueError(f"own has shape {tuple(own.shape)} for {len(samples)} samples: one index for each of at least one sample.")
    if len(candidates) < 2 or not 0 <= int(own.min()) <= int(own.max()) < len(candidates):
        raise ValueError(f"own={int(own.min())}..{int(own.max())} of {len(candidates)} candidates: at least two, and indices of them.")
    distances = torch.cdist(samples.flatten(1).double(), candidates.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")
    if not bool(torch.isfinite(distances).all()):
        raise ValueError("samples or candidates are not finite: no distance can be taken.")
    mine = distances.gather(1, own[:, None])
    nearer = (distances < mine).sum(1)
    tied = (distances == mine).sum(1)  # its own counts
    top1, top5 = (((k - nearer).clamp(min=0).minimum(tied) / tied).double().mean().item() for k in (1, 5))
    rank = torch.arange(1, len(candidates) + 1)
    among = (rank > nearer[:, None]) & (rank <= (nearer + tied)[:, None])
    return RetrievalResult(
        samples=len(samples),
        candidates=len(candidates),
        top1=top1,
        top1_interval=wilson_interval(top1, len(samples)),
        top5=top5,
        top5_interval=wilson_interval(top5, len(samples)),
        mean_reciprocal_rank=((among / rank).sum(1) / tied).double().mean().item(),
    )
