"""DiT in the house: its section of the recipe, and its forms elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from condot.core.model_config import Conditioning, ModelConfig
from condot.core.option_ranges import IntRange

from ..common.presets import IMAGENET, PRESETS
from ..common.spec import NetworkSpec
from .convert import DIT_CUSTOM, DIT_STOCK
from .model import DiT, init_rule
from .original import DIT_ORIGINAL


@dataclass(frozen=True, kw_only=True)
class DiTConfig(ModelConfig):
    """A diffusion transformer with adaLN-zero on classes; as published, it is exported to stock diffusers."""

    kind: Literal["dit"] = "dit"  # dit, cross_dit, mmdit or unet: the other kinds have fields of their own
    preset: str = "S/2"  # size / patch: S, B, L or XL / 1, 2, 4 or 8; `python -m models.cost` prints what each costs
    style: Literal["dit", "modern"] = "dit"  # dit: as published; modern: qk_norm, rope, swiglu and rms_norm, which train faster
    patch_size: Annotated[int, IntRange("[1, inf)")] | None = None  # pixels (or latents) a side of one token; none: as the preset
    width: Annotated[int, IntRange("[1, inf)")] | None = None  # channels of a token; none: as the preset
    depth: Annotated[int, IntRange("[1, inf)")] | None = None  # blocks; none: as the preset
    heads: Annotated[int, IntRange("[1, inf)")] | None = None  # attention heads; they divide the width; none: as the preset
    qk_norm: bool | None = None  # divide queries and keys by their root mean square, against diverging attention; none: as the style
    rope: bool | None = None  # turn queries and keys by their place, row and column; none: as the style
    swiglu: bool | None = None  # a gated feed-forward net in place of the GELU one, of the same cost; none: as the style
    rms_norm: bool | None = None  # root mean squares in place of LayerNorm; none: as the style
    shared_modulation: bool | None = None  # one modulation for all blocks, plus a table a block: fewer parameters; none: as the style
    registers: Annotated[int, IntRange("[0, inf)")] = 0  # learned tokens beside the image's
    positions: Literal["sincos", "learned", "none"] = "sincos"  # added to the tokens
    clock: Literal["diffusers", "original", "sit"] = "diffusers"  # how time is embedded; original: DiT's own weights, sit: SiT's
    own_conditions: bool = False  # every block embeds time and class itself, as an untied stock class does
    micro_conditions: bool = False  # tell the network the size and crop of each original
    gradient_checkpointing: bool = False  # compute blocks again in the backward pass: half the memory, a third more time

    conditioning: ClassVar[Conditioning] = "class"


DIT = NetworkSpec(
    config=DiTConfig,
    network=DiT,
    init_rule=init_rule,
    presets=PRESETS,
    styles={
        "dit": {},
        # what Yao and Wang, Reconstruction vs. Generation (LightningDiT), table 2, found to train faster at the same cost
        "modern": {"qk_norm": True, "rope": True, "swiglu": True, "rms_norm": True},
    },
    lora_targets={
        "attention": r"blocks\.\d+\.attention\.(qkv|out)",
        "feed_forward": r"blocks\.\d+\.feed_forward\.(enter|leave)",
        "modulation": r"(blocks\.\d+\.|shared_)?modulation",
    },
    tiny={"num_classes": 3, "patch_size": 2, "width": 16, "depth": 2, "heads": 2},
    tabulated=(
        ("dit S/2", {**IMAGENET, "preset": "S/2"}),
        ("dit S/2, modern", {**IMAGENET, "preset": "S/2", "style": "modern"}),
    ),
    is_stage=lambda name: not name.startswith("conditions"),  # of own_conditions: each embeds time and class
    stock=DIT_STOCK,
    custom=DIT_CUSTOM,
    checkpoint=DIT_ORIGINAL,
)
