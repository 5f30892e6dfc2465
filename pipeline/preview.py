"""A look at a run while it trains: some samples of each class, by the averaged weights."""

from __future__ import annotations

from pathlib import Path

import torch

from .generate import Sampler, generate, grid, network_source, save_image
from .loop import Run

ROWS = 4
"""Samples of each class."""


def preview(run: Run) -> None:
    """Write `samples/step-<step>.png` into the run's folder: a column for each of the first ten classes."""
    config, count = run.config, len(run.about["class_names"])
    source = network_source(run.ema.model, config.flow, run.method.shape, count, run.decode)
    columns = min(count, 10) or 8
    labels = torch.arange(ROWS * columns) % columns if count else torch.full((ROWS * columns,), source.null)
    sampler = Sampler("heun", config.log.sample_steps, config.log.guidance_scale if count else 1.0)
    images = generate(source, labels, sampler, seed=config.seed).images
    path = Path(config.output_dir) / "samples" / f"step-{run.step:07d}.png"
    save_image(grid(images, columns, scale=max(1, 48 // images.shape[-1])), path)
