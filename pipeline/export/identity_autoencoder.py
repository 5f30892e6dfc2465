"""A stock AutoencoderKL that is the identity, so that a pixel model fits a pipeline made for latents.

The only layers of an autoencoder without blocks are two convolutions with a
norm and a SiLU between. `silu(x) - silu(-x) = x` undoes the SiLU; two constant
channels, far larger than the image, fix what the norm divides by.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn

CONSTANT = 1024.0
"""Of the two extra channels: large, so that the image hardly moves the norm; not so large that float32 rounds the image away."""
MAX_IDENTITY_CHANNELS = 16
"""Up to so many the identity is exact to 1e-5 for |x| <= 1, less than half a step of 16 bits; its weights grow with the square."""


@torch.no_grad()
def identity_autoencoder(channels: int, resolution: int) -> AutoencoderKL:
    """An autoencoder whose latents are its images.

    Args:
        channels: of images and latents alike.
        resolution: pixels a side.

    Returns:
        Decoding is the identity to about 2e-6 in float32 for |x| <= 1.5 and three channels; in proportion for more.
    """
    width = 2 * channels + 2
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        block_out_channels=(width,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=0,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=resolution,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
    deviation = (2 * CONSTANT**2 / width) ** 0.5
    for part in (vae.encoder, vae.decoder):
        for c in range(channels):
            part.conv_in.weight[2 * c, c, 1, 1] = 1.0
            part.conv_in.weight[2 * c + 1, c, 1, 1] = -1.0
            part.conv_out.weight[c, 2 * c, 1, 1] = 1.0
            part.conv_out.weight[c, 2 * c + 1, 1, 1] = -1.0
        part.conv_in.bias[-2:] = torch.tensor([CONSTANT, -CONSTANT])
        part.conv_norm_out.weight.fill_(deviation)
        part.conv_norm_out.weight[-2:] = 0.0
    vae.encoder.conv_out.bias[channels:] = -30.0  # log-variance: encoding is deterministic
    return vae.eval()
