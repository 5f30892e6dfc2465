"""Classifier-free guidance: from a conditional and an unconditional field, a sharper one.

`u = u_null + w (u_cond - u_null)` on all channels. w = 1 is no guidance and
w = 0 drops the condition; both need one evaluation, every other w one
evaluation of a batch of 2 B.
Source: Ho and Salimans, Classifier-Free Diffusion Guidance, eq. 6, with w
counted so that 1 means none; mathematics.md section 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
ConditionalField = Callable[[Tensor, Tensor, Tensor], Tensor]


def guide(field: ConditionalField, condition: Tensor, null: Tensor, scale: float) -> Field:
    """Bind a condition to a field, guided.

    Args:
        field: `field(x, t, condition)` -> (B, *S).
        condition: (B, ...), one per sample.
        null: (B, ...), the condition that stands for none.
        scale: w above; 1 is the conditional field itself.

    Returns:
        A field of (x, t).

    Raises:
        ValueError: conditions of different shapes, or a scale that is not finite.
    """
    if condition.shape != null.shape:
        raise ValueError(f"condition {tuple(condition.shape)} and null {tuple(null.shape)} differ: give one null condition per sample.")
    if not abs(scale) < float("inf"):
        raise ValueError(f"guidance_scale={scale} is not finite: use 1 for none, 1.5 to 5 as a rule.")
    if scale == 1:
        return lambda x, t: field(x, t, condition)
    if scale == 0:
        return lambda x, t: field(x, t, null)
    both = torch.cat([condition, null])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = field(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return guided
