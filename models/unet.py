"""diffusers' U-Net behind the house's interface: t from noise to data, a null class."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor, nn

from .condition import noise_clock
from .initialise import Rule, initialise


class UNet(nn.Module):
    """A class-conditional U-Net.

    Args:
        channels, resolution, num_classes: as in DiT.
        block_channels: of each level, from fine to coarse; multiples of 32.
        layers_per_block: residual blocks of each level.
        attention_levels: so many of the coarsest levels attend.
        head_width: channels of one attention head.

    Raises:
        ValueError: sizes that do not divide one another.

    Source: Ronneberger et al., U-Net; Ho et al., Denoising Diffusion
    Probabilistic Models, appendix B; the layers are diffusers' UNet2DModel.
    """

    def __init__(
        self,
        *,
        channels: int,
        resolution: int,
        num_classes: int,
        block_channels: tuple[int, ...],
        layers_per_block: int,
        attention_levels: int,
        head_width: int,
    ) -> None:
        super().__init__()
        levels = len(block_channels)
        if not levels or any(c < 32 or c % 32 for c in block_channels):
            raise ValueError(
                f"model.block_channels={block_channels}: at least one level, each a multiple of 32 (its norm has 32 groups). Use (64, 128)."
            )
        if resolution % 2 ** (levels - 1):
            raise ValueError(
                f"the resolution {resolution} cannot be halved {levels - 1} times: "
                f"give model.block_channels={block_channels} fewer levels, or another resolution."
            )
        if not 0 <= attention_levels <= levels or any(c % head_width for c in block_channels[levels - attention_levels :]):
            raise ValueError(
                f"model.attention_levels={attention_levels} of {levels} levels "
                f"with model.head_width={head_width}: at most all, of divisible channels."
            )
        plain = levels - attention_levels
        self.channels, self.resolution, self.num_classes = channels, resolution, num_classes
        self.net = UNet2DModel(
            sample_size=resolution,
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attention_levels,
            up_block_types=("AttnUpBlock2D",) * attention_levels + ("UpBlock2D",) * plain,
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            attention_head_dim=head_width,
            num_class_embeds=num_classes + 1,
        )
        if not self.net.conv_out.weight.is_meta:
            initialise(self)

    def rule(self, name: str) -> Rule:
        """How a parameter begins: as torch's layers do, and the output at zero."""
        return "zero" if name.startswith("net.conv_out.") else "torch"

    @property
    def multiple(self) -> int:
        """The sides of an image are multiples of it."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The prediction; arguments as in DiT."""
        return self.net(x, noise_clock(t), class_labels=labels).sample
