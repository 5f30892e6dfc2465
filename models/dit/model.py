"""The diffusion transformer with adaLN-zero: every block is shifted, scaled and gated by time and class.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers, section
3.2; each option of the constructor names its own. One embedding of time and
class serves all blocks; the class is dropped by the caller, once per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common.conditioning import SizeEmbedding, TimeAndClassEmbedding, TimeEmbedding, TimeEmbeddingKind
from ..common.init import InitMethod
from ..common.layers import (
    Attention,
    FeedForward,
    SwiGLU,
    modulate,
    patch_embed,
    resize_positions,
    rotary_tables,
    sincos_positions,
    unpatchify,
)
from ..common.position_embedding import check_sizes

PositionKind = Literal["sincos", "learned", "none"]
Rotation = tuple[Tensor, Tensor]


class ScaleShiftTable(nn.Module):
    """A block's own table on top of the modulation that all blocks share, (B, 6 D) -> (B, 6 D).

    Source: Chen et al., PixArt-alpha, section 2.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.table.flatten().to(shared.dtype)


class Block(nn.Module):
    """Attention and feed-forward net, both modulated; the identity at the start.

    Args:
        width, heads: of its tokens.
        qk_norm, swiglu, rms_norm, shared_modulation: as in DiT.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, swiglu: bool, rms_norm: bool, shared_modulation: bool) -> None:
        super().__init__()
        self.rms = rms_norm
        self.attention = Attention(width, heads, qk_norm)
        self.feed_forward = SwiGLU(width) if swiglu else FeedForward(width)
        self.modulation = ScaleShiftTable(width) if shared_modulation else nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation | None = None) -> Tensor:
        """x (B, N, D), condition (B, D) after its SiLU, or the shared modulation (B, 6 D) -> (B, N, D)."""
        m = self.modulation(condition)[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, m[2], self.attention(modulate(x, m[0], m[1], self.rms), rotation))
        return torch.addcmul(x, m[5], self.feed_forward(modulate(x, m[3], m[4], self.rms)))


class DiT(nn.Module):
    """A class-conditional DiT.

    Args:
        channels: of an image.
        resolution: pixels a side.
        num_classes: 0 for an unconditional model.
        patch_size: pixels a side of a token.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        qk_norm: RMS norms of queries and keys, against logits that grow.
        rope: queries and keys are rotated by row and column.
        swiglu: gated feed-forward nets, of the same cost.
        rms_norm: the norms before a modulation keep the mean.
        registers: so many learned tokens more, cut off at the end (Darcet et al., Vision Transformers Need Registers).
        positions: added to the tokens: fixed, learned (resized bicubically for other grids), or none.
        shared_modulation: one map from the condition to the modulation of all blocks, and a table of each block's own.
        clock: how time is embedded.
        own_conditions: each block embeds time and class itself, as diffusers' class does when its weights are
            drawn at random; the last layer goes by the first block's.
        micro_conditions: sizes of the original, the crop and the image are added to the condition.
        gradient_checkpointing: the inside of a block is computed again in the backward pass instead of kept.
        outputs: predictions a channel, one after another: 2 for velocity and score, laid out as a stock DiT's learned variances.

    Raises:
        ValueError: sizes that do not divide one another, options that exclude one another.
    """

    conditioning: Literal["class"] = "class"

    def __init__(
        self,
        *,
        channels: int,
        resolution: int,
        num_classes: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
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
        gradient_checkpointing: bool = False,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(resolution=resolution, patch_size=patch_size, width=width, depth=depth, heads=heads, rope=rope)
        _check_options(registers, positions, rope, shared_modulation, own_conditions)
        self.channels, self.resolution, self.num_classes, self.patch_size = channels, resolution, num_classes, patch_size
        self.outputs = outputs
        self.rope, self.rms_norm, self.clock, self.own_conditions, self.head_width = rope, rms_norm, clock, own_conditions, width // heads
        self.micro_conditions, self.gradient_checkpointing = micro_conditions, gradient_checkpointing
        if own_conditions:
            self.conditions = nn.ModuleList(TimeAndClassEmbedding(width, num_classes, clock) for _ in range(depth))
        else:
            self.time = TimeEmbedding(width, clock)
            self.classes = nn.Embedding(num_classes + 1, width)
        self.sizes = SizeEmbedding(width) if micro_conditions else None
        self.enter = nn.Linear(channels * patch_size**2, width)
        side = resolution // patch_size
        self.positions = nn.Parameter(torch.zeros(side, side, width)) if positions == "learned" else None
        self.fixed_positions = positions == "sincos"
        self.registers = nn.Parameter(torch.zeros(registers, width)) if registers else None
        self.shared_modulation = nn.Linear(width, 6 * width) if shared_modulation else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm, swiglu, rms_norm, shared_modulation) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, outputs * channels * patch_size**2)
        self._cache: dict[tuple[str, int, int, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    @property
    def size_multiple(self) -> int:
        """The sides of an image are multiples of it."""
        return self.patch_size

    def _cached(self, what: str, rows: int, columns: int, like: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` makes for a grid of tokens, as `like` is; made once."""
        key = what, rows, columns, like.device, like.dtype
        if key not in self._cache:
            with torch.inference_mode(False):  # what is made while sampling serves training too
                self._cache[key] = tuple(part.to(like) for part in make())
        return self._cache[key]

    def _rotation(self, rows: int, columns: int, like: Tensor) -> Rotation:
        registers = 0 if self.registers is None else len(self.registers)
        cosine, sine = self._cached(
            "rotation", rows, columns, like, lambda: rotary_tables(self.head_width, rows, columns, before=registers)
        )
        return cosine, sine

    def _tokens(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(B, C, H, W) to (B, registers + rows * columns, D)."""
        h = patch_embed(self.enter, x, self.patch_size)
        if self.positions is not None:
            h = h + resize_positions(self.positions, rows, columns).flatten(0, 1).to(h.dtype)
        elif self.fixed_positions:
            h = h + self._cached("positions", rows, columns, h, lambda: (sincos_positions(self.enter.out_features, rows, columns),))[0]
        if self.registers is not None:
            h = torch.cat([self.registers.to(h.dtype).expand(len(h), -1, -1), h], dim=1)
        return h

    def _conditions(self, t: Tensor, labels: Tensor, sizes: Tensor | None) -> list[Tensor]:
        """What each block goes by, (B, D) after its SiLU; one and the same unless they embed it themselves."""
        each = [embed(t, labels) for embed in self.conditions] if self.own_conditions else [self.time(t) + self.classes(labels)]
        if self.sizes is not None:
            if sizes is None:
                raise ValueError(
                    "sizes=None: a network with model.micro_conditions takes (B, 6) sizes in pixels. Give them, or switch it off."
                )
            more = self.sizes(sizes)
            each = [condition + more for condition in each]
        each = [F.silu(condition) for condition in each]
        return each if self.own_conditions else each * len(self.blocks)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The prediction.

        Args:
            x: (B, channels, H, W), sides multiples of the patch size; `resolution` is the usual one.
            t: (B,), 0 (noise) to 1 (data).
            condition: labels, (B,), int64, 0 .. num_classes; num_classes is none.
            sizes: (B, 6), pixels, with micro_conditions.

        Returns:
            The shape of x.
        """
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        conditions = self._conditions(t, condition, sizes)
        shift, scale = self.modulation(conditions[0])[:, None].chunk(2, dim=2)
        if self.shared_modulation is not None:
            conditions = [self.shared_modulation(conditions[0])] * len(self.blocks)
        h = self._tokens(x, rows, columns)
        rotation = self._rotation(rows, columns, h) if self.rope else None
        for block, own in zip(self.blocks, conditions, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, own, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, own, rotation)
        h = modulate(h[:, h.shape[1] - rows * columns :], shift, scale, self.rms_norm)
        return unpatchify(self.leave(h), self.patch_size, rows)


def init_rule(name: str) -> InitMethod:
    """Return how a parameter begins: the linear maps Xavier's way; every modulation and the output at zero, so that the network does."""
    if name.endswith("bias") or "modulation" in name or name.startswith(("leave.", "sizes.leave.")):
        return "zero"
    if "_norm." in name:
        return "one"
    return "normal" if name.startswith(("time.", "classes.", "conditions.", "sizes.", "positions", "registers")) else "xavier"


def _check_options(registers: int, positions: PositionKind, rope: bool, shared_modulation: bool, own_conditions: bool) -> None:
    if registers < 0:
        raise ValueError(f"model.registers={registers}: a number of tokens. Use 0 for none, or 4.")
    if positions not in ("sincos", "learned", "none"):
        raise ValueError(f"model.positions={positions!r} is unknown: choose sincos, learned or none.")
    if positions == "none" and not rope:
        raise ValueError("model.positions='none' without model.rope: tokens would not know their places. Set model.rope=true, or sincos.")
    if shared_modulation and own_conditions:
        raise ValueError(
            "model.own_conditions=True with model.shared_modulation: one map cannot go by as many conditions as blocks. Choose one of them."
        )
