"""ODE solvers: from noise at t = 0 to data at t = 1 along a velocity field, `dX = u dt`.

A grid of n + 1 times means n steps; each interval is stepped once, except by
the adaptive method. Every solver returns how often it evaluated the field.
Heun, RK4 and Dormand-Prince evaluate at the last time too. A field that is
singular there (`is_singular` of field.py says which) is solved by `solve_then_denoise`: with
the solver's own order to beside the end, then one step along the data
prediction; or with `last_euler=True`: the last interval is one Euler step.
Source: docs/mathematics.md section 4; Hairer, Norsett and Wanner, Solving Ordinary
Differential Equations I, sections II.1, II.4, II.5 and III.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .field import Field, denoise, velocity_and_score
from .path import Path, require_finite
from .time_grid import intervals

FINAL_STEP = 1e-3
"""Where the last step along the data prediction begins: so long before the end, or later, at so much noise for the signal."""
MAX_SHRINK = 4.0
"""By so much a step may bring a field that is singular nearer to its end."""

StepCallback = Callable[[Tensor, float], Tensor]  # what becomes of x after a step that ended at t


class Solution(NamedTuple):
    """The end point, (B, *S), and the number of evaluations of the field."""

    x: Tensor
    evaluations: int


class ButcherTableau(NamedTuple):
    """An explicit Runge-Kutta method: where slopes are taken, from which points, and how they are averaged.

    `rows[i]` are the weights of the earlier slopes in the point of slope i;
    `weights` those of the step; `error_weights` those of the error estimate, if any.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error_weights: tuple[float, ...] = ()


EULER = ButcherTableau((0,), ((),), (1,))
MIDPOINT = ButcherTableau((0, 1 / 2), ((), (1 / 2,)), (0, 1))
HEUN = ButcherTableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
RK4 = ButcherTableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
_FIFTH = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DORMAND_PRINCE = ButcherTableau(
    nodes=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    rows=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _FIFTH,
    ),
    weights=(*_FIFTH, 0),
    error_weights=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


def expand_time(t: float, x: Tensor) -> Tensor:
    """One time for all samples, (B,)."""
    return torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)


def check_start(x: Tensor) -> Tensor:
    """A start in at least float32; a ValueError unless it is (B, *S) and finite."""
    if x.ndim < 2:
        raise ValueError(f"the start has shape {tuple(x.shape)}: samples come first, (B, *S). Use x[None] for one.")
    require_finite("the start", x)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_solution(x: Tensor, evaluations: int) -> Solution:
    """A solution; a ValueError unless its end is finite. The only wait for an accelerator, once per solve."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            "the end point is not finite: the field is singular on the grid, or the steps are too long for it. "
            "Begin at 1e-3, end by `solve_then_denoise` or last_euler=True, or take more steps."
        )
    return Solution(x, evaluations)


def _add_slopes(x: Tensor, h: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """`x + h sum_i w_i k_i`."""
    for w, slope in zip(weights, slopes, strict=False):
        if w:
            x = torch.add(x, slope, alpha=h * w)
    return x


def _slopes(tableau: ButcherTableau, field: Field, x: Tensor, s: float, t: float, first: Tensor | None = None) -> list[Tensor]:
    """The slopes of one step from s to t; `first` saves the evaluation at s where it is known."""
    slopes: list[Tensor] = [] if first is None else [first]
    for node, row in list(zip(tableau.nodes, tableau.rows, strict=True))[len(slopes) :]:
        now = t if node == 1 else s + node * (t - s)
        slopes.append(velocity_and_score(field(_add_slopes(x, t - s, row, slopes), expand_time(now, x)))[0])
    return slopes


def runge_kutta(
    tableau: ButcherTableau, field: Field, x: Tensor, times: Tensor, *, last_euler: bool = False, step_callback: StepCallback | None = None
) -> Solution:
    """One step of an explicit Runge-Kutta method per interval.

    Args:
        tableau: the method.
        field: velocity of (x, t).
        x: start, (B, *S), at times[0].
        times: grid, (n + 1,), rising, in [0, 1].
        last_euler: take the last interval as one Euler step.
        step_callback: called with (x, t) after each step; what it returns goes on.

    Raises:
        ValueError: a grid that does not rise inside [0, 1]; a start or an end
            that is not finite.
    """
    steps, x, evaluations = intervals(times), check_start(x), 0
    for k, (s, t) in enumerate(steps):
        method = EULER if last_euler and k + 1 == len(steps) else tableau
        x = _add_slopes(x, t - s, method.weights, _slopes(method, field, x, s, t))
        evaluations += len(method.nodes)
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, evaluations)


def euler(field: Field, x: Tensor, times: Tensor, *, last_euler: bool = False, step_callback: StepCallback | None = None) -> Solution:
    """Order 1, one evaluation a step. Arguments and errors of every solver here: see `runge_kutta`."""
    return runge_kutta(EULER, field, x, times, last_euler=last_euler, step_callback=step_callback)


def midpoint(field: Field, x: Tensor, times: Tensor, *, last_euler: bool = False, step_callback: StepCallback | None = None) -> Solution:
    """Order 2, two evaluations a step, none at its end: the slope half-way."""
    return runge_kutta(MIDPOINT, field, x, times, last_euler=last_euler, step_callback=step_callback)


def heun(field: Field, x: Tensor, times: Tensor, *, last_euler: bool = False, step_callback: StepCallback | None = None) -> Solution:
    """Order 2, two evaluations a step: the mean of the slopes at both ends; evaluates at times[-1] too."""
    return runge_kutta(HEUN, field, x, times, last_euler=last_euler, step_callback=step_callback)


def rk4(field: Field, x: Tensor, times: Tensor, *, last_euler: bool = False, step_callback: StepCallback | None = None) -> Solution:
    """Order 4, four evaluations a step; evaluates at times[-1] too."""
    return runge_kutta(RK4, field, x, times, last_euler=last_euler, step_callback=step_callback)


def multistep(field: Field, x: Tensor, times: Tensor, *, last_euler: bool = False, step_callback: StepCallback | None = None) -> Solution:
    """Order 2, one evaluation a step, none at times[-1]: Adams and Bashforth's two-step method, on any grid.

    The slope is drawn through the last two points, so with r = h / h_before
    the step is `h ((1 + r / 2) u - (r / 2) u_before)`. The first step is Euler's.
    """
    steps, x = intervals(times), check_start(x)
    previous_slope: Tensor | None = None
    width = 0.0
    for k, (s, t) in enumerate(steps):
        slope = velocity_and_score(field(x, expand_time(s, x)))[0]
        if previous_slope is None or (last_euler and k + 1 == len(steps)):
            x = torch.add(x, slope, alpha=t - s)
        else:
            r = (t - s) / width
            x = _add_slopes(x, t - s, (1 + r / 2, -r / 2), [slope, previous_slope])
        previous_slope, width = slope, t - s
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, len(steps))


def dormand_prince(
    field: Field,
    x: Tensor,
    times: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_evaluations: int = 10_000,
    last_euler: bool = False,
    step_callback: StepCallback | None = None,
) -> Solution:
    """Dormand and Prince's 5(4): steps as long as the tolerances allow, six evaluations each.

    Every time of the grid is hit. The error of a step is the root mean square
    over a sample's values, in units of `atol + rtol |x|`, and the worst sample
    decides; so each sample meets the tolerances, but the steps depend on the
    batch, and each waits for the accelerator once.

    Args:
        field, x, times, last_euler, step_callback: as in `runge_kutta`.
        rtol, atol: relative and absolute error allowed in a step, > 0.
        max_evaluations: most evaluations.

    Raises:
        ValueError: as `runge_kutta`; tolerances that are not positive, or that
            cannot be met within the limit or the precision of time.
    """
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol={rtol}, atol={atol}: tolerances are positive and finite. Use 1e-5.")
    grid, x = intervals(times), check_start(x)
    slope: Tensor | None = None
    h, evaluations = (grid[-1][1] - grid[0][0]) / 20, 0
    for k, (s, t) in enumerate(grid):
        if last_euler and k + 1 == len(grid):
            evaluations += slope is None
            slope = velocity_and_score(field(x, expand_time(s, x)))[0] if slope is None else slope
            x = torch.add(x, slope, alpha=t - s)
            s = t
        while s < t:
            end = t if s + 1.01 * h >= t else s + h
            if end - s < 1e-10 or evaluations + 6 > max_evaluations:
                raise ValueError(
                    f"tolerances rtol={rtol}, atol={atol} cannot be met: at t={s:.6g} the step is {end - s:.2g} "
                    f"after {evaluations} of {max_evaluations} evaluations. Loosen them, use float64, "
                    f"or keep the grid off times where the field is singular."
                )
            width, slopes = end - s, _slopes(DORMAND_PRINCE, field, x, s, end, slope)
            evaluations += 6 if slope is not None else 7
            x_next = _add_slopes(x, width, DORMAND_PRINCE.weights, slopes)
            error = _error(slopes, width, x, x_next, rtol, atol)
            factor = min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2)) if error < math.inf else 0.2
            if error <= 1:
                h = max(h, width * factor) if width < h else width * factor
                x, s, slope = x_next, end, slopes[-1]
            else:
                h, slope = width * factor, slopes[0]
        if step_callback:
            x, slope = step_callback(x, t), None
    return check_solution(x, evaluations)


def _error(slopes: list[Tensor], h: float, x: Tensor, x_next: Tensor, rtol: float, atol: float) -> float:
    """The estimated error of the worst sample in units of the tolerance; not a number where the field is not."""
    estimate = _add_slopes(torch.zeros_like(x), h, DORMAND_PRINCE.error_weights, slopes)
    scale = atol + rtol * torch.maximum(x.abs(), x_next.abs())
    return (estimate / scale).square().flatten(1).mean(1).sqrt().max().item()


def solve_then_denoise(
    solver: Callable[..., Solution],
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    *,
    step_callback: StepCallback | None = None,
    **solver_kwargs: Any,
) -> Solution:
    """Solve a field that is singular at the end, where the path is clean: all but the last 1e-3 with the solver's own order.

    The last step ends on the data prediction. Along the ODE that prediction
    changes with beta^2, so a step from 1e-3 costs some 1e-6, where one over a
    whole last interval costs rk4 three digits. The way there is divided: a slope
    near the end multiplies what a trained network errs by h / (1 - t), so no step
    leaves less than a quarter of what was left (dormand_prince sees to that itself).

    Args:
        solver: one of this file, or `dpmpp_2m`.
        field: velocity of (x, t), not evaluated at times[-1].
        x: start, (B, *S), at times[0].
        times: grid, (n + 1,), rising, in [0, 1], beta = 0 at its end. A last
            interval longer than FINAL_STEP is divided; what comes later than that is one step.
        path: the field's path.
        step_callback: called with (x, t) after each step to a time of the grid.
        solver_kwargs: what the solver takes beside.

    Returns:
        The end, and all evaluations, those of the divided interval and of the last step among them.

    Raises:
        ValueError: as the solver.
    """
    intervals(times)
    times = times.detach().double().cpu()
    snr_start = path.time_from_log_snr(times.new_tensor(2 * math.log((1 - FINAL_STEP) / FINAL_STEP))).item()
    final_start = max(1 - FINAL_STEP, snr_start)
    grid_times = set(times[:-1].tolist())
    inner = times[:-1]
    if times[-2] < final_start:
        remains, ends = 1 - times[-2].item(), 1 - final_start
        parts = 1 if solver is dormand_prince else math.ceil(math.log(remains / ends) / math.log(MAX_SHRINK) - 1e-9)
        inner = torch.cat([inner, 1 - remains * (ends / remains) ** (torch.arange(1, parts + 1) / parts).to(times)])

    def callback_on_grid(x: Tensor, t: float) -> Tensor:
        return step_callback(x, t) if step_callback and t in grid_times else x

    if len(inner) > 1:
        x, evaluations = solver(field, x, inner, step_callback=callback_on_grid, **solver_kwargs)
    else:
        x, evaluations = check_start(x), 0
    x = denoise(field, x, inner[-1].item(), path)
    return check_solution(step_callback(x, times[-1].item()) if step_callback else x, evaluations + 1)
