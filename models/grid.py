"""The grid of tokens that a transformer lays over an image: sizes that fit one another, and positions that are kept once made."""

from __future__ import annotations

from torch import Tensor, device, dtype

from .layers import sincos_positions


def check_sizes(*, resolution: int, patch_size: int, width: int, depth: int, heads: int) -> None:
    """Raises ValueError where the sizes of a transformer do not divide one another."""
    if patch_size < 1 or resolution % patch_size:
        use = next(d for d in range(min(2, resolution), resolution + 1) if resolution % d == 0)
        raise ValueError(f"model.patch_size={patch_size} does not divide the resolution {resolution}: use a divisor, such as {use}.")
    if heads < 1 or width < 4 or width % heads or width % 4:
        unit = 4 * max(heads, 1)
        raise ValueError(f"model.width={width} must be a multiple of 4 and of model.heads={heads}: use {max(-(-width // unit), 1) * unit}.")
    if depth < 1:
        raise ValueError(f"model.depth={depth}: a transformer has at least one block. Use 12.")


def check_text(text_width: int, pooled_width: int) -> None:
    """Raises ValueError where there is no text encoder to take captions from."""
    if text_width < 1 or pooled_width < 1:
        raise ValueError(
            f"text states {text_width} wide and pooled text {pooled_width} wide: a network on text needs both. "
            f"Name an encoder in data.text_encoder, or use model.kind=dit."
        )


def given(sizes: Tensor | None) -> Tensor:
    """Raises ValueError where a network with micro-conditions gets none."""
    if sizes is None:
        raise ValueError("model.micro_conditions=True: the network needs sizes, (B, 6), with every batch. Give them, or train without.")
    return sizes


class Positions:
    """Sines and cosines of places on a grid, whose middle an image of any shape takes where the grid is limited.

    Args:
        width: channels, a multiple of 4.
        grid: tokens a side of the whole grid; 0 for none, so that counting starts at an image's own corner.
        start, spacing: of the whole grid: the first token's coordinate, and the way to the next.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, section 5.3.2.
    """

    def __init__(self, width: int, *, grid: int = 0, start: float = 0.0, spacing: float = 1.0) -> None:
        self.width, self.grid, self.start, self.spacing = width, grid, start, spacing
        self.made: dict[tuple[int, int, device, dtype], Tensor] = {}

    def of(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows * columns, width), as `like` is.

        Raises:
            ValueError: an image larger than the grid.
        """
        key = rows, columns, like.device, like.dtype
        if key not in self.made:
            if self.grid and max(rows, columns) > self.grid:
                raise ValueError(
                    f"an image of {rows} x {columns} tokens is larger than model.position_grid={self.grid}: "
                    f"use at least {max(rows, columns)}, or 0 for no limit."
                )
            top, left = ((self.grid - n) // 2 if self.grid else 0 for n in (rows, columns))
            start = self.start + self.spacing * top, self.start + self.spacing * left
            self.made[key] = sincos_positions(self.width, rows, columns, start=start, spacing=(self.spacing,) * 2).to(like)
        return self.made[key]
