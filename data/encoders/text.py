"""Frozen text encoders: captions to the states of their tokens and one pooled vector.

transformers is imported when used. CLIP gives what Stable Diffusion takes of
it, the states before its last layer and its own pooled vector; every other
encoder the states of its last layer and their mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condot.core.data_config import DataConfig
from condot.core.hashing import sha256_of
from condot.core.model_folders import TEXT_MODELS, check_counts, check_model_folder, check_size, read_json, read_shapes
from condot.core.text_states import TextStates

from .fingerprint import config_hash, read_config, resolve_encoder, weight_files, weights_hash
from .text_states import TextFacts, pad_tokens, padded_length

CLIP = ("clip", "clip_text_model")
"""What CLIP's configurations call their type."""
VOCABULARIES = ("tokenizer*", "vocab*", "*.model")
"""Files of which every tokenizer has one."""


def read_text_encoder(name: str, max_tokens: int, padding: str = "mask") -> TextFacts:
    """The facts of a text encoder; arguments and errors as in `TextEncoder`."""
    folder = resolve_encoder(name, "data.text_encoder", "text_encoder")
    config = _config(folder)
    tokenizer = _tokenizer(folder)
    limit = _limit(tokenizer, config)
    if max_tokens > limit:
        raise ValueError(f"data.max_tokens={max_tokens}: {name} reads at most {limit} tokens. Use {limit} or fewer.")
    if padding == "attend" and tokenizer.pad_token_id is None:
        raise ValueError(f"data.text_padding=attend: the tokenizer of {name} has no pad token. Use mask.")
    clip, projected = config.model_type in CLIP, _is_projected(folder)
    width = int(config.hidden_size)
    pooled_width = int(config.projection_dim) if projected else width
    fingerprint = {
        "class": f"{config.model_type}{' with projection' if projected else ''}",
        "config": config_hash({key: value for key, value in read_text_config(folder).to_dict().items() if key != "architectures"}),
        "weights": weights_hash(weight_files(folder)),
        "tokenizer": _tokenizer_hash(tokenizer),
        "max_tokens": max_tokens,
        "padding": padding,
        "width": width,
        "pooled": pooled_width,
    }
    return TextFacts(name, fingerprint, width, pooled_width, "clip" if clip else "other", max_tokens, padding)


def read_text_encoders(options: DataConfig) -> tuple[TextFacts, ...]:
    """The facts of all that a recipe names; where one number of tokens stands for several, each reads at most its own limit."""
    return tuple(read_text_encoder(name, count, options.text_padding) for name, count in _counts(options))


def _counts(options: DataConfig) -> list[tuple[str, int]]:
    names, counts = options.text_encoder, options.max_tokens
    if len(counts) == len(names):
        return list(zip(names, counts, strict=True))
    return [(name, min(counts[0], max_text_tokens(name))) for name in names]


def max_text_tokens(name: str) -> int:
    """The most tokens that a text encoder reads."""
    folder = resolve_encoder(name, "data.text_encoder", "text_encoder")
    return _limit(_tokenizer(folder), _config(folder))


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Args:
        name: a folder (or a pipeline's, for its `text_encoder`; its others are
            `folder/text_encoder_2`), or a Hub id.
        device, dtype: to compute in.
        max_tokens: longer captions are cut to so many tokens, special ones included.
        padding: mask, or attend: all captions padded to max_tokens by the
            tokenizer, and the encoder attends to all of it.

    Raises:
        ValueError: no such encoder, no tokenizer, pickled weights, more
            tokens than it reads.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 128,
        padding: str = "mask",
    ) -> None:
        self.facts = read_text_encoder(name, max_tokens, padding)
        self.fingerprint, self.kind = self.facts.fingerprint, self.facts.kind
        self.width, self.pooled_width, self.max_tokens = self.facts.width, self.facts.pooled_width, max_tokens
        folder = resolve_encoder(name, "data.text_encoder", "text_encoder")
        self.tokenizer = _tokenizer(folder)
        self.model: Any = _load(folder, dtype).to(device).eval().requires_grad_(False)
        self.truncated = 0
        """Captions that were longer than max_tokens, of all encoded so far."""

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Token numbers and mask, (B, L), padded behind to the longest of the batch or to max_tokens, and how many captions were cut."""
        captions = list(captions)
        whole = self.tokenizer(captions)["input_ids"]
        truncated = sum(len(ids) > self.max_tokens for ids in whole)
        if self.facts.padding == "attend":
            ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
            return ids, torch.ones(ids.shape, dtype=torch.bool), truncated
        rows = self.tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"] if truncated else whole
        spare = next(t for t in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, 0) if t is not None)
        rows = [row or [spare] for row in rows]  # "" is the null condition: a tokenizer that adds nothing to it still gives one token
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), max(map(len, rows))), spare if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        return ids, mask, truncated

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """States and pooled vectors, float32, of captions; "" is the null condition.

        Returns:
            With L tokens, the longest caption's number, at most max_tokens; under attend always max_tokens.

        Source: diffusers, StableDiffusion3Pipeline, for CLIP and for T5 under attend.
        """
        ids, mask, truncated = self.tokens(captions)
        self.truncated += truncated
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        seen = mask.long() if self.facts.padding == "mask" else None
        if self.kind == "clip":
            out = self.model(input_ids=ids, attention_mask=seen, output_hidden_states=True)
            pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
            states = out.hidden_states[-2].float() * mask[..., None]
            return TextStates(states, mask, pooled.float())
        states = self.model(input_ids=ids, attention_mask=seen).last_hidden_state.float() * mask[..., None]
        return TextStates(states, mask, states.sum(1) / mask.sum(1, keepdim=True))

    @cached_property
    def null(self) -> TextStates:
        """The encoding of "", one row."""
        return self.encode([""])


def encode_captions(encoders: Sequence[TextEncoder], captions: Sequence[str]) -> tuple[TextStates, ...]:
    """What each encoder gives of a micro-batch's captions, padded as cached ones are; what was cut adds up in `encoder.truncated`."""
    parts = [encoder.encode(captions) for encoder in encoders]
    return tuple(
        pad_tokens(part, padded_length(part.token_mask.shape[1], encoder.max_tokens)) for encoder, part in zip(encoders, parts, strict=True)
    )


def read_text_config(folder: Path) -> Any:
    """Return the configuration of a text encoder whose folder holds nothing that would be run, or opened elsewhere.

    Raises:
        ValueError: a folder that does, a type that is not read here, or a configuration that makes none.
    """
    import transformers

    check_model_folder(folder)
    said = read_json(folder / "config.json")
    if said.get("model_type") not in TEXT_MODELS:
        raise ValueError(
            f"data.text_encoder={str(folder)!r} is of the type {str(said.get('model_type'))[:60]!r}, which is not read here: choose one of "
            f"{', '.join(TEXT_MODELS)}."
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for what a stranger may write there
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}/config.json makes no text encoder ({reason}): copy the text encoder again.") from error


def _config(folder: Path) -> Any:
    """The text part of an encoder's configuration; a whole CLIP's with the projection that its two halves share."""
    whole = read_text_config(folder)
    text = whole.get_text_config()
    if text is not whole and whole.model_type == "clip":
        text.projection_dim = whole.projection_dim
    return text


def _is_projected(folder: Path) -> bool:
    """Whether an encoder is a CLIP whose pooled vector is projected: its class says so, and a whole CLIP's always is."""
    config = read_config(folder)
    made = str((config.get("architectures") or [""])[0])
    return config.get("model_type") in CLIP and made in ("CLIPTextModelWithProjection", "CLIPModel")


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """A text encoder with its weights, from safetensors alone."""
    import transformers

    encoders = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    config, more = _config(folder), {}
    if config.model_type in CLIP:
        name, more = f"CLIPTextModel{'WithProjection' if _is_projected(folder) else ''}", {"config": config}
    else:
        name = encoders.get(config.model_type, "AutoModel")
    transformers.logging.disable_progress_bar()
    check_counts(folder / "config.json", read_json(folder / "config.json"), len(shapes := read_shapes(weight_files(folder))))
    load_options = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with _quiet_transformers():
            with torch.device("meta"):
                kind = getattr(transformers, name)
                check_size(folder / "config.json", kind.from_config(config) if name == "AutoModel" else kind(config), shapes)
            model, said = kind.from_pretrained(folder, dtype=dtype, **load_options, **more)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: the weights do not fit ({reason}): copy the text encoder again.") from error
    missing = sorted(key for key in said["missing_keys"] if not key.startswith("pooler."))  # BERT's, which nobody asks here
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the weights, such as {missing[0]}: copy the text encoder again.")
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' table of the weights that a whole model has beyond its text encoder."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _limit(tokenizer: Any, config: Any) -> int:
    """The most tokens that both the tokenizer and the network's positions allow."""
    positions = config.max_position_embeddings if "max_position_embeddings" in config else None
    return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))


def _tokenizer(folder: Path) -> Any:
    """The tokenizer beside an encoder, or in a pipeline's `tokenizer`."""
    import transformers

    tokenizer_folder = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    place = tokenizer_folder if folder.name.startswith("text_encoder") and tokenizer_folder.is_dir() else folder
    try:
        if not any(file for kind in VOCABULARIES for file in place.glob(kind)):  # transformers may make one that knows no word
            raise ValueError(f"none of {', '.join(VOCABULARIES)} is there")
        check_model_folder(place)
        return transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its library in Rust raises plain ones
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.text_encoder={str(folder)!r} has no tokenizer ({reason}): save it into the same folder.") from error


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary, of how text is cut into it, and of the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    kept = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    text = json.dumps([kept, sorted(map(str, tokenizer.all_special_tokens))], sort_keys=True)
    return sha256_of(text)
