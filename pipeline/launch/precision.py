"""Which precision a network is faster in, here and now: `train.mixed_precision: auto`.

Large products gain from bf16, small networks may lose more by its conversions,
and on some CPUs nothing gains. So it is measured at the start, once a run: the
answer goes into the checkpoint, and a resumed run computes as it began.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

Precision = Literal["no", "bf16"]
MAX_TIME_RATIO = 0.95
"""bf16 is taken for at most this share of float32's time: less is no gain for its rounding."""


def resolve_precision(requested: str | None, saved: Precision | None, benchmark: Callable[[], Precision]) -> str | None:
    """The precision of a run; all ranks together, after their process group began.

    Args:
        requested: `train.mixed_precision`; what is not `auto` is the answer.
        saved: of the checkpoint that the run goes on from.
        benchmark: called where nothing is saved, on every rank, as they will train; rank 0's answer holds for all.
    """
    if requested != "auto":
        return requested
    answer = [saved or benchmark()]
    broadcast_object_list(answer)
    return answer[0]


def pick_faster_precision(
    network: nn.Module,
    inputs: tuple[Any, ...],
    *,
    rounds: int = 5,
    max_seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Precision:
    """Time forward and backward passes in float32 and under bf16 autocast, in turns; the faster by medians.

    Neither weights and gradients nor torch's generators are changed.

    Args:
        network: float32, on its device, not wrapped.
        inputs: of one micro-batch.
        rounds: after one that warms up.
        max_seconds: seconds after which no further round begins; one is always measured.
        clock: seconds.
    """
    device = next(network.parameters()).device
    if (device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)) or device.type not in ("cpu", "cuda"):
        return "no"
    timings: dict[Precision, list[float]] = {"no": [], "bf16": []}
    began = clock()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for round_index in range(1 + rounds):
            if round_index > 1 and clock() - began > max_seconds:
                break
            for precision, seconds in timings.items():
                elapsed = _time_step(network, inputs, precision, clock)
                if round_index:
                    seconds.append(elapsed)
    return "bf16" if statistics.median(timings["bf16"]) < MAX_TIME_RATIO * statistics.median(timings["no"]) else "no"


def _time_step(network: nn.Module, inputs: tuple[Any, ...], precision: Precision, clock: Callable[[], float]) -> float:
    """Return the seconds of one forward and backward pass; infinite where memory does not hold it."""
    weights = [p for p in network.parameters() if p.requires_grad]
    device = weights[0].device
    began = clock()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            y = network(*inputs)
        torch.autograd.grad(y.float().square().mean(), weights, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return math.inf
    return clock() - began
