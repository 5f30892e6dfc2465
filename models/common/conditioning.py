"""Conditions: time, class, text and the original's size as a network takes them, and the null condition that stands for none."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_CHANNELS = 256
"""Channels of the sinusoidal embedding of time."""
MICRO_CONDITIONS = 6
"""Numbers of a micro-condition: height and width of the original, top and left of the crop, height and width of the image."""
TimeEmbeddingKind = Literal["diffusers", "original", "sit"]
"""How time is embedded. diffusers: of 1000 (1 - t), the last frequency 1 / 10000 itself, as its DiT has it. original: the last
frequency one step short of that, as the original DiT, SD3 and PixArt have it. sit: the same frequencies of t itself."""


def to_timestep(t: Tensor) -> Tensor:
    """The time that networks embed: `1000 (1 - t)`, 0 at the data and 1000 at the noise; any shape.

    Times in [0, 1] unscaled would make all but one channel of the embedding
    alike. It counts from the data because published networks do, so that
    weights go to and from them unchanged.
    """
    return 1000 * (1 - t)


def sinusoidal_embedding(values: Tensor, clock: TimeEmbeddingKind = "diffusers") -> Tensor:
    """Cosines, then sines, of numbers at geometric frequencies from 1 to about 1 / 10000.

    Args:
        values: (B,), such as 0 to 1000.
        clock: which frequency is the last.

    Returns:
        (B, FREQUENCIES), float32.
    """
    half = FREQUENCY_CHANNELS // 2
    steps = torch.arange(half, device=values.device, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - 1 if clock == "diffusers" else half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class EmbeddingMLP(nn.Module):
    """Two linear maps with a SiLU between, (B, inputs) -> (B, width)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.silu(self.enter(x.to(self.enter.weight.dtype))))


class TimeEmbedding(EmbeddingMLP):
    """Times, (B,), 0 (noise) to 1 (data), to (B, width)."""

    def __init__(self, width: int, clock: TimeEmbeddingKind) -> None:
        super().__init__(FREQUENCY_CHANNELS, width)
        self.clock: TimeEmbeddingKind = clock

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(sinusoidal_embedding(t if self.clock == "sit" else to_timestep(t), self.clock))


class SizeEmbedding(EmbeddingMLP):
    """Micro-conditions, (B, 6) pixels, to (B, width); each number as sinusoids.

    Source: Podell et al., SDXL, section 2.2.
    """

    def __init__(self, width: int) -> None:
        super().__init__(MICRO_CONDITIONS * FREQUENCY_CHANNELS, width)

    def forward(self, sizes: Tensor) -> Tensor:
        return super().forward(sinusoidal_embedding(sizes.flatten(), "original").view(len(sizes), -1))


class TimeAndClassEmbedding(nn.Module):
    """Time, (B,), and class, (B,) int64, embedded and added, (B, width); class `num_classes` is none."""

    def __init__(self, width: int, num_classes: int, clock: TimeEmbeddingKind) -> None:
        super().__init__()
        self.time = TimeEmbedding(width, clock)
        self.classes = nn.Embedding(num_classes + 1, width)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        return self.time(t) + self.classes(labels)


def check_text_widths(text_width: int, pooled_width: int) -> None:
    """Raises ValueError where there is no text encoder to take captions from."""
    if text_width < 1 or pooled_width < 1:
        raise ValueError(
            f"text states {text_width} wide and pooled text {pooled_width} wide: a network on text needs both. "
            f"Name an encoder in data.text_encoder, or use model.kind=dit."
        )


def require_sizes(sizes: Tensor | None) -> Tensor:
    """Raises ValueError where a network with micro-conditions gets none."""
    if sizes is None:
        raise ValueError("sizes=None: a network with model.micro_conditions takes (B, 6) sizes in pixels. Give them, or switch it off.")
    return sizes
