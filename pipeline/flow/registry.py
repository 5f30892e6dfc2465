"""Solvers by the names that recipes and `sample.py` know."""

from __future__ import annotations

from collections.abc import Callable

from condot.core.registry import Registry

from .dpm_solver import dpmpp_2m, dpmpp_2m_sde
from .sde import euler_maruyama, exponential, stochastic_heun
from .solver import Solution, dormand_prince, euler, heun, midpoint, multistep, rk4

ODE_SOLVERS: Registry[Callable[..., Solution]] = Registry(
    "solver",
    {
        "euler": euler,
        "midpoint": midpoint,
        "heun": heun,
        "rk4": rk4,
        "multistep": multistep,
        "dpmpp_2m": dpmpp_2m,
        "dormand_prince": dormand_prince,
    },
)
"""Each of (field, x, times); see `solver.runge_kutta`."""

SDE_SOLVERS: Registry[Callable[..., Solution]] = Registry(
    "solver",
    {
        "exponential": exponential,
        "dpmpp_2m_sde": dpmpp_2m_sde,
        "euler_maruyama": euler_maruyama,
        "stochastic_heun": stochastic_heun,
    },
)
"""Each of (field, x, times, path, sigma, noise); see `sde.exponential`."""
