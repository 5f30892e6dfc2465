"""Stable Diffusion 3's transformer: image and text attend to one another as one sequence, each with weights of its own.

Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution
Image Synthesis, section 4; laid out as diffusers' SD3Transformer2DModel.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from condot.core.text_states import TextStates

from ..common.conditioning import EmbeddingMLP, SizeEmbedding, TimeEmbedding, check_text_widths, require_sizes
from ..common.init import InitMethod
from ..common.kernels import attend
from ..common.layers import FeedForward, RMSNorm, modulate, patch_embed, residual_dtype, unpatchify
from ..common.position_embedding import PositionEmbedding, check_sizes


class QKVProjection(nn.Module):
    """Queries (if wanted), keys and values of one kind of token, (B, N, D) -> 3 or 2 times (B, N, heads, D / heads)."""

    def __init__(self, width: int, heads: int, qk_norm: bool, queries: bool = True) -> None:
        super().__init__()
        self.heads, self.parts = heads, 3 if queries else 2
        self.linear = nn.Linear(width, self.parts * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm and queries else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None

    def forward(self, x: Tensor) -> list[Tensor]:
        *q, k, v = self.linear(x).unflatten(2, (self.parts, self.heads, -1)).unbind(2)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.q_norm is not None:
            q = [self.q_norm(part) for part in q]
        return [*q, k, v]


class ModalityStream(nn.Module):
    """What one kind of token has of its own in a block; `is_last` where nothing but its keys and values is wanted."""

    def __init__(self, width: int, heads: int, qk_norm: bool, modulations: int, is_last: bool = False) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, modulations * width)
        self.heads = QKVProjection(width, heads, qk_norm, queries=not is_last)
        if not is_last:
            self.out = nn.Linear(width, width)
            self.feed_forward = FeedForward(width)


class Block(nn.Module):
    """One attention over both kinds of tokens, then a feed-forward net of each; the identity at the start.

    Args:
        width, heads, qk_norm: as in MMDiT.
        is_last: after the last block nobody looks at the text.
        dual: image tokens also attend among themselves alone, beside the joint attention.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, is_last: bool, dual: bool) -> None:
        super().__init__()
        self.image = ModalityStream(width, heads, qk_norm, 9 if dual else 6)
        self.text = ModalityStream(width, heads, qk_norm, 2 if is_last else 6, is_last)
        self.own = QKVProjection(width, heads, qk_norm) if dual else None
        self.own_out = nn.Linear(width, width) if dual else None
        self.is_last = is_last

    def forward(self, x: Tensor, c: Tensor, condition: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), c (B, L, D), condition (B, D) after its SiLU, mask (B, N + L) or None for all -> new x, new c."""
        m = self.image.modulation(condition)[:, None].chunk(9 if self.own is not None else 6, dim=2)
        n = self.text.modulation(condition)[:, None].chunk(2 if self.is_last else 6, dim=2)
        image_qkv = self.image.heads(modulate(x, m[0], m[1]))
        text_qkv = self.text.heads(modulate(c, n[0], n[1]))
        k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image_qkv[-2:], text_qkv[-2:], strict=True))
        q = image_qkv[0] if self.is_last else torch.cat([image_qkv[0], text_qkv[0]], dim=1)
        y = attend(q.transpose(1, 2), k, v, mask)

        mixed = torch.addcmul(x, m[2], self.image.out(y[:, : x.shape[1]]))
        if self.own is not None and self.own_out is not None:
            q, k, v = (part.transpose(1, 2) for part in self.own(modulate(x, m[6], m[7])))
            mixed = torch.addcmul(mixed, m[8], self.own_out(attend(q, k, v)))
        mixed = torch.addcmul(mixed, m[5], self.image.feed_forward(modulate(mixed, m[3], m[4])))
        if self.is_last:
            return mixed, c
        c = torch.addcmul(c, n[2], self.text.out(y[:, x.shape[1] :]))
        return mixed, torch.addcmul(c, n[5], self.text.feed_forward(modulate(c, n[3], n[4])))


class MMDiT(nn.Module):
    """A text-conditional transformer over image and text tokens together.

    Args:
        channels, resolution: of an image; pixels a side.
        text_width: channels of a text token.
        pooled_width: channels of the pooled text, which joins time in every modulation.
        patch_size, width, depth, heads: as in DiT.
        qk_norm: queries and keys are divided by their root mean square, which keeps bfloat16 attention finite.
        dual_attention_blocks: so many of the first blocks have a second attention, of the image alone (SD3.5-medium).
        position_grid: tokens a side of the grid whose middle an image takes (SD3's pos_embed_max_size); 0 for none:
            then positions are stretched over images of another shape.
        position_line: coordinate of that grid's first token, and the way to the next; None as diffusers counts,
            from 0 to the tokens a side of the usual image. Published SD3 weights are read with theirs.
        micro_conditions: the original's size and crop join the conditioning.
        gradient_checkpointing: blocks are computed again on the way back instead of kept.
        outputs: as in DiT.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    conditioning: Literal["text"] = "text"
    num_classes = 0

    def __init__(
        self, *, channels: int, resolution: int, text_width: int, pooled_width: int, patch_size: int = 2, width: int = 384,
        depth: int = 12, heads: int = 6, qk_norm: bool = True, dual_attention_blocks: int = 0, position_grid: int = 0,
        position_line: tuple[float, float] | None = None, micro_conditions: bool = False, gradient_checkpointing: bool = False,
        outputs: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(resolution=resolution, patch_size=patch_size, width=width, depth=depth, heads=heads)
        check_text_widths(text_width, pooled_width)
        tokens = resolution // patch_size
        if not 0 <= dual_attention_blocks <= depth:
            raise ValueError(f"model.dual_attention_blocks={dual_attention_blocks}: of {depth} blocks, so 0 to {depth}.")
        if position_grid and position_grid < tokens:
            raise ValueError(f"model.position_grid={position_grid}: an image has {tokens} tokens a side. Use at least that, or 0 for none.")
        self.channels, self.resolution, self.patch_size, self.outputs = channels, resolution, patch_size, outputs
        self.micro_conditions, self.gradient_checkpointing = micro_conditions, gradient_checkpointing
        self.time = TimeEmbedding(width, "original")
        self.pooled = EmbeddingMLP(pooled_width, width)
        self.sizes = SizeEmbedding(width) if micro_conditions else None
        self.text = nn.Linear(text_width, width)
        self.enter = nn.Linear(channels * patch_size**2, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, qk_norm=qk_norm, is_last=i == depth - 1, dual=i < dual_attention_blocks) for i in range(depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, outputs * channels * patch_size**2)
        line = position_line or (0.0, tokens / max(position_grid, 1))
        self.positions = PositionEmbedding(width, span=tokens, grid=position_grid, line=line)

    @property
    def size_multiple(self) -> int:
        """The sides of an image are multiples of it."""
        return self.patch_size

    def forward(self, x: Tensor, t: Tensor, condition: TextStates, sizes: Tensor | None = None) -> Tensor:
        """The prediction.

        Args:
            x: (B, channels, H, W), sides multiples of the patch size; `resolution` is the usual one.
            t: (B,), 0 (noise) to 1 (data).
            condition: captions; tokens outside the mask are never looked at.
            sizes: (B, 6), pixels, where there are micro-conditions.

        Returns:
            The shape of x.
        """
        condition = TextStates(*condition)
        embedding = self.time(t) + self.pooled(condition.pooled)
        if self.sizes is not None:
            embedding = embedding + self.sizes(require_sizes(sizes))
        embedding = F.silu(embedding)
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        h = patch_embed(self.enter, x, self.patch_size)
        h = h + self.positions.for_grid(rows, columns, h)
        c = self.text(condition.states.to(self.text.weight.dtype)).to(residual_dtype(self.text, x))
        attention_mask = condition.attention_mask
        mask = None if attention_mask is None else torch.cat([attention_mask.new_ones(h.shape[:2]), attention_mask], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h, c = checkpoint(block, h, c, embedding, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                h, c = block(h, c, embedding, mask)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        return unpatchify(self.leave(modulate(h, shift, scale)), self.patch_size, rows)


def init_rule(name: str) -> InitMethod:
    """Return how a parameter begins: the linear maps Xavier's way; every modulation and the output at zero, so that the network does."""
    if name.endswith("norm.weight"):
        return "one"
    if name.endswith("bias") or "modulation" in name or name.startswith(("leave.", "sizes.leave.")):
        return "zero"
    return "normal" if name.startswith(("time.", "pooled.", "sizes.")) else "xavier"
