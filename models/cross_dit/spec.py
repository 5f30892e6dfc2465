"""The cross-attention DiT in the house: its section of the recipe, and its forms elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from condot.core.model_config import Conditioning, ModelConfig
from condot.core.option_ranges import FloatRange, IntRange

from ..common.presets import CAPTIONED, PRESETS
from ..common.spec import NetworkSpec
from .convert import CROSS_DIT_CUSTOM, CROSS_DIT_STOCK
from .model import CrossDiT, init_rule


@dataclass(frozen=True, kw_only=True)
class CrossDiTConfig(ModelConfig):
    """A diffusion transformer with cross-attention to text, as PixArt has it: cheap text conditioning."""

    kind: Literal["cross_dit"] = "cross_dit"  # dit, cross_dit, mmdit or unet: the other kinds have fields of their own
    preset: str = "S/2"  # size / patch, as of dit
    patch_size: Annotated[int, IntRange("[1, inf)")] | None = None  # pixels (or latents) a side of one token; none: as the preset
    width: Annotated[int, IntRange("[1, inf)")] | None = None  # channels of a token; none: as the preset
    depth: Annotated[int, IntRange("[1, inf)")] | None = None  # blocks; none: as the preset
    heads: Annotated[int, IntRange("[1, inf)")] | None = None  # attention heads; they divide the width; none: as the preset
    qk_norm: bool = False  # divide queries and keys by their root mean square, against diverging attention
    # positions are divided by it; none: one for each 64 of the resolution, as PixArt has it
    interpolation_scale: Annotated[float, FloatRange("(0, inf)")] | None = None
    micro_conditions: bool = False  # tell the network the size and crop of each original
    gradient_checkpointing: bool = False  # compute blocks again in the backward pass: half the memory, a third more time

    conditioning: ClassVar[Conditioning] = "text"


CROSS_DIT = NetworkSpec(
    config=CrossDiTConfig,
    network=CrossDiT,
    init_rule=init_rule,
    presets=PRESETS,
    lora_targets={
        "attention": r"blocks\.\d+\.(attention\.(qkv|out)|cross\.(q|kv|out))",
        "feed_forward": r"blocks\.\d+\.feed_forward\.(enter|leave)",
        "modulation": r"modulation",
    },
    tiny={"text_width": 8, "pooled_width": 6, "patch_size": 2, "width": 16, "depth": 2, "heads": 2},
    tabulated=(("cross_dit S/2", {**CAPTIONED, "preset": "S/2"}),),
    stock=CROSS_DIT_STOCK,
    custom=CROSS_DIT_CUSTOM,
)
