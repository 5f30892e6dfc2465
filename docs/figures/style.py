"""How the pictures look: one palette, bare square panels, densities from white to ink."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

INK, NOISE, DATA, ACCENT, PAPER = "#1b2a41", "#8d99ae", "#2a6f97", "#e4572e", "#ffffff"
SERIES = ["#2a6f97", "#e4572e", "#6a994e", "#f2a541", "#7b5ea7", "#17a398", "#b23a48", "#5c677d", "#0b132b"]
DENSITY = LinearSegmentedColormap.from_list("ink", ["#ffffff", "#d7e6f0", "#8fbcd4", "#3c86b0", "#1d4e73", "#0f2a44"])
SOFT = LinearSegmentedColormap.from_list("soft", ["#eef4f8", "#d7e6f0", "#a9cbe0", "#7fb0cd"])
WHEEL = LinearSegmentedColormap.from_list("wheel", ["#2a6f97", "#17a398", "#8ab17d", "#f2a541", "#e4572e", "#b23a48", "#7b5ea7", "#2a6f97"])
TIME = LinearSegmentedColormap.from_list("time", ["#c3cad6", "#8fbcd4", "#2a6f97", "#e4572e"])

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.edgecolor": "#c8ced8",
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": "#5c677d",
        "ytick.color": "#5c677d",
        "axes.linewidth": 0.8,
        "figure.facecolor": PAPER,
        "mathtext.fontset": "cm",
        "savefig.dpi": 140,
    }
)


def panels(rows: int, columns: int, size: float = 2.3) -> tuple[Figure, np.ndarray]:
    """Square panels, (rows, columns), without ticks."""
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * size + 0.3), squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_aspect("equal")
    return figure, axes


def frame(ax: Axes, reach: float) -> None:
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)


def histogram(ax: Axes, x: Tensor, reach: float, bins: int = 90, top: float = 99.0) -> None:
    """The density of many points, (N, 2), from white to ink; the darkest percent is cut."""
    counts, _, _ = np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=bins, range=[[-reach, reach]] * 2)
    high = np.percentile(counts[counts > 0], top) if (counts > 0).any() else 1.0
    ax.imshow(counts.T, origin="lower", extent=(-reach, reach, -reach, reach), cmap=DENSITY, vmax=high, interpolation="bilinear")
    frame(ax, reach)


def contours(ax: Axes, log_density: Callable[[Tensor], Tensor], reach: float, filled: bool = False) -> None:
    """Level lines of a density, halving from one to the next."""
    line = torch.linspace(-reach, reach, 181)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    value = log_density(grid).reshape(181, 181)
    levels = value.max().item() + np.log(2.0) * np.arange(-7, 0.5)
    if filled:
        ax.contourf(line, line, value, levels=levels, cmap=SOFT)
    ax.contour(line, line, value, levels=levels, colors=DATA, linewidths=0.6, alpha=0.6, linestyles="solid")
    frame(ax, reach)


def swarm(ax: Axes, x: Tensor) -> None:
    """Points, (N, 2), small and orange."""
    ax.scatter(x[:, 0], x[:, 1], s=2.2, color=ACCENT, alpha=0.55, linewidths=0)


def threaded(ax: Axes, line: Tensor, times: Tensor) -> None:
    """A trajectory, (n, 2), coloured by its time from gray to orange."""
    points = line.numpy()
    pieces = LineCollection(list(np.stack([points[:-1], points[1:]], 1)), cmap=TIME, linewidths=0.75, alpha=0.85, capstyle="round")
    pieces.set_array(times[:-1].numpy())
    pieces.set_clim(0, 1)
    ax.add_collection(pieces)


def save(figure: Figure, path: str) -> None:
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)
