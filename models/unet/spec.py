"""diffusers' U-Nets in the house: their section of the recipe, and their forms elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from condot.core.model_config import Conditioning, ModelConfig
from condot.core.option_ranges import IntRange

from ..common.presets import IMAGENET
from ..common.spec import NetworkSpec
from .convert import UNET_STOCK
from .model import UNet, init_rule


@dataclass(frozen=True, kw_only=True)
class UNetConfig(ModelConfig):
    """diffusers' UNet2DModel, or with text UNet2DConditionModel."""

    kind: Literal["unet"] = "unet"  # dit, cross_dit, mmdit or unet: the other kinds have fields of their own
    condition: Literal["class", "text"] = "class"  # what it is told; of data without classes, class is nothing
    # channels of each level, from fine to coarse; multiples of 32
    block_channels: tuple[Annotated[int, IntRange("[1, inf)")], ...] = (64, 128, 128)
    layers_per_block: Annotated[int, IntRange("[1, inf)")] = 2  # residual blocks of each level
    attention_levels: Annotated[int, IntRange("[0, inf)")] = 1  # so many of the coarsest levels attend
    attention_at: tuple[Annotated[int, IntRange("[0, inf)")], ...] | None = None  # the levels that attend instead, the finest being 0
    # channels of one attention head; it divides the attending levels' channels; 0 for a single head
    head_width: Annotated[int, IntRange("[0, inf)")] = 32
    layout: Literal["plain", "ddpm"] = "plain"  # ddpm: in details as the published weights of Ho et al. have them
    micro_conditions: bool = False  # tell the network the size and crop of each original; with text only
    gradient_checkpointing: bool = False  # compute blocks again in the backward pass: less memory, more time

    @property
    def conditioning(self) -> Conditioning:  # type: ignore[override]  # of other kinds it is fixed
        """What it is conditioned on."""
        return self.condition


UNET = NetworkSpec(
    config=UNetConfig,
    network=UNet,
    init_rule=init_rule,
    lora_targets={
        "attention": r"net\..*\.(to_q|to_k|to_v|to_out\.0)",
        "feed_forward": r"net\..*\.ff\.net\.(0\.proj|2)",
        "modulation": r"net\..*\.time_emb_proj",
    },
    tiny={"num_classes": 3, "block_channels": (32,), "layers_per_block": 1, "head_width": 32},
    tabulated=(
        (
            "unet",
            {**IMAGENET, "block_channels": (64, 128, 256), "layers_per_block": 2, "attention_levels": 2, "head_width": 32},
        ),
    ),
    stock=UNET_STOCK,
)
