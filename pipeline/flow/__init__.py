"""The mathematics of flows and diffusions, in one convention: t = 0 is noise, t = 1 is data.

`path`, `diffusion`, `ddpm` and `linear` mix signal and noise;
`parameterisation` names what a network predicts and `field` makes a velocity
of it; `time` says where it is trained, `objective` and `matching` for what,
`weighting` how much it counts, `coupling` on which pairs; `precondition` scales
it. `guidance` sharpens the field, `grid`, `solver`, `sde` and `langevin` follow
it, `likelihood` and `inverse` ask it questions; `random` names every random number.
"""

from .churn import churned
from .condition import Condition, count, each, repeat, stack
from .coupling import COUPLINGS, assign, couple
from .ddpm import DDPM, VARIANCES, step_variances
from .diffusion import EDM, PATHS, VE, VP, SubVP
from .divergence import EXACT_LIMIT, divergence
from .dpmpp import dpmpp_2m, dpmpp_2m_sde
from .field import Field, clipped, denoise, singular, velocity_field
from .grid import GRIDS, grid, log_snr_grid, rho_grid, shifted_grid, uniform_grid
from .guidance import autoguide, guide
from .inverse import Colourisation, Inpainting, Measurement, SuperResolution, reconstruction, replacement
from .langevin import annealed_langevin, langevin, predictor_corrector
from .likelihood import Density, Estimate, bits_per_dimension, dequantise, estimate, log_density
from .linear import LinearPath, NormalPrior, Prior, UniformPrior, finite_field
from .matching import ScoreMatching
from .objective import JointObjective, Objective
from .parameterisation import PREDICTIONS, Prediction, change, convert, target
from .path import Coefficients, CondOT, Cosine, Path, initial, interpolate, widen
from .precondition import precondition
from .random import Purpose, normal, rademacher, uniform
from .registry import ODE_SOLVERS, SDE_SOLVERS
from .sde import (
    COEFFICIENTS,
    Diffusion,
    coefficient,
    euler_maruyama,
    exponential,
    noising,
    stochastic_heun,
)
from .simulate import simulate
from .solver import Solution, dormand_prince, euler, heun, landed, midpoint, multistep, rk4
from .time import (
    TIME_LAWS,
    CosMap,
    Discrete,
    LogitNormal,
    LogNormalSigma,
    Mode,
    Shifted,
    TimeLaw,
    Uniform,
    draw_times,
    importance,
    resolution_shift,
)
from .weighting import WEIGHTINGS, weight

__all__ = [
    "COEFFICIENTS",
    "COUPLINGS",
    "DDPM",
    "EDM",
    "EXACT_LIMIT",
    "GRIDS",
    "ODE_SOLVERS",
    "PATHS",
    "PREDICTIONS",
    "SDE_SOLVERS",
    "TIME_LAWS",
    "VARIANCES",
    "VE",
    "VP",
    "WEIGHTINGS",
    "Coefficients",
    "Colourisation",
    "CondOT",
    "Condition",
    "CosMap",
    "Cosine",
    "Density",
    "Diffusion",
    "Discrete",
    "Estimate",
    "Field",
    "Inpainting",
    "JointObjective",
    "LinearPath",
    "LogNormalSigma",
    "LogitNormal",
    "Measurement",
    "Mode",
    "NormalPrior",
    "Objective",
    "Path",
    "Prediction",
    "Prior",
    "Purpose",
    "ScoreMatching",
    "Shifted",
    "Solution",
    "SubVP",
    "SuperResolution",
    "TimeLaw",
    "Uniform",
    "UniformPrior",
    "annealed_langevin",
    "assign",
    "autoguide",
    "bits_per_dimension",
    "change",
    "churned",
    "clipped",
    "coefficient",
    "convert",
    "count",
    "couple",
    "denoise",
    "dequantise",
    "divergence",
    "dormand_prince",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "draw_times",
    "each",
    "estimate",
    "euler",
    "euler_maruyama",
    "exponential",
    "finite_field",
    "grid",
    "guide",
    "heun",
    "importance",
    "initial",
    "interpolate",
    "landed",
    "langevin",
    "log_density",
    "log_snr_grid",
    "midpoint",
    "multistep",
    "noising",
    "normal",
    "precondition",
    "predictor_corrector",
    "rademacher",
    "reconstruction",
    "repeat",
    "replacement",
    "resolution_shift",
    "rho_grid",
    "rk4",
    "shifted_grid",
    "simulate",
    "singular",
    "stack",
    "step_variances",
    "stochastic_heun",
    "target",
    "uniform",
    "uniform_grid",
    "velocity_field",
    "weight",
    "widen",
]
