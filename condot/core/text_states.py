"""What a caption has become on its way into a network: encoders make it, caches keep it, networks take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TextStates(NamedTuple):
    """Captions as a text encoder, or several side by side, see them.

    What travels with exports has a class of its own (`captions_v1.Captions`), which must load without
    this package; `pipeline/flow` takes any tuple of tensors.
    """

    states: Tensor
    """(B, L, D), of each token; zero behind a caption's end."""
    mask: Tensor | None
    """(B, L), bool: where there is a token; at least one a caption. None for everywhere, as stock pipelines without a mask give it."""
    pooled: Tensor
    """(B, P), of the whole caption."""

    @property
    def token_mask(self) -> Tensor:
        """The mask, (B, L), also where it hides nothing."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask; None where it hides nothing and asking costs nothing: a device would have to be waited for."""
        if self.mask is None:
            return None
        free = self.mask.device.type == "cpu" and not torch.compiler.is_compiling()
        return None if free and bool(self.mask.all()) else self.mask

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextStates:
        """Return the captions elsewhere, or in another precision; the mask stays bool."""
        states, pooled = (part.to(device=device, dtype=dtype, non_blocking=True) for part in (self.states, self.pooled))
        mask = None if self.mask is None else self.mask.to(device=device, non_blocking=True)
        return TextStates(states, mask, pooled)
