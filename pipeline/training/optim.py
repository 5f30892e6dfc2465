"""The optimiser: which parameters decay, and the learning rate's ramp as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import TrainConfig


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
