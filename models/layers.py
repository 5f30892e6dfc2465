"""The parts a transformer is made of: patches, positions, norms, attention, the feed-forward net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .kernels import attend, gelu_tanh

EPSILON = 1e-6
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


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, times a weight.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPSILON)


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, D) -> (B, N, D).

    Source: Vaswani et al., section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v))


class FeedForward(nn.Module):
    """Two linear maps with a tanh-GELU between, four times as wide inside; any (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 4 * width)
        self.leave = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(gelu_tanh(self.enter(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then a shift and a scale per sample.

    Args:
        x: (B, N, D).
        shift, scale: (B, 1, D); zero leaves the norm as it is.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), 1 + scale)


def patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, N, C * size * size): tokens row by row, each its channels, then rows, then columns.

    The order in which a convolution of kernel and stride `size` reads them.
    """
    return rearrange(x, "b c (row p) (column q) -> b (row column) (c p q)", p=size, q=size)


def unpatch(x: Tensor, size: int, rows: int) -> Tensor:
    """(B, rows * columns, size * size * C) to (B, C, H, W): each token its rows, columns, channels, as DiT's last layer has it."""
    return rearrange(x, "b (row column) (p q c) -> b c (row p) (column q)", row=rows, p=size, q=size)
