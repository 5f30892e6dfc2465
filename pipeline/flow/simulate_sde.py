"""A stochastic differential equation as it stands, `dX = u dt + sigma_t dW`: the drift is what the field says, and nothing is added to it.

With the velocity of a path for a drift the marginals are NOT the path's: for
those the drift needs `sigma_t^2 / 2` times the score, which `sde` adds. This is
for a network that was trained as such a drift, and for processes such as
Ornstein and Uhlenbeck's, `u = -theta x`.
Source: Holderrieth and Erives, MIT 6.S184 notes, algorithm 2 (Euler and Maruyama's method).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .field import Field, velocity_and_score
from .sde import NoiseFunction
from .solver import Solution, StepCallback, check_solution, check_start, expand_time
from .time_grid import intervals


def simulate_sde(
    drift: Field,
    x: Tensor,
    times: Tensor,
    sigma: Callable[[Tensor], Tensor],
    noise: NoiseFunction,
    *,
    step_callback: StepCallback | None = None,
) -> Solution:
    """Simulate `dX = u dt + sigma_t dW` by Euler and Maruyama's method: strong order 1 for noise that does not depend on X.

    Args:
        drift: u of (x, t); of a pair (velocity, score) the first.
        x: start, (B, *S), at times[0].
        times: grid, (n + 1,), rising, in [0, 1].
        sigma: diffusion coefficient of t, any shape -> the same, >= 0; taken where steps begin.
        noise: `noise(k)` -> (B, *S), standard normal, for step k from 0, the last step too.
        step_callback: called with (x, t) after each step; what it returns goes on.

    Raises:
        ValueError: a grid that does not rise inside [0, 1]; a coefficient that is negative or not finite; a start or an end
            that is not finite.
    """
    steps, x = intervals(times), check_start(x)
    values = torch.as_tensor(sigma(times[:-1].detach().double().cpu()), dtype=torch.float64).broadcast_to(len(steps)).tolist()
    for (s, _), g in zip(steps, values, strict=True):
        if not 0 <= g < math.inf:
            raise ValueError(f"sigma_t={g} at t={s:.6g}: a diffusion coefficient is finite and not negative. Start later, or take another.")
    for k, (s, t) in enumerate(steps):
        x = torch.add(x, velocity_and_score(drift(x, expand_time(s, x)))[0], alpha=t - s)
        if values[k]:
            x = torch.add(x, noise(k), alpha=math.sqrt(t - s) * values[k])
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, len(steps))
