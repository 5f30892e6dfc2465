"""The parts a transformer is made of: patches, positions, norms, attention, feed-forward nets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import attend

NORM_EPSILON = 1e-6
"""Of every norm."""


def sincos_positions(
    width: int, rows: int, columns: int, *, start: tuple[float, float] = (0.0, 0.0), spacing: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Fixed two-dimensional positions: half of the channels tell the column, half the row, each as sines, then cosines.

    Args:
        width: channels, a multiple of 4.
        rows, columns: of tokens.
        start, spacing: row and column of the first token, and the way to the next.

    Returns:
        (rows * columns, width), float32; tokens row by row.

    Source: Vaswani et al., Attention Is All You Need, section 3.5, in two
    dimensions as in He et al., Masked Autoencoders.
    """
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))

    def axis(count: int, which: int) -> Tensor:
        angles = (start[which] + spacing[which] * torch.arange(count, dtype=torch.float64, device="cpu"))[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = axis(columns, 1)[None].expand(rows, columns, -1)
    down = axis(rows, 0)[:, None].expand(rows, columns, -1)
    return torch.cat([across, down], dim=2).reshape(rows * columns, width).float()


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions, (R, C, D), for a grid of another shape, (rows, columns, D): bicubic; themselves for their own."""
    if table.shape[:2] == (rows, columns):
        return table
    return F.interpolate(table.permute(2, 0, 1)[None], (rows, columns), mode="bicubic")[0].permute(1, 2, 0)


def rotary_tables(width: int, rows: int, columns: int, *, before: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines that `apply_rotary` turns the tokens of a grid by: half of the channels by the row, half by the column.

    Args:
        width: of a head, a multiple of 4.
        rows, columns: of tokens, read row by row.
        before: so many tokens stand before them, which are not turned.

    Returns:
        Two of (before + rows * columns, width / 2), float32.

    Source: Su et al., RoFormer, section 3.2, along two axes as in Heo et al.,
    Rotary Position Embedding for Vision Transformer, section 3.2 (theta 10000 here).
    """
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    down, across = (torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequencies for count in (rows, columns))
    grid = torch.cat([down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)], dim=2).flatten(0, 1)
    angles = torch.cat([grid.new_zeros(before, width // 2), grid])
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channel i and channel i + d / 2 of every token as one point of a plane.

    Args:
        x: (B, heads, N, d).
        cosine, sine: (N, d / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, times a weight; keeps the dtype.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), NORM_EPSILON).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, D) -> (B, N, D).

    Args:
        width, heads: channels of all heads together; heads.
        qk_norm: queries and keys are RMS-normed within each head.

    Source: Vaswani et al., section 3.2; the norm: Dehghani et al., Scaling
    Vision Transformers to 22 Billion Parameters, section 2.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = RMSNorm(width // heads) if qk_norm else None
        self.key_norm = RMSNorm(width // heads) if qk_norm else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`rotation`: what `rotary_tables` gives for the tokens; None for none."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            cosine, sine = (part.to(q.dtype) for part in rotation)
            q, k = apply_rotary(q, cosine, sine), apply_rotary(k, cosine, sine)
        return self.out(attend(q, k, v))


class FeedForward(nn.Module):
    """Two linear maps with a tanh-GELU between, four times as wide inside; any (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU("tanh")
        self.leave = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.gelu(self.enter(x)))


class SwiGLU(nn.Module):
    """A feed-forward net whose inside is the SiLU of one half times the other; any (..., D).

    Two thirds as wide inside as FeedForward, up to the next multiple of 8, so
    that its three maps cost what the two of FeedForward do.

    Source: Shazeer, GLU Variants Improve Transformer, section 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = -(-8 * width // 24) * 8
        self.enter = nn.Linear(width, 2 * inside)
        self.leave = nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.enter(x).chunk(2, dim=-1)
        return self.leave(F.silu(gate) * value)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rms: bool = False) -> Tensor:
    """LayerNorm without weights of its own, then a shift and a scale per sample.

    Args:
        x: (B, N, D).
        shift, scale: (B, 1, D); zero leaves the norm as it is.
        rms: division by the root mean square instead, the mean stays.
    """
    norm = F.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON) if rms else F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)
    return torch.addcmul(shift, norm, 1 + scale)


def patchify(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, N, C * size * size): tokens row by row, each its channels, then rows, then columns.

    The order in which a convolution of kernel and stride `size` reads them.
    """
    cut = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # B, C, rows, size, columns, size
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def patch_embed(linear: nn.Linear, x: Tensor, size: int) -> Tensor:
    """The tokens of an image, (B, N, D), as precise as the weights are.

    Under autocast the products of every block are bf16, the sum that goes
    through all of them is not: for 1 % of time on a CPU the output of a DiT-S
    errs 0.5 % instead of 1.3 %, its gradients 0.3 % instead of 0.6 %. That
    holds too where FSDP2 has gathered the weights in bf16.
    """
    return linear(patchify(x, size)).to(residual_dtype(linear, x))


def residual_dtype(linear: nn.Linear, x: Tensor) -> torch.dtype:
    """The precision of what goes through all blocks: that of the weights, under autocast float32."""
    return torch.float32 if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type) else linear.weight.dtype


def unpatchify(x: Tensor, size: int, rows: int) -> Tensor:
    """(B, rows * columns, size * size * C) to (B, C, H, W): each token its rows, columns, channels, as DiT's last layer has it."""
    cut = x.unflatten(2, (size, size, -1)).unflatten(1, (rows, -1))  # B, rows, columns, size, size, C
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
