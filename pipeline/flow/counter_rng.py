"""Random numbers that are a function of where they are used, not of what was drawn before.

A draw is named by whole numbers: (seed, purpose, step, index of the sample in
the global batch). Nothing else decides it: not the rank, not the batch it is
computed in, not how often a run was stopped. No generator has a state, so
there is none to save.

The numbers are SplitMix64's: a counter walked in steps of the golden ratio and
hashed. Each name is folded into the 64-bit start of a sequence of its own; the
CPU generator of torch keeps only 32 bits of a seed, which would repeat the
noise of some samples within 100,000 of them.
Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators;
Box and Muller, A Note on the Generation of Random Normal Deviates.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MASK64 = (1 << 64) - 1
_MIX1 = -0x40A7B892E31B1A47
_MIX2 = -0x6B2FB644ECCEEE15


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    NOISE = 1
    TIME = 2
    CONDITION_DROP = 3
    INITIAL = 4
    DIFFUSION = 5
    PROBE = 6
    COUPLING = 7
    POSTERIOR = 8
    ENCODER_DROP = 9


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: a bijection of 64-bit integers that changes half the bits for one."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_MIX1)
    x.bitwise_xor_(_shift(x, 27)).mul_(_MIX2)
    return x.bitwise_xor_(_shift(x, 31))


def _fold_in(key: int, part: int) -> int:
    """One whole number folded into a key: `_mix((key ^ part) + golden)` in Python's integers, as a signed 64-bit one."""
    x = ((key ^ part) + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    x ^= x >> 31
    return x - ((x >> 63) << 64)


def _keys(seed: int, purpose: Purpose, step: int, index: Tensor) -> Tensor:
    """One 64-bit start per sample, (B,); `index` is (B,) of whole numbers."""
    if index.ndim != 1 or index.is_floating_point():
        raise ValueError(
            f"index has shape {tuple(index.shape)} and dtype {index.dtype}: one whole number per sample, (B,). Use torch.arange."
        )
    key = _fold_in(_fold_in(_fold_in(0, seed), int(purpose)), step)
    return _mix((index.to(torch.int64) ^ key).add_(_GOLDEN))


def _bits(keys: Tensor, count: int) -> Tensor:
    """`count` hashed 64-bit integers for each key: (B, count)."""
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    return _mix(counter.mul_(_GOLDEN) + keys[:, None])


def uniform(seed: int, purpose: Purpose, step: int, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers for each sample; one, unless a shape is given.

    Args:
        seed: the run's seed, any 64-bit integer.
        purpose: what the number is for.
        step: optimiser or solver step.
        index: position of each sample in the global batch, (B,).
        shape: of one sample, S.

    Returns:
        (B, *S), float64, inside (0, 1): neither end occurs.

    Raises:
        ValueError: an index that is not (B,) of whole numbers.
    """
    bits = _bits(_keys(seed, purpose, step, index), math.prod(shape))
    return ((_shift(bits, 12).double() + 0.5) / 2.0**52).reshape(len(index), *shape)


def normal(seed: int, purpose: Purpose, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers for each sample.

    Args:
        seed, purpose, step, index: as in `uniform`.
        shape: of one sample, S.

    Returns:
        (B, *S), float32, |value| below 6.8. Computed in float64, so that the
        rounded result does not depend on vector widths and batch sizes.
    """
    size = math.prod(shape)
    bits = _bits(_keys(seed, purpose, step, index), (size + 1) // 2)
    high, low = _shift(bits, 32).double(), bits.bitwise_and_(0xFFFFFFFF).double()
    radius = high.add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = low.mul_(2 * math.pi / 2.0**32)
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pairs[:, :size].float().reshape(len(index), *shape)


def rademacher(seed: int, purpose: Purpose, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Signs, +1 or -1 with equal probability: (B, *S), float32. Arguments as in `uniform`."""
    return torch.where(uniform(seed, purpose, step, index, shape) < 0.5, -1.0, 1.0)
