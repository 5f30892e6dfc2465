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
import math

import torch
from torch import Tensor, nn

from .config import EmaConfig

SAME = 0.05
"""A decay is written with few digits: half-lives so near are one."""


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
        halflife = min(self.config.halflife[0], self.config.ramp * images) if self.config.enabled else 0.0
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, images: int, batch: int) -> None:
        """Move the average towards the weights; arguments as in `decay`."""
        average: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(average, weights, 1 - self.decay(images, batch))


def check_average(asked: str, config: EmaConfig, batch_size: int) -> bool:
    """Whether an average is asked for, and not the weights as they were trained.

    Args:
        asked: `raw`; a half-life in images; or a decay a step, below 1, which is 0.5 ** (batch size / half-life). "" is the run's.
        config: what the run keeps.
        batch_size: images of a step.

    Raises:
        ValueError: an average that the run did not keep.
    """
    if asked in ("", "raw"):
        return asked != "raw"
    try:
        number = float(asked)
    except ValueError:
        raise ValueError(f"--ema {asked!r} is none: give a half-life in images, a decay a step such as 0.9999, or raw.") from None
    halflife = -batch_size * math.log(2) / math.log(number) if 0 < number < 1 else number
    if not config.enabled or abs(halflife / config.halflife[0] - 1) > SAME:
        decay = 0.5 ** (batch_size / config.halflife[0])
        kept = f"one average, of half-life {config.halflife[0]:g} images (decay {decay:.6g} a step)" if config.enabled else "no average"
        raise ValueError(f"--ema {asked}: a half-life of {halflife:.4g} images, and the run kept {kept}. Leave --ema out for what it kept.")
    return True
