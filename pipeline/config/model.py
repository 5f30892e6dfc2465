"""The section `model` of a recipe: one dataclass for each kind of network that `models.build` makes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from condot.core.option_ranges import FloatRange, IntRange, check_numbers

Conditioning = Literal["class", "text"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A diffusion transformer with adaLN-zero on classes; as published, it is exported to stock diffusers."""

    kind: Literal["dit"] = "dit"  # dit, cross_dit, mmdit or unet: the other kinds have fields of their own
    preset: str = "S/2"  # size / patch: S, B, L or XL / 1, 2, 4 or 8; `python -m condot.models.cost` prints what each costs
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

    def __post_init__(self) -> None:
        check_numbers(self, "model.")


@dataclass(frozen=True, kw_only=True)
class CrossDiTConfig:
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

    def __post_init__(self) -> None:
        check_numbers(self, "model.")


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
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

    def __post_init__(self) -> None:
        check_numbers(self, "model.")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
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

    def __post_init__(self) -> None:
        check_numbers(self, "model.")

    @property
    def conditioning(self) -> Conditioning:
        """What it is conditioned on."""
        return self.condition


ModelConfig = DiTConfig | CrossDiTConfig | MMDiTConfig | UNetConfig


def build_model_kwargs(
    model: ModelConfig, shape: tuple[int, int, int], num_classes: int, text: tuple[int, int] | None = None, objective: str = "regression"
) -> dict[str, Any]:
    """The arguments of `models.build`: a recipe's section `model`, and what the data say.

    Args:
        model: the section.
        shape: of a sample, (C, H, W), here square.
        num_classes: of the data.
        text: width of a token's state and of the pooled vector, where there is text.
        objective: flow.objective; a joint one asks for two outputs of each channel, velocity and score.

    Raises:
        ValueError: a network that takes text, and none.
    """
    options = {item.name: getattr(model, item.name) for item in fields(model)} | {"channels": shape[0], "resolution": shape[-1]}
    if objective == "joint":
        options["outputs"] = 2
    if model.conditioning == "class":
        return options | {"num_classes": num_classes}
    if text is None:
        raise ValueError(
            f"model.kind={model.kind} takes text, and data.text_encoder is empty: name a frozen text encoder, a folder or a Hub id."
        )
    return options | {"text_width": text[0], "pooled_width": text[1]}
