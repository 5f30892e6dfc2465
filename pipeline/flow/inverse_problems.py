"""Inverse problems: images from a linear measurement of them, `y = A z + noise`.

Three measurements, each with `A A^T = gain I`, so that the pseudo-inverse is
`A^T / gain`: a mask (inpainting), a weighted sum of the colours
(colourisation), block means (super-resolution). Two ways to sample given y:

- replacement puts the measured part of every x_t to `alpha_t y + beta_t A eps`: simple, and
  exact in what was measured, but the rest hears of it only through the network;
- reconstruction guidance adds the score of p(y | x_t) to the field, through
  the data prediction and its derivative: exact for Gaussian data.

Source: docs/mathematics.md section 7; Song et al., Score-Based Generative Modeling
through SDEs, appendix I; Song et al., Pseudoinverse-Guided Diffusion Models,
eq. 7; Rozet et al., Learning Diffusion Priors from Observations (the exact
covariance by conjugate gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .field import Field, shift_score_prediction, velocity_and_score
from .parameterisation import convert
from .path import Path, widen
from .solver import StepCallback, expand_time


class Measurement(Protocol):
    """A linear map A with `A A^T = gain I` on what it measures."""

    @property
    def gain(self) -> float: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return the measurement A x."""
        ...

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The smallest x with A x = y, that is `A^T y / gain`."""
        ...


@dataclass(frozen=True, eq=False)
class Inpainting:
    """Keeps the values where the mask is 1; y is an image with zeros elsewhere.

    Args:
        mask: of zeros and ones, of a shape that broadcasts to (B, C, H, W): 1 is measured.
    """

    mask: Tensor
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not bool(((self.mask == 0) | (self.mask == 1)).all()):
            raise ValueError("the mask holds values other than 0 and 1: 1 is measured, 0 is to be filled in. Use (mask > 0.5).float().")

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y * self.mask.to(y)


@dataclass(frozen=True)
class Colourisation:
    """Gray as a weighted sum of the channels; y is (B, 1, H, W).

    Args:
        weights: one per channel; Rec. 601's for red, green, blue unless said.
    """

    weights: tuple[float, ...] = (0.299, 0.587, 0.114)

    @property
    def gain(self) -> float:
        return sum(w**2 for w in self.weights)

    def _weights_like(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights, device=like.device, dtype=like.dtype)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != len(self.weights):
            raise ValueError(f"x has shape {tuple(x.shape)}: colourisation takes (B, {len(self.weights)}, H, W), one channel per weight.")
        return (x * self._weights_like(x)).sum(1, keepdim=True)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y * self._weights_like(y) / self.gain


@dataclass(frozen=True)
class SuperResolution:
    """Means over blocks of `factor` x `factor` values; y is (B, C, H / factor, W / factor)."""

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"factor={self.factor} of super-resolution: a whole number, at least 2. Use 4.")

    @property
    def gain(self) -> float:
        return 1 / self.factor**2

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: (B, C, H, W) with sides that {self.factor} divides. Crop it, or take another factor."
            )
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def replacement_callback(operator: Measurement, y: Tensor, path: Path, noise: Tensor) -> StepCallback:
    """Replacement, as the `step_callback` of any solver.

    Args:
        operator: A.
        y: the measurement of each sample, of the shape of A x.
        path: the field's path.
        noise: eps, (B, *S), standard normal; kept for the whole solve. The
            noise the solver started from keeps the measured part on one trajectory.

    Returns:
        A function of (x, t): x with its measured part put to
        `alpha_t y + beta_t A eps`. Where the path ends clean, A x = y there.

    Raises:
        ValueError: a measurement that has not the shape of A eps.
    """
    measured = operator(noise)
    _check_shape(y, measured)

    def replace(x: Tensor, t: float) -> Tensor:
        c = path(widen(expand_time(t, x), x))
        return x + operator.pseudo_inverse(c.a * y + c.b * measured - operator(x))

    return replace


def reconstruction_guidance(
    field: Field, path: Path, operator: Measurement, y: Tensor, *, noise_std: float = 0.0, data_std: float = 1.0, iterations: int = 0
) -> Field:
    """The field of p(x_t | y): reconstruction guidance.

    The covariance C of z given x_t turns what the data prediction leaves
    unexplained, `r = y - A E[z | x_t]`, into a correction of that prediction,
    `C A^T (A C A^T + noise_std^2 I)^{-1} r`, where `C = (b^2 / a) dE[z | x] / dx` is
    applied by one backward pass. In the inverse, C is taken as that of data
    N(0, data_std^2 I) (`iterations = 0`; exact for them), or exactly, by
    conjugate gradients with one backward pass an iteration (exact for all
    Gaussian data once there are as many as measured values).

    Args:
        field: velocity of (x, t), or (velocity, score), differentiable in x.
        path: its path.
        operator: A.
        y: the measurement of each sample, of the shape of A x.
        noise_std: standard deviation of the measurement's noise, >= 0, data units.
        data_std: of the data, > 0, data units.
        iterations: of conjugate gradients.

    Returns:
        A field for t in (0, 1), of what the given one returns, both parts
        guided: begin the grid at 1e-3, and do not evaluate where beta = 0
        (`last_euler=True`, or a solver that does not).

    Raises:
        ValueError: a standard deviation or number that is out of range.
    """
    if not (0 <= noise_std < float("inf") and 0 < data_std < float("inf")) or iterations < 0:
        raise ValueError(
            f"noise_std={noise_std}, data_std={data_std}, iterations={iterations}: not negative, data_std positive. Use 0.01, 0.5, 0."
        )

    def guided(x: Tensor, t: Tensor) -> Any:
        c = path(widen(t, x))
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            out = field(point, t)
            data = convert(velocity_and_score(out)[0], "velocity", "data", point, c)

        def vjp(q: Tensor) -> Tensor:
            """Return the derivative of the data prediction, transposed, times A^T q: by one backward pass."""
            (product,) = torch.autograd.grad(data, point, operator.gain * operator.pseudo_inverse(q), retain_graph=True)
            return product

        with torch.no_grad():
            measured = operator(data)
            _check_shape(y, measured)
            residual = y - measured
            variance = (data_std * c.b) ** 2 / ((data_std * c.a) ** 2 + c.b**2)
            size = operator.gain * variance + noise_std**2
            weights = residual / size
            if iterations:
                apply = lambda q: operator(c.b**2 / c.a * vjp(q)) + noise_std**2 * q  # noqa: E731  C A^T q is b^2 / a of it
                weights = _conjugate_gradients(apply, residual, weights, iterations)
            detached = tuple(part.detach() for part in out) if isinstance(out, tuple) else out.detach()
            return shift_score_prediction(detached, vjp(weights), c)

    return guided


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], rhs: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Solve `apply(w) = right` for each sample, apply symmetric and not negative; a sample that is solved stays put."""

    def dot(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).flatten(1).sum(1).reshape(-1, *[1] * (p.ndim - 1))

    def ratio(p: Tensor, q: Tensor) -> Tensor:
        return torch.where(q > 0, p / torch.where(q > 0, q, 1), 0)

    w = start
    residual = rhs - apply(w)
    direction, square = residual, dot(residual, residual)
    tolerance = torch.finfo(rhs.dtype).eps ** 2 * dot(rhs, rhs)
    for _ in range(iterations):
        along = apply(direction)
        active = square > tolerance
        length = torch.where(active, ratio(square, dot(direction, along)), 0)
        w, residual = w + length * direction, residual - length * along
        new = dot(residual, residual)
        direction, square = residual + ratio(new, square) * direction, new
    return w


def _check_shape(y: Tensor, measured: Tensor) -> None:
    if y.shape != measured.shape:
        raise ValueError(
            f"the measurement {tuple(y.shape)} is not of the shape A x = {tuple(measured.shape)}: measure with the same operator."
        )
