"""The mathematics of flows and diffusions, in one convention: t = 0 is noise, t = 1 is data.

`path`, `diffusion`, `ddpm` and `linear` mix signal and noise, `trajectory` along any curve;
`parameterisation` names what a network predicts and `field` makes a velocity
of it; `time` says where it is trained, `objective` and `matching` for what,
`weighting` how much it counts, `coupling` on which pairs; `precondition` scales
it. `guidance` sharpens the field, by one of the methods of `guiders`, and
`classifier_guidance` by a classifier; `grid`, `solver`, `sde` and `langevin`
follow it, `likelihood`, `log_prob` and `inverse` ask it questions; `random` names every random number.
"""

from .churn import edm_sampler
from .classifier_guidance import classifier_guide
from .condition import Condition, concat_conditions, map_condition, num_samples, repeat_condition
from .counter_rng import Purpose, normal, rademacher, uniform
from .coupling import couple_by_optimal_transport, solve_assignment
from .ddpm_path import DDPM, VARIANCE_SCHEDULES, step_variances
from .diffusion_coefficient import DIFFUSION_COEFFICIENTS, NamedDiffusion, diffusion_coefficient, forward_sde_coefficients
from .diffusion_paths import EDM, PATHS, VE, VP, SubVP
from .divergence import MAX_EXACT_DIMENSIONS, divergence
from .dpm_solver import dpmpp_2m, dpmpp_2m_sde
from .field import (
    Field,
    clip_data_prediction,
    denoise,
    is_singular,
    score_field,
    shift_data_prediction,
    shift_score_prediction,
    velocity_field,
)
from .guidance import autoguide, guide
from .guidance_methods import APG, CFGZeroStar, cfg_zero_star_scale, project_difference, rescale_factor
from .inverse_problems import Colourisation, Inpainting, Measurement, SuperResolution, reconstruction_guidance, replacement_callback
from .langevin import annealed_langevin, langevin, predictor_corrector
from .likelihood import (
    LogDensityResult,
    MeanEstimate,
    bits_per_dimension,
    dequantise,
    likelihood_end_time,
    log_density,
    mean_and_standard_error,
)
from .linear_path import LinearPath, NormalPrior, Prior, UniformPrior, empirical_velocity_field
from .objective import JointObjective, Objective, infinite_loss_times
from .parameterisation import PREDICTIONS, Prediction, conversion_coefficients, convert, target
from .path import Coefficients, CondOT, Cosine, Path, interpolate, scale_initial_noise, widen
from .precondition import precondition
from .registry import ODE_SOLVERS, SDE_SOLVERS
from .score_matching import ScoreMatching
from .sde import euler_maruyama, exponential, stochastic_heun
from .simulate_sde import simulate_sde
from .solver import Solution, dormand_prince, euler, heun, midpoint, multistep, rk4, solve_then_denoise
from .step_log_prob import step_distribution, step_log_prob, trajectory_log_prob
from .time_grid import GRIDS, log_snr_grid, rho_grid, shifted_grid, time_grid, uniform_grid
from .timestep_distribution import (
    TIMESTEP_DISTRIBUTIONS,
    CosMap,
    Discrete,
    LogitNormal,
    LogNormalSigma,
    Mode,
    Shifted,
    TimestepDistribution,
    Uniform,
    importance_weight,
    resolution_shift,
    sample_times,
    support,
)
from .trajectory import Trajectory, TrajectoryMatching, empirical_marginal
from .weighting import WEIGHTINGS, Weighting, build_weighting, from_data_error, weight

__all__ = [
    "APG",
    "DDPM",
    "DIFFUSION_COEFFICIENTS",
    "EDM",
    "GRIDS",
    "MAX_EXACT_DIMENSIONS",
    "ODE_SOLVERS",
    "PATHS",
    "PREDICTIONS",
    "SDE_SOLVERS",
    "TIMESTEP_DISTRIBUTIONS",
    "VARIANCE_SCHEDULES",
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
    "Discrete",
    "Field",
    "Inpainting",
    "JointObjective",
    "LinearPath",
    "LogDensityResult",
    "LogNormalSigma",
    "LogitNormal",
    "MeanEstimate",
    "Measurement",
    "Mode",
    "NamedDiffusion",
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
    "TimestepDistribution",
    "Trajectory",
    "TrajectoryMatching",
    "Uniform",
    "UniformPrior",
    "Weighting",
    "annealed_langevin",
    "autoguide",
    "bits_per_dimension",
    "build_weighting",
    "cfg_zero_star_scale",
    "classifier_guide",
    "clip_data_prediction",
    "concat_conditions",
    "conversion_coefficients",
    "convert",
    "couple_by_optimal_transport",
    "denoise",
    "dequantise",
    "diffusion_coefficient",
    "divergence",
    "dormand_prince",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "edm_sampler",
    "empirical_marginal",
    "empirical_velocity_field",
    "euler",
    "euler_maruyama",
    "exponential",
    "forward_sde_coefficients",
    "from_data_error",
    "guide",
    "heun",
    "importance_weight",
    "infinite_loss_times",
    "interpolate",
    "is_singular",
    "langevin",
    "likelihood_end_time",
    "log_density",
    "log_snr_grid",
    "map_condition",
    "mean_and_standard_error",
    "midpoint",
    "multistep",
    "normal",
    "num_samples",
    "precondition",
    "predictor_corrector",
    "project_difference",
    "rademacher",
    "reconstruction_guidance",
    "repeat_condition",
    "replacement_callback",
    "rescale_factor",
    "resolution_shift",
    "rho_grid",
    "rk4",
    "sample_times",
    "scale_initial_noise",
    "score_field",
    "shift_data_prediction",
    "shift_score_prediction",
    "shifted_grid",
    "simulate_sde",
    "solve_assignment",
    "solve_then_denoise",
    "step_distribution",
    "step_log_prob",
    "step_variances",
    "stochastic_heun",
    "support",
    "target",
    "time_grid",
    "trajectory_log_prob",
    "uniform",
    "uniform_grid",
    "velocity_field",
    "weight",
    "widen",
]
