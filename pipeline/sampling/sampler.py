"""How a field is followed: the solver by name, its grid, its noise, its guidance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..flow import ODE_SOLVERS, SDE_SOLVERS, diffusion_coefficient, is_singular, time_grid
from ..flow.churn import check_churn
from ..flow.diffusion_coefficient import DiffusionCoefficient
from .flow_model import FlowModel
from .guidance_options import GuidanceOptions

LANGEVIN_LAST_TIME = 0.99
"""Where Langevin dynamics end: at the last time the score is finite at, nearly; the noise left there is taken off at once."""
LANGEVIN_SOLVERS = ("langevin", "annealed_langevin", "predictor_corrector")
FIRST_TIME = 1e-3
"""Where sampling begins if the field is singular at t = 0, as one that predicts noise is: diffusers' own first step is there too."""


@dataclass(frozen=True)
class Sampler(GuidanceOptions):
    """How a field is followed; `options.SamplingOptions` explains each field.

    Raises:
        ValueError: an unknown solver, coefficient or grid, fewer than one step.
    """

    solver: str = "dpmpp_2m"
    steps: int = 50
    guidance_scale: float = 1.0
    sigma_t: str | tuple[float, ...] | DiffusionCoefficient = "noise"
    sigma_scale: float = 1.0
    drift: Literal["marginals", "plain"] = "marginals"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    grid: str = "uniform"
    grid_shift: float = 3.0
    grid_rho: float = 7.0
    given_times: tuple[float, ...] = ()
    tolerance: float = 1e-5
    corrections: int = 0
    langevin_step: float = 0.2
    snr: float = 0.16
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = 1000.0
    churn_noise: float = 1.0
    clip: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        known = (*ODE_SOLVERS, *SDE_SOLVERS, *LANGEVIN_SOLVERS)
        if self.solver not in known:
            raise ValueError(f"solver={self.solver!r} is unknown: choose one of {', '.join(known)}.")
        if self.drift == "plain" and self.solver != "euler_maruyama":
            raise ValueError(f"drift=plain of solver={self.solver}: dX = u dt + sigma dW is simulated by euler_maruyama alone.")
        if self.churn and self.solver not in ("euler", "heun"):
            raise ValueError(f"churn={self.churn} of solver={self.solver}: it is a matter of heun and euler; use 0, or one of those.")
        check_churn(self.churn, self.churn_min, self.churn_max, self.churn_noise)
        diffusion_coefficient(self.sigma_t, self.sigma_scale)
        time_grid(self.grid, self.steps, shift=self.grid_shift, rho=self.grid_rho)
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        """Return all that decides what is drawn, JSON values by name.

        Options that came later are left out where they change nothing, so that folders begun before go on.
        """
        everything = asdict(self)
        for name in ("drift", "churn", "churn_min", "churn_max", "churn_noise", *asdict(GuidanceOptions())):
            if everything[name] == getattr(Sampler, name):
                del everything[name]
        if not self.corrections and self.solver != "annealed_langevin":
            everything["corrections"] = 1  # what 0 stands for, and what was written before 0 could be
        return everything

    def times(self, model: FlowModel, off_noise: bool = False) -> Tensor:
        """Return the grid, (steps + 1,): the caller's, or from 0, or FIRST_TIME where the field is singular at 0, to 1.

        An adaptive solver chooses inside; Langevin dynamics end at LANGEVIN_LAST_TIME. A field that is
        singular at the last time is not evaluated there: see `flow.solve_then_denoise`.
        `off_noise` begins at FIRST_TIME in any case.
        """
        if self.given_times:
            return torch.tensor(self.given_times, dtype=torch.float64)
        off_noise = off_noise or model.classifier is not None  # as of every inverse problem
        begin = FIRST_TIME if off_noise or is_singular(model.path, model.predict, 0.0) else 0.0
        if self.solver == "dormand_prince":
            return torch.tensor([begin, 1.0], dtype=torch.float64)
        end = LANGEVIN_LAST_TIME if self.solver in ("langevin", "annealed_langevin") else 1.0
        return time_grid(self.grid, self.steps, path=model.path, shift=self.grid_shift, rho=self.grid_rho, start=begin, end=end)
