"""Divergence of a field: the trace of its Jacobian, by products and never by the Jacobian itself.

Exactly, with one product per dimension, or as the quadratic form
`v^T (grad f) v` along a random v of covariance I, whose mean is the trace.
Source: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix;
docs/mathematics.md sections 3 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MAX_EXACT_DIMENSIONS = 64  # dimensions: one derivative of the network for each

AutodiffMode = Literal["forward", "reverse"]


def check_exact_divergence(shape: tuple[int, ...], remedy: str) -> None:
    """A ValueError when a sample of this shape has too many dimensions for the exact trace."""
    size = math.prod(shape)
    if size > MAX_EXACT_DIMENSIONS:
        raise ValueError(
            f"an exact trace in {size} dimensions takes {size} derivatives of the network: the limit is {MAX_EXACT_DIMENSIONS}. {remedy}"
        )


def divergence(
    function: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None = None, mode: AutodiffMode = "reverse"
) -> tuple[Tensor, Tensor]:
    """A field and its divergence, both differentiable where gradients are on.

    Args:
        function: of x to the same shape, sample by sample.
        x: (B, *S).
        probe: v, (B, *S), mean 0 and covariance I; None for the exact trace.
        mode: `reverse` differentiates backwards; `forward` costs one forward
            pass per product and no graph of a graph, but needs every operation
            to have a forward derivative.

    Returns:
        f(x), (B, *S), and its divergence, (B,), 1 / units of x.

    Raises:
        ValueError: a probe of another shape; an unknown mode.
    """
    if probe is not None and probe.shape != x.shape:
        raise ValueError(f"probe {tuple(probe.shape)} beside x {tuple(x.shape)}: one random vector per sample, of its shape.")
    if mode not in ("forward", "reverse"):
        raise ValueError(f"mode={mode!r} of derivative products: choose forward or reverse.")
    products = _forward(function, x, probe) if mode == "forward" else _reverse(function, x, probe)
    return products


def _basis_vectors(x: Tensor) -> list[Tensor]:
    """One vector along each dimension of a sample, (1, *S) each."""
    return list(torch.eye(x[0].numel(), device=x.device, dtype=x.dtype).reshape(-1, 1, *x.shape[1:]))


def _inner_product(product: Tensor, v: Tensor) -> Tensor:
    return (product * v).flatten(1).sum(1)


def _forward(function: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    trace = x.new_zeros(len(x))
    value = x
    for v in _basis_vectors(x) if probe is None else [probe]:
        value, product = torch.func.jvp(function, (x,), (v.expand_as(x).contiguous(),))[:2]
        trace = trace + _inner_product(product, v)
    return value, trace


def _reverse(function: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        trace = x.new_zeros(len(x))
        if not value.requires_grad:  # a constant field
            return value, trace
        for v in _basis_vectors(x) if probe is None else [probe]:
            (product,) = torch.autograd.grad((value * v).sum(), x, create_graph=graph, retain_graph=True)
            trace = trace + _inner_product(product, v)
    return (value, trace) if graph else (value.detach(), trace.detach())
