"""The two inner loops of a transformer, attention over tokens and the tanh-GELU, each in the form that its device runs fastest.

Which form that is depends on device, dtype and sizes alone, so that a run is
repeated bit by bit. benchmarks/train_step.py measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCORES = 2**24
"""How many scores are kept whole in bf16 on a CPU: two to eight times as fast as scaled_dot_product_attention; with more, no faster."""
SMALL_INPUT = 2**16
"""Numbers below which torch's own GELU is faster, for it is one call."""
CHUNK = 2**18
"""Numbers a thread that go through GELU together, in float32, so that every step but the first finds them in the cache."""
SLOPE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    In bf16 on a CPU the scores are bf16 too, as those of a matmul under
    autocast are; elsewhere as scaled_dot_product_attention has them.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        mask: (B, M), bool: which keys may be looked at, at least one a sample; None for all.

    Returns:
        (B, N, heads * d).

    Source: Vaswani et al., Attention Is All You Need, section 3.2.
    """
    key_mask = None if mask is None else mask[:, None, None, :]
    if _materialises_scores(q, k):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        y = (scores if key_mask is None else scores.masked_fill(~key_mask, -math.inf)).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    return y.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def _materialises_scores(q: Tensor, k: Tensor) -> bool:
    """Whether matmul, softmax, matmul is the fastest form."""
    if not _on_cpu(q):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return dtype == torch.bfloat16 and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= MAX_SCORES


def _on_cpu(x: Tensor) -> bool:
    """Whether the forms for CPUs are taken; memory.py asks for the others without a GPU."""
    return x.device.type == "cpu"


class TanhGELU(nn.GELU):
    """`gelu_tanh` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu_tanh(input)


def use_fast_gelu(network: nn.Module) -> nn.Module:
    """Give every tanh-GELU of a network, in place, the form that its device runs fastest; it computes what it did, to rounding.

    Networks are made of torch's own, so that an exported one needs none of this.
    """
    for owner in list(network.modules()):
        for name, child in owner.named_children():
            if type(child) is nn.GELU and child.approximate == "tanh":
                setattr(owner, name, TanhGELU("tanh"))
    return network


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, which DiT, SD3 and PixArt are published with; any shape.

    With 1 + tanh(u) = 2 sigmoid(2 u) it is x sigmoid(y), y = 2 sqrt(2 / pi) (x + 0.044715 x^3):
    on a CPU sigmoid is several times as fast as tanh, and does not cancel.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, section 2.
    """
    if not _on_cpu(x):
        return F.gelu(x, approximate="tanh")
    if torch.compiler.is_compiling():
        return _gelu_and_derivative(x)[0]
    if x.numel() < SMALL_INPUT:
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x, torch.is_grad_enabled() and x.requires_grad)[0]  # type: ignore[no-untyped-call]


def _gelu_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative, s (1 + x y' (1 - s)) with x y' = 3 y - 4 sqrt(2 / pi) x; differentiable, for a compiler to fuse."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = SLOPE * (wide + CUBE * wide * wide * wide)
    s = torch.sigmoid(y)
    return (wide * s).to(x.dtype), s * (1 + (3 * y - 2 * SLOPE * wide) * (1 - s))


class _Gelu(torch.autograd.Function):
    """GELU that finds its derivative on the way forward, where the sigmoid is at hand; backwards it is one product.

    x is kept for those who differentiate the derivative.
    """

    @staticmethod
    def forward(x: Tensor, differentiated: bool) -> tuple[Tensor, Tensor | None]:
        return _in_chunks(x, differentiated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor | None]) -> None:
        x, derivative = inputs[0], output[1]
        if derivative is not None:
            ctx.mark_non_differentiable(derivative)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, derivative)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        x, derivative = ctx.saved_tensors
        if gradient is None:
            return None, None
        if torch.is_grad_enabled() or derivative is None:
            return (gradient * _gelu_and_derivative(x)[1]).to(x.dtype), None
        return gradient * derivative, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (tangent * _gelu_and_derivative(x)[1]).to(x.dtype), None


def _chunks(x: Tensor, size: int) -> Sequence[Tensor]:
    return x.reshape(-1).split(size)


def _in_chunks(x: Tensor, differentiated: bool) -> tuple[Tensor, Tensor | None]:
    """GELU and, if it will be differentiated, its derivative; a chunk passes through every step before the next one begins."""
    value = torch.empty_like(x, memory_format=torch.contiguous_format)
    derivative = torch.empty_like(value) if differentiated else None
    size = CHUNK * torch.get_num_threads()
    buffers = [torch.empty(min(size, x.numel()), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3)]
    for i, part in enumerate(_chunks(x, size)):
        wide, y, s = (place[: len(part)] for place in buffers)
        here = slice(i * size, i * size + len(part))
        wide.copy_(part)
        torch.addcmul(wide, wide, torch.mul(wide, wide, out=y), value=CUBE, out=y).mul_(SLOPE)
        torch.sigmoid(y, out=s)
        torch.mul(wide, s, out=value.view(-1)[here])
        if derivative is not None:
            y.mul_(3).sub_(wide, alpha=2 * SLOPE)
            derivative.view(-1)[here] = s.addcmul_(s, y.addcmul_(y, s, value=-1))
    return value, derivative
