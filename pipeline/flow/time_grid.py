"""Grids: the times a solver steps through, from noise to data.

n steps are n intervals, so n + 1 times, float64, on the CPU.
Source: docs/mathematics.md section 4; Esser et al., eq. 23; Karras et al., eq. 5.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .path import CondOT, Path
from .timestep_distribution import shift_time

GRIDS = ("uniform", "shifted", "rho", "log_snr")


def uniform_grid(steps: int, start: float = 0.0, end: float = 1.0) -> Tensor:
    """`steps` equal intervals: steps + 1 times.

    Args:
        steps: at least 1.
        start, end: 0 <= start < end <= 1.

    Raises:
        ValueError: fewer than one step, or ends outside [0, 1].
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps={steps}: a solver takes at least one step. Use 25 to 50 as a rule.")
    if not 0 <= start < end <= 1:
        raise ValueError(f"a grid from {start} to {end}: 0 <= start < end <= 1, from noise to data.")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def shifted_grid(steps: int, shift: float, start: float = 0.0, end: float = 1.0) -> Tensor:
    """A uniform grid moved towards the noise, `t / (t + shift (1 - t))`: finer there for shift > 1.

    Raises:
        ValueError: as `uniform_grid`; a shift that is not positive and finite.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} of a grid: positive and finite; 1 is none. Use 3 for images of 1024 pixels a side.")
    times = uniform_grid(steps, start, end)
    inner = shift_time((times - start) / (end - start), shift)
    return start + (end - start) * inner


def rho_grid(
    steps: int, path: Path, rho: float = 7.0, low: float = 0.002, high: float = 80.0, start: float = 0.0, end: float = 1.0
) -> Tensor:
    """Noise-to-signal ratios beta / alpha with equal steps of their root: Karras et al.'s grid, on any path.

    Args:
        steps: at least 1.
        path: whose times the levels are turned into.
        rho: > 0; 7 is theirs.
        low, high: the levels next to the ends; the grid's own ends are put to
            `start` and `end`. Levels outside them are left out by moving low and high inside.

    Raises:
        ValueError: as `uniform_grid`; a rho or levels that are not positive.
    """
    if not (0 < rho < math.inf and 0 < low < high < math.inf):
        raise ValueError(f"rho={rho}, levels {low} to {high} of a grid: all positive, low < high. Use 7, 0.002, 80.")
    ends = torch.exp(-path.log_snr(uniform_grid(1, start, end)) / 2)
    high, low = min(high, ends[0].item()), max(low, ends[1].item())
    roots = torch.linspace(high ** (1 / rho), low ** (1 / rho), uniform_grid(steps, start, end).numel(), dtype=torch.float64)
    times = path.time_from_log_snr(-2 * rho * torch.log(roots))
    times[0], times[-1] = start, end
    return times


def log_snr_grid(steps: int, path: Path, low: float = 0.01, high: float = 20.0, start: float = 0.0, end: float = 1.0) -> Tensor:
    """Build a grid of equal steps in the log signal-to-noise ratio, that is of noise levels in geometric progression.

    Args:
        steps, path: as in `rho_grid`.
        low, high: the levels beta / alpha that the ends stand for, as in `rho_grid`: where the ratio is 0 or infinite there is a grid too.

    Raises:
        ValueError: as `uniform_grid`; levels that are not positive.

    Source: Lu et al., DPM-Solver, section 3.3.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"levels {low} to {high} of a grid: positive, low < high. Use 0.01 and 20.")
    ends = torch.exp(-path.log_snr(uniform_grid(1, start, end)) / 2)
    high, low = min(high, ends[0].item()), max(low, ends[1].item())
    logs = torch.linspace(math.log(high), math.log(low), uniform_grid(steps, start, end).numel(), dtype=torch.float64)
    times = path.time_from_log_snr(-2 * logs)
    times[0], times[-1] = start, end
    return times


def time_grid(
    name: str, steps: int, *, path: Path | None = None, shift: float = 3.0, rho: float = 7.0, start: float = 0.0, end: float = 1.0
) -> Tensor:
    """A grid by its recipe name.

    Args:
        name: one of GRIDS.
        steps, start, end: as in `uniform_grid`.
        path: for `rho` and `log_snr`; rho: for `rho`; shift: for `shifted`.

    Raises:
        ValueError: an unknown name, and as the grid of that name.
    """
    if name == "uniform":
        return uniform_grid(steps, start, end)
    if name == "shifted":
        return shifted_grid(steps, shift, start, end)
    if name == "rho":
        return rho_grid(steps, path or CondOT(), rho, start=start, end=end)
    if name == "log_snr":
        return log_snr_grid(steps, path or CondOT(), start=start, end=end)
    raise ValueError(f"grid {name!r} is unknown: choose one of {', '.join(GRIDS)}, or pass your own times.")


def intervals(times: Tensor) -> list[tuple[float, float]]:
    """A grid as pairs of floats.

    Raises:
        ValueError: unless it has two times or more and rises strictly inside [0, 1].
    """
    values = times.flatten().tolist()
    pairs = list(pairwise(values))
    if not pairs or not (values[0] >= 0 and values[-1] <= 1) or any(not s < t for s, t in pairs):
        shown = values if len(values) < 9 else [*values[:4], "...", *values[-4:]]
        raise ValueError(
            f"times {shown} are no grid: at least two, rising strictly, inside [0, 1] from noise to data. Use uniform_grid(steps)."
        )
    return pairs
