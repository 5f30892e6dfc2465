"""The mathematics of flows and diffusions, in one convention: t = 0 is noise, t = 1 is data.

`path` mixes signal and noise, `parameterisation` names what a network predicts,
`time` says where it is trained and `objective` for what, `guidance` sharpens
the field, `solver` follows it, `random` names every random number.
"""

from .guidance import guide
from .objective import Objective
from .parameterisation import PREDICTIONS, Prediction, convert, target
from .path import PATHS, Coefficients, CondOT, Cosine, Path, interpolate, widen
from .random import Purpose, normal, uniform
from .solver import COEFFICIENTS, ODE_SOLVERS, SDE_SOLVERS, Solution, coefficient, euler, euler_maruyama, heun, uniform_grid
from .time import LogitNormal, TimeLaw, Uniform

__all__ = [
    "COEFFICIENTS",
    "ODE_SOLVERS",
    "PATHS",
    "PREDICTIONS",
    "SDE_SOLVERS",
    "Coefficients",
    "CondOT",
    "Cosine",
    "LogitNormal",
    "Objective",
    "Path",
    "Prediction",
    "Purpose",
    "Solution",
    "TimeLaw",
    "Uniform",
    "coefficient",
    "convert",
    "euler",
    "euler_maruyama",
    "guide",
    "heun",
    "interpolate",
    "normal",
    "target",
    "uniform",
    "uniform_grid",
    "widen",
]
