"""Images on one sheet, and a sheet as a file, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from condot.core.atomic_files import open_regular

from .image_encoding import array_to_pil, composite_on_white, quantise

SUFFIXES_WITHOUT_ALPHA = (".jpg", ".jpeg", ".gif")
"""Files that cannot hold a picture's alpha, or of a GIF a bit of it."""


def make_grid(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """Images side by side on white, a gap of one of their pixels between them.

    Args:
        images: (N, C, H, W), -1..1.
        columns: images in a row.
        scale: each pixel becomes so many a side.

    Returns:
        (C, height, width), -1..1.
    """
    cells = F.pad(images.to("cpu", torch.float32), (1, 0, 1, 0), value=1.0)  # the gap above and left of each
    blank = cells.new_ones(-len(cells) % columns, *cells.shape[1:])
    grid = rearrange(torch.cat([cells, blank]), "(row column) c h w -> c (row h) (column w)", column=columns)
    return repeat(F.pad(grid, (0, 1, 0, 1), value=1.0), "c h w -> c (h y) (w x)", y=scale, x=scale)


def tensor_to_pil(image: Tensor) -> Image.Image:
    """(C, H, W), -1..1, with 8 bits a channel, to be looked at: gray, RGB, either with its alpha; of five bands or more the first three."""
    return array_to_pil(quantise(image))


def save_image(image: Tensor, path: Path) -> None:
    """Write (C, H, W), -1..1, as an image file, whole or not at all; the folder is made. A JPEG has no alpha: it is laid on white."""
    shown = tensor_to_pil(image)
    with atomic_file(path) as temporary:
        (composite_on_white(shown) if path.suffix.lower() in SUFFIXES_WITHOUT_ALPHA else shown).save(temporary)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name of the same suffix, which becomes `path` at the end, or nothing after an error; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)  # never written through a link that somebody planted
    os.close(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_comparison_grid(above: Tensor, below: Tensor, scale: int) -> Tensor:
    """Two batches of as many images, (N, C, H, W), in rows of up to ten: a row of one, below it the other's; `scale` as in `make_grid`."""
    columns = min(10, len(above))
    white = above.new_ones(-len(above) % columns, *above.shape[1:])
    halves = (torch.cat([part, white]).split(columns) for part in (above, below))
    return make_grid(torch.cat([row for pair in zip(*halves, strict=True) for row in pair]), columns, scale)
