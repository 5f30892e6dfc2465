"""FlowSDEScheduler, second version: two steps of memory, and the log-probability of each step, for reinforcement learning.

This file travels with exported models and stands alone: torch and diffusers are all it needs. Licence: Apache-2.0.
Sources: those of the first version; Lu et al., DPM-Solver++, section 5 (the two-step SDE solver); Black et al., Training Diffusion Models
with Reinforcement Learning, section 4.2; Liu et al., Flow-GRPO, section 4.1 (the policy of a step).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_flow_sde_v1 import FlowSDEScheduler as FlowSDESchedulerV1
from .scheduling_flow_sde_v1 import Move
from .scheduling_flow_v2 import FlowSchedulerV2, plain, within

NAMED = ("zero", "constant", "noise", "forward")
"""Diffusion coefficients with a name."""


def normal_log_prob(x: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Return log N(x; mean, std^2 I) of each sample, (B,), summed in double precision: a ratio of policies needs its last digits."""
    parts = -((x.detach().to(mean.dtype) - mean) / std).square() / 2
    return parts.flatten(1).sum(1, dtype=finest(mean)) - parts[0].numel() * (math.log(std) + math.log(2 * math.pi) / 2)


def steady_share(keep: float) -> float:
    """Return the share of a two-step extrapolation that is taken where a step keeps so much of the old noise: 1 of all, 1/2 of none.

    Where noise is renewed, predictions jump with it, and a line through two of them carries the jump on, step after step. The share is
    that of DPM-Solver++'s midpoint form in its other one.
    """
    lost = 1 - keep
    return 1.0 if lost < 1e-5 else lost / 2 / (1 + lost / math.log(keep)) if keep else 0.5


def finest(x: torch.Tensor) -> torch.dtype:
    """Return the finest precision of a tensor's device."""
    return torch.float32 if x.device.type == "mps" else torch.float64


@dataclass
class FlowSDESchedulerOutput(BaseOutput):
    """A step and the normal law that it was drawn from.

    Args:
        prev_sample: the next point, (B, *S), in the network's dtype.
        log_prob: (B,), float64: logarithm of the density of `prev_sample`, summed over all values of a sample; 0 in a step without noise.
        prev_sample_mean: (B, *S), float32 at least.
        std: one number, standard deviation of every value; 0 in a step without noise.
    """

    prev_sample: torch.Tensor
    log_prob: torch.Tensor
    prev_sample_mean: torch.Tensor
    std: torch.Tensor


class FlowSDEScheduler(FlowSchedulerV2, FlowSDESchedulerV1):
    """Stochastic sampling, `dx = (u + sigma_t^2 / 2 score) dt + sigma_t dW`; the last step adds no noise and ends on the data.

    Noise comes from the `generator` that `step` is given; DiTPipeline, SD3 and Flux give none: then from `scheduler.generator`
    if one was put there, else from torch's global one (torch.manual_seed).

    Args:
        solver: `dpmpp_2m_sde` (the exponential form with the data prediction on a line through the last two, as DPM-Solver++ 2M's SDE,
            for every coefficient), `exponential` (exact in the linear part, stable for every coefficient, order 1), `euler_maruyama`
            (order 1) or `stochastic_heun` (order 2, 2 n - 1 evaluations).
        sigma_t: `zero`, `constant`, `noise` (in proportion to b), `forward` (the reverse of the noising process:
            sqrt(2 (b^2 da / a - db b)), for the first two), or a list of values, evenly from t = 0, the noise, to 1.
        sigma_scale: a factor on it.
        prediction_type, path, table, rates, trained_betas, sigma_data, clip_sample, shift...: as in FlowODEScheduler.
    """

    solvers: Any = ("dpmpp_2m_sde", "exponential", "euler_maruyama", "stochastic_heun")
    two_step = "dpmpp_2m_sde"

    @register_to_config
    def __init__(
        self,
        solver: str = "dpmpp_2m_sde",
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
        values, scale = plain(sigma_t), plain(sigma_scale)
        listed = isinstance(values, list) and len(values) > 1 and all(within(one, -1e-300, math.inf) for one in values)
        if not (listed or (isinstance(values, str) and values in NAMED)) or not within(scale, -1e-300, math.inf):
            raise ValueError(
                f"sigma_t={sigma_t!r} times {sigma_scale!r}: {', '.join(NAMED)} or two values or more >= 0; finite, >= 0. For one "
                f"value c everywhere give sigma_t='constant', sigma_scale=c."
            )
        self.order, self.generator = 2 if solver == "stochastic_heun" else 1, None

    def _plan(self, levels: Any) -> Any:
        """Return the points where the network is evaluated and what follows each."""
        if self.config.solver != self.two_step:
            return super()._plan(levels)
        marks = [*levels, 0.0] if self._point(0.0).frame else levels
        points, moves = [self._point(s) for s in marks], []
        for k, (p, q) in enumerate(pairwise(points)):  # the exponential form; none is drawn in the step to sigma = 0
            s, t, lost = p.frame, q.frame, 1 - self._keep(p, q) if k + 1 < len(levels) else 0.0
            moves.append(Move(True, -t * lost, t - s - t * lost * (1 - s), t * math.sqrt(lost * (2 - lost)), q.gauge))
        keeps = [*(self._keep(p, q) for p, q in pairwise(points[: len(levels)])), 1.0]
        self._ahead = [ahead * steady_share(keep) for ahead, keep in zip(self._look_ahead(levels, self._keep), keeps, strict=True)] + [0.0]
        return points, [*moves, Move(True, 0.0, -points[-1].frame, 0.0, 1.0)]

    def _source(self, generator: Any, count: int) -> Any:
        """Return the generator of a step's noise, or one for each sample, as randn_tensor takes them."""
        if generator is None:
            generator = self.generator
        many = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        if (len(many) not in (1, count)) or not all(isinstance(one, torch.Generator) for one in many if generator is not None):
            kind = type(many[0]).__name__ if many else "none"
            raise ValueError(
                f"generator: {len(many)} of type {kind} for {count} samples. Give one torch.Generator, or a list of one for each sample."
            )
        return many if len(many) > 1 else many[0]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        return_log_prob: bool = False,
        prev_sample: Any = None,
        **kwargs: Any,
    ) -> Any:
        """From an evaluation to the point of the next.

        Args:
            model_output: the network's prediction, of the shape of `sample`.
            timestep: one of `timesteps`; read at the first step only, and after `set_begin_index`.
            sample: what the network saw.
            generator: of the noise, one or one per sample; see the class where a pipeline gives none.
            return_dict: False for a tuple, (prev_sample,), or with the logarithm (prev_sample, log_prob, prev_sample_mean, std).
            return_log_prob: return a FlowSDESchedulerOutput: the step, the logarithm of its density, and that law's mean and deviation.
                Gradients reach it through the mean alone.
            prev_sample: a point drawn before, of the shape of `sample`: nothing is drawn, and its logarithm is returned. `set_begin_index`
                says which step, where steps are asked out of turn (not by `dpmpp_2m_sde`, whose steps depend on the ones before).

        Raises:
            ValueError: generators that are not one, or one for each sample; a log-probability where nothing is drawn at any step, or
                by `stochastic_heun`, whose steps are not normal.
        """
        if not return_log_prob and prev_sample is None:
            source = self._source(generator, len(sample)) if isinstance(sample, torch.Tensor) and sample.ndim else generator
            return super().step(model_output, timestep, sample, source, return_dict)
        self._check_law(sample, generator, prev_sample)
        alone = self._before is None
        i, y, slope = self._take(model_output, timestep, sample)
        if prev_sample is not None and alone and self._ahead and self._ahead[i]:
            raise ValueError(f"{self.two_step} looks back on the step before: ask in turn, or draw by solver='exponential'.")
        move, change = self._moves[i], self._moves[i].of_slope * slope
        change = torch.add(change, y, alpha=move.of_point)
        mean = (y + change) * move.gauge
        if prev_sample is None:
            if move.noise:
                xi = randn_tensor(y.shape, generator=self._source(generator, len(y)), device=y.device, dtype=y.dtype)
                y = torch.add(y, xi, alpha=move.noise)
            prev_sample = ((y + change) * move.gauge).to(model_output.dtype)
        std = move.noise * move.gauge
        log_prob = normal_log_prob(prev_sample, mean, std) if std else mean.new_zeros(len(mean), dtype=finest(mean))
        found = FlowSDESchedulerOutput(prev_sample, log_prob, mean, mean.new_full((), std))
        return found if return_dict else (prev_sample, log_prob, mean, found.std)

    def _check_law(self, sample: Any, generator: Any, prev_sample: Any) -> None:
        """Raise ValueError where the density of a step is not known, or is asked of a point that is none."""
        if self.config.solver == "stochastic_heun":
            raise ValueError("log-probabilities by solver='stochastic_heun': its steps are not normal. Use exponential or euler_maruyama.")
        if self.num_inference_steps is not None and not any(move.noise for move in self._moves):
            raise ValueError(f"log-probabilities with sigma_t={self.config.sigma_t!r}, {len(self._moves)} steps: no step draws anything.")
        if prev_sample is not None and generator is not None:
            raise ValueError("prev_sample and a generator: nothing is drawn where the point is given. Give one of them.")
        if prev_sample is not None and getattr(prev_sample, "shape", None) != sample.shape:
            raise ValueError(f"prev_sample {tuple(getattr(prev_sample, 'shape', ()))}: of the shape of sample, {tuple(sample.shape)}.")
