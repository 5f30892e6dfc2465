"""The optimiser: which parameters decay, and the learning rate's ramp as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters; matrices decay, vectors and embedding tables do not.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization. Fused,
    which on a CPU takes a third of the time of the unfused one.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    plain = [p for p in trained if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def step_unless(optimizer: Any, bad: Tensor) -> None:
    """A step that leaves everything as it is where `bad` is 1: fused optimisers find that on the device, without a word to the host.

    Args:
        optimizer: as Accelerate wraps it; fp16's scaler, if there is one, has its own word, and either is enough.
        bad: 0 or 1, a scalar on the device.
    """
    inner = optimizer.optimizer

    def mark(*_: Any) -> None:
        found = getattr(inner, "found_inf", None)
        inner.found_inf = bad if found is None else torch.maximum(bad, found)

    hook = inner.register_step_pre_hook(mark)
    optimizer.step()
    hook.remove()
    vars(inner).pop("found_inf", None)


def check_ramp(config: TrainConfig) -> None:
    """Raise a ValueError for a learning rate that would never be reached."""
    if config.lr_warmup_steps > config.max_steps:
        raise ValueError(
            f"train.lr_warmup_steps={config.lr_warmup_steps} is more than train.max_steps={config.max_steps}: the learning rate would "
            f"never be reached. Use --train.lr_warmup_steps {config.max_steps // 10}, or train for longer."
        )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimiser step `step`, counted from 0; a function of nothing else, so there is no state to save.

    Rises in a line over `lr_warmup_steps`, stays, and over the last
    `lr_decay_fraction` of the run falls to zero, in a line or half a cosine.
    """
    rise = min(1.0, (step + 1) / (config.lr_warmup_steps + 1))
    span = config.lr_decay_fraction * config.max_steps
    left = min(1.0, max(0.0, (config.max_steps - step) / span))
    fall = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.lr_ramp]
    return config.learning_rate * rise * fall
