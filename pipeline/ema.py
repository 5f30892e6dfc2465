"""The exponential moving average of the weights, on a clock of images.

Counted in images and not in steps, it does not depend on the batch size. At
first the half-life grows with the images seen, so that the random start is
forgotten.
Source: Karras et al., Analyzing and Improving the Training Dynamics of
Diffusion Models (the half-life and its ramp); Tarvainen and Valpola, Mean
teachers are better role models.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .config import EmaConfig


class Ema:
    """A second copy of a model whose weights trail the first.

    Args:
        model: the network that is trained, not wrapped for several processes.
        config: half-life and ramp.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay(self, images: int, batch: int) -> float:
        """What is kept of the average in one update.

        Args:
            images: seen so far, this batch included.
            batch: images of this step.

        Returns:
            A factor in [0, 1).
        """
        halflife = min(self.config.halflife, self.config.ramp * images) if self.config.enabled else 0.0
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, images: int, batch: int) -> None:
        """Move the average towards the weights; arguments as in `decay`."""
        average: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(average, weights, 1 - self.decay(images, batch))
