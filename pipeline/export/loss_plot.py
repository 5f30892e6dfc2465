"""A training curve as a small picture: axes with round numbers, every value in a light line, their running mean in a dark one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (720, 400)
"""Width and height of the picture, pixels."""
FINE = 3
"""It is drawn so many times larger, then made smaller: smooth lines."""
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
"""Margins around the axes, pixels."""
INK, RULE, LIGHT, DARK, PAPER = "#1b2a41", "#e3e7ee", "#a9cbe0", "#2a6f97", "#ffffff"
LOG_FROM = 20.0
"""The values' axis is logarithmic where the largest is so many times the smallest."""


def plot_loss(points: Sequence[tuple[float, float]], path: Path, *, x_label: str, y_label: str) -> bool:
    """Draw values over their places and write a PNG; the same points give the same bytes.

    Args:
        points: (place, value), finite.
        path: of the file.
        x_label, y_label: what stands beside the axes.

    Returns:
        Whether it was drawn: fewer than two places make no curve.
    """
    points = sorted(points)
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return False
    frame = Axes([x for x, _ in points], [y for _, y in points])
    image = Image.new("RGB", (SIZE[0] * FINE, SIZE[1] * FINE), PAPER)
    draw = ImageDraw.Draw(image)
    frame.draw_axes(draw, x_label, y_label)
    for line, colour, width in ((points, LIGHT, 1), (running_mean(points), DARK, 2)):
        draw.line([frame.place(x, y) for x, y in line], fill=colour, width=width * FINE, joint="curve")
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path, optimize=True)
    return True


def running_mean(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """At each point the mean of the values around it: as many on either side as `share` of all, fewer near the ends."""
    reach, sums = round(share * len(points)), [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    means = []
    for i, (place, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        means.append((place, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return means


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, at most so many and a few fewer."""
    wanted = (high - low) / most
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times each power of ten from low to high; powers of ten alone where that would be more than eight."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**k for k in powers for factor in (1, 2, 5)]
    inside = [value for value in fine if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return inside if len(inside) <= 8 else [value for value in inside if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]


class Axes:
    """Axes around some points: from values to pixels."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.log = min(ys) > 0 and max(ys) >= LOG_FROM * min(ys)
        spread = 0.05 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 1.0
        self.x = (min(xs), max(xs))
        self.y = (min(ys) / 1.1, max(ys) * 1.1) if self.log else (min(ys) - spread, max(ys) + spread)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in fine pixels."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        low, high, value = (math.log(v) for v in (*self.y, y)) if self.log else (*self.y, y)
        up = (value - low) / (high - low)
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return FINE * (LEFT + across * width), FINE * (TOP + (1 - up) * height)

    def draw_axes(self, draw: ImageDraw.ImageDraw, x_label: str, y_label: str) -> None:
        """Rules at round numbers, the numbers, and the labels."""
        small = ImageFont.load_default(size=12 * FINE)
        (left, bottom), (right, top) = self.place(self.x[0], self.y[0]), self.place(self.x[1], self.y[1])
        for x in ticks(*self.x):
            at = self.place(x, self.y[0])[0]
            draw.line([(at, top), (at, bottom)], fill=RULE, width=FINE)
            draw.text((at, bottom + 6 * FINE), format_tick(x), fill=INK, font=small, anchor="mt")
        for y in log_ticks(*self.y) if self.log else ticks(*self.y):
            at = self.place(self.x[0], y)[1]
            draw.line([(left, at), (right, at)], fill=RULE, width=FINE)
            draw.text((left - 6 * FINE, at), format_tick(y), fill=INK, font=small, anchor="rm")
        draw.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=FINE)
        draw.text((right, bottom + 26 * FINE), x_label, fill=INK, font=small, anchor="rt")
        draw.text((right - 6 * FINE, top + 4 * FINE), y_label, fill=INK, font=small, anchor="rt")


def format_tick(value: float) -> str:
    """A number as an axis says it: 0.25, 1500, 20k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"
