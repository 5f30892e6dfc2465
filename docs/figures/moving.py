"""The moving picture: noise becomes a checkerboard, along the ODE and along an SDE of one model."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

from condot.pipeline.flow import CondOT, Purpose, diffusion_coefficient, exponential, normal, uniform_grid
from docs.figures import style
from docs.figures.scenes import Network
from docs.figures.still import recorded, stream


def flow_movie(model: Network, output: Path, count: int = 4500, frames: int = 60) -> None:
    """Two panels, `frames` moments from t = 0 to 1, then a pause; an animated WebP."""
    index, steps, reach = torch.arange(count), 4 * (frames - 1), 3.0
    start = normal(11, Purpose.INITIAL, 0, index, (2,))
    lines: list[Tensor] = []
    for name, scale in (("zero", 0.0), ("noise", 1.5)):
        follow = partial(exponential, model, start, uniform_grid(steps), CondOT(), diffusion_coefficient(name, scale), stream(12, index))
        lines.append(recorded(follow, start)[::4])
    colour = torch.atan2(start[:, 1], start[:, 0])
    images = [_frame(lines, colour, k, k / (frames - 1), reach) for k in range(frames)]
    durations = [70] * (frames - 1) + [2200]
    images[0].save(output / "flow.webp", save_all=True, append_images=images[1:], duration=durations, loop=0, quality=58, method=4)


def _frame(lines: list[Tensor], colour: Tensor, k: int, t: float, reach: float) -> Image.Image:
    """One moment as an image."""
    figure, axes = style.panels(1, 2, 3.3)
    for ax, line, title in zip(axes[0], lines, ("ODE", "SDE,  $\\sigma_t = 1.5\\,(1 - t)$"), strict=True):
        ax.scatter(*line[k].T, c=colour, cmap=style.WHEEL, s=2.4, linewidths=0)
        ax.set_title(title)
        style.frame(ax, reach)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.09, wspace=0.05)
    bar = figure.add_axes((0.02, 0.035, 0.96, 0.018))
    bar.barh(0, t, color=style.ACCENT, height=1)
    bar.set_xlim(0, 1)
    bar.set_ylim(-0.5, 0.5)
    bar.set_xticks([])
    bar.set_yticks([])
    figure.text(0.5, 0.93, f"$t = {t:.2f}$", ha="center", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    return Image.open(buffer).convert("RGB")
