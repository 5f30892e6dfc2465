"""From a micro-batch to its loss: encoded, with random numbers named by (seed, step, place), conditioned, and judged by the objective."""

from __future__ import annotations

from typing import Any

import torch

from ..objectives.step_objective import StepLoss
from .conditioning import MicroBatch
from .run import Run


def compute_loss(run: Run, batch: MicroBatch) -> StepLoss:
    """Return the loss of each sample of a micro-batch, (B,), and what else the objective reports."""
    device = run.accelerator.device
    data = run.encode(batch, run.step)
    indices = batch.batch_indices.to(device, non_blocking=True)
    seed, step = run.config.seed, run.step
    draws = run.objective.draw_random_inputs(seed, step, indices, tuple(data.shape[1:]))
    condition = run.condition(batch, step, draws.drop)
    step_loss = run.objective(run.model, torch.nan_to_num(data), draws, *condition, seed=seed, step=step, indices=indices)
    # a sample that is not finite has a loss that is not: the step is skipped, and training goes on
    return step_loss._replace(loss=step_loss.loss + 0 * data.flatten(1).sum(1))


def example_inputs(run: Run, batch: MicroBatch) -> tuple[Any, ...]:
    """Return what the network sees of a micro-batch beside the time, nothing dropped: data, (B, *S), and what else it takes."""
    data = run.encode(batch, run.step)
    return data, *run.condition(batch, run.step, torch.ones(len(data), device=run.accelerator.device))
