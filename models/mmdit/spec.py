"""MM-DiT in the house: its section of the recipe, and its forms elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from condot.core.model_config import Conditioning, ModelConfig
from condot.core.option_ranges import FloatRange, IntRange

from ..common.presets import CAPTIONED
from ..common.spec import NetworkSpec
from .convert import MMDIT_CUSTOM, MMDIT_STOCK
from .model import MMDiT, init_rule


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(ModelConfig):
    """Image and text tokens that attend jointly, each with weights of their own, as Stable Diffusion 3 has it."""

    kind: Literal["mmdit"] = "mmdit"  # dit, cross_dit, mmdit or unet: the other kinds have fields of their own
    patch_size: Annotated[int, IntRange("[1, inf)")] = 2  # pixels (or latents) a side of one token
    width: Annotated[int, IntRange("[1, inf)")] = 384  # channels of a token
    depth: Annotated[int, IntRange("[1, inf)")] = 12  # blocks
    heads: Annotated[int, IntRange("[1, inf)")] = 6  # attention heads; they divide the width
    qk_norm: bool = True  # divide queries and keys by their root mean square, against diverging attention
    dual_attention_blocks: Annotated[int, IntRange("[0, inf)")] = 0  # the first so many attend to the image a second time, alone
    # positions are cut from the middle of a grid of so many tokens a side; 0: stretched over any shape
    position_grid: Annotated[int, IntRange("[0, inf)")] = 0
    # coordinate of that grid's first token, and the way to the next; none: as SD3 counts
    position_line: tuple[Annotated[float, FloatRange("(-inf, inf)")], Annotated[float, FloatRange("(-inf, inf)")]] | None = None
    micro_conditions: bool = False  # tell the network the size and crop of each original
    gradient_checkpointing: bool = False  # compute blocks again in the backward pass: half the memory, a third more time

    conditioning: ClassVar[Conditioning] = "text"


MMDIT = NetworkSpec(
    config=MMDiTConfig,
    network=MMDiT,
    init_rule=init_rule,
    lora_targets={
        "attention": r"blocks\.\d+\.((image|text)\.(heads\.linear|out)|own\.linear|own_out)",
        "feed_forward": r"blocks\.\d+\.(image|text)\.feed_forward\.(enter|leave)",
        "modulation": r"(blocks\.\d+\.(image|text)\.)?modulation",
    },
    tiny={"text_width": 8, "pooled_width": 6, "patch_size": 2, "width": 16, "depth": 2, "heads": 2},
    tabulated=(("mmdit", {**CAPTIONED, "patch_size": 2, "width": 384, "depth": 12, "heads": 6}),),
    stock=MMDIT_STOCK,
    custom=MMDIT_CUSTOM,
)
