"""CondotMMDiT: Stable Diffusion 3's transformer with the interface of diffusers' SD3Transformer2DModel, and a mask of the text.

Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, section 4.
"""

from __future__ import annotations

from typing import Any, Optional, Union

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..common.diffusers_inputs import text_condition, time_from_timestep
from .model import MMDiT


class CondotMMDiT(ModelMixin, ConfigMixin):
    """An MM-DiT whose output follows diffusers' conventions: with flow matching it predicts noise minus data.

    Args:
        in_channels: of an image.
        out_channels: as many; None says so.
        sample_size: pixels a side of the usual image, or of its latents.
        patch_size: of them a token is so many a side.
        num_attention_heads, attention_head_dim: a token has as many channels as both multiply to.
        num_layers: blocks.
        joint_attention_dim: channels of a text token.
        pooled_projection_dim: channels of the pooled text.
        qk_norm, dual_attention_blocks, micro_conditions: as in `MMDiT`.
        pos_embed_max_size: tokens a side of the grid whose middle an image takes; 0 for none.
        position_line: coordinate of that grid's first token, and the way to the next; None as in `MMDiT`.

    Raises:
        ValueError: sizes that do not fit one another, other channels out than in.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: Optional[int] = None,
        sample_size: int = 32,
        patch_size: int = 2,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 2048,
        qk_norm: bool = True,
        dual_attention_blocks: int = 0,
        pos_embed_max_size: int = 0,
        position_line: Optional[tuple[float, float]] = None,
        micro_conditions: bool = False,
    ) -> None:
        super().__init__()
        if out_channels not in (None, in_channels):
            raise ValueError(f"out_channels={out_channels}: as many as in_channels={in_channels}, or None.")
        self.register_to_config(out_channels=in_channels)  # pipelines compare it
        self.network = MMDiT(
            channels=in_channels, resolution=sample_size, text_width=joint_attention_dim, pooled_width=pooled_projection_dim,
            patch_size=patch_size, width=num_attention_heads * attention_head_dim, depth=num_layers, heads=num_attention_heads,
            qk_norm=qk_norm, dual_attention_blocks=dual_attention_blocks, position_grid=pos_embed_max_size,
            position_line=None if position_line is None else (position_line[0], position_line[1]), micro_conditions=micro_conditions,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Union[Tensor, float],
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Optional[Tensor] = None,
        pooled_projections: Optional[Tensor] = None,
        sizes: Optional[Tensor] = None,
        joint_attention_kwargs: Optional[dict[str, Any]] = None,
        return_dict: bool = True,
    ) -> Union[Transformer2DModelOutput, tuple[Tensor]]:
        """The prediction.

        Args:
            hidden_states: (B, in_channels, H, W), noisy images; sides are multiples of the patch size.
            timestep: 1000 (noise) to 0 (data), whole or not; one, or (B,).
            encoder_hidden_states: (B, L, joint_attention_dim), of each token of the caption.
            encoder_attention_mask: (B, L), 0 at padding, which is never looked at; None for no padding.
            pooled_projections: (B, pooled_projection_dim), of the whole caption.
            sizes: (B, 6), pixels, with micro_conditions: height and width of the original, top and left of the crop, height and width.
            joint_attention_kwargs: StableDiffusion3Pipeline passes it; nothing is known here.
            return_dict: False for a tuple.

        Returns:
            `sample`, of the shape and dtype of hidden_states; inside, the weights' dtype is used.

        Raises:
            ValueError: no pooled text, a mask of another shape, joint_attention_kwargs.
        """
        if pooled_projections is None or joint_attention_kwargs:
            raise ValueError("pooled_projections are needed, and joint_attention_kwargs are not known here.")
        x = hidden_states.to(self.network.enter.weight.dtype)
        text = text_condition(encoder_hidden_states, encoder_attention_mask, pooled_projections, self.config.pooled_projection_dim)
        sample = self.network(x, time_from_timestep(timestep, x), text, sizes).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
