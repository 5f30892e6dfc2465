"""FlowODEScheduler, second version: two steps of memory, and the solver's own order to the end where networks predict data.

This file travels with exported models and stands alone: torch and diffusers are all it needs. Licence: Apache-2.0.
Sources: those of the first version; Lu et al., DPM-Solver++, algorithm 2.
"""

import math
from itertools import pairwise
from typing import Any

from diffusers.configuration_utils import register_to_config

from .scheduling_flow_ode_v1 import TABLES, Stage
from .scheduling_flow_ode_v1 import FlowODEScheduler as FlowODESchedulerV1
from .scheduling_flow_v2 import LAST_LEVEL, FlowSchedulerV2

SHRINK = 4.0
"""By so much a step may bring a slope that is singular nearer to its end: it multiplies what a network errs."""


class FlowODEScheduler(FlowSchedulerV2, FlowODESchedulerV1):
    """Deterministic sampling; evaluations of the network: n for Euler, multistep and dpmpp_2m, 2 n for midpoint and Heun, 4 n for RK4.

    Sampling ends on the data. Where the slope is unknown there, of networks that predict data, the solver goes on to a thousandth of
    noise, by steps that leave a quarter of it or more, and one more evaluation leads to the data prediction; likewise, by every
    solver, from sigma = 0 on paths that keep noise there. `dpmpp_2m` and `euler` end on a data prediction by
    themselves. Euler's method is DDIM on every path.

    Args:
        solver: `dpmpp_2m` (DPM-Solver++ 2M's kin, order 2, the data prediction on a line through the last two), `multistep` (Adams and
            Bashforth's two-step method for uneven steps, order 2), `euler`, `midpoint`, `heun` or `rk4`.
        prediction_type: `velocity` (da z + db eps), `flow_prediction` (eps - z), `epsilon`, `sample`, `v_prediction`, `score`.
        path: `condot` (a = 1 - sigma, b = sigma), `cosine`, `vp` by its `rates`, `ddpm` by its `trained_betas`, or `table`.
        table: alpha, beta and their slopes in t = 1 - sigma, each a list, evenly from sigma = 0 to 1.
        sigma_data: standard deviation of the data if the network is scaled the Karras way, else 0.
        clip_sample, clip_sample_range: data predictions are kept within plus and minus so much, as of DDPMs in pixels.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: of the sigmas, as in FlowMatchEulerDiscreteScheduler.
    """

    solvers: Any = ("dpmpp_2m", "multistep", "euler", "midpoint", "heun", "rk4")
    two_step = "dpmpp_2m"

    @register_to_config
    def __init__(
        self,
        solver: str = "dpmpp_2m",
        prediction_type: str = "flow_prediction",
        path: str = "condot",
        table: Any = None,
        rates: Any = (0.1, 20.0),
        trained_betas: Any = None,
        sigma_data: float = 0.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: Any = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        self._prepare()
        self.order = len(TABLES.get(solver, TABLES["euler"])[0])

    def _marks(self, levels: Any) -> Any:
        """Return the levels where steps begin, and whether the last step leads to the data prediction, not along a slope known there."""
        if self._point(0.0).frame:
            return [*levels, 0.0], True
        known = self._usable(0.0) and self.config.solver != self.two_step
        last = min(LAST_LEVEL, self._level(LAST_LEVEL))
        whole = known or self.config.solver in ("euler", self.two_step) or levels[-1] <= last
        if whole:
            return levels, not known
        parts = math.ceil(math.log(levels[-1] / last) / math.log(SHRINK) - 1e-9)
        return [*levels, *(levels[-1] * (last / levels[-1]) ** (k / parts) for k in range(1, parts + 1))], not known

    def _plan(self, levels: Any) -> Any:
        """Return the points where the network is evaluated and what follows each."""
        marks, lands = self._marks(levels)
        ends, points, moves, before = [self._point(s) for s in (*marks, 0.0)], [], [], 0.0
        frames = [*(p.frame for p in ends[:-1]), 0.0]
        for k, h in enumerate(t - s for s, t in pairwise(frames)):
            last = k + 1 == len(marks)
            plain_step = (last and lands) or self.config.solver == self.two_step
            nodes, rows, weights = TABLES["euler" if plain_step else self.config.solver]
            if self.config.solver == "multistep" and k and not plain_step:
                weights = (-h / before / 2, 1 + h / before / 2)
            inner = [ends[k + 1] if node == 1 else self._point(self._level(frames[k] + node * h)) for node in nodes[1:]]
            gauges = [*(p.gauge for p in inner), 1.0 if last else ends[k + 1].gauge]
            points += [ends[k], *inner]
            moves += [Stage(j == 0, [h * w for w in row], gauges[j]) for j, row in enumerate((*rows, weights))]
            before = h
        self._ahead = [*self._look_ahead(levels), 0.0] if self.config.solver == self.two_step else []
        return points, moves
