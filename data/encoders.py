"""Frozen encoders: pixels to moments of latents and back, captions to token states.

diffusers and transformers are imported when used. An encoder carries its
fingerprint, by which a cache of its output is known.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .fingerprint import config_hash, differences, locate, read_config, weight_files, weight_names, weights_hash

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


@dataclass(frozen=True)
class AutoencoderFacts:
    """What an autoencoder's files say of it; its weights are hashed and no network is built."""

    name: str
    fingerprint: dict[str, Any]
    channels: int
    """Of a latent."""
    image_channels: int
    factor: int
    """Pixels a side that one latent value stands for."""
    deterministic: bool
    """Whether moments are a value without a spread."""
    scale: tuple[float, ...]
    """What its configuration multiplies latents by, for the model: one number, or one a channel."""
    shift: tuple[float, ...]
    """What its configuration subtracts from latents before that."""


def read_autoencoder(name: str) -> AutoencoderFacts:
    """The facts of an autoencoder; arguments and errors as in `Autoencoder`."""
    folder = locate(name, "data.autoencoder", "vae")
    kind, config = _kind(folder)
    files = weight_files(folder)
    named = f"{kind} with pools" if kind == "AutoencoderTiny" and any(".pool." in name for name in weight_names(files)) else kind
    scale, mean, std = float(config.get("scaling_factor") or 1.0), config.get("latents_mean"), config.get("latents_std")
    return AutoencoderFacts(
        name=name,
        fingerprint={"class": named, "config": config_hash(config), "weights": weights_hash(files)},
        channels=config["latent_channels"],
        image_channels=config["in_channels"],
        factor=2 ** (len(config["block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"]) - 1),
        deterministic=kind != "AutoencoderKL",
        scale=tuple(scale / float(s) for s in std) if std else (scale,),
        shift=tuple(map(float, mean)) if mean else (float(config.get("shift_factor") or 0.0),),
    )


def _kind(folder: Path) -> tuple[str, dict[str, Any]]:
    """An autoencoder's class, and its configuration with the class's defaults where its file says nothing."""
    import diffusers

    config = read_config(folder)
    kind = str(config.get("_class_name"))
    if kind not in AUTOENCODERS:
        raise ValueError(f"data.autoencoder={str(folder)!r} is a {kind}: choose one of {', '.join(AUTOENCODERS)}.")
    signature = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    defaults = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in signature if p.default is not p.empty}
    return kind, {**defaults, **config}


class Autoencoder:
    """A frozen autoencoder.

    Args:
        name: a folder that `save_pretrained` wrote (or a pipeline's, for its `vae`), or a Hub id.
        device, dtype: to compute in.
        expected: the fingerprint that it must have, if one is known.

    Raises:
        ValueError: no such encoder, an unknown class, pickled or damaged
            weights, another fingerprint.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        expected: dict[str, Any] | None = None,
    ) -> None:
        self.facts = read_autoencoder(name)
        self.fingerprint, self.channels, self.factor = self.facts.fingerprint, self.facts.channels, self.facts.factor
        self.deterministic = self.facts.deterministic
        if expected and expected != self.fingerprint:
            raise ValueError(
                f"data.autoencoder={name!r} is another autoencoder: {'; '.join(differences(expected, self.fingerprint, 'its'))}. "
                f"Give the one that the model was trained with."
            )
        folder = locate(name, "data.autoencoder", "vae")
        self.model: Any = _load(folder, self.fingerprint["class"].split()[0], dtype).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Encode pixels.

        Args:
            x: (B, 3, H, W), -1..1.

        Returns:
            float32: mean and standard deviation of the posterior, (B, 2 C, H /
            factor, W / factor), or the latents, (B, C, ...), where it is deterministic.

        Raises:
            ValueError: a side that the factor does not divide, or another number of channels.
        """
        check_images(self.facts, x.shape[1], *x.shape[-2:])
        encoded = self.model.encode(x.to(self.model.device, self.model.dtype))
        if self.deterministic:
            return (encoded.latents if "latents" in encoded else encoded.latent).float()
        posterior = encoded.latent_dist
        return torch.cat([posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, (B, 3, H, W), about -1..1, float32, of latents as `moments` has them (unscaled)."""
        return self.model.decode(latents.to(self.model.device, self.model.dtype)).sample.float()


def check_images(facts: AutoencoderFacts, channels: int, *sides: int) -> None:
    """Raises ValueError for images that the autoencoder does not read, or that do not divide into latents."""
    if channels != facts.image_channels:
        need = facts.image_channels
        raise ValueError(f"data.channels={channels}: the autoencoder {facts.name} reads {need} channel(s). Use {need}.")
    bad = [side for side in sides if side % facts.factor]
    if bad:
        near = max(facts.factor, round(bad[0] / facts.factor) * facts.factor)
        raise ValueError(
            f"data.resolution gives a side of {bad[0]} pixels: a multiple of {facts.factor} for the autoencoder {facts.name}. Use {near}."
        )


def _load(folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    """An autoencoder with its weights, from safetensors alone.

    Raises:
        ValueError: weights that do not fit its configuration.
    """
    import diffusers
    from safetensors.torch import load_file

    files = weight_files(folder)
    try:
        if kind == "AutoencoderTiny":
            state = {name: value for file in files for name, value in load_file(file).items()}
            known = inspect.signature(diffusers.AutoencoderTiny.__init__).parameters
            vae = diffusers.AutoencoderTiny(**{key: value for key, value in read_config(folder).items() if key in known})
            _add_pools(vae, state)
            vae.load_state_dict(state)
            return nn.Module.to(vae, dtype=dtype)
        loaded: nn.Module = getattr(diffusers, kind).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False
        )
        return loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: the weights do not fit ({' '.join(str(error).split())[:300]}): copy the autoencoder again.") from error


def _add_pools(vae: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the blocks of an AutoencoderTiny the global branch `x + pool(x)` that TAEF2's coarse ones have and diffusers' lack."""
    for name in [key.removesuffix(".pool.0.weight") for key in state if key.endswith(".pool.0.weight")]:
        block, (wide, width) = vae.get_submodule(name), state[f"{name}.pool.0.weight"].shape[:2]
        into, back = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
        block.pool = nn.Sequential(into, nn.GroupNorm(wide // width, wide), nn.ReLU(), back)
        block.register_forward_pre_hook(lambda module, given: (given[0] + module.pool(given[0]),))


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Args:
        name: a folder (or a pipeline's, for its `text_encoder`), or a Hub id.
        device, dtype: to compute in.
        max_tokens: longer captions are cut to so many tokens, special ones included.

    Raises:
        ValueError: no such encoder, no tokenizer, pickled weights, more
            tokens than it reads.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, max_tokens: int = 128) -> None:
        import transformers

        folder = locate(name, "data.text_encoder", "text_encoder")
        weight_files(folder)
        self.name, self.max_tokens = name, max_tokens
        self.tokenizer = _tokenizer(folder, max_tokens)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kinds: dict[str, Any] = {
            "t5": transformers.T5EncoderModel,
            "mt5": transformers.MT5EncoderModel,
            "umt5": transformers.UMT5EncoderModel,
            "clip": transformers.CLIPTextModel,
            "clip_text_model": transformers.CLIPTextModel,
        }
        kind = kinds.get(config.model_type, transformers.AutoModel)
        transformers.logging.disable_progress_bar()
        model: Any = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        inner = self.model.config.get_text_config()
        self.width: int = inner.hidden_size
        """Of a token's state."""
        limit = inner.max_position_embeddings if "max_position_embeddings" in inner else None
        if limit and max_tokens > limit:
            raise ValueError(f"data.max_tokens={max_tokens}: {name} reads at most {limit} tokens. Use {limit} or fewer.")
        self.fingerprint = text_fingerprint(name, max_tokens)

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor, int]:
        """Token numbers and mask, (B, L), padded behind to the longest of the batch, and how many captions were cut."""
        whole = self.tokenizer(captions)["input_ids"]
        cut = sum(len(ids) > self.max_tokens for ids in whole)
        rows = self.tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"] if cut else whole
        spare = next(t for t in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, 0) if t is not None)
        rows = [row or [spare] for row in rows]  # "" is the null condition: a tokenizer that adds nothing to it still gives one token
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), max(map(len, rows))), spare if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        return ids, mask, cut

    @torch.no_grad()
    def states(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Returns:
            States of the last layer, (B, L, D), float32, zero where the mask,
            (B, L), is false. L is the longest caption's number of tokens, at
            most max_tokens; "" is the null condition.
        """
        ids, mask, _ = self.tokens(captions)
        mask = mask.to(self.model.device)
        states = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.long()).last_hidden_state
        return states.float() * mask[..., None], mask


def text_fingerprint(name: str, max_tokens: int) -> dict[str, Any]:
    """Class, configuration, weights, tokenizer, greatest length and width of a text encoder, without building it."""
    import transformers

    folder = locate(name, "data.text_encoder", "text_encoder")
    read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    config = read.to_dict()
    return {
        "class": str(config.get("model_type")),
        "config": config_hash({key: value for key, value in config.items() if key != "architectures"}),
        "weights": weights_hash(weight_files(folder)),
        "tokenizer": _tokenizer_hash(_tokenizer(folder, max_tokens)),
        "max_tokens": max_tokens,
        "width": read.get_text_config().hidden_size,
    }


def _tokenizer(folder: Path, max_tokens: int) -> Any:
    """The tokenizer beside an encoder, or in a pipeline's `tokenizer`."""
    import transformers

    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    place = beside if folder.name.startswith("text_encoder") and beside.is_dir() else folder
    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.text_encoder={str(folder)!r} has no tokenizer ({reason}): save it into the same folder.") from error
    if max_tokens > found.model_max_length:
        limit = found.model_max_length
        raise ValueError(f"data.max_tokens={max_tokens}: the tokenizer of {folder} reads at most {limit}. Use {limit} or fewer.")
    return found


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary, of how text is cut into it, and of the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    kept = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    text = json.dumps([kept, sorted(map(str, tokenizer.all_special_tokens))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
