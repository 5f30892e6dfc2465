"""Captions on their way into a network: encoded before or now, some of them dropped, several encoders joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from condot.core.text_states import TextStates

from ..encoders.fingerprint import fingerprint_differences
from ..encoders.text import TextEncoder, encode_captions
from ..encoders.text_states import TextFacts, concat_text_states, drop_captions, text_layout
from .batch import Batch
from .build import EncodedCache


class TextConditioner:
    """The frozen text encoders of a run.

    Args:
        facts: of each encoder, in the recipe's order; at least one.
        device: to compute on.
        cached: what was encoded before, of each encoder; none encodes every batch's captions now.

    Raises:
        ValueError: encoders that cannot stand together, or cannot be loaded.
    """

    def __init__(self, facts: Sequence[TextFacts], device: torch.device | str = "cpu", cached: Sequence[EncodedCache] = ()) -> None:
        self.facts, self.device, self.cached = tuple(facts), device, tuple(cached)
        self.layout = text_layout(self.facts)
        self.encoders = len(self.facts)

    @cached_property
    def networks(self) -> tuple[TextEncoder, ...]:
        """The encoders themselves, loaded when the first caption comes."""
        return tuple(TextEncoder(one.name, self.device, max_tokens=one.max_tokens, padding=one.padding) for one in self.facts)

    @cached_property
    def nulls(self) -> tuple[TextStates, ...]:
        """Each encoder's encoding of "", one row."""
        found = [one.null for one in (self.cached or self.networks)]
        return tuple(null.to(self.device, torch.float32) for null in found if null is not None)

    @property
    def null(self) -> TextStates:
        """The text states that a network gets where there is no caption, one row."""
        return concat_text_states(self.nulls, self.layout)

    @property
    def truncated(self) -> int:
        """Captions of which an encoder read only the beginning, of all that were encoded now."""
        return 0 if self.cached else sum(one.truncated for one in self.networks)

    def check(self, fingerprints: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError unless these are the encoders' own."""
        for number, (one, wanted) in enumerate(zip(self.facts, fingerprints, strict=True)):
            if one.fingerprint != wanted:
                raise ValueError(
                    f"data.text_encoder={one.name!r} is another encoder than number {number} of the run: "
                    f"{'; '.join(fingerprint_differences(wanted, one.fingerprint, 'its'))}. Give the one that the model was trained with."
                )

    def read(self, captions: Sequence[str]) -> TextStates:
        """Captions as a network takes them."""
        return concat_text_states(encode_captions(self.networks, captions), self.layout)

    def build_condition(self, batch: Batch, drop_all: Tensor, drop_encoders: Tensor) -> TextStates:
        """The captions of a micro-batch, some dropped: arguments as in `concat_text_states.drop_captions`."""
        parts = batch.text or encode_captions(self.networks, batch.captions)
        return concat_text_states(
            drop_captions([part.to(self.device, torch.float32) for part in parts], self.nulls, drop_all, drop_encoders), self.layout
        )
