"""What FlowODEScheduler and FlowSDEScheduler share: paths, predictions, the schedule and its clock.

It travels with exported models, written into the file of either, which then stands alone on torch and diffusers: diffusers
loads a component from one file, without helpers beside it. Licence: Apache-2.0.
Sources: Lipman et al., Flow Matching for Generative Modeling (the straight path); Karras et al., Elucidating the Design
Space of Diffusion-Based Generative Models, table 1 (the scaling by sigma_data); Esser et al., Scaling Rectified Flow
Transformers, eq. 23 (shift).
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin

PREDICTIONS = ("velocity", "flow_prediction", "epsilon", "sample", "v_prediction", "score")
PATHS = ("condot", "cosine", "vp", "ddpm", "table")
REFUSED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "invert_sigmas",
    "rescale_betas_zero_snr",
)
"""What stock schedulers can be told to do, and these cannot."""


class Point(NamedTuple):
    """One time of the path; the slope there is `of_sample * sample + of_output * model_output`, not a number where it is unknown."""

    sigma: float
    frame: float
    gauge: float
    of_sample: float
    of_output: float


def in_our_words(config: Any, solvers: Any) -> Any:
    """A configuration of diffusers', or of the sibling class, for a class that has these solvers."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if given.get("solver", solvers[0]) not in solvers:  # the sibling's: kept for the way back
        given["solver"], given["other_solver"] = given.get("other_solver", solvers[0]), given["solver"]
    if "path" in given and config.get("_class_name", "FlowODEScheduler") in ("FlowODEScheduler", "FlowSDEScheduler"):
        return given
    if given.pop("thresholding", False):
        if given.get("sample_max_value", 1.0) > 1:
            raise ValueError(f"thresholding up to sample_max_value={given['sample_max_value']} is not known here: 1 is, or give none.")
        given["clip_sample"] = True
    bad = [key for key in REFUSED if given.get(key)]
    if bad:
        raise ValueError(f"{bad[0]}={given[bad[0]]} is not known here: set it to False, and give sigmas of your own to set_timesteps.")
    if given.get("use_flow_sigmas") or "beta_schedule" not in given:  # DPM-Solver and UniPC say flow_shift
        stock = given.get("use_flow_sigmas") and not str(config.get("_class_name")).startswith("FlowMatch")
        shift = given.get("flow_shift" if stock else "shift", 1.0)
        return {"prediction_type": "flow_prediction", **given, "path": "condot", "shift": shift}
    kept = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
    betas = DDPMScheduler(**{key: given[key] for key in kept if key in given}).betas.double().tolist()
    return {"prediction_type": "epsilon", **given, "path": "ddpm", "trained_betas": betas, "shift": 1.0}


class FlowScheduler(SchedulerMixin, ConfigMixin):
    """What both schedulers share: the paths, the predictions, the schedule and its clock.

    With data z and noise eps a noisy point is x = a z + b eps. The clock is
    sigma, 1 at the noise, 0 at the data; a network is told 1000 sigma. Every
    path is the straight one through a lens: y = x / (a + b) is (1 - s) z + s eps
    at s = b / (a + b), the `frame`; all steps are taken there, along dy / ds =
    eps - z. On the straight path y = x and s = sigma. A `sample` is what the network is to
    see: y times the `gauge`, a + b over sqrt((a sigma_data)^2 + b^2) if sigma_data is given.
    """

    order = 1
    init_noise_sigma = 1.0
    solvers: Any = ()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a configuration of this class, its sibling or a stock flow or DDPM scheduler; `kwargs` go before it."""
        given, names = in_our_words(config, cls.solvers), cls._get_init_keys(cls)
        known = {key: value for key, value in given.items() if key in names}
        made, unused = super().from_config(known, return_unused_kwargs=True, **kwargs)
        made.register_to_config(**{k: v for k, v in given.items() if k not in {*names, "use_flow_sigmas", "flow_shift"}})
        return (made, unused) if return_unused_kwargs else made

    def _prepare(self) -> None:
        """Check the configuration, and say beside it what stock schedulers read."""
        c, count = self.config, self.config.num_train_timesteps
        for name, known in (("solver", self.solvers), ("prediction_type", PREDICTIONS), ("path", PATHS)):
            if c[name] not in known:
                raise ValueError(f"{name}={c[name]!r} is unknown: choose one of {', '.join(known)}.")
        if not 0 < c.shift < math.inf or c.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"shift={c.shift}, {c.time_shift_type!r}: positive and finite, 1 is none; exponential or linear.")
        if c.sigma_data and (c.sigma_data < 0 or c.prediction_type != "sample"):
            raise ValueError(
                f"sigma_data={c.sigma_data}: positive, and for a scaled network, which predicts data: prediction_type='sample'."
            )
        if c.path == "table" and (len(c.table or ()) != 4 or {len(row) for row in c.table} != {len(c.table[0])} or len(c.table[0]) < 2):
            raise ValueError("table: alpha, beta and their slopes in t = 1 - sigma, four lists of one length, from sigma = 0 to 1.")
        if c.path == "ddpm" and (len(c.trained_betas or ()) != count or not 0 < min(c.trained_betas) <= max(c.trained_betas) < 1):
            raise ValueError("trained_betas: the variance of each of num_train_timesteps steps, inside (0, 1), for path='ddpm'.")
        betas = torch.tensor([*c.trained_betas, c.trained_betas[-1]] if c.path == "ddpm" else [], dtype=torch.float64)
        self._log_alphas = (torch.log1p(-betas).cumsum(0) / 2).tolist()
        self.register_to_config(use_flow_sigmas=c.path == "condot", flow_shift=c.shift, _use_default_values=[])
        self.timesteps, self.sigmas = torch.arange(count, 0.0, -1), torch.arange(count, -1.0, -1, dtype=torch.float64) / count
        self.num_inference_steps: Any = None
        self._step_index: Any = None
        self._begin_index: Any = None
        self._placed: Any = None
        self._loudness = 1.0

    def coefficients(self, sigma: float) -> Any:
        """alpha, beta and their derivatives in t = 1 - sigma; that of beta may be infinite at the data."""
        c, count = self.config, self.config.num_train_timesteps
        if c.path == "condot":
            return 1 - sigma, sigma, 1.0, -1.0
        if c.path == "cosine":
            w = math.pi / 2
            a, b = math.sin(w * (1 - sigma)), math.sin(w * sigma)
            return a, b, w * b, -w * a
        if c.path == "table":  # the cubic through the values and slopes of two rows
            count, ends = len(c.table[0]) - 1, []
            k = min(int(sigma * count), count - 1)
            u = sigma * count - k
            for row, slopes in zip(c.table[:2], c.table[2:], strict=True):
                p, q, m, n = row[k], row[k + 1], -slopes[k] / count, -slopes[k + 1] / count
                square, cube = 3 * (q - p) - 2 * m - n, 2 * (p - q) + m + n
                ends.append((p + u * (m + u * (square + u * cube)), -count * (m + u * (2 * square + 3 * u * cube))))
            return ends[0][0], ends[1][0], ends[0][1], ends[1][1]
        if c.path == "vp":
            low, high = c.rates
            log_a, rate = -(sigma**2) * (high - low) / 4 - sigma * low / 2, (sigma * (high - low) + low) / 2
        else:  # log alpha runs linearly from timestep to timestep
            k = min(int(sigma * count), count - 1)
            slope = self._log_alphas[k + 1] - self._log_alphas[k]
            log_a, rate = self._log_alphas[k] + (sigma * count - k) * slope, -slope * count
        a, b = math.exp(log_a), math.sqrt(-math.expm1(2 * log_a))
        return a, b, a * rate, -a * a * rate / b if b else -math.inf

    def _point(self, sigma: float) -> Point:
        """The numbers of one time."""
        (a, b, da, db), size = self.coefficients(sigma), self.config.sigma_data
        if size:  # the network's output F gives data = a size^2 / root^2 x + b size / root F
            root = math.sqrt((a * size) ** 2 + b**2)
            return Point(sigma, b / (a + b), (a + b) / root, (b - a * size**2) / root, -(a + b) * size / root)
        forms = {"velocity": (da, db), "flow_prediction": (-1, 1), "sample": (1, 0), "v_prediction": (-b, a)}
        u, w = forms.get(self.config.prediction_type, (0, 1))  # the output is u z + w eps; a score is -eps / b
        determinant = (a * w - b * u) or math.nan
        factor = -b if self.config.prediction_type == "score" else 1.0
        return Point(sigma, b / (a + b), a + b, -(u + w) / determinant, factor * (a + b) / determinant)

    def _usable(self, sigma: float) -> bool:
        """Whether the slope is known at a time: not at the noise from a prediction of noise, nor at the data from one of data."""
        point = self._point(sigma)
        return math.isfinite(point.of_sample) and math.isfinite(point.of_output)

    def _level(self, frame: float) -> float:
        """The sigma at which b / (a + b) has this value, by halving."""
        low, high = (frame, frame) if self.config.path == "condot" else (0.0, 1.0)
        for _ in range(60 if low < high else 0):
            middle = (low + high) / 2
            a, b, _, _ = self.coefficients(middle)
            low, high = (middle, high) if b < frame * (a + b) else (low, middle)
        return (low + high) / 2

    def _shifted(self, sigmas: Any, mu: Any) -> Any:
        """Sigmas moved towards the noise, s sigma / (1 + (s - 1) sigma), by `shift`, or by what `mu` says of the image's size."""
        c, shift = self.config, self.config.shift
        if c.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting is set: pass mu to set_timesteps, as pipelines do by the size of the image.")
        if c.use_dynamic_shifting:
            shift = math.exp(mu) if c.time_shift_type == "exponential" else mu
        moved = [shift * s / (1 + (shift - 1) * s) for s in sigmas]
        if c.shift_terminal and moved[-1] < 1:
            moved = [1 - (1 - s) * (1 - c.shift_terminal) / (1 - moved[-1]) for s in moved]
        return moved

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None, timesteps: Any = None
    ) -> None:
        """Plan the steps: a timestep for each evaluation of the network, of which some solvers take several a step.

        Args:
            num_inference_steps: at least 1; evenly from 1, or a thousandth less where the slope is unknown there, then shifted.
            device: for `timesteps`; `sigmas`, one more than steps, stay on the CPU.
            sigmas: your own, falling, in (0, 1], without the last 0; shifted too, as diffusers does.
            mu: for use_dynamic_shifting; not used without.
            timesteps: your own instead of sigmas, num_train_timesteps times sigma; not shifted.
        """
        count, n = self.config.num_train_timesteps, num_inference_steps
        top = 1.0 if self._usable(1.0) and self.config.path != "ddpm" else 1 - 1 / count
        if timesteps is not None:
            levels = [min(float(k) / count, top) for k in timesteps]
        elif sigmas is not None:
            levels = [min(s, top) for s in self._shifted([float(s) for s in sigmas], mu)]
        else:
            levels = [top * s for s in self._shifted([1 - i / n for i in range(n or 0)], mu)] if n else []
        if not levels or n not in (None, len(levels)) or (sigmas is not None and timesteps is not None):
            raise ValueError(f"num_inference_steps={n} and {len(levels)} levels: at least one step; sigmas or timesteps, one per step.")
        if not 0 < levels[-1] <= levels[0] <= 1 or any(s <= t for s, t in pairwise(levels)):
            raise ValueError(f"sigmas {levels[:8]}: they fall, from 1 at most, and stay above 0, which is added.")
        self.num_inference_steps, self.sigmas = len(levels), torch.tensor([*levels, 0.0], dtype=torch.float64)
        self._points, self._moves = self._plan(levels)
        self.timesteps = torch.tensor([count * p.sigma for p in self._points], dtype=torch.float32, device=device)
        self._known = torch.tensor([count * p.sigma for p in self._points], dtype=torch.float32).tolist()
        self._loudness = self._points[0].frame * self._points[0].gauge if levels[0] == top else 1.0  # of the noise it begins on
        self._step_index = self._begin_index = self._placed = None

    @property
    def step_index(self) -> Any:
        """The place in `timesteps` of the next evaluation; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> Any:
        """The place in `timesteps` where sampling begins, if it was said."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at `timesteps[begin_index]`, where a step must begin."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The place of a timestep in the schedule; of several the one where a step begins."""
        if self.num_inference_steps is None:
            raise ValueError("no steps are planned: call set_timesteps(num_inference_steps) first.")
        known = self._known if schedule_timesteps is None else [float(k) for k in schedule_timesteps]
        places = [i for i, k in enumerate(known) if k == float(timestep)]
        if not places:
            raise ValueError(f"timestep {float(timestep)} is not in the schedule, {known[:8]}: pass one of scheduler.timesteps.")
        return next((i for i in places if self._moves[min(i, len(self._moves) - 1)].begins), places[0])

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself; but where a path begins on louder noise than 1, the first one is made so loud."""
        if self._loudness == 1 or timestep is None or self._step_index is not None or self._begin_index:
            return sample
        self._placed = sample * self._loudness if float(timestep) == self._known[0] else sample
        return self._placed

    def _take(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        """The number of this evaluation; the point y and the slope dy / ds there, in float32 at least."""
        if output.shape != sample.shape:
            raise ValueError(f"model_output {tuple(output.shape)} and sample {tuple(sample.shape)} differ: both are of one shape.")
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self._step_index is None:
            i = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            if i == 0 and sample is not self._placed:  # a pipeline that shows the network a copy
                x = x * self._loudness
        else:
            i = self._step_index
        if self.num_inference_steps is None or i >= len(self._moves) or (self._step_index is None and not self._moves[i].begins):
            raise ValueError(f"no step begins at evaluation {i}: call set_timesteps; begin at a multiple of {self.order}.")
        self._step_index, self._placed, point = i + 1, None, self._points[i]
        slope = point.of_output * output.to(x.dtype)
        if point.of_sample:
            slope = torch.add(slope, x, alpha=point.of_sample)
        y, s = x if point.gauge == 1 else x / point.gauge, point.frame
        if self.config.clip_sample and s:  # the data prediction y - s slope is kept in range, and the noise follows from it
            slope = (y - torch.sub(y, slope, alpha=s).clamp(-self.config.clip_sample_range, self.config.clip_sample_range)) / s
        return i, y, slope

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """Data and noise mixed as at a timestep, one for all or one each: a sample from which sampling may begin."""
        points = [self._point(k / self.config.num_train_timesteps) for k in torch.as_tensor(timestep).flatten().tolist()]
        shape = (-1, *[1] * (sample.ndim - 1))
        of_data = torch.tensor([(1 - p.frame) * p.gauge for p in points], dtype=torch.float32, device=sample.device)
        of_noise = torch.tensor([p.frame * p.gauge for p in points], dtype=torch.float32, device=sample.device)
        return (of_data.reshape(shape) * sample + of_noise.reshape(shape) * noise).to(sample.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        """`scale_noise` with its arguments in DDPM's order."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
