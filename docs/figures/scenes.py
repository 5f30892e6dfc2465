"""Data in the plane, and networks small enough to learn them in seconds on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from condot.pipeline.flow import CondOT, Objective, Purpose, normal, sample_times, uniform
from condot.pipeline.flow.timestep_distribution import Uniform

Sampler = Callable[[int, Tensor], Tensor]  # (step, index) -> points (B, 2)


def _uniforms(step: int, index: Tensor, count: int) -> list[Tensor]:
    """`count` uniform numbers per sample, each (B,)."""
    return list(uniform(0, Purpose.INITIAL, step, index, (count,)).float().unbind(1))


def checkerboard(step: int, index: Tensor) -> Tensor:
    """Uniform on the dark squares of a 4 x 4 board on [-2, 2]^2; (B, 2)."""
    u, v, w = _uniforms(step, index, 3)
    column = (4 * u).floor()
    row = 2 * (2 * w).floor() + column % 2
    return torch.stack([4 * u - 2, row + v - 2], 1)


def moons(step: int, index: Tensor) -> Tensor:
    """Two interleaved half circles with a little noise; (B, 2)."""
    u, side = _uniforms(step, index, 2)
    angle, upper = math.pi * u, side < 0.5
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle)) - 0.5
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle)) - 0.25
    return 1.5 * torch.stack([x, y], 1) + 0.07 * normal(0, Purpose.COUPLING, step, index, (2,))


def five_modes(sigma: float = 0.0) -> torch.distributions.MixtureSameFamily:
    """Five unlike normal laws on a ring, plus noise of size `sigma`, as torch's own distribution."""
    angle = 2 * math.pi * torch.arange(5) / 5 + math.pi / 2
    means = 2.2 * torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    spread = torch.tensor([0.30, 0.45, 0.36, 0.50, 0.40])[:, None].expand(5, 2)
    spread = torch.sqrt(spread**2 + sigma**2)
    weights = torch.distributions.Categorical(torch.tensor([0.30, 0.15, 0.20, 0.15, 0.20]))
    return torch.distributions.MixtureSameFamily(weights, torch.distributions.Independent(torch.distributions.Normal(means, spread), 1))


def score_of(law: torch.distributions.Distribution) -> Callable[[Tensor], Tensor]:
    """grad log p by differentiation of the log-density."""

    def score(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        return gradient

    return score


class Network(nn.Module):
    """A perceptron over (x, t) seen through waves of several frequencies; out: a velocity, (B, 2)."""

    def __init__(self, width: int = 128, frequencies: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 ** torch.arange(frequencies) * math.pi / 4)
        inputs = 3 * (1 + 2 * frequencies)
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        point = torch.cat([x, t[:, None]], 1)
        waves = (point[:, :, None] * self.get_buffer("frequency")).flatten(1)
        out: Tensor = self.body(torch.cat([point, torch.sin(waves), torch.cos(waves)], 1))
        return out


def train(sample: Sampler, steps: int, batch: int = 1024, rate: float = 4e-3) -> Network:
    """Conditional flow matching on fresh draws, about six seconds per thousand steps on one core.

    Returns the average of the weights over the last fifth of the steps.
    """
    torch.manual_seed(0)
    model, objective, index = Network(), Objective(CondOT()), torch.arange(batch)
    optimiser = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.99))
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps)) * min(1.0, step / 50)
        data, noise = sample(step, index), normal(0, Purpose.NOISE, step, index, (2,))
        loss = objective(model, data, noise, sample_times(Uniform(), 0, step, index, batch)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step > 0.8 * steps:
            average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    return model.requires_grad_(False)
