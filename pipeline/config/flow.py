"""The section `flow` of a recipe: what is learned, with the kinds that plugins may add to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from condot.core.option_ranges import FloatRange, IntRange, check_numbers

from ..flow import PATHS, TIMESTEP_DISTRIBUTIONS, WEIGHTINGS, Path, Shifted, TimestepDistribution, Weighting
from ..objectives.regularisers import RegulariserSection, default_regularisers
from ..objectives.table import OBJECTIVES
from .kinds import OneOf, kind_fields

NORMAL_OPTIONS = {"mean": "time_mean", "std": "time_std"}
FLAT_TIMES = {"logit_normal": NORMAL_OPTIONS, "log_normal_sigma": NORMAL_OPTIONS, "mode": {"scale": "time_scale"}}
FLAT_WEIGHTINGS = {"min_snr": {"gamma": "min_snr_gamma"}, "edm": {"sigma_data": "sigma_data"}}
FLAT_OBJECTIVES = {"joint": {"balance": "joint_balance"}}
"""Options that fields of the section hold: `flow.time: {kind: mode, scale: 1}` is `flow.time: mode` with `flow.time_scale: 1`."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What is learned: the path, the prediction, the timestep distribution. docs/theory.md explains each name."""

    # how signal and noise are mixed over time
    path: Annotated[str, OneOf((PATHS,), "path_options")] = "condot"
    path_options: Any = None  # the path itself where its options are not the defaults: VE(sigma_max=348)
    prior: Literal["normal", "uniform"] = "normal"  # where the path starts; uniform, of unit variance, on condot only
    predict: Literal["velocity", "noise", "data", "score", "v"] = "velocity"  # what the network outputs
    # regression to `predict`; joint: velocity and score, two outputs of one network; explicit and sliced score matching need predict=score
    objective: Annotated[str, OneOf((OBJECTIVES,), "objective_options", FLAT_OBJECTIVES)] = "regression"
    objective_options: Any = None  # the objective itself where its options are not the defaults
    joint_balance: Annotated[float, FloatRange("[0, inf)", "finite and not negative. Use 1.")] = (
        1.0  # of joint: factor on the score's loss, which is weighted by beta^2
    )
    weighting: Annotated[str, OneOf((WEIGHTINGS,), "weighting_options", FLAT_WEIGHTINGS)] = "none"  # how errors count over time
    weighting_options: Any = None  # the weighting itself where its options are not the defaults
    min_snr_gamma: Annotated[float, FloatRange("(0, inf)")] = 5.0  # signal-to-noise ratio at which min_snr caps
    precondition: bool = False  # scale the network the Karras way, with predict=data; always so on edm
    sigma_data: Annotated[float, FloatRange("(0, inf)")] = 0.5  # standard deviation of the data, for precondition and the weighting edm
    # timestep distribution in training; discrete are DDPM's thousand steps
    time: Annotated[str, OneOf((TIMESTEP_DISTRIBUTIONS,), "time_options", FLAT_TIMES)] = "uniform"
    time_options: Any = None  # the distribution itself where its options are not the defaults
    time_mean: Annotated[float, FloatRange("(-inf, inf)")] = 0.0  # logit of t for logit_normal, log of sigma for log_normal_sigma
    time_std: Annotated[float, FloatRange("(0, inf)", "a standard deviation is positive and finite. Use 1.0.")] = 1.0  # of the same
    # bump of the distribution mode, -1 to 1.75
    time_scale: Annotated[float, FloatRange("[-1, 1.75]", "from -1 to 1.75, else times would fold. Use 1.29.")] = 1.29
    # above 1 moves the distribution towards the noise, for higher resolutions; 1 is none
    time_shift: Annotated[float, FloatRange("(0, inf)", "a shift is positive and finite; 1 is none.")] = 1.0
    stratified: bool = False  # spread the times of each global batch evenly
    coupling: Literal["independent", "optimal_transport"] = "independent"  # which noise goes with which image; among images of one class
    coupling_group: Annotated[int, IntRange("[1, inf)")] = (
        32  # images assigned to one another by optimal_transport; divides the micro-batch
    )
    # terms of plugins that are added to the loss: {NAME: {weight: 0.1}}
    regularisers: RegulariserSection = dataclasses.field(default_factory=default_regularisers)

    def __post_init__(self) -> None:
        check_numbers(self, "flow.")
        for name, one in kind_fields(FlowConfig).items():
            one.check(f"flow.{name}", getattr(self, name))
            options, default = getattr(self, one.options), one.default_of(getattr(self, name))
            if options is not None and not isinstance(options, type(default)):
                raise ValueError(f"flow.{one.options}={options}: no options of flow.{name}={getattr(self, name)}. Leave them out.")

    def build_path(self) -> Path:
        """Return the Gaussian path; with a uniform prior, the coefficients of the straight line."""
        return PATHS[self.path]() if self.path_options is None else self.path_options

    def build_weighting(self) -> str | Weighting:
        """Return how errors count over time: by name, where `min_snr_gamma` and `sigma_data` are all its options."""
        return self.weighting if self.weighting_options is None else self.weighting_options

    def build_timestep_distribution(self) -> TimestepDistribution:
        """Return where on the path the network is trained; a distribution with a field `path` is given the recipe's."""
        given = {option: getattr(self, older) for option, older in FLAT_TIMES.get(self.time, {}).items()}
        distribution = TIMESTEP_DISTRIBUTIONS[self.time](**given) if self.time_options is None else self.time_options
        if dataclasses.is_dataclass(distribution) and "path" in {item.name for item in dataclasses.fields(distribution)}:
            distribution = dataclasses.replace(distribution, path=self.build_path())  # type: ignore[type-var]
        return distribution if self.time_shift == 1 else Shifted(self.time_shift, distribution)
