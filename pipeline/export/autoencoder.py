"""An autoencoder whose own latents are the network's, so that a stock pipeline decodes what the network draws.

Stock pipelines divide latents by one number, `scaling_factor`. A shift, or one
number a channel, goes into the 1 x 1 convolutions that an AutoencoderKL has
between its latents and its halves, exactly; where it has none it gets them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..latent_space import LatentSpace

EXPORTABLE_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
MAX_ENCODERS = 3
"""Text encoders that pipelines have places for."""


def check_export(space: LatentSpace, encoders: int = 0) -> None:
    """Raises ValueError for latents that no stock pipeline decodes, and more text encoders than a pipeline has places for."""
    if encoders > MAX_ENCODERS:
        raise ValueError(
            f"data.text_encoder names {encoders} text encoders: a pipeline has places for {MAX_ENCODERS}. Use fewer, or --export=false."
        )
    kind = space.fingerprint.get("class")
    if not space.is_latent or kind == "AutoencoderKL":
        return
    if kind not in EXPORTABLE_CLASSES:
        raise ValueError(f"data.autoencoder is a {kind}, which stock diffusers does not load: set --export=false, or use another.")
    if len(set(space.scale)) > 1 or any(space.shift):
        raise ValueError(
            f"data.latent_scale has {len(space.scale)} numbers and data.latent_shift is {'not ' if any(space.shift) else ''}zero: a stock "
            f"pipeline with an {kind} divides latents by one number. Set data.latent_scale to one and data.latent_shift to 0, "
            f"or --export=false."
        )


@torch.no_grad()
def fold_latent_scaling(vae: Any, space: LatentSpace) -> Any:
    """A copy of a stock autoencoder for which `decode(z / scaling_factor)` decodes the network's samples z."""
    check_export(space)
    vae = copy.deepcopy(vae).float().cpu()
    own = {name: None for name in ("shift_factor", "latents_mean", "latents_std") if vae.config.get(name)}  # the recipe's are other ones
    if len(set(space.scale)) == 1 and not any(space.shift):
        vae.register_to_config(scaling_factor=space.scale[0], **own)
        return vae
    scale, shift = (torch.tensor(v, dtype=torch.float64).expand(space.channels) for v in (space.scale, space.shift))
    post_quant, quant = _ensure_conv(vae, "post_quant_conv", space.channels), _ensure_conv(vae, "quant_conv", 2 * space.channels)
    _fold_affine(post_quant, before=(1 / scale, shift))
    ones, logs = torch.ones_like(scale), 2 * torch.log(scale)
    _fold_affine(quant, after=(torch.cat([scale, ones]), torch.cat([-shift * scale, logs])))
    vae.register_to_config(scaling_factor=1.0, **own)
    return vae


def _ensure_conv(vae: Any, name: str, channels: int) -> nn.Conv2d:
    """A 1 x 1 convolution of the autoencoder; the identity where it had none."""
    if getattr(vae, name) is None:
        conv = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        conv.weight.copy_(torch.eye(channels)[..., None, None])
        setattr(vae, name, conv)
        vae.register_to_config(**{f"use_{name}": True})
    found: nn.Conv2d = getattr(vae, name)
    return found


def _fold_affine(conv: nn.Conv2d, before: tuple[Tensor, Tensor] | None = None, after: tuple[Tensor, Tensor] | None = None) -> None:
    """Make of `conv(x)` `conv(f x + s)`, or `f conv(x) + s`, channel by channel; computed in float64."""
    weight, bias = conv.weight[..., 0, 0].double(), conv.bias.double()  # type: ignore[union-attr]
    if before:
        weight, bias = weight * before[0], bias + weight @ before[1]
    if after:
        weight, bias = weight * after[0][:, None], bias * after[0] + after[1]
    conv.weight.copy_(weight[..., None, None])
    conv.bias.copy_(bias)  # type: ignore[union-attr]
