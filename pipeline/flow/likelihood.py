"""Likelihood: the log-density a flow gives to a point, and bits per dimension of images.

Along the ODE `d/dt log p_t(X_t) = -div u_t(X_t)`. From a point at t = 1 the
ODE is run back to noise with the divergence summed on the way, and
`log p_1(x) = log p_0(X_0) - integral of div u`. The divergence is exact in
small dimension; else Hutchinson's estimate, with one probe for the whole
solve: a new one in every evaluation would make the field jump, and an adaptive
solver with it. On sharp data a fixed grid misses most of the divergence, which
is near t = 1, and errs by bits; hence an adaptive solver by default.
p_0 is the distribution that sampling starts from, N(0, beta_0^2 I) unless said: of what
signal a path leaves there (VP, DDPM, VE) the density is of the order of 1e-5 nats a dimension off.
Source: docs/mathematics.md section 5; Chen et al., Neural ODEs, theorem 1;
Grathwohl et al., FFJORD, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .divergence import AutodiffMode, check_exact_divergence, divergence
from .field import Field, is_singular, velocity_and_score
from .parameterisation import Prediction
from .path import Path, require_finite
from .solver import Solution, dormand_prince

IntegrationVariable = Literal["time", "log_snr"]


class LogDensityResult(NamedTuple):
    """log p of each sample, nats, (B,); where it came from, (B, *S); evaluations of the field with its divergence."""

    log_density: Tensor
    initial_point: Tensor
    evaluations: int


class MeanEstimate(NamedTuple):
    """A mean and its standard error, both 0-dimensional."""

    mean: Tensor
    standard_error: Tensor


def log_density(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    *,
    probe: Tensor | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    solver: Callable[..., Solution] = dormand_prince,
    mode: AutodiffMode = "reverse",
    integration_variable: IntegrationVariable = "time",
) -> LogDensityResult:
    """Return log p of points at times[-1], by the instantaneous change of variables.

    Args:
        field: velocity of (x, t), differentiable in x; x comes in its own dtype, t in float64.
        x: points, (B, *S), data units.
        times: grid, rising, as for sampling; it is run backwards. End before 1 where
            the field is singular there (`likelihood_end_time`): the density is that of p at the last time.
        path: the field's path; p at times[0] is taken as N(0, beta^2 I) there.
        probe: v, (B, *S), of mean 0 and covariance I, kept for the whole solve;
            None for the exact divergence, in at most 64 dimensions.
        prior: log-density of p at times[0], (B, *S) -> (B,), where it is not that.
        solver: an ODE solver.
        mode: how derivative products are taken.
        integration_variable: what the solver steps in. Over `log_snr` neither VP's root at
            t = 1 nor the kinks of DDPM's table are seen; it is finite at both ends of the grid.

    Returns:
        Float64, in which the ODE is solved (float32 on MPS, which has no other).

    Raises:
        ValueError: too many dimensions without a probe; a log-SNR that is not finite at an end; what the solver refuses.
    """
    if probe is None:
        check_exact_divergence(tuple(x.shape[1:]), "Pass a probe: rademacher(seed, Purpose.PROBE, step, index, shape).")
    require_finite("x", x)
    shape, size = x.shape, x[0].numel()
    time, grid = _backward_time(path, times.double().cpu(), integration_variable)

    def backwards(state: Tensor, s: Tensor) -> Tensor:
        point, (t, rate) = state[:, :size].reshape(shape).to(x.dtype), time(s)
        with torch.no_grad():
            value, trace = divergence(lambda p: velocity_and_score(field(p, t))[0], point, probe, mode)
        # The mean divergence stands once for each dimension: so an adaptive solver weighs its error as much as the point's.
        return -rate[:, None] * torch.cat([value.flatten(1), (trace / size)[:, None].expand(-1, size)], 1).to(state.dtype)

    wide = torch.float32 if x.device.type == "mps" else torch.float64
    start = torch.cat([x.flatten(1), torch.zeros_like(x.flatten(1))], 1).to(wide)
    end, evaluations = solver(backwards, start, grid)
    initial_point = end[:, :size].reshape(shape)
    prior_log_density = _normal(initial_point, path(times[:1].double()).b.item()) if prior is None else prior(initial_point)
    return LogDensityResult(prior_log_density + end[:, size:].sum(1), initial_point, evaluations)


def _backward_time(
    path: Path, times: Tensor, integration_variable: IntegrationVariable
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    """Return how a solver's time s, from 0 at the data up, becomes t and -dt / ds, and the grid in s."""
    if integration_variable == "time":
        return (lambda s: (1 - s, torch.ones_like(s))), (1 - times).flip(0)
    levels = path.log_snr(times)
    (low, high), (first, last) = levels[[0, -1]].tolist(), times[[0, -1]].tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"integration_variable='log_snr' from t={first:g} to t={last:g}, where it is {low} and {high}: both are finite. "
            "Use integration_variable='time'."
        )

    def time(s: Tensor) -> tuple[Tensor, Tensor]:
        t = path.time_from_log_snr(high - s * (high - low)).clamp(first, last)
        c = path(t)
        return t, (high - low) / (2 * (c.da / c.a - c.db / c.b))

    return time, ((high - levels) / (high - low)).flip(0)


def likelihood_end_time(path: Path, predict: Prediction, noise: float) -> float:
    """Return the time at which to take the density of data: 1, or where the velocity is not finite there the time of a little noise.

    Args:
        path: the field's path.
        predict: what the network gives.
        noise: beta at that time, data units: a tenth of an 8-bit step costs
            pixels of standard deviation 1 / 255 (half a step) 0.001 bits on average.

    Returns:
        By bisection of beta, which falls.
    """
    end = path(torch.ones(1, dtype=torch.float64))
    if not is_singular(path, predict, 1.0) and bool(end.db.isfinite().all()):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if path(torch.tensor(middle, dtype=torch.float64)).b > noise else (low, middle)
    return high


def _normal(x: Tensor, std: float) -> Tensor:
    """log N(x; 0, std^2 I) of each sample, (B,)."""
    each = -((x / std) ** 2) / 2 - math.log(std * math.sqrt(2 * math.pi))
    return each.flatten(1).sum(1)


def dequantise(data: Tensor, u: Tensor, step: float = 2 / 255) -> Tensor:
    """Spread 8-bit values evenly over their bins, so that they have a density.

    Args:
        data: images on the lattice of 8 bits, data units, (B, *S).
        u: uniform on (0, 1), (B, *S).
        step: from one 8-bit value to the next, data units; 2 / 255 for images in [-1, 1].
    """
    return data + (u.to(data) - 0.5) * step


def bits_per_dimension(log_density: Tensor, dimensions: int, step: float = 2 / 255) -> Tensor:
    """Bits per dimension of 8-bit images from the log-density of their dequantised values.

    A bin of width `step` in each of D dimensions holds probability of about
    p step^D (at least that of the mean logarithm, by Jensen), so
    `bits = -log2(p) / D - log2(step)`; the second term, the dequantisation
    term, is 6.99 for images in [-1, 1].

    Args:
        log_density: nats, (B,), data units.
        dimensions: D, values of one image.
        step: as in `dequantise`.

    Raises:
        ValueError: no dimension, or a step that is not positive.
    """
    if dimensions < 1 or not 0 < step < math.inf:
        raise ValueError(f"dimensions={dimensions}, step={step}: at least one, and a positive step. Use 2 / 255 for images in [-1, 1].")
    return -log_density / (dimensions * math.log(2)) - math.log2(step)


def mean_and_standard_error(values: Tensor) -> MeanEstimate:
    """Mean of one value per image and its standard error, which spans images, probes and dequantisation alike.

    Raises:
        ValueError: fewer than two values.
    """
    if values.numel() < 2:
        raise ValueError(f"{values.numel()} values have no standard error: give two images or more.")
    return MeanEstimate(values.mean(), values.std() / math.sqrt(values.numel()))
