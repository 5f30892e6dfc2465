"""The two inner loops of a transformer: attention over tokens, and the tanh-GELU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        mask: (B, M), bool: which keys may be looked at, at least one a sample; None for all.

    Returns:
        (B, N, heads * d).

    Source: Vaswani et al., Attention Is All You Need, section 3.2.
    """
    seen = None if mask is None else mask[:, None, None, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, which DiT, SD3 and PixArt are published with; any shape."""
    return F.gelu(x, approximate="tanh")
