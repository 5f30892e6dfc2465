"""FlowODEScheduler: from noise to data along the flow of any model trained on a Gaussian path, by five solvers.

This file travels with exported models and stands alone: torch and diffusers are all it needs. Licence: Apache-2.0.
Sources: Song et al., Denoising Diffusion Implicit Models (Euler's step here, on every path); Hairer, Norsett and Wanner,
Solving Ordinary Differential Equations I, sections II.1 and III.5 (the solvers).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .scheduling_flow_v1 import FlowScheduler

TABLES: Any = {
    "euler": ((0.0,), (), (1.0,)),
    "midpoint": ((0.0, 0.5), ((0.5,),), (0.0, 1.0)),
    "heun": ((0.0, 1.0), ((1.0,),), (0.5, 0.5)),
    "rk4": ((0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "multistep": ((0.0,), (), (1.0,)),
}
"""Of each solver: where in a step slopes are taken, the weights of the earlier ones at each but the first, and those of the step."""


class Stage(NamedTuple):
    """What follows an evaluation: whether a step begins with it, the weights of the latest slopes, the gauge where they lead."""

    begins: bool
    weights: Any
    gauge: float


class FlowODEScheduler(FlowScheduler):
    """Deterministic sampling; evaluations of the network: n for Euler and multistep, 2 n for midpoint and Heun, 4 n for RK4.

    The last step ends on the data. Where the slope is unknown there (networks that predict data; paths that end
    on noise) it is one Euler step to the data prediction. Euler's method is DDIM on every path.

    Args:
        solver: `euler`, `midpoint`, `heun`, `rk4` or `multistep` (Adams and Bashforth's two-step method for uneven steps, order 2).
        prediction_type: `velocity` (da z + db eps), `flow_prediction` (eps - z), `epsilon`, `sample`, `v_prediction`, `score`.
        path: `condot` (a = 1 - sigma, b = sigma), `cosine`, `vp` by its `rates`, `ddpm` by its `trained_betas`, or `table`.
        table: alpha, beta and their slopes in t = 1 - sigma, each a list, evenly from sigma = 0 to 1.
        sigma_data: standard deviation of the data if the network is scaled the Karras way, else 0.
        clip_sample, clip_sample_range: data predictions are kept within plus and minus so much, as of DDPMs in pixels.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: of the sigmas, as in FlowMatchEulerDiscreteScheduler.
    """

    solvers = tuple(TABLES)

    @register_to_config
    def __init__(
        self,
        solver: str = "euler",
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
        self.order = len(TABLES[solver][0])

    def _plan(self, levels: Any) -> Any:
        """The points where the network is evaluated and what follows each."""
        ends, points, moves, before = [self._point(s) for s in (*levels, 0.0)], [], [], 0.0
        known = self._usable(0.0) and ends[-1].frame == 0  # at the data
        frames = [*(p.frame for p in ends[:-1]), 0.0]
        self._slopes: list[torch.Tensor] = []
        for k, h in enumerate(t - s for s, t in pairwise(frames)):
            last = k + 1 == len(levels)
            nodes, rows, weights = TABLES["euler" if last and not known else self.config.solver]
            if self.config.solver == "multistep" and k and (known or not last):
                weights = (-h / before / 2, 1 + h / before / 2)
            inner = [ends[k + 1] if node == 1 else self._point(self._level(frames[k] + node * h)) for node in nodes[1:]]
            gauges = [*(p.gauge for p in inner), 1.0 if last else ends[k + 1].gauge]
            points += [ends[k], *inner]
            moves += [Stage(j == 0, [h * w for w in row], gauges[j]) for j, row in enumerate((*rows, weights))]
            before = h
        return points, moves

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """From an evaluation to the point of the next.

        Args:
            model_output: the network's prediction, of the shape of `sample`.
            timestep: one of `timesteps`; read at the first step only.
            sample: what the network saw.
            generator: not used; nothing here is drawn.
        """
        i, y, slope = self._take(model_output, timestep, sample)
        move = self._moves[i]
        if move.begins:
            self._start, self._slopes = y, self._slopes[-1:]
        self._slopes.append(slope)
        used, y = self._slopes[-len(move.weights) :], self._start
        weights = move.weights if len(used) == len(move.weights) else [sum(move.weights)]  # a two-step method begun in the middle
        for weight, one in zip(weights, used, strict=True):
            y = torch.add(y, one, alpha=weight) if weight else y
        y = (y if move.gauge == 1 else y * move.gauge).to(model_output.dtype)
        return SchedulerOutput(prev_sample=y) if return_dict else (y,)
