"""A look at a run while it trains: some samples of each class, or of captions, by the averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from condot.core.printable import one_line

from ..flow import Condition, num_samples
from ..latent_space import LatentSpace
from ..launch.parallel import finish_gathers_on_error, reset_fsdp_state
from ..sampling.flow_model import build_flow_model
from ..sampling.generate import generate
from ..sampling.image_grid import make_grid, save_image
from ..sampling.sampler import Sampler
from .best_effort import BestEffortError, free_memory, is_out_of_memory
from .run import Interrupted, Run

SAMPLES_PER_CLASS = 4
"""Samples of each class."""
OUT_OF_MEMORY, FAILED = 1, 2
"""What may befall a rank that draws: too little memory, which fewer images at once may cure; anything else."""
ON_ANOTHER_RANK = "on another rank"


class PeerFailure(Exception):
    """Another rank cannot go on with what all draw together."""

    def __init__(self, failure: int) -> None:
        super().__init__(ON_ANOTHER_RANK)
        self.failure = failure


def preview(run: Run, text: tuple[Condition, Condition] | None = None) -> None:
    """Write `samples/step-<step>.png` into the run's folder: a column for each of the first ten classes, or one image a caption.

    Where the network is shared out, all ranks compute the samples together, and the first writes them. As many are drawn at
    once as a rank trains on at once, and half as many after each lack of memory.

    Args:
        run: the run.
        text: what is shown of a model that takes text, (N, ...), and what stands for none, (1, ...).

    Raises:
        Interrupted: a signal came meanwhile.
        BestEffortError: it could not be drawn; where all ranks draw, all raise.
    """
    config, classes = run.config, 0 if text else len(run.metadata["class_names"])
    null = text[1] if text else None
    pixels = LatentSpace.from_checkpoint(run.metadata["space"]).pixels
    source = build_flow_model(run.ema.model, config.flow, run.objective.shape, classes, run.decode, pixels, null=null)
    if text:
        condition, columns = text[0], 8
    else:
        columns = min(classes, 10) or 8
        condition = (
            torch.arange(SAMPLES_PER_CLASS * columns) % columns if classes else torch.full((SAMPLES_PER_CLASS * columns,), source.null)
        )
    guided = text is not None or classes > 0
    plain = source.field
    sampler = Sampler("heun", config.log.sample_steps, config.log.guidance_scale if guided else 1.0)

    def field(x: Tensor, t: Tensor, *condition: Condition) -> Tensor:
        if failure := run.check_interrupt():
            raise PeerFailure(failure)
        run.watchdog.heartbeat(run.step, "sampling")
        with finish_gathers_on_error(run.ema.model):
            velocity: Tensor = plain(x, t, *condition)
            return velocity

    source = replace(source, field=field)
    images = draw_within_memory(
        run, lambda batch_size: generate(source, condition, sampler, seed=config.seed, batch_size=batch_size).images
    )
    if run.accelerator.is_main_process:
        path = Path(config.output_dir) / "samples" / f"step-{run.step:07d}.png"
        save_image(make_grid(images, min(columns, num_samples(condition)), scale=max(1, 48 // images.shape[-1])), path)


def draw_within_memory(run: Run, draw: Callable[[int], Tensor]) -> Tensor:
    """Return what `draw(n)` gives, with n images at once: at first a micro-batch, and half as many after each lack of memory.

    Raises:
        Interrupted: a signal came meanwhile.
        BestEffortError: what `draw` raised; where all ranks draw, all of them raise, and none waits for another.
    """
    train = run.config.train
    batch_size = max(1, train.batch_size // train.gradient_accumulation_steps // run.accelerator.num_processes)
    while True:
        images, failure, cause = _try_drawing(run, draw, batch_size)
        if images is not None and not failure:
            return images
        reset_fsdp_state(run.ema.model)
        free_memory()
        if failure != OUT_OF_MEMORY or batch_size == 1:
            raise BestEffortError(cause)
        batch_size //= 2


def _try_drawing(run: Run, draw: Callable[[int], Tensor], batch_size: int) -> tuple[Tensor | None, int, str]:
    """Draw once: the images, the worst failure of any rank, and its cause as this rank knows it; no exception, which would hold memory."""
    try:
        images = draw(batch_size)
        return images, run.check_interrupt(), ON_ANOTHER_RANK
    except Interrupted:
        raise
    except PeerFailure as problem:
        return None, problem.failure, ON_ANOTHER_RANK
    except Exception as problem:
        cause, failure = f"{type(problem).__name__}: {one_line(problem)}", OUT_OF_MEMORY if is_out_of_memory(problem) else FAILED
    return None, run.check_interrupt(failure), cause
