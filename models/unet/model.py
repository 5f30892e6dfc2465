"""diffusers' U-Nets behind the house's interface: t from noise to data, a null class or captions.

Source: Ronneberger et al., U-Net; Ho et al., Denoising Diffusion Probabilistic
Models, appendix B; with text: Rombach et al., High-Resolution Image Synthesis
with Latent Diffusion Models, section 3.3. The layers are diffusers'.
"""

from __future__ import annotations

from typing import Any, Literal

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from condot.core.text_states import TextStates

from ..common.conditioning import FREQUENCY_CHANNELS, MICRO_CONDITIONS, check_text_widths, require_sizes, to_timestep
from ..common.init import InitMethod

Conditioning = Literal["class", "text"]
Layout = Literal["plain", "ddpm"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6},
}
"""Details in which diffusers' networks differ. ddpm: as the published weights of Ho et al. have them."""


class UNet(nn.Module):
    """A U-Net on classes, on text, or on nothing.

    Args:
        channels, resolution: of an image; pixels a side.
        condition: `class` builds a UNet2DModel, `text` a UNet2DConditionModel, which looks at text by cross-attention.
        num_classes: 0 for an unconditional network, without an embedding of classes.
        text_width, pooled_width: of text tokens and of pooled text, which only micro-conditions use.
        block_channels: of each level, from fine to coarse; multiples of 32.
        layers_per_block: residual blocks of each level.
        attention_levels: so many of the coarsest levels attend; the middle always does.
        attention_at: the levels that attend, the finest being 0; none for the coarsest, as attention_levels says.
        head_width: channels of one attention head; 0 for a single head.
        layout: details of the published networks; see LAYOUTS.
        micro_conditions: the original's size and crop join the time, as in SDXL; with text only.
        gradient_checkpointing: blocks are computed again on the way back instead of kept.
        outputs: as in DiT.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    def __init__(
        self, *, channels: int, resolution: int, condition: Conditioning = "class", num_classes: int = 0, text_width: int = 0,
        pooled_width: int = 0, block_channels: tuple[int, ...] = (64, 128, 128), layers_per_block: int = 2, attention_levels: int = 1,
        attention_at: tuple[int, ...] | None = None, head_width: int = 32, layout: Layout = "plain", micro_conditions: bool = False,
        gradient_checkpointing: bool = False, outputs: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        levels = len(block_channels)
        where = tuple(attention_at or range(levels - attention_levels, levels))
        _check(resolution, tuple(block_channels), attention_levels, where, head_width, layout)
        if condition not in ("class", "text"):
            raise ValueError(f"model.condition={condition!r} is unknown: choose class or text.")
        self.channels, self.resolution, self.num_classes, self.conditioning = channels, resolution, num_classes, condition
        self.outputs = outputs
        self.micro_conditions, self.gradient_checkpointing = micro_conditions, gradient_checkpointing
        kind = "CrossAttn" if condition == "text" else "Attn"
        common: dict[str, Any] = {
            "sample_size": resolution, "in_channels": channels, "out_channels": outputs * channels,
            "block_out_channels": tuple(block_channels),
            "layers_per_block": layers_per_block,
            "down_block_types": tuple(f"{kind if i in where else ''}DownBlock2D" for i in range(levels)),
            "up_block_types": tuple(f"{kind if i in where else ''}UpBlock2D" for i in reversed(range(levels))),
            **LAYOUTS[layout],
        }  # fmt: skip
        self.net: UNet2DModel | UNet2DConditionModel
        if condition == "class":
            if micro_conditions:
                raise ValueError(
                    "model.micro_conditions=True: diffusers' UNet2DModel has no place for sizes beside the class. "
                    "Use model.condition=text, or model.kind=dit."
                )
            self.net = UNet2DModel(
                **common, attention_head_dim=head_width or None, num_class_embeds=num_classes + 1 if num_classes else None
            )
        else:
            check_text_widths(text_width, pooled_width)
            sizes = {
                "addition_embed_type": "text_time", "addition_time_embed_dim": FREQUENCY_CHANNELS,
                "projection_class_embeddings_input_dim": pooled_width + MICRO_CONDITIONS * FREQUENCY_CHANNELS,
            }  # fmt: skip
            heads = tuple(c // (head_width or c) for c in block_channels)  # this class counts heads where the other counts channels
            self.net = UNet2DConditionModel(
                **common, attention_head_dim=heads, cross_attention_dim=text_width, **(sizes if micro_conditions else {})
            )
            self.num_classes = 0
        if gradient_checkpointing:
            self.net.enable_gradient_checkpointing()

    @property
    def size_multiple(self) -> int:
        """The sides of an image are multiples of it."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | TextStates, sizes: Tensor | None = None) -> Tensor:
        """The prediction; arguments as in DiT, or as in MMDiT with text."""
        time = to_timestep(t)
        if isinstance(condition, Tensor):
            return self.net(x, time, class_labels=condition if self.num_classes else None, return_dict=False)[0]
        dtype = self.net.conv_in.weight.dtype
        condition = TextStates(*condition)
        more = {"text_embeds": condition.pooled.to(dtype), "time_ids": require_sizes(sizes)} if self.micro_conditions else None
        states = condition.states.to(dtype)
        return self.net(x, time, states, encoder_attention_mask=condition.attention_mask, added_cond_kwargs=more, return_dict=False)[0]


def init_rule(name: str) -> InitMethod:
    """Return how a parameter begins: as torch's layers do; the output, and what sizes add, at zero."""
    return "zero" if name.startswith(("net.conv_out.", "net.add_embedding.linear_2.")) else "torch"


def _check(resolution: int, channels: tuple[int, ...], attention_levels: int, where: tuple[int, ...], head_width: int, layout: str) -> None:
    levels = len(channels)
    if layout not in LAYOUTS:
        raise ValueError(f"model.layout={layout!r} is unknown: choose one of {', '.join(LAYOUTS)}.")
    if not levels or any(c < 32 or c % 32 for c in channels):
        raise ValueError(
            f"model.block_channels={channels}: at least one level, each a multiple of 32 (its norm has 32 groups). Use (64, 128)."
        )
    if resolution % 2 ** (levels - 1):
        raise ValueError(
            f"the resolution {resolution} cannot be halved {levels - 1} times: "
            f"give model.block_channels={channels} fewer levels, or another resolution."
        )
    if not 0 <= attention_levels <= levels or any(not 0 <= i < levels for i in where):
        raise ValueError(f"model.attention_levels={attention_levels}, at {where}: there are {levels} levels, so at most all of them.")
    attending = [channels[i] for i in where] + [channels[-1]]
    if head_width < 0 or (head_width and any(c % head_width for c in attending)):
        raise ValueError(
            f"model.head_width={head_width} with {sorted(set(attending))} channels that attend, the middle's among them: "
            f"heads are of divisible channels. Use 32, or 0 for one head."
        )
