"""CondotDiT: a class-conditional diffusion transformer with the interface of diffusers' DiTTransformer2DModel, and options it has not.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers; each option of `DiT` names its own.
"""

from __future__ import annotations

from typing import Optional, Union

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..common.conditioning import TimeEmbeddingKind
from ..common.diffusers_inputs import clamp_labels, time_from_timestep
from .model import DiT, PositionKind


class CondotDiT(ModelMixin, ConfigMixin):
    """A DiT whose output follows diffusers' conventions: with flow matching it predicts noise minus data.

    Args:
        in_channels: of an image.
        out_channels: as many; None says so.
        sample_size: pixels a side of the usual image, or of its latents.
        patch_size: of them a token is so many a side.
        num_classes: 0 for an unconditional model; every label from `num_classes` on is no class.
        num_attention_heads, attention_head_dim: a token has as many channels as both multiply to.
        num_layers: blocks.
        qk_norm, rope, swiglu, rms_norm, registers, positions, shared_modulation, clock, own_conditions, micro_conditions: as in `DiT`.

    Raises:
        ValueError: sizes that do not divide one another, options that exclude one another, other channels out than in.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: Optional[int] = None,
        sample_size: int = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        rms_norm: bool = False,
        registers: int = 0,
        positions: PositionKind = "sincos",
        shared_modulation: bool = False,
        clock: TimeEmbeddingKind = "diffusers",
        own_conditions: bool = False,
        micro_conditions: bool = False,
    ) -> None:
        super().__init__()
        if out_channels not in (None, in_channels):
            raise ValueError(f"out_channels={out_channels}: as many as in_channels={in_channels}, or None.")
        self.register_to_config(out_channels=in_channels)  # pipelines compare it
        self.network = DiT(
            channels=in_channels, resolution=sample_size, num_classes=num_classes, patch_size=patch_size,
            width=num_attention_heads * attention_head_dim, depth=num_layers, heads=num_attention_heads, qk_norm=qk_norm, rope=rope,
            swiglu=swiglu, rms_norm=rms_norm, registers=registers, positions=positions, shared_modulation=shared_modulation, clock=clock,
            own_conditions=own_conditions, micro_conditions=micro_conditions,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Union[Tensor, float],
        class_labels: Optional[Tensor] = None,
        sizes: Optional[Tensor] = None,
        return_dict: bool = True,
    ) -> Union[Transformer2DModelOutput, tuple[Tensor]]:
        """The prediction.

        Args:
            hidden_states: (B, in_channels, H, W), noisy images; sides are multiples of the patch size.
            timestep: 1000 (noise) to 0 (data), whole or not; one, or (B,).
            class_labels: (B,), whole numbers; None for no class.
            sizes: (B, 6), pixels, with micro_conditions: height and width of the original, top and left of the crop, height and width.
            return_dict: False for a tuple.

        Returns:
            `sample`, of the shape and dtype of hidden_states; inside, the weights' dtype is used.
        """
        x = hidden_states.to(self.network.enter.weight.dtype)
        labels = clamp_labels(class_labels, x, self.network.num_classes)
        sample = self.network(x, time_from_timestep(timestep, x), labels, sizes).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
