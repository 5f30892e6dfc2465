"""The grid of tokens that a transformer lays over an image: sizes that fit one another, and positions kept once made."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import sincos_positions


def check_sizes(*, resolution: int, patch_size: int, width: int, depth: int, heads: int, rope: bool = False) -> None:
    """Raises ValueError where the sizes of a transformer do not divide one another."""
    if patch_size < 1 or resolution % patch_size:
        use = next(d for d in range(min(2, resolution), resolution + 1) if resolution % d == 0)
        raise ValueError(f"model.patch_size={patch_size} does not divide the resolution {resolution}: use a divisor, such as {use}.")
    if heads < 1 or width < 4 or width % heads or width % 4:
        unit = 4 * max(heads, 1)
        raise ValueError(f"model.width={width} must be a multiple of 4 and of model.heads={heads}: use {max(-(-width // unit), 1) * unit}.")
    if rope and width // heads % 4:
        raise ValueError(
            f"model.heads={heads} of model.width={width} are {width // heads} wide: with model.rope a head's width is a multiple of 4 "
            f"(rows and columns in pairs). Use width {-(-width // (4 * heads)) * 4 * heads}, or other heads."
        )
    if depth < 1:
        raise ValueError(f"model.depth={depth}: a transformer has at least one block. Use 12.")


class PositionEmbedding:
    """Sines and cosines of places, of a whole grid whose middle an image takes, or stretched over every image.

    Args:
        width: channels, a multiple of 4.
        span: so far the coordinates go, from 0, over an image of any number of tokens; without a grid.
        grid: tokens a side of the whole grid; 0 for none.
        line: the grid's first coordinate, and the way to the next.

    Source: the grid: Esser et al., Scaling Rectified Flow Transformers for
    High-Resolution Image Synthesis, section 5.3.2; the span: Chen et al.,
    PixArt-alpha, as in diffusers' PatchEmbed.
    """

    def __init__(self, width: int, *, span: float = 0.0, grid: int = 0, line: tuple[float, float] = (0.0, 1.0)) -> None:
        self.width, self.span, self.grid, self.line = width, span, grid, line
        self.cache: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def for_grid(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows * columns, width), as `like` is.

        Raises:
            ValueError: an image larger than the grid.
        """
        key = rows, columns, like.device, like.dtype
        if key not in self.cache:
            with torch.inference_mode(False):  # what is made while sampling serves training too
                self.cache[key] = self._compute(rows, columns).to(like)
        return self.cache[key]

    def _compute(self, rows: int, columns: int) -> Tensor:
        if not self.grid:
            return sincos_positions(self.width, rows, columns, spacing=(self.span / rows, self.span / columns))
        if max(rows, columns) > self.grid:
            raise ValueError(
                f"an image of {rows} x {columns} tokens is larger than model.position_grid={self.grid}: "
                f"use at least {max(rows, columns)}, or 0 for no limit."
            )
        first, spacing = self.line
        top, left = (first + spacing * ((self.grid - n) // 2) for n in (rows, columns))
        return sincos_positions(self.width, rows, columns, start=(top, left), spacing=(spacing, spacing))
