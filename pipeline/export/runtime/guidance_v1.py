"""Guidance as exported pipelines have it: of the network's own prediction.

It travels with exported models, written into the file of their pipeline. Licence: Apache-2.0.
Sources: Ho and Salimans, Classifier-Free Diffusion Guidance; Kynkaanniemi et al., Applying Guidance in a Limited
Interval; Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, section 3.4 (rescale).
"""

import math
from typing import NamedTuple

import torch

ROUNDING = 1e-6
"""Times come from timesteps in float32: what is so near an end is the end."""


class Guidance(NamedTuple):
    """Away from a lesser prediction: how far, between which times (0 the noise, 1 the data), and how much of the spread is undone."""

    scale: float
    first: float
    last: float
    rescale: float

    def check(self) -> None:
        """Raises ValueError for numbers that cannot be."""
        if not math.isfinite(self.scale) or not 0 <= self.first < self.last <= 1 or not 0 <= self.rescale <= 1:
            raise ValueError(
                f"guidance_scale={self.scale}, guidance_interval={self[1:3]}, guidance_rescale={self.rescale}: a finite number, "
                f"1 for none; 0 <= first < last <= 1; from 0 (off) to 1."
            )

    def holds(self, t: float) -> bool:
        """Whether guidance acts at a time, ends included; on an accelerator asking costs one wait."""
        return self.first - ROUNDING <= t <= self.last + ROUNDING

    def sharpen(self, good: torch.Tensor, lesser: torch.Tensor) -> torch.Tensor:
        """The guided prediction, (B, C, h, w); what is undone brings it back to the spread of the good one, image by image."""
        guided = torch.lerp(lesser, good, self.scale)
        if not self.rescale:
            return guided
        size = good.flatten(1).std(1) / guided.flatten(1).std(1)
        return guided * (1 + self.rescale * (size - 1)).reshape(-1, *[1] * (good.ndim - 1))
