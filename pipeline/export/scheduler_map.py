"""What stock diffusers can hold of our paths and predictions, and under which scheduler.

Its flow schedulers follow the CondOT path, its DDPM family any path with
alpha^2 + beta^2 = 1, given as a table of step variances at times t = 1 - k / 1000.
A velocity differs from what they expect by a constant factor, which goes into
the network's last layer: -1 on CondOT (noise - data), -2 / pi on cosine, where
`v = -(pi / 2) (alpha eps - beta z)`. Everything else takes a scheduler of our
own along, a file that stands alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler

from ..config.schema import FlowConfig
from ..flow import DDPM, VP, CondOT, Path, Prediction, step_variances
from .runtime.scheduling_flow_ode_v2 import FlowODEScheduler

OWN_SCHEDULERS = ("FlowODEScheduler", "FlowSDEScheduler")
"""Schedulers of ours."""
NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps of a stock scheduler."""
PREDICTION_TYPES: dict[Prediction, str] = {"velocity": "flow_prediction", "noise": "epsilon", "data": "sample", "v": "v_prediction"}
"""Ours and diffusers' words for what a network predicts."""
NOT_EXPORTED = "Give --export=false and sample with `sample.py --run`."
MAX_TABLE_ERROR = 1e-4
"""Of a path between the rows of its table, relative; our own are within 1e-8."""
MIN_LOG_ALPHA_DROP = 5e-7
"""At least so much below 0 is log alpha at timestep 0: on a path that ends without noise a step variance would be 0 there."""
VARIANCE_PRESERVING_PATHS = ("cosine", "vp", "ddpm", "ddpm_scaled_linear", "ddpm_cosine")
"""Paths with alpha^2 + beta^2 = 1."""


class ExportForm(NamedTuple):
    """What the exported network predicts, the factor on its last layer that makes it so, and whether a stock scheduler serves it."""

    predict: Prediction
    factor: float
    stock: bool = True


def export_form(flow: FlowConfig) -> ExportForm:
    """The form in which a recipe's network is exported.

    Raises:
        ValueError: a prior that is not normal, which no stock pipeline starts from.
    """
    if flow.prior != "normal":
        raise ValueError(
            f"flow.prior={flow.prior} cannot be exported: stock pipelines start from normal noise. "
            f"Give --export=false and sample with `sample.py --run`."
        )
    plain = not flow.precondition
    if plain and flow.path == "condot" and flow.predict == "velocity":
        return ExportForm("velocity", -1.0)
    if plain and flow.path == "condot" and flow.predict in ("noise", "data"):
        return ExportForm(flow.predict, 1.0)
    if plain and flow.path == "cosine" and flow.predict == "velocity":
        return ExportForm("v", -2 / math.pi)
    if plain and flow.path in VARIANCE_PRESERVING_PATHS and flow.predict in ("noise", "data", "v"):
        return ExportForm(flow.predict, 1.0)
    _own_scheduler(flow, clip=False)  # refuses what it cannot follow
    return ExportForm(flow.predict, 1.0, stock=False)


def build_scheduler(flow: FlowConfig, pixels: bool = True) -> DPMSolverMultistepScheduler | FlowODEScheduler:
    """Return the scheduler of an exported folder: DPM-Solver++, on flow sigmas or step variances, or our own where no stock one serves.

    It is the nearest to the exact end from 10 to 1,000 steps, whatever is predicted, of those that a stock pipeline steps rightly
    with and that have a counterpart among ours (benchmarks/schedulers.py; the table is in docs/export.md). DDIM leaves noise where
    the steps do not divide 1,000.
    """
    form, clip = export_form(flow), pixels and flow.predict == "noise"
    if not form.stock:
        return _own_scheduler(flow, clip)
    solver: dict[str, Any] = {"prediction_type": PREDICTION_TYPES[form.predict], "algorithm_type": "dpmsolver++"}
    if clip:  # DDIM clips too, but keeps the noise that no longer fits: a Frechet distance of 5.2 where this has 0.6 (failed-ideas.md)
        solver |= {"thresholding": True, "sample_max_value": 1.0}
    if flow.path == "condot":
        return _with_clip_sample(DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=1.0, **solver), clip)
    k = torch.arange(NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    log_alpha = torch.log(flow.build_path()(1 - k / NUM_TRAIN_TIMESTEPS).a)
    log_alpha[0] = log_alpha[0].clamp(max=-MIN_LOG_ALPHA_DROP)
    variances = -torch.expm1(2 * torch.diff(log_alpha, prepend=log_alpha.new_zeros(1)))
    return _with_clip_sample(DPMSolverMultistepScheduler(trained_betas=variances.tolist(), timestep_spacing="trailing", **solver), clip)


def _with_clip_sample(scheduler: DPMSolverMultistepScheduler, clip: bool) -> DPMSolverMultistepScheduler:
    """Return the scheduler, its configuration saying what those made from it, such as DDIM, would do unasked: keep data within -1..1."""
    scheduler.register_to_config(clip_sample=clip)
    return scheduler


def _own_scheduler(flow: FlowConfig, clip: bool) -> FlowODEScheduler:
    """Our own scheduler, with the recipe's path by its name, or else as a table; by the two-step method that is nearer on it.

    On VP and DDPM that is the exponential one, which in 10 steps is the nearer there and from 25 to 50 on no more than twice as far,
    elsewhere Adams and Bashforth's: one evaluation a step as Euler's (DDIM on every path), and nearer from 10 steps on.
    """
    path = flow.build_path()
    kind = PREDICTION_TYPES.get(flow.predict, flow.predict) if flow.predict != "velocity" else "velocity"
    more: dict[str, Any] = {"clip_sample": clip}
    if flow.precondition or flow.path == "edm":
        more["sigma_data"] = flow.sigma_data
    if isinstance(path, DDPM):
        return FlowODEScheduler("dpmpp_2m", kind, "ddpm", trained_betas=_betas_of(path), **more)
    if type(path) is VP:
        return FlowODEScheduler("dpmpp_2m", kind, "vp", rates=[path.beta_min, path.beta_max], **more)
    if flow.path in ("condot", "cosine"):
        return FlowODEScheduler("multistep", kind, flow.path, **more)
    table = _table_of(flow.path, path)
    try:
        return FlowODEScheduler("multistep", kind, "table", table=table, **more)
    except ValueError as error:
        raise ValueError(f"flow.path={flow.path} cannot be exported ({error}) {NOT_EXPORTED}") from error


def _betas_of(path: DDPM) -> list[float]:
    """Return the variances of a thousand steps that follow a DDPM path exactly.

    Raises:
        ValueError: steps that do not divide a thousand, so that the path bends between two of those.
    """
    if path.steps == NUM_TRAIN_TIMESTEPS:
        return step_variances(path.variances, path.steps, path.first, path.last).tolist()
    if NUM_TRAIN_TIMESTEPS % path.steps:
        raise ValueError(
            f"flow.path.steps={path.steps} cannot be exported with this prediction: our own scheduler knows the path at "
            f"{NUM_TRAIN_TIMESTEPS} timesteps. Choose a divisor of that. {NOT_EXPORTED}"
        )
    log_alpha = torch.log(path(1 - torch.arange(NUM_TRAIN_TIMESTEPS, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS).a)
    return (-torch.expm1(2 * torch.diff(log_alpha, prepend=log_alpha.new_zeros(1)))).tolist()


def _table_of(name: str, path: Path) -> list[list[float]]:
    """Return a path as a table of values and slopes, between which our own scheduler draws cubics.

    Raises:
        ValueError: a path that is not finite, or that the cubics do not follow.
    """
    grid = torch.arange(2 * NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / (2 * NUM_TRAIN_TIMESTEPS)
    fine = [part.double() for part in path(1 - grid)]  # sigma = 0 to 1
    if not all(bool(part.isfinite().all()) for part in fine):
        raise ValueError(
            f"flow.path={name} cannot be exported: its coefficients or their slopes are not finite at every time, and a path that has "
            f"no scheduler of its own travels as a table of them. {NOT_EXPORTED}"
        )
    for value, slope in zip(fine[:2], fine[2:], strict=True):
        before, after = value[:-2:2], value[2::2]
        middle = (before + after) / 2 + (slope[2::2] - slope[:-2:2]) / (8 * NUM_TRAIN_TIMESTEPS)  # of Hermite's cubic; slopes are in t
        error = ((middle - value[1::2]).abs() / (value[1::2].abs() + MAX_TABLE_ERROR)).max()
        if error > MAX_TABLE_ERROR:
            raise ValueError(
                f"flow.path={name} cannot be exported: a table of {NUM_TRAIN_TIMESTEPS} values and slopes, as which it would travel, "
                f"misses it by {error:.1g} between them. Are its derivatives right? {NOT_EXPORTED}"
            )
    return [part[::2].tolist() for part in fine]


def read_path_and_prediction(scheduler: Any, flow: FlowConfig | None) -> tuple[Path, Prediction]:
    """Path and prediction of a loaded pipeline.

    Args:
        scheduler: its own.
        flow: the recipe that came with the folder, if any.

    Raises:
        ValueError: a scheduler of another kind of model.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in OWN_SCHEDULERS and flow is not None:
        return flow.build_path(), flow.predict
    stock = config.get("prediction_type", "flow_prediction")
    ours = {name: kind for kind, name in PREDICTION_TYPES.items()}
    if stock in ours:
        if stock == "flow_prediction" or config.get("use_flow_sigmas"):
            return CondOT(), ours[stock]
        if flow is not None:
            return flow.build_path(), ours[stock]
        variances = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}.get(config.get("beta_schedule"))
        if variances and not config.get("trained_betas") and config.get("num_train_timesteps") == NUM_TRAIN_TIMESTEPS:
            return DDPM(variances, NUM_TRAIN_TIMESTEPS, config["beta_start"], config["beta_end"]), ours[stock]  # type: ignore[arg-type]
    raise ValueError(f"{name} with prediction_type={stock} is of no path known here: use the pipeline itself to sample it.")
