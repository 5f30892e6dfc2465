"""Frozen autoencoders: pixels to moments of latents and back.

diffusers is imported when used. An encoder carries its fingerprint, by which a
cache of its output is known.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condot.core.model_folders import check_counts, check_model_folder, check_size, read_shapes

from .fingerprint import config_hash, fingerprint_differences, read_config, resolve_encoder, weight_files, weight_names, weights_hash

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
    folder = resolve_encoder(name, "data.autoencoder", "vae")
    kind, config = _kind(folder)
    files = weight_files(folder)
    named = f"{kind} with pools" if kind == "AutoencoderTiny" and any(".pool." in name for name in weight_names(files)) else kind
    fingerprint = {"class": named, "config": config_hash(config), "weights": weights_hash(files)}
    try:
        return _facts(name, kind, config, fingerprint)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{folder}/config.json makes no autoencoder ({error}): copy the autoencoder again.") from error


def _facts(name: str, kind: str, config: dict[str, Any], fingerprint: dict[str, Any]) -> AutoencoderFacts:
    """Return what a configuration says of an autoencoder."""
    scale, mean, std = float(config.get("scaling_factor") or 1.0), config.get("latents_mean"), config.get("latents_std")
    return AutoencoderFacts(
        name=name,
        fingerprint=fingerprint,
        channels=operator.index(config["latent_channels"]),
        image_channels=operator.index(config["in_channels"]),
        factor=2 ** (len(config["block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"]) - 1),
        deterministic=kind != "AutoencoderKL",
        scale=tuple(scale / float(s) for s in std) if std else (scale,),
        shift=tuple(map(float, mean)) if mean else (float(config.get("shift_factor") or 0.0),),
    )


def _kind(folder: Path) -> tuple[str, dict[str, Any]]:
    """An autoencoder's class, and its configuration with the class's defaults where its file says nothing."""
    import diffusers

    check_model_folder(folder)
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
                f"data.autoencoder={name!r} is another autoencoder: "
                f"{'; '.join(fingerprint_differences(expected, self.fingerprint, 'its'))}. "
                f"Give the one that the model was trained with."
            )
        folder = resolve_encoder(name, "data.autoencoder", "vae")
        self.model: Any = _load(folder, self.fingerprint["class"].split()[0], dtype).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Encode pixels.

        Args:
            x: (B, image_channels, H, W), -1..1.

        Returns:
            float32: mean and standard deviation of the posterior, (B, 2 C, H /
            factor, W / factor), or the latents, (B, C, ...), where it is deterministic.

        Raises:
            ValueError: a side that the factor does not divide, or another number of channels.
        """
        check_images(self.facts, x.shape[1], *x.shape[-2:])
        encoded = self.model.encode(x.to(self.model.device, self.model.dtype))
        if self.deterministic:
            latents: Tensor = encoded.latents if "latents" in encoded else encoded.latent
            return latents.float()
        posterior = encoded.latent_dist
        return torch.cat([posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, (B, image_channels, H, W), about -1..1, float32, of latents as `moments` has them (unscaled)."""
        pixels: Tensor = self.model.decode(latents.to(self.model.device, self.model.dtype)).sample
        return pixels.float()


def check_images(facts: AutoencoderFacts, channels: int, *sides: int) -> None:
    """Raises ValueError for images that the autoencoder does not read, or that do not divide into latents."""
    if channels != facts.image_channels:
        need = facts.image_channels
        raise ValueError(
            f"data.channels={channels}: the autoencoder {facts.name} reads {need} channel(s). "
            f"Use {need}, or leave data.autoencoder out, to train on pixels."
        )
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
    path, config, shapes = folder / "config.json", read_config(folder), read_shapes(files)
    check_counts(path, config, len(shapes))
    try:
        with torch.device("meta"):
            check_size(path, getattr(diffusers, kind).from_config(config), shapes)
        if kind == "AutoencoderTiny":
            state = {name: value for file in files for name, value in load_file(file).items()}
            known = inspect.signature(diffusers.AutoencoderTiny.__init__).parameters
            vae = diffusers.AutoencoderTiny(**{key: value for key, value in config.items() if key in known})
            _add_pools(vae, state)
            vae.load_state_dict(state)
            tiny: nn.Module = nn.Module.to(vae, dtype=dtype)
            return tiny
        loaded: nn.Module = getattr(diffusers, kind).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False
        )
        return loaded
    except Exception as error:  # diffusers raises many kinds for what a stranger may write there
        raise ValueError(f"{folder}: the weights do not fit ({' '.join(str(error).split())[:300]}): copy the autoencoder again.") from error


def _add_pools(vae: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the blocks of an AutoencoderTiny the global branch `x + pool(x)` that TAEF2's coarse ones have and diffusers' lack."""
    for name in [key.removesuffix(".pool.0.weight") for key in state if key.endswith(".pool.0.weight")]:
        block, (wide, width) = vae.get_submodule(name), state[f"{name}.pool.0.weight"].shape[:2]
        into, back = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
        block.pool = nn.Sequential(into, nn.GroupNorm(wide // width, wide), nn.ReLU(), back)
        block.register_forward_pre_hook(lambda module, given: (given[0] + module.pool(given[0]),))
