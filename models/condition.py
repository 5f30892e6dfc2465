"""Conditions: time and class as one vector a sample, and the null class that stands for none."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256
"""Channels of the sinusoidal embedding of time."""


def noise_clock(t: Tensor) -> Tensor:
    """The time that networks embed: `1000 (1 - t)`, 0 at the data and 1000 at the noise; any shape.

    Times in [0, 1] unscaled would make all but one channel of the embedding
    alike. It counts from the data because published networks do, so that
    weights go to and from them unchanged.
    """
    return 1000 * (1 - t)


def sinusoids(clock: Tensor) -> Tensor:
    """Cosines, then sines, of a clock at geometric frequencies from 1 to 1 / 10000.

    Args:
        clock: (B,), 0 to 1000.

    Returns:
        (B, FREQUENCIES), float32. The last frequency is 1 / 10000 itself, as in
        diffusers' DiT; the original DiT stops one short of it.
    """
    half = FREQUENCIES // 2
    steps = torch.arange(half, device=clock.device, dtype=torch.float32)
    angles = clock.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - 1))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeAndClass(nn.Module):
    """(t, labels) to (B, width).

    Args:
        width: of the vector.
        num_classes: labels 0 .. num_classes - 1 are classes, num_classes is none.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.enter = nn.Linear(FREQUENCIES, width)
        self.leave = nn.Linear(width, width)
        self.classes = nn.Embedding(num_classes + 1, width)
        for weight in (self.enter.weight, self.leave.weight, self.classes.weight):
            nn.init.normal_(weight, std=0.02)
        for linear in (self.enter, self.leave):
            nn.init.zeros_(linear.bias)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        embedding = sinusoids(noise_clock(t)).to(self.enter.weight.dtype)
        return self.leave(F.silu(self.enter(embedding))) + self.classes(labels)


def drop(labels: Tensor, chance: Tensor, *, null: int, probability: float) -> Tensor:
    """Train some samples without their class: the null class replaces theirs where `chance < probability`.

    Args:
        labels: (B,); a negative one, which a sample without class has, becomes null too.
        chance: (B,), uniform in (0, 1), one number per sample.
        null: the label that stands for none.
        probability: of dropping, 0 to 1.
    """
    return torch.where((chance < probability) | (labels < 0), torch.full_like(labels, null), labels)
