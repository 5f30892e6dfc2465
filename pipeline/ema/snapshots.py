"""Snapshots of the power averages, from which those of other widths are rebuilt: `<run>/averages/checkpoint-<step>`.

Each is a checkpoint that holds the power averages alone; none is ever pruned.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from condot.core.printable import say

from ..checkpoint.store import PREFIX, CheckpointManager, averages, verify
from ..config.schema import EmaConfig
from .averages import PowerProfile, WeightAverages
from .posthoc import MAX_RELATIVE_ERROR, PosthocCombination, solve_posthoc_coefficients

SNAPSHOT_FOLDER = "averages"
DEFAULT_SNAPSHOTS = 64
"""In a run, unless the recipe says how far they are apart."""


class SnapshotSource(Protocol):
    """What is taken of a run: see pipeline.training.run.Run."""

    snapshots: CheckpointManager
    ema: WeightAverages
    step: int
    images: int


def snapshot_manager(run: Path) -> CheckpointManager:
    """Where a run's snapshots lie; all are kept."""
    return CheckpointManager(run / SNAPSHOT_FOLDER, keep=sys.maxsize)


def snapshot_due(images: int, batch: int, config: EmaConfig, total: int) -> bool:
    """Whether a snapshot falls due with this step; a function of the image clock alone.

    Args:
        images: seen so far, this step's included.
        batch: images of this step.
        config: which averages are kept, and how far snapshots are apart.
        total: images of the whole run.
    """
    if not config.power:
        return False
    every = config.snapshot_every or total / DEFAULT_SNAPSHOTS
    return images >= total or images // every > (images - batch) // every


def count_snapshots(config: EmaConfig, batch: int, total: int) -> int:
    """Snapshots of a whole run; arguments as in `snapshot_due`."""
    if not config.power:
        return 0
    every = config.snapshot_every or total / DEFAULT_SNAPSHOTS
    steps = -(-total // batch)
    return steps if every <= batch else int((steps - 1) * batch // every) + 1  # the last step has one


def write_snapshot(run: SnapshotSource) -> list[str]:
    """Write one, all ranks together; what went wrong on any rank, as `CheckpointManager.save` says it."""
    state = {"step": run.step, "images": run.images, "widths": list(run.ema.widths)}
    return run.snapshots.save(run.step, run.ema.power(), state)


def remove_later_snapshots(manager: CheckpointManager, step: int) -> None:
    """Remove snapshots of steps after the one from which a run goes on: they may be of another course. For the first rank alone.

    A good snapshot is not written twice, so that an old one would stay.
    """
    for folder in manager.folders():
        if int(folder.name.removeprefix(PREFIX)) > step:
            os.rename(folder, manager.root / f".tmp-old-{uuid.uuid4().hex[:8]}")
    manager.remove_leftovers()


@dataclass(frozen=True)
class KeptAverage:
    """One power average that was kept."""

    images: float
    width: float
    folder: Path
    """The snapshot, or the checkpoint, that holds it."""


def find_kept_averages(checkpoint: Path, images: int, widths: tuple[float, ...]) -> list[KeptAverage]:
    """The power averages of a checkpoint, and of the snapshots of its run up to it.

    Args:
        checkpoint: a run's, verified.
        images: that it has seen.
        widths: that it holds.
    """
    found = {(float(images), width): checkpoint for width in widths}
    for folder in snapshot_manager(checkpoint.parent).folders():
        try:
            state = json.loads((folder / "state.json").read_text())
            places = [(float(state["images"]), float(width)) for width in state["widths"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"snapshot {folder} is damaged and passed over: {type(error).__name__}: {error}")
            continue
        for place in places:
            if 0 < place[0] <= images:
                found.setdefault(place, folder)
    return [KeptAverage(*place, folder) for place, folder in sorted(found.items())]


def rebuild_average(kept: list[KeptAverage], width: float, images: float) -> tuple[dict[str, Tensor], PosthocCombination]:
    """A power average of any width, at any time up to the last that was kept.

    Args:
        kept: what there is; damaged snapshots are named and passed over.
        width: relative width wanted.
        images: time wanted, at which some were kept.

    Returns:
        Trained weights by the network's own names, float32, summed in
        float64; and how they were combined.

    Raises:
        ValueError: no combination of what was kept comes within MAX_RELATIVE_ERROR of it.
    """
    kept, sound = list(kept), set[Path]()
    while True:
        found = solve_posthoc_coefficients([(one.images, one.width) for one in kept], width, images)
        if found.error > MAX_RELATIVE_ERROR:
            raise ValueError(f"a width of {width:g} at {images:.0f} images cannot be rebuilt: {_reason(kept, images, found)}")
        terms = [(c, one) for c, one in zip(found.coefficients, kept, strict=True) if c]
        for folder in dict.fromkeys(one.folder for _, one in terms):
            fault = None if folder in sound else verify(folder)
            if fault:
                say(f"snapshot {folder} is damaged and passed over: {fault}")
                kept = [one for one in kept if one.folder != folder]
                break
            sound.add(folder)
        else:
            return _sum(terms), found


def _reason(kept: list[KeptAverage], images: float, found: PosthocCombination) -> str:
    widths = ", ".join(f"{width:g}" for width in sorted({one.width for one in kept}))
    times = sorted({one.images for one in kept})
    near = sorted(sorted(times, key=lambda time: abs(time - images))[:2])
    remedy = "a width nearer to those, or keep more snapshots (ema.snapshot_every) or widths (ema.power)"
    if images not in times:
        remedy = f"images={' or images='.join(f'{time:.0f}' for time in near)}, where averages were kept"
    return (
        f"the nearest combination of widths {widths}, kept {len(times)} time(s) from {times[0]:.0f} to {times[-1]:.0f} images, misses it "
        f"by {found.error:.2g} of its size, and {MAX_RELATIVE_ERROR:g} is allowed. Ask for {remedy}."
    )


@torch.no_grad()
def _sum(terms: list[tuple[float, KeptAverage]]) -> dict[str, Tensor]:
    """The combination of weights, read one average after the other."""
    total: dict[str, Tensor] = {}
    for coefficient, one in terms:
        tensors = averages(one.folder, PowerProfile(one.width).label)
        if not tensors or total.keys() - tensors.keys():
            raise ValueError(f"{one.folder} holds no average of width {one.width:g}, as its state says: move it elsewhere.")
        for name, value in tensors.items():
            if name not in total:
                total[name] = torch.zeros_like(value, dtype=torch.float64)
            total[name].add_(value, alpha=coefficient)
    return {name: value.float() for name, value in total.items()}
