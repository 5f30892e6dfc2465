"""Conditions as solvers and guidance handle them: a tensor of labels, or a tuple of tensors such as a text's.

What they mean is the network's business; here they are cut, repeated and put
one behind the other, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Condition = Any  # a Tensor (B, ...), or a tuple of Conditions


def map_condition(condition: Condition, act: Callable[[Tensor], Tensor]) -> Condition:
    """The same condition with every tensor changed."""
    if isinstance(condition, Tensor):
        return act(condition)
    return _like(condition, [map_condition(part, act) for part in condition])


def num_samples(condition: Condition) -> int:
    """Return the number of samples of a condition."""
    return len(condition) if isinstance(condition, Tensor) else num_samples(condition[0])


def repeat_condition(condition: Condition, times: int) -> Condition:
    """One sample's condition, (1, ...), for so many samples."""
    return map_condition(condition, lambda part: part.expand(times, *part.shape[1:]))


def concat_conditions(a: Condition, b: Condition) -> Condition:
    """(A, ...) and (B, ...) to (A + B, ...).

    Where the second sides differ, as of captions with more and fewer tokens,
    zeros go behind the shorter one: in a mask that is no token.

    Raises:
        ValueError: conditions of different make.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape[2:] != b.shape[2:] or a.ndim != b.ndim:
            raise ValueError(f"condition {tuple(a.shape)} and null {tuple(b.shape)} differ: give conditions of one make.")
        longest = max(a.shape[1], b.shape[1]) if a.ndim > 1 else 0
        return torch.cat([_longer(a, longest), _longer(b, longest)])
    if isinstance(a, Tensor) or isinstance(b, Tensor) or len(a) != len(b):
        raise ValueError("a condition is a tensor and the other a tuple, or they have different parts: give conditions of one make.")
    return _like(a, [concat_conditions(x, y) for x, y in zip(a, b, strict=True)])


def _longer(part: Tensor, length: int) -> Tensor:
    missing = length - part.shape[1] if part.ndim > 1 else 0
    return F.pad(part, (0, 0) * (part.ndim - 2) + (0, missing)) if missing else part


def _like(condition: tuple[Any, ...], parts: list[Any]) -> Any:
    make = getattr(condition, "_make", tuple)
    return make(parts)
