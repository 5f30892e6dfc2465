"""A look at a run while it trains: some samples of each class, or of captions, by the averaged weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..flow import Condition, count
from ..generate import Sampler, generate
from ..sheet import grid, save_image
from ..source import network_source
from ..space import Space
from .run import Run

ROWS = 4
"""Samples of each class."""


def preview(run: Run, text: tuple[Condition, Condition] | None = None) -> None:
    """Write `samples/step-<step>.png` into the run's folder: a column for each of the first ten classes, or one image a caption.

    Where the network is shared out, all ranks compute the samples together, and the first writes them.

    Args:
        run: the run.
        text: what is shown of a model that takes text, (N, ...), and what stands for none, (1, ...).

    Raises:
        Told: a signal came meanwhile.
    """
    config, classes = run.config, 0 if text else len(run.about["class_names"])
    null = text[1] if text else None
    pixels = Space.of(run.about["space"]).pixels
    source = network_source(run.ema.model, config.flow, run.method.shape, classes, run.decode, pixels, null=null)
    if text:
        condition, columns = text[0], 8
    else:
        columns = min(classes, 10) or 8
        condition = torch.arange(ROWS * columns) % columns if classes else torch.full((ROWS * columns,), source.null)
    guided = text is not None or classes > 0
    sampler = Sampler("heun", config.log.sample_steps, config.log.guidance_scale if guided else 1.0)

    def field(x: Tensor, t: Tensor, *condition: Condition) -> Tensor:
        run.told()
        run.watch.beat(run.step, "sampling")
        return source.field(x, t, *condition)

    images = generate(replace(source, field=field), condition, sampler, seed=config.seed).images
    if run.accelerator.is_main_process:
        path = Path(config.output_dir) / "samples" / f"step-{run.step:07d}.png"
        save_image(grid(images, min(columns, count(condition)), scale=max(1, 48 // images.shape[-1])), path)
