"""The mathematics of flows and diffusions, in one convention: t = 0 is noise, t = 1 is data.

`path`, `diffusion`, `ddpm` and `linear` mix signal and noise, `trajectory` along any curve;
`parameterisation` names what a network predicts and `field` makes a velocity
of it; `time` says where it is trained, `objective` and `matching` for what,
`weighting` how much it counts, `coupling` on which pairs; `precondition` scales
it. `guidance` sharpens the field, by one of the methods of `guiders`, and
`classifier_guidance` by a classifier; `grid`, `solver`, `sde` and `langevin`
follow it, `likelihood`, `log_prob` and `inverse` ask it questions; `random` names every random number.
"""

from .classifier_guidance import classifier_guide
from .condition import Condition, count, each, repeat, stack
from .counter_rng import Purpose, normal, rademacher, uniform
from .coupling import COUPLINGS, assign, couple
from .ddpm_path import DDPM, VARIANCES, step_variances
from .diffusion_paths import EDM, PATHS, VE, VP, SubVP
from .divergence import EXACT_LIMIT, divergence
from .dpm_solver import dpmpp_2m, dpmpp_2m_sde
from .edm_sampler import churned
from .field import Field, clipped, denoise, score_field, shift_data, shift_score, singular, velocity_field
from .guidance import autoguide, guide
from .guidance_methods import APG, CFGZeroStar, optimal_scale, projected, rescale_factor
from .inverse_problems import Colourisation, Inpainting, Measurement, SuperResolution, reconstruction, replacement
from .langevin import annealed_langevin, langevin, predictor_corrector
from .likelihood import Density, Estimate, bits_per_dimension, dequantise, estimate, last_time, log_density
from .linear_path import LinearPath, NormalPrior, Prior, UniformPrior, finite_field
from .objective import JointObjective, Objective, infinite_times
from .parameterisation import PREDICTIONS, Prediction, change, convert, target
from .path import Coefficients, CondOT, Cosine, Path, initial, interpolate, widen
from .precondition import precondition
from .registry import ODE_SOLVERS, SDE_SOLVERS
from .score_matching import ScoreMatching
from .sde import COEFFICIENTS, Diffusion, coefficient, euler_maruyama, exponential, noising, stochastic_heun
from .simulate_sde import simulate
from .solver import Solution, dormand_prince, euler, heun, landed, midpoint, multistep, rk4
from .step_log_prob import step_law, step_log_prob, trajectory_log_prob
from .time_grid import GRIDS, grid, log_snr_grid, rho_grid, shifted_grid, uniform_grid
from .timestep_distribution import (
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
    support,
)
from .trajectory import Trajectory, TrajectoryMatching, marginal
from .weighting import WEIGHTINGS, weight

__all__ = [
    "APG",
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
    "CFGZeroStar",
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
    "Trajectory",
    "TrajectoryMatching",
    "Uniform",
    "UniformPrior",
    "annealed_langevin",
    "assign",
    "autoguide",
    "bits_per_dimension",
    "change",
    "churned",
    "classifier_guide",
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
    "infinite_times",
    "initial",
    "interpolate",
    "landed",
    "langevin",
    "last_time",
    "log_density",
    "log_snr_grid",
    "marginal",
    "midpoint",
    "multistep",
    "noising",
    "normal",
    "optimal_scale",
    "precondition",
    "predictor_corrector",
    "projected",
    "rademacher",
    "reconstruction",
    "repeat",
    "replacement",
    "rescale_factor",
    "resolution_shift",
    "rho_grid",
    "rk4",
    "score_field",
    "shift_data",
    "shift_score",
    "shifted_grid",
    "simulate",
    "singular",
    "stack",
    "step_law",
    "step_log_prob",
    "step_variances",
    "stochastic_heun",
    "support",
    "target",
    "trajectory_log_prob",
    "uniform",
    "uniform_grid",
    "velocity_field",
    "weight",
    "widen",
]
