"""diffusers' words in ours: its timesteps, labels and captions as our networks take them."""

from __future__ import annotations

import torch
from torch import Tensor

from condot.core.text_states import TextStates


def time_from_timestep(timestep: Tensor | float, sample: Tensor) -> Tensor:
    """The time of each sample, 0 (noise) to 1 (data), from diffusers' timesteps, 1000 (noise) to 0 (data): 1 - timestep / 1000.

    In float64, from which networks that embed 1000 (1 - t) get the timestep back to 1e-13; in float32, as on MPS, to 6e-5.

    Args:
        timestep: one for all, or (B,); whole or not.
        sample: (B, ...), for its device.

    Returns:
        (B,).
    """
    wide = torch.float32 if sample.device.type == "mps" else torch.float64
    steps = torch.as_tensor(timestep, device=sample.device, dtype=wide)
    return (1 - steps / 1000).reshape(-1).expand(len(sample))


def clamp_labels(class_labels: Tensor | None, sample: Tensor, num_classes: int) -> Tensor:
    """Labels, (B,), where every number from `num_classes` on is no class, as DiTPipeline's 1000; so is None."""
    if class_labels is None:
        return torch.full((len(sample),), num_classes, device=sample.device)
    return class_labels.to(sample.device).clamp(max=num_classes)


def text_condition(states: Tensor, mask: Tensor | None, pooled: Tensor | None, pooled_width: int) -> TextStates:
    """Return captions as our networks take them.

    Args:
        states: (B, L, D), of each token.
        mask: (B, L), other than 0 where there is a token, at least one a caption; None for everywhere.
        pooled: (B, P), of the whole caption; None for zeros, where it is not looked at.
        pooled_width: P.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is not None and mask.shape != states.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask {tuple(mask.shape)} for {tuple(states.shape[:2])} tokens: it is (batch, tokens), 0 at padding."
        )
    pooled = states.new_zeros(len(states), pooled_width) if pooled is None else pooled
    return TextStates(states, None if mask is None else mask != 0, pooled)
