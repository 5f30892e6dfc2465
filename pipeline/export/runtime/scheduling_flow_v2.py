"""What the second versions of FlowODEScheduler and FlowSDEScheduler share beyond the first: schedules that are checked, a look ahead.

It travels with exported models, written into the file of either, which then stands alone on torch and diffusers. Licence: Apache-2.0.
Sources: Lu et al., DPM-Solver++, algorithm 2 (the two-step method, of which this is a kin); Xue et al., SA-Solver, eq. 14 (any sigma_t).
"""

import math
from itertools import pairwise
from operator import index
from typing import Any

import torch

from .scheduling_flow_sde_v1 import NODES, WEIGHTS
from .scheduling_flow_v1 import FlowScheduler

LAST_LEVEL = 1e-3
"""From this sigma, or this share of noise where that is later, the last step goes to the data prediction if the slope there is unknown."""
ROUNDING = 1e-6
"""Of sigmas and timesteps that were counted in single precision."""


def plain(value: Any) -> Any:
    """Return arrays and tensors as lists and numbers, which a configuration can be saved with."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def whole_number(name: str, value: Any, rule: str) -> int:
    """Return a whole number of any library; a ValueError with the rule for what is none, 3.7 and True among them."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: {rule}") from None


def numbers_of(name: str, values: Any) -> Any:
    """Return a caller's list, array or tensor as floats."""
    try:
        return [float(one) for one in values]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={values!r}: a list of numbers, one for each step.") from None


def within(value: Any, low: float, high: float) -> bool:
    """Return whether a value is a number in the open interval."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < high


def check_numbers(c: Any) -> None:
    """Raise ValueError for numbers of a configuration that no schedule can be made of."""
    n, end, spread = c.num_train_timesteps, c.shift_terminal, c.clip_sample_range
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"num_train_timesteps={n!r}: a whole number, at least 1. Use 1000, as of the network's training.")
    if not within(c.shift, -math.inf, math.inf):
        raise ValueError(f"shift={c.shift!r}: a positive, finite number; 1 is none.")
    if end is not None and end != 0 and not within(end, 0, 1):
        raise ValueError(f"shift_terminal={end!r}: the last sigma, between 0 and 1; None or 0 for none.")
    if not within(c.sigma_data, -math.inf, math.inf):
        raise ValueError(f"sigma_data={c.sigma_data!r}: a finite number; 0 for a network that is not scaled.")
    if not within(spread, 0, math.inf):
        raise ValueError(f"clip_sample_range={spread!r}: a positive, finite number. Use 1 for images within -1 and 1.")
    rates = c.rates
    if not isinstance(rates, list) or len(rates) != 2 or not all(within(r, -1e-300, math.inf) for r in rates) or not sum(rates):
        raise ValueError(f"rates={rates!r}: of the path vp at the data and at the noise, not negative. Use 0.1 and 20.")
    for name, rows in (("table", c.table), ("trained_betas", [c.trained_betas])):
        lists = [row for row in (rows if isinstance(rows, list) else [rows]) if row is not None]
        if not all(isinstance(row, list) and all(within(one, -math.inf, math.inf) for one in row) for row in lists):
            raise ValueError(f"{name}: it holds what is no finite number. Give finite numbers alone.")
    if c.table and len(c.table) > 1:
        rows = list(zip(*c.table[:2], strict=False))
        if not all(min(a, b, q) >= 0 and b * p < q * a for (a, b), (p, q) in pairwise(rows)):
            raise ValueError(
                "table: beta / alpha does not rise from sigma = 0 to 1. Give alpha and beta, not negative, from data to noise."
            )


class FlowSchedulerV2(FlowScheduler):
    """What both second versions add to FlowScheduler.

    Sigmas, timesteps and numbers that cannot be followed are refused; only what
    lies between the first level where the slope is known and 1 is moved there.
    A two-step method draws the data prediction z on the straight line through
    the last two, in the signal's share tau = a / sqrt(a^2 + b^2), over a step
    that is exact for such a z: DPM-Solver++ 2M's, in another variable than
    log-SNR, which is infinite at both ends.
    """

    two_step = ""

    def _prepare(self) -> None:
        """Check the configuration, with all of it in plain lists and numbers."""
        self.register_to_config(**{key: plain(value) for key, value in self.config.items() if not key.startswith("_")})
        check_numbers(self.config)
        super()._prepare()
        self._shape: Any = None
        self._before: Any = None
        self._ahead: list[float] = []

    def _shifted(self, sigmas: Any, mu: Any) -> Any:
        """Sigmas moved towards the noise; a `mu` of 0 is one."""
        if self.config.use_dynamic_shifting and mu is not None:
            mu = float(mu)
            if not math.isfinite(mu) or (self.config.time_shift_type == "linear" and mu <= 0):
                raise ValueError(
                    f"mu={mu}: finite, and with time_shift_type='linear' positive. Use 0 (exponential) or 1 (linear) for none."
                )
        return super()._shifted(sigmas, mu)

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None, timesteps: Any = None
    ) -> None:
        """Plan the steps: a timestep for each evaluation of the network, of which some solvers take several a step.

        Args:
            num_inference_steps: a whole number, at least 1; evenly from 1, or a thousandth less where the slope is unknown there, then
                shifted.
            device: for `timesteps`; `sigmas`, one more than steps, stay on the CPU.
            sigmas: your own, falling, in (0, 1], without the last 0; shifted too, as diffusers does. A first one between the first level
                where the slope is known and 1 is moved to that level.
            mu: for use_dynamic_shifting; not used without.
            timesteps: your own instead of sigmas, num_train_timesteps times sigma; not shifted.

        Raises:
            ValueError: steps that are no whole number from 1; levels beyond 1, at or below 0, not finite or not falling; two where the
                slope is unknown.
        """
        count, n = self.config.num_train_timesteps, num_inference_steps
        n = n if n is None else whole_number("num_inference_steps", n, "a whole number, at least one step. Use 25 to 50 as a rule.")
        for name, values, unit in (("sigmas", sigmas, 1), ("timesteps", timesteps, count)):
            if values is None:
                continue
            values = numbers_of(name, values)
            bad = [v for v in values if not 0 < v <= unit * (1 + ROUNDING)]
            if bad or any(s <= t for s, t in pairwise(values)):
                raise ValueError(f"{name}={values[:8]}: they fall, from {unit} at most, and stay above 0, which is added.")
            top = 1.0 if self._usable(1.0) and self.config.path != "ddpm" else 1 - 1 / count
            moved = self._shifted(values, mu) if name == "sigmas" else [v / count for v in values]
            if len(moved) > 1 and moved[1] >= top:
                raise ValueError(f"{name}={values[:8]}: at most one lies at or above {top * unit:g}, the first where the slope is known.")
            sigmas, timesteps = (values, timesteps) if name == "sigmas" else (sigmas, values)
        super().set_timesteps(n, device, sigmas, mu, timesteps)
        self._forget()

    def _forget(self) -> None:
        """Begin anew: no step was taken, and none is looked back on."""
        self._step_index = self._placed = self._shape = self._before = None
        self._slopes: list[torch.Tensor] = []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin, anew if sampling was under way, at `timesteps[begin_index]`, where a step must begin."""
        place = whole_number("begin_index", begin_index, "a whole number, the place in `timesteps` where sampling begins.")
        planned = self.num_inference_steps is not None
        if place < 0 or (planned and (place >= len(self._moves) or not self._moves[place].begins)):
            raise ValueError(
                f"begin_index={place}: no step begins there; begin at a multiple of {self.order}, below {len(self.timesteps)}."
            )
        self._forget()
        self._begin_index = place

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """Return the place of a timestep, to rounding, in the schedule; of several the one where a step begins. One for all samples."""
        values = {float(one) for one in torch.as_tensor(timestep).flatten().tolist()}
        if len(values) != 1:
            raise ValueError(f"timestep {timestep}: one for all samples. Step samples at different times one by one.")
        value = values.pop()
        if self.num_inference_steps is not None:
            known = self._known if schedule_timesteps is None else [float(k) for k in schedule_timesteps]
            nearest = min(known, key=lambda k: abs(k - value), default=value)
            value = nearest if abs(nearest - value) <= ROUNDING * self.config.num_train_timesteps else value
        return super().index_for_timestep(value, schedule_timesteps)

    def _take(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        """Return the number of this evaluation, the point y and the slope dy / ds there, or half-way of a two-step method."""
        for name, one in (("model_output", output), ("sample", sample)):
            if not isinstance(one, torch.Tensor):
                raise ValueError(f"{name} is a {type(one).__name__}: pass a tensor, such as the `sample` of what a network returned.")
        if self._step_index is not None and self._shape != sample.shape:
            raise ValueError(
                f"sample {tuple(sample.shape)} after {tuple(self._shape)}: one run has one shape. Call set_timesteps before the next."
            )
        i, y, slope = super()._take(output, timestep, sample)
        self._shape = sample.shape
        if self.config.solver == self.two_step:
            frame = self._points[i].frame
            data = torch.sub(y, slope, alpha=frame)
            if self._before is not None and self._ahead[i]:
                slope = torch.sub(slope, data - self._before, alpha=self._ahead[i] / frame)
            self._before = data.detach()
        return i, y, slope

    def _look_ahead(self, levels: Any, kept: Any = None) -> list[float]:
        """Return by how much of its last change each step moves the data prediction on; the last ends at sigma = 0 without noise.

        A step from s to t keeps `(b_t / b_s) keep` of x and adds the integral of z dm, m = b_t keep(r, t) a_r / b_r, which is
        `z (m_t - m_s)` if z stands still. By parts, the line adds its slope times `(tau_t - tau_s) a_t - integral of m dtau`, here by
        Gauss's rule in log(a / b).
        `kept`: of two points, the share of the noise that stays between them; None for the ODE.
        """
        found, (nodes, weights) = [0.0], ((*NODES, *(-node for node in NODES)), WEIGHTS * 2)
        ends = [(self._point(s), *self.coefficients(s)[:2]) for s in (*levels, 0.0)]
        share = [a / math.hypot(a, b) for _, a, b in ends]
        for k in range(1, len(levels)):
            (now, a, b), (then, c, d), noisy = ends[k], ends[k + 1], kept is not None and k + 1 < len(levels)
            integral, half = 0.0, math.log(c * b / (d * a)) / 2 if d else 0.0
            for node, weight in zip(nodes, weights, strict=True):
                ratio = a / b * math.exp(half * (1 + node))
                keep = kept(self._point(self._level(1 / (1 + ratio))), then) if noisy and d else 1.0
                integral += half * weight * d * keep * ratio * ratio / (1 + ratio * ratio) ** 1.5
            step, before = share[k + 1] - share[k], share[k] - share[k - 1]
            still = c - d * (kept(now, then) if noisy else 1.0) * a / b
            found.append((step * c - integral) / before / still if before else 0.0)
        return found

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """Data and noise mixed as at a timestep, one for all or one each: a sample from which sampling may begin, at the first one too.

        Raises:
            ValueError: noise of another shape, timesteps that are neither one nor one for each sample, or beyond the schedule.
        """
        times, count = torch.as_tensor(timestep).flatten().tolist(), self.config.num_train_timesteps
        if sample.shape != noise.shape or len(times) not in (1, len(sample)):
            raise ValueError(
                f"sample {tuple(sample.shape)}, noise {tuple(noise.shape)}, {len(times)} timesteps: noise of the sample's shape, and one "
                f"timestep, or one for each sample."
            )
        if not all(0 <= k <= count for k in times):
            raise ValueError(f"timesteps {times[:8]}: from 0, the data, to {count}, the noise.")
        if self.num_inference_steps is not None and self._step_index is None and all(k == self._known[0] for k in times):
            self._loudness = 1.0  # what begins on this sample begins on the path, not on noise of variance 1
        return super().scale_noise(sample, timestep, noise)
