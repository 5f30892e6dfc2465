"""Plot a training curve for the model card: every value in a light line, their running mean in a dark one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (720, 400)
"""Width and height of the picture, pixels."""
DPI = 100
INK, RULE, LIGHT, DARK = "#1b2a41", "#e3e7ee", "#a9cbe0", "#2a6f97"
LOG_FROM = 20.0
"""The axis of the values is logarithmic where the largest is at least this many times the smallest."""


def plot_loss(points: Sequence[tuple[float, float]], path: Path, *, x_label: str, y_label: str) -> bool:
    """Plot values over their places and write a PNG; the same points give the same bytes.

    Args:
        points: (place, value), finite.
        path: of the file.
        x_label, y_label: what stands beside the axes.

    Returns:
        Whether a file was written: fewer than two places make no curve.
    """
    points = sorted(points)
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return False
    import matplotlib.style  # here, since it takes half a second that most commands need not spend

    with matplotlib.style.context("default"):  # not as the user's matplotlibrc has it: a card looks alike everywhere
        figure = draw_loss(points, x_label=x_label, y_label=y_label)
        figure.savefig(path, format="png", metadata={"Software": None})  # which names matplotlib's release
    return True


def draw_loss(points: Sequence[tuple[float, float]], *, x_label: str, y_label: str) -> Figure:
    """Return the figure of `plot_loss`: one pair of axes with two lines, the values and their running mean.

    Args:
        points: (place, value), finite, by rising place.
        x_label, y_label: what stands beside the axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI, layout="constrained")  # no pyplot: no window, no global state
    axes = figure.add_subplot()
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=LIGHT, linewidth=1)
    axes.plot(*zip(*running_mean(points), strict=True), color=DARK, linewidth=2)
    axes.set_xlim(xs[0], xs[-1])
    if min(ys) > 0 and max(ys) >= LOG_FROM * min(ys):
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 3M
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=RULE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def running_mean(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Return at each point the mean of the values around it: as many on either side as `share` of all, fewer near the ends."""
    reach, sums = round(share * len(points)), [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    means = []
    for i, (place, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        means.append((place, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return means
