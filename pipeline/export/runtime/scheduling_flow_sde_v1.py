"""FlowSDEScheduler: noise on the way from noise to data, any amount of it, with the marginals of the model's own flow.

This file travels with exported models and stands alone: torch and diffusers are all it needs. Licence: Apache-2.0.
Sources: Song et al., Score-Based Generative Modeling through SDEs, eq. 6; Ma et al., SiT, section 2 (any coefficient,
chosen after training).
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_flow_v1 import FlowScheduler, Point

NODES = (0.18343464249564978, 0.525532409916329, 0.7966664774136267, 0.9602898564975362)
WEIGHTS = (0.36268378337836166, 0.3137066458778869, 0.22238103445337443, 0.10122853629037706)
"""Gauss's rule of 8 points on [-1, 1], which is symmetric: the points above 0, and their weights."""


class Move(NamedTuple):
    """What follows an evaluation: y changes by `of_point` y + `of_slope` slope + `noise` xi, and is shown at this gauge."""

    begins: bool
    of_point: float
    of_slope: float
    noise: float
    gauge: float


class FlowSDEScheduler(FlowScheduler):
    """Stochastic sampling, `dx = (u + sigma_t^2 / 2 score) dt + sigma_t dW`; the last step adds no noise and ends on the data.

    Noise comes from the `generator` that `step` is given; DiTPipeline, SD3 and Flux give none: then from `scheduler.generator`
    if one was put there, else from torch's global one (torch.manual_seed).

    Args:
        solver: `exponential` (exact in the linear part, stable for every coefficient, order 1), `euler_maruyama` (order 1)
            or `stochastic_heun` (order 2, 2 n - 1 evaluations); with sigma_t = zero the first two are Euler's method.
        sigma_t: `zero`, `constant`, `noise` (in proportion to b), `forward` (the reverse of the noising process:
            sqrt(2 (b^2 da / a - db b)), for `exponential`), or a list of values, evenly from t = 0, the noise, to 1.
        sigma_scale: a factor on it.
        prediction_type, path, table, rates, trained_betas, sigma_data, clip_sample, shift...: as in FlowODEScheduler. `path` is
            condot, cosine, vp (by its rates), ddpm (by trained_betas) or a table.
    """

    solvers = ("exponential", "euler_maruyama", "stochastic_heun")

    @register_to_config
    def __init__(
        self,
        solver: str = "exponential",
        sigma_t: Any = "noise",
        sigma_scale: float = 1.0,
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
        named = sigma_t in ("zero", "constant", "noise", "forward") if isinstance(sigma_t, str) else len(sigma_t) > 1 and min(sigma_t) >= 0
        if not named or not 0 <= sigma_scale < math.inf:
            raise ValueError(f"sigma_t={sigma_t!r} times {sigma_scale}: zero, constant, noise, forward or values >= 0; finite, >= 0.")
        self.order, self.generator = 2 if solver == "stochastic_heun" else 1, None

    def _variance(self, sigma: float) -> float:
        """sigma_t^2 at a time."""
        (a, b, da, db), kind = self.coefficients(sigma), self.config.sigma_t
        if kind == "zero" or not self.config.sigma_scale:
            return 0.0
        if not isinstance(kind, str):
            place = (1 - sigma) * (len(kind) - 1)
            k = min(int(place), len(kind) - 2)
            return (self.config.sigma_scale * (kind[k] + (place - k) * (kind[k + 1] - kind[k]))) ** 2
        forward = 2 * (b * b * da / a - db * b) if a else math.inf
        return self.config.sigma_scale**2 * {"constant": 1.0, "noise": b * b, "forward": forward}[kind]

    def _keep(self, now: Point, then: Point) -> float:
        """exp(-1/2 integral of sigma_t^2 / b^2) over a step: the share of the old noise that stays; by Gauss's rule of 8 points."""
        if self.config.sigma_t == "forward":  # the integral is a change of log signal-to-noise
            return (then.frame * (1 - now.frame) / (now.frame * (1 - then.frame))) ** (self.config.sigma_scale**2)
        half, integral = (now.sigma - then.sigma) / 2, 0.0
        for node, weight in zip((*NODES, *(-node for node in NODES)), WEIGHTS * 2, strict=True):
            sigma = then.sigma + half * (1 + node)
            integral += half * weight * self._variance(sigma) / self.coefficients(sigma)[1] ** 2
        return math.exp(-integral / 2)

    def _plan(self, levels: Any) -> Any:
        """The points where the network is evaluated and what follows each."""
        ends, points, moves, kind = [self._point(s) for s in levels], [], [], self.config.solver
        rates = []
        for p in ends[:-1] if kind == "euler_maruyama" else ends if kind == "stochastic_heun" else ():
            a, b, da, db = self.coefficients(p.sigma)
            rates.append(self._variance(p.sigma) / (da * b - a * db))  # of dy, per unit of s
            if not math.isfinite(rates[-1]):
                raise ValueError(f"sigma_t is not finite at sigma={p.sigma}: start later, or take solver='exponential'.")
        for k, (p, q) in enumerate(pairwise(ends)):
            s, t, h = p.frame, q.frame, p.frame - q.frame
            points.append(p)
            if kind == "exponential":
                keep = self._keep(p, q)
                moves.append(Move(True, -t * (1 - keep), -h - t * (1 - keep) * (1 - s), t * math.sqrt(1 - keep**2), q.gauge))
                continue
            pull = rates[k] / (2 * s)
            kick = rates[k] if kind == "euler_maruyama" else (rates[k] + rates[k + 1]) / 2
            moves.append(Move(True, -h * pull, -h - h * pull * (1 - s), math.sqrt(h * kick), q.gauge))
            if kind == "stochastic_heun":
                pull = rates[k + 1] / (2 * t)
                points.append(q)
                moves.append(Move(False, -h * pull, -h - h * pull * (1 - t), 0.0, q.gauge))
        return [*points, ends[-1]], [*moves, Move(True, 0.0, -ends[-1].frame, 0.0, 1.0)]

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
            generator: of the noise, one or one per sample; see the class where a pipeline gives none.
        """
        i, y, slope = self._take(model_output, timestep, sample)
        move = self._moves[i]
        change = move.of_slope * slope
        if move.of_point:
            change = torch.add(change, y, alpha=move.of_point)
        if move.begins:
            if move.noise:
                xi = randn_tensor(y.shape, generator=generator or self.generator, device=y.device, dtype=y.dtype)
                y = torch.add(y, xi, alpha=move.noise)
            self._start, self._change = y, change
            y = y + change
        else:  # Heun: the same noise, the mean of both changes
            y = self._start + (self._change + change) / 2
        y = (y if move.gauge == 1 else y * move.gauge).to(model_output.dtype)
        return SchedulerOutput(prev_sample=y) if return_dict else (y,)
