"""Captions to what a text network is told: each encoder's token states, all joined as they were in training.

It travels with exported models, written into the file of their pipeline, which then stands alone on torch, diffusers and
transformers. Licence: Apache-2.0.
Source: diffusers, StableDiffusion3Pipeline.encode_prompt, for the order of tokens and channels.
"""

from typing import Any, NamedTuple

import torch


class Captions(NamedTuple):
    """States (B, L, D) of tokens, mask (B, L) of those that are there, one vector (B, P) of each whole caption."""

    states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor


def numbered(tokenizer: Any, captions: Any, limit: int, padded: bool) -> Any:
    """Token numbers and mask, (B, L); longer captions are cut to `limit`, shorter ones padded to it or to the longest."""
    if padded:
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").input_ids
        return ids, torch.ones(ids.shape, dtype=torch.bool)
    spare = next(t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id, 0) if t is not None)
    rows = [row or [spare] for row in tokenizer(captions, truncation=True, max_length=limit)["input_ids"]]
    pad = spare if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = torch.full((len(rows), max(map(len, rows))), pad), torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return ids, mask


def is_clip(encoder: Any) -> bool:
    """Whether an encoder is CLIP's: of it the states before the last layer count, and its own pooled vector."""
    return encoder.config.model_type in ("clip", "clip_text_model")


def encode(tokenizer: Any, encoder: Any, captions: Any, padded: bool, device: Any) -> Captions:
    """One encoder's view of captions, a list: of CLIP states before the last layer and its pooled vector; else last states, their mean."""
    ids, mask = (part.to(device) for part in numbered(tokenizer, captions, tokenizer.model_max_length, padded))
    seen, there = None if padded else mask.long(), mask[..., None]
    if is_clip(encoder):
        out = encoder(input_ids=ids, attention_mask=seen, output_hidden_states=True)
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return Captions(out.hidden_states[-2] * there, mask, pooled)
    states = encoder(input_ids=ids, attention_mask=seen).last_hidden_state * there
    return Captions(states, mask, states.sum(1) / mask.sum(1, keepdim=True))


def joined(parts: Any, clips: Any) -> Captions:
    """Several encoders' views as one: neighbouring CLIPs side by side in channels, all others' tokens behind, as wide as the widest.

    Pooled vectors stand side by side: CLIP's, or all of them where none is CLIP's.
    """
    runs: Any = []
    for part, clip in zip(parts, clips, strict=True):
        if runs and clip and runs[-1][1]:
            length = max(part.mask.shape[1], runs[-1][0].mask.shape[1])
            one, two = lengthened(runs[-1][0], length), lengthened(part, length)
            runs[-1] = (Captions(torch.cat([one.states, two.states], dim=2), one.mask | two.mask, one.pooled), True)
        else:
            runs.append((part, clip))
    width = max(part.states.shape[2] for part, _ in runs)
    states = [torch.nn.functional.pad(part.states, (0, width - part.states.shape[2])) for part, _ in runs]
    pooled = [part.pooled for part, clip in zip(parts, clips, strict=True) if clip or not any(clips)]
    return Captions(torch.cat(states, dim=1), torch.cat([part.mask for part, _ in runs], dim=1), torch.cat(pooled, dim=1))


def lengthened(part: Captions, length: int) -> Captions:
    """With so many tokens, those behind zero and masked."""
    more = length - part.mask.shape[1]
    pad = torch.nn.functional.pad
    return Captions(pad(part.states, (0, 0, 0, more)), pad(part.mask, (0, more)), part.pooled)
