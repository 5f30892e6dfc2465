"""A look at a run while it trains: some samples of each class, or of captions, by the averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from condot.core.printable import one_line

from ..flow import Condition, count
from ..latent_space import Space
from ..launch.parallel import in_step, reset
from ..sampling.flow_model import network_source
from ..sampling.generate import generate
from ..sampling.image_grid import grid, save_image
from ..sampling.sampler import Sampler
from .best_effort import SideFailure, free_memory, is_out_of_memory
from .run import Run, Told

ROWS = 4
"""Samples of each class."""
LACK, FAILED = 1, 2
"""What may befall a rank that draws: too little memory, which fewer images at once may cure; anything else."""
ELSEWHERE = "on another rank"


class Elsewhere(Exception):
    """Another rank cannot go on with what all draw together."""

    def __init__(self, trouble: int) -> None:
        super().__init__(ELSEWHERE)
        self.trouble = trouble


def preview(run: Run, text: tuple[Condition, Condition] | None = None) -> None:
    """Write `samples/step-<step>.png` into the run's folder: a column for each of the first ten classes, or one image a caption.

    Where the network is shared out, all ranks compute the samples together, and the first writes them. As many are drawn at
    once as a rank trains on at once, and half as many after each lack of memory.

    Args:
        run: the run.
        text: what is shown of a model that takes text, (N, ...), and what stands for none, (1, ...).

    Raises:
        Told: a signal came meanwhile.
        SideFailure: it could not be drawn; where all ranks draw, all raise.
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
    plain = source.field
    sampler = Sampler("heun", config.log.sample_steps, config.log.guidance_scale if guided else 1.0)

    def field(x: Tensor, t: Tensor, *condition: Condition) -> Tensor:
        if trouble := run.told():
            raise Elsewhere(trouble)
        run.watch.beat(run.step, "sampling")
        with in_step(run.ema.model):
            return plain(x, t, *condition)

    source = replace(source, field=field)
    images = draw(run, lambda most: generate(source, condition, sampler, seed=config.seed, batch_size=most).images)
    if run.accelerator.is_main_process:
        path = Path(config.output_dir) / "samples" / f"step-{run.step:07d}.png"
        save_image(grid(images, min(columns, count(condition)), scale=max(1, 48 // images.shape[-1])), path)


def draw(run: Run, make: Callable[[int], Tensor]) -> Tensor:
    """Return what `make(n)` gives, with n images at once: at first a micro-batch, and half as many after each lack of memory.

    Raises:
        Told: a signal came meanwhile.
        SideFailure: what `make` raised; where all ranks draw, all of them raise, and none waits for another.
    """
    train = run.config.train
    most = max(1, train.batch_size // train.gradient_accumulation_steps // run.accelerator.num_processes)
    while True:
        made, trouble, cause = _attempt(run, make, most)
        if made is not None and not trouble:
            return made
        reset(run.ema.model)
        free_memory()
        if trouble != LACK or most == 1:
            raise SideFailure(cause)
        most //= 2


def _attempt(run: Run, make: Callable[[int], Tensor], most: int) -> tuple[Tensor | None, int, str]:
    """Draw once: the images, the worst trouble of any rank, and its cause as this rank knows it; no exception, which would hold memory."""
    try:
        made = make(most)
        return made, run.told(), ELSEWHERE
    except Told:
        raise
    except Elsewhere as problem:
        return None, problem.trouble, ELSEWHERE
    except Exception as problem:
        cause, trouble = f"{type(problem).__name__}: {one_line(problem)}", LACK if is_out_of_memory(problem) else FAILED
    return None, run.told(trouble), cause
