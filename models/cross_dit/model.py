"""A diffusion transformer that looks at text by cross-attention, all blocks modulated by one map of the time: PixArt's form.

Source: Chen et al., PixArt-alpha: Fast Training of Diffusion Transformer for
Photorealistic Text-to-Image Synthesis, section 2.3; laid out as diffusers'
PixArtTransformer2DModel. Text costs only its own keys and values here, where
MM-DiT carries every token of it through every layer.
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
from ..common.layers import Attention, FeedForward, RMSNorm, modulate, patch_embed, unpatchify
from ..common.position_embedding import PositionEmbedding, check_sizes


class CaptionProjection(EmbeddingMLP):
    """Text states, (B, L, inputs), to (B, L, width): two linear maps with a tanh-GELU between."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.gelu = nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.gelu(self.enter(x.to(self.enter.weight.dtype))))


class CrossAttention(nn.Module):
    """Image tokens look at text tokens: x (B, N, D), c (B, L, D), mask (B, L) or None for all -> (B, N, D)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.query_norm = RMSNorm(width // heads) if qk_norm else None
        self.key_norm = RMSNorm(width // heads) if qk_norm else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(c).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return self.out(attend(q, k, v, mask))


class Block(nn.Module):
    """Attention, cross-attention and feed-forward net; the identity at the start."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, qk_norm)
        self.cross = CrossAttention(width, heads, qk_norm)
        self.feed_forward = FeedForward(width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, c: Tensor, shared: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), c (B, L, D), shared (B, 6, D), mask (B, L) or None for all -> (B, N, D)."""
        m = (shared + self.table.to(shared.dtype)).chunk(6, dim=1)
        x = torch.addcmul(x, m[2], self.attention(modulate(x, m[0], m[1])))
        x = x + self.cross(x, c, mask)
        return torch.addcmul(x, m[5], self.feed_forward(modulate(x, m[3], m[4])))


class CrossDiT(nn.Module):
    """A text-conditional DiT with cross-attention. Pooled text is not used: the modulation knows the time alone.

    Args:
        channels, resolution: of an image; pixels a side.
        text_width: channels of a text token.
        pooled_width: channels of the pooled text, for the interface's sake.
        patch_size, width, depth, heads, qk_norm: as in DiT.
        interpolation_scale: positions are divided by it; None as PixArt has it, by one for each 64 of the resolution.
        micro_conditions: the original's size and crop join the time.
        gradient_checkpointing: blocks are computed again on the way back instead of kept.
        outputs: as in DiT.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    conditioning: Literal["text"] = "text"
    num_classes = 0

    def __init__(
        self, *, channels: int, resolution: int, text_width: int, pooled_width: int, patch_size: int, width: int, depth: int, heads: int,
        qk_norm: bool = False, interpolation_scale: float | None = None, micro_conditions: bool = False,
        gradient_checkpointing: bool = False, outputs: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(resolution=resolution, patch_size=patch_size, width=width, depth=depth, heads=heads)
        check_text_widths(text_width, pooled_width)
        self.channels, self.resolution, self.patch_size, self.qk_norm = channels, resolution, patch_size, qk_norm
        self.outputs = outputs
        self.micro_conditions, self.gradient_checkpointing, self.pooled_width = micro_conditions, gradient_checkpointing, pooled_width
        self.interpolation_scale = interpolation_scale or max(resolution // 64, 1)
        self.time = TimeEmbedding(width, "original")
        self.sizes = SizeEmbedding(width) if micro_conditions else None
        self.text = CaptionProjection(text_width, width)
        self.enter = nn.Linear(channels * patch_size**2, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
        self.table = nn.Parameter(torch.zeros(2, width))
        self.leave = nn.Linear(width, outputs * channels * patch_size**2)
        self.positions = PositionEmbedding(width, span=resolution // patch_size / self.interpolation_scale)

    @property
    def size_multiple(self) -> int:
        """The sides of an image are multiples of it."""
        return self.patch_size

    def forward(self, x: Tensor, t: Tensor, condition: TextStates, sizes: Tensor | None = None) -> Tensor:
        """The prediction; arguments as in MMDiT."""
        time = self.time(t)
        if self.sizes is not None:
            time = time + self.sizes(require_sizes(sizes))
        shared = self.modulation(F.silu(time)).unflatten(1, (6, -1))
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        h = patch_embed(self.enter, x, self.patch_size)
        h = h + self.positions.for_grid(rows, columns, h)
        condition = TextStates(*condition)
        c, mask = self.text(condition.states), condition.attention_mask
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, shared, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c, shared, mask)
        shift, scale = (time[:, None] + self.table.to(time.dtype)).chunk(2, dim=1)
        return unpatchify(self.leave(modulate(h, shift, scale)), self.patch_size, rows)


def init_rule(name: str) -> InitMethod:
    """Return how a parameter begins: the linear maps Xavier's way; modulations, what text adds and the output at zero."""
    if "_norm." in name:
        return "one"
    if name.endswith(("bias", "table")) or "cross.out." in name or name.startswith(("modulation.", "leave.", "sizes.leave.")):
        return "zero"
    return "normal" if name.startswith(("time.", "text.", "sizes.")) else "xavier"
