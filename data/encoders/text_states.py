"""Captions as tensors: what each text encoder gives, how several stand together before a network, and how they are dropped.

The order of tokens and channels is Stable Diffusion 3's: CLIP encoders that
follow one another side by side in channels, every other encoder's tokens
behind, all as wide as the widest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condot.core.text_states import TextStates

TOKEN_MULTIPLE = 16
"""Masked captions are padded to a multiple of so many tokens: few shapes, and little beyond the longest."""


@dataclass(frozen=True)
class TextFacts:
    """What a text encoder's files say of it; its weights are hashed and no network is built."""

    name: str
    fingerprint: dict[str, Any]
    width: int
    """Of a token's state."""
    pooled_width: int
    kind: Literal["clip", "other"]
    max_tokens: int
    """Longer captions are cut to so many tokens, special ones included."""
    padding: str
    """mask or attend."""


@dataclass(frozen=True)
class TextLayout:
    """Where the parts of several encoders stand."""

    width: int
    """Channels of a token."""
    pooled_width: int
    tokens: int
    """At most, of a caption."""
    groups: tuple[tuple[int, ...], ...]
    """Encoders by number: those of one run stand side by side in channels, the runs one behind the other."""
    pooled_from: tuple[int, ...]
    """The encoders whose pooled vectors count."""


def text_layout(facts: Sequence[TextFacts]) -> TextLayout:
    """Return how the states of several encoders stand beside one another, in the recipe's order.

    Raises:
        ValueError: no encoder; CLIP encoders side by side that read different numbers of tokens.
    """
    if not facts:
        raise ValueError("data.text_encoder is empty: name the encoder of the captions, or several.")
    groups: list[list[int]] = []
    for number, one in enumerate(facts):
        if groups and one.kind == "clip" == facts[number - 1].kind:
            groups[-1].append(number)
        else:
            groups.append([number])
    for group in groups:
        read = [facts[number].max_tokens for number in group]
        if len(set(read)) > 1:
            raise ValueError(
                f"data.max_tokens={' '.join(str(one.max_tokens) for one in facts)}: CLIP encoders stand side by side, token by token, "
                f"and these read {' and '.join(map(str, read))}. Give them the same number, {min(read)}."
            )
    clips = tuple(number for number, one in enumerate(facts) if one.kind == "clip")
    pooled_from = clips or tuple(range(len(facts)))
    return TextLayout(
        width=max(sum(facts[number].width for number in group) for group in groups),
        pooled_width=sum(facts[number].pooled_width for number in pooled_from),
        tokens=sum(facts[group[0]].max_tokens for group in groups),
        groups=tuple(map(tuple, groups)),
        pooled_from=pooled_from,
    )


def concat_text_states(parts: Sequence[TextStates], text_layout: TextLayout) -> TextStates:
    """What a network sees of captions.

    Args:
        parts: of each encoder, for the same captions.
        text_layout: of those encoders.

    Returns:
        States (B, L, width), zero where a narrower encoder has no channels;
        where any encoder of a run has a token there is one; pooled vectors
        (B, pooled_width) of the CLIP encoders side by side, or without CLIP
        of all encoders.

    Source: diffusers, StableDiffusion3Pipeline.encode_prompt.
    """
    rows = []
    for group in text_layout.groups:
        length = max(parts[number].token_mask.shape[1] for number in group)
        side = [pad_tokens(parts[number], length) for number in group]
        states = torch.cat([part.states for part in side], dim=2)
        mask = torch.stack([part.token_mask for part in side]).any(0)
        rows.append((F.pad(states, (0, text_layout.width - states.shape[2])), mask))
    pooled = torch.cat([parts[number].pooled for number in text_layout.pooled_from], dim=1)
    return TextStates(torch.cat([states for states, _ in rows], dim=1), torch.cat([mask for _, mask in rows], dim=1), pooled)


def drop_captions(
    parts: Sequence[TextStates], nulls: Sequence[TextStates], drop_all: Tensor, drop_encoders: Tensor
) -> tuple[TextStates, ...]:
    """Captions of which some are dropped.

    Args:
        parts: of each encoder.
        nulls: of each encoder, one row: its encoding of "".
        drop_all: (B,), bool: these samples become the encoding of "".
        drop_encoders: (B, encoders), bool: of these the encoder gives zeros where it
            has tokens for "", as a stock pipeline without it does; whole goes first.
    """
    made = []
    for number, (part, null) in enumerate(zip(parts, nulls, strict=True)):
        length = max(part.token_mask.shape[1], null.token_mask.shape[1])
        part, null = pad_tokens(part, length), pad_tokens(null.to(part.states.device, part.states.dtype), length)
        all_of_it = drop_all.to(part.token_mask.device)
        gone = drop_encoders[:, number].to(part.token_mask.device) & ~all_of_it
        states, pooled = (
            torch.where(_wide(all_of_it, have), none, have) for have, none in ((part.states, null.states), (part.pooled, null.pooled))
        )
        states, pooled = (have.masked_fill(_wide(gone, have), 0) for have in (states, pooled))
        made.append(TextStates(states, torch.where((all_of_it | gone)[:, None], null.token_mask, part.token_mask), pooled))
    return tuple(made)


def pad_tokens(part: TextStates, length: int) -> TextStates:
    """With so many tokens, those behind zero and masked; as it is where it has them."""
    more = length - part.token_mask.shape[1]
    return TextStates(F.pad(part.states, (0, 0, 0, more)), F.pad(part.token_mask, (0, more)), part.pooled) if more else part


def padded_length(longest: int, max_tokens: int) -> int:
    """Tokens to which the captions of a micro-batch are padded: a multiple of STEP, at most max_tokens."""
    return min(max_tokens, -(-longest // TOKEN_MULTIPLE) * TOKEN_MULTIPLE)


def _wide(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.view(-1, *[1] * (like.ndim - 1))
