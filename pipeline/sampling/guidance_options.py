"""How a sampler guides beside plain guidance; `options.SamplingOptions` explains each number to users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..flow import APG, ODE_SOLVERS, CFGZeroStar
from .flow_model import FlowModel


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """The method of guidance, its numbers, and the scale of a classifier's.

    Raises:
        ValueError: a number out of its range, or of a method that is not chosen.
    """

    guidance: Literal["cfg", "apg", "cfg_zero_star"] = "cfg"
    apg_eta: float = 0.0
    apg_norm_threshold: float = 0.0
    apg_momentum: float = 0.0
    zero_init_steps: int = 0
    classifier_guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance not in ("cfg", "apg", "cfg_zero_star"):
            raise ValueError(f"guidance={self.guidance!r} is unknown: choose one of cfg, apg, cfg_zero_star.")
        for name in ("apg_eta", "apg_norm_threshold", "apg_momentum"):
            if self.guidance != "apg" and getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} has no effect with guidance={self.guidance}: set guidance=apg.")
        if self.guidance == "apg":
            APG(eta=self.apg_eta, norm_threshold=self.apg_norm_threshold, momentum=self.apg_momentum)
        if self.zero_init_steps and self.guidance != "cfg_zero_star":
            raise ValueError(
                f"zero_init_steps={self.zero_init_steps} has no effect with guidance={self.guidance}: set guidance=cfg_zero_star."
            )
        if self.zero_init_steps < 0:
            raise ValueError(f"zero_init_steps={self.zero_init_steps}: none or more, fewer than all. Use 1 of 25.")

    def guidance_method(self, times: Tensor) -> APG | CFGZeroStar | None:
        """Return the method on a grid of times, (n + 1,); None for plain guidance.

        Raises:
            ValueError: as many steps that stand still as there are.
        """
        if self.guidance == "apg":
            return APG(eta=self.apg_eta, norm_threshold=self.apg_norm_threshold, momentum=self.apg_momentum)
        if self.guidance == "cfg":
            return None
        if self.zero_init_steps > len(times) - 2:
            raise ValueError(f"zero_init_steps={self.zero_init_steps} of {len(times) - 1} steps: fewer than all. Use 1 of 25.")
        return CFGZeroStar(zero_until=float(times[self.zero_init_steps]) if self.zero_init_steps else 0.0)

    def check_guidance(self, model: FlowModel, scale: float, solver: str, begin: Tensor) -> None:
        """Raise ValueError for a method that has no effect on a model, or that a solver cannot go with.

        Args:
            model: what is sampled.
            scale: of guidance, 1 for none.
            solver: by its name.
            begin: the first time of the grid.
        """
        if self.guidance != "cfg" and scale == 1:
            raise ValueError(f"guidance={self.guidance} beside guidance_scale=1.0, which is none: give guidance_scale 3.")
        if self.apg_momentum and solver == "dormand_prince":
            raise ValueError("apg_momentum remembers evaluations, and solver=dormand_prince takes some of them back: use heun.")
        if self.zero_init_steps and (solver not in ODE_SOLVERS or solver in ("dormand_prince", "multistep", "dpmpp_2m")):
            raise ValueError(
                f"zero_init_steps={self.zero_init_steps} with solver={solver}: it counts the steps of an ODE, and the step after must not "
                f"look back at one that stood still. Use heun."
            )
        if self.zero_init_steps and model.predict != "velocity":
            raise ValueError(
                f"zero_init_steps={self.zero_init_steps} of a model that predicts {model.predict}: it is made for velocities. Use 0."
            )
        if model.classifier is None and self.classifier_guidance_scale != 1:
            raise ValueError(
                f"classifier_guidance_scale={self.classifier_guidance_scale} without a classifier: give --classifier_reference too."
            )
        if model.classifier is not None and float(model.path(begin).a) == 0:
            raise ValueError(f"given_times begin at {float(begin):g}: a classifier knows nothing where no image is left. Begin at 0.001.")
