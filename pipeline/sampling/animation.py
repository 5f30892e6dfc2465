"""The way from noise to images as an animation: a frame for each time of the solver's grid, the last one the images themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import denoise
from ..flow.field import Field
from .flow_model import FlowModel
from .image_encoding import composite_on_white
from .image_grid import atomic_file, make_grid, tensor_to_pil
from .sampler import Sampler

FIRST_FRAME_MS, MIDDLE_FRAMES_MS, LAST_FRAME_MS = 600, 3000, 2000
"""Milliseconds: of the first frame, of those between together, of the last."""
MIN_FRAME_MS = 40
"""Milliseconds of a frame: browsers play shorter ones slowly."""


class FrameRecorder:
    """Watches `generate` and keeps what is to be shown.

    Args:
        model: what is sampled; its decoder makes images of latents.
        sampler: how.
        show: `state`, the points themselves, made smaller where the path is
            wider than data; or `prediction`, the data that the field expects
            from there, which costs an evaluation a frame.

    Raises:
        ValueError: a solver that does not step from time to time of a grid.
    """

    def __init__(self, model: FlowModel, sampler: Sampler, show: str) -> None:
        if sampler.solver in ("langevin", "annealed_langevin"):
            raise ValueError(
                f"--solver {sampler.solver} has no way from noise to data to show: use heun, or another that steps along the path."
            )
        if sampler.solver == "dormand_prince" and len(sampler.given_times) < 3:
            raise ValueError("--solver dormand_prince chooses its own steps: say at which to look by --given_times 0 0.2 0.4 0.6 0.8 1.")
        self._model, self._show = model, show
        self._frames: dict[float, list[Tensor]] = {}

    def __call__(self, x: Tensor, t: float, field: Field) -> None:
        """Keep a batch, (B, *S), at a time; see `generate.StepCallback`."""
        if self._show == "prediction":
            shown = denoise(field, x, t, self._model.path)
        else:
            a, b = (float(part) for part in self._model.path(x.new_tensor(t))[:2])
            shown = x / max(1.0, (a**2 + b**2) ** 0.5)
        self._frames.setdefault(t, []).append(self._model.decode(shown).clamp(-1, 1).half().cpu())

    def frames(self, images: Tensor) -> list[Tensor]:
        """All moments in order, each (N, C, H, W), -1..1, and last the images that `generate` returned."""
        return [*(torch.cat(parts).float() for parts in self._frames.values()), images]


def save_animation(frames: list[Tensor], path: Path, columns: int, scale: int = 1) -> None:
    """Write grids as an animated GIF or WebP, whole or not at all; a GIF has 256 colours a frame, a WebP all; alpha is laid on white.

    Args:
        frames: each (N, C, H, W), -1..1.
        path: where to, `.gif` or `.webp`.
        columns, scale: as in `image_grid.make_grid`.
    """
    pictures = [composite_on_white(tensor_to_pil(make_grid(frame, columns, scale))) for frame in frames]
    between = max(MIN_FRAME_MS, MIDDLE_FRAMES_MS // max(1, len(pictures) - 2))
    durations = [FIRST_FRAME_MS, *[between] * (len(pictures) - 2), LAST_FRAME_MS][-len(pictures) :]
    more: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    with atomic_file(path) as temporary:
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **more)
