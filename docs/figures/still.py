"""The still pictures: paths, fields, trajectories, Langevin dynamics, a uniform prior, convergence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from condot.pipeline.flow import (
    VE,
    CondOT,
    LinearPath,
    Purpose,
    UniformPrior,
    annealed_langevin,
    diffusion_coefficient,
    empirical_velocity_field,
    exponential,
    interpolate,
    langevin,
    normal,
    rk4,
    scale_initial_noise,
    uniform,
    uniform_grid,
)
from docs.figures import scenes, style
from docs.figures.scenes import Network, Sampler


def many(sample: Sampler, count: int) -> tuple[Tensor, Tensor]:
    """Points of data and noise, (count, 2) each."""
    index = torch.arange(count)
    return sample(10**6, index), normal(1, Purpose.NOISE, 0, index, (2,))


def stream(seed: int, index: Tensor) -> Callable[[int], Tensor]:
    """Normal numbers for step k of a solve in the plane."""
    return lambda k: normal(seed, Purpose.DIFFUSION, k, index, (2,))


def recorded(solve: Callable[..., Any], start: Tensor) -> Tensor:
    """The points after every step of a solve, (n + 1, B, 2); `solve(after=...)`."""
    steps = [start]

    def keep(x: Tensor, t: float) -> Tensor:
        steps.append(x)
        return x

    solve(after=keep)
    return torch.stack(steps)


def conditional_and_marginal(sample: Sampler, output: Path) -> None:
    """Above: noise and one datum, p_t(x | z). Below: noise and all data, p_t(x)."""
    data, noise = many(sample, 400_000)
    datum = torch.tensor([[1.45, -0.55]]).expand_as(data)
    times = (0.0, 0.3, 0.6, 0.8, 0.93, 1.0)
    figure, axes = style.panels(2, len(times), 2.1)
    for column, t in enumerate(times):
        when = torch.full((len(data),), t)
        for row, z in enumerate((datum, data)):
            style.histogram(axes[row, column], interpolate(CondOT(), z, noise, when)[0], 3.2, top=99.7)
        axes[0, column].plot(1.45, -0.55, "o", color=style.ACCENT, markersize=4)
        axes[0, column].set_title(f"$t = {t:g}$")
    axes[0, 0].set_ylabel("conditional  $p_t(x\\,|\\,z)$", labelpad=8)
    axes[1, 0].set_ylabel("marginal  $p_t(x)$", labelpad=8)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    style.save(figure, str(output / "conditional-and-marginal.png"))


def field_over_time(model: Network, sample: Sampler, output: Path) -> None:
    """Arrows of the learned marginal velocity over the density it carries."""
    data, noise = many(sample, 200_000)
    times, reach = (0.05, 0.35, 0.6, 0.8, 0.95), 2.8
    line = torch.linspace(-reach * 0.93, reach * 0.93, 17)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    figure, axes = style.panels(1, len(times), 2.6)
    for ax, t in zip(axes[0], times, strict=True):
        x, _ = interpolate(CondOT(), data, noise, torch.full((len(data),), t))
        style.histogram(ax, x, reach, top=99.7)
        v = model(grid, torch.full((len(grid),), t))
        speed = v.norm(dim=1)
        near = torch.cdist(grid, x[:4000]).min(1).values < 0.45
        shown, v, speed = grid[near], v[near], speed[near]
        length = v / speed[:, None] * speed[:, None].clamp(max=4).sqrt()
        ax.quiver(
            *shown.T, *length.T, speed, cmap="YlOrRd", clim=(-1.5, 4), scale=26, width=0.0062, headwidth=4, headlength=4.5, alpha=0.95
        )
        ax.set_title(f"$u_{{{t:g}}}(x)$")
        style.frame(ax, reach)
    figure.subplots_adjust(wspace=0.05)
    style.save(figure, str(output / "vector-field.png"))


def trajectories(model: Network, sample: Sampler, output: Path) -> None:
    """One model, five coefficients: the same starts along the ODE and along SDEs; below, where 20,000 samples end."""
    steps, reach = 500, 2.6
    cases = [("zero", 0.0, "ODE: $\\sigma_t = 0$"), ("noise", 1.0, "$\\sigma_t = 1 - t$"), ("noise", 3.0, "$\\sigma_t = 3\\,(1 - t)$"),
             ("constant", 0.4, "$\\sigma_t = 0.4$"), ("forward", 1.0, "forward: $\\sigma_t^2 = 2(1-t)/t$")]  # fmt: skip
    figure, axes = style.panels(2, len(cases), 2.5)
    index, few = torch.arange(20_000), 10
    start, times = normal(3, Purpose.INITIAL, 0, index, (2,)), uniform_grid(steps)
    for column, (name, scale, title) in enumerate(cases):
        line = recorded(partial(exponential, model, start, times, CondOT(), diffusion_coefficient(name, scale), stream(4, index)), start)
        upper, lower = axes[:, column]
        upper.scatter(*line[-1, :3000].T, s=0.6, color="#dfe4ec", linewidths=0)
        for i in range(few):
            style.threaded(upper, line[:, i], times)
        upper.scatter(*line[0, :few].T, s=8, color=style.NOISE, zorder=3, linewidths=0)
        upper.scatter(*line[-1, :few].T, s=16, color=style.ACCENT, zorder=4, linewidths=0.5, edgecolors="white")
        upper.set_title(title)
        style.frame(upper, reach)
        style.histogram(lower, line[-1], reach, bins=110, top=99)
    axes[0, 0].set_ylabel("10 trajectories", labelpad=8)
    axes[1, 0].set_ylabel("20,000 ends", labelpad=8)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    style.save(figure, str(output / "ode-and-sde.png"))


def relaxation(output: Path) -> None:
    """Langevin dynamics from one corner to five modes; below, annealed over noise levels, from wide noise."""
    index, stops = torch.arange(1500), (0, 30, 150, 600, 3000)
    noise, law = stream(5, index), scenes.five_modes()
    figure, axes = style.panels(2, len(stops), 2.4)
    x, done = torch.tensor([3.0, -3.2]) + 0.15 * noise(-1), 0
    for ax, stop in zip(axes[0], stops, strict=True):
        if stop > done:
            x = langevin(scenes.score_of(law), x, 0.02, stop - done, partial(_later, noise, done)).x
            done = stop
        style.contours(ax, law.log_prob, 4.0, filled=True)
        style.swarm(ax, x)
        ax.set_title(f"{stop} steps")
    path, times = VE(0.05, 3.0), uniform_grid(24)
    start = scale_initial_noise(path, noise(-2))

    def score(y: Tensor, t: Tensor) -> Tensor:
        return scenes.score_of(scenes.five_modes(path(t[0]).b.item()))(y)

    levels = recorded(partial(annealed_langevin, score, start, times, path, 0.0025, 12, stream(6, index)), start)
    for ax, k in zip(axes[1], (0, 6, 10, 15, 24), strict=True):
        sigma = path(times[k]).b.item()
        style.contours(ax, scenes.five_modes(sigma).log_prob, 4.0, filled=True)
        style.swarm(ax, levels[k + 1])
        ax.set_title(f"$\\sigma = {sigma:.2g}$")
    axes[0, 0].set_ylabel("Langevin", labelpad=8)
    axes[1, 0].set_ylabel("annealed Langevin", labelpad=8)
    figure.subplots_adjust(wspace=0.05, hspace=0.16)
    style.save(figure, str(output / "langevin.png"))


def _later(noise: Callable[[int], Tensor], done: int, k: int) -> Tensor:
    return noise(done + k)


def uniform_prior(output: Path) -> None:
    """Straight lines from a uniform prior on [0, 2] to four data, two of them equal; left the bridges, right the marginal flow."""
    points, count = torch.tensor([[0.5], [0.5], [1.2], [1.7]], dtype=torch.float64), 48
    path = LinearPath(UniformPrior(0, 2, softness=1e-3))
    field = empirical_velocity_field(path, points)
    times = uniform_grid(600, end=0.999)
    start = (2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    line = recorded(partial(rk4, field, start, times), start)[..., 0]
    colours = {0.5: style.SERIES[0], 1.2: style.SERIES[1], 1.7: style.SERIES[2]}
    figure, (left, middle, right, scale) = plt.subplots(
        1, 4, figsize=(12.6, 3.9), gridspec_kw={"width_ratios": [1, 1.15, 0.3, 0.035], "wspace": 0.09}
    )
    pairs = uniform(8, Purpose.INITIAL, 0, torch.arange(60), (2,))
    for a, which in pairs.tolist():
        z = points[int(4 * which), 0].item()
        left.plot([0, 1], [2 * a, z], color=colours[z], alpha=0.5, linewidth=0.9)
    left.set_title("bridges  $x_t = t\\,z + (1 - t)\\,x_{\\rm init}$")
    t, x = torch.linspace(0, 0.985, 260, dtype=torch.float64), torch.linspace(0, 2, 261, dtype=torch.float64)[:, None]
    speed = torch.stack([field(x, torch.full((len(x),), s, dtype=torch.float64))[:, 0] for s in t.tolist()], 1)
    inside = torch.stack([(x >= t * z) & (x <= t * z + 2 * (1 - t)) for z in points[:, 0].tolist()]).any(0)
    mesh = middle.pcolormesh(
        t, x[:, 0], np.ma.masked_array(speed, ~inside), cmap="RdBu_r", vmin=-1.6, vmax=1.6, shading="auto", alpha=0.55, rasterized=True
    )
    for i in range(count):
        z = points[(points[:, 0] - line[-1, i]).abs().argmin(), 0].item()
        middle.plot(times, line[:, i], color=colours[z], linewidth=1.0)
    middle.set_title("the marginal field $u_t(x)$ and its flow")
    figure.colorbar(mesh, cax=scale, label="velocity")
    dense = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 1000)[:, None]
    ends = rk4(field, dense, times).x[:, 0]
    for z, colour in colours.items():
        share = ((ends - z).abs() < 0.05).double().mean().item()
        right.barh(z, share, height=0.09, color=colour)
        right.text(share + 0.03, z, f"{share:.2f}", va="center", fontsize=9)
    right.set_xlim(0, 0.78)
    right.set_title("where it ends")
    right.set_xticks([])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    for ax in (left, middle, right):
        ax.set_ylim(-0.03, 2.03)
    for ax in (middle, right):
        ax.set_yticklabels([])
    for ax in (left, middle):
        ax.set_xlabel("$t$")
        ax.set_xlim(-0.02, 1.02)
    left.set_ylabel("$x$")
    style.save(figure, str(output / "uniform-prior.png"))


def draw_all(board: Network, moon: Network, output: Path) -> None:
    """Every still picture into a folder that exists."""
    conditional_and_marginal(scenes.checkerboard, output)
    field_over_time(board, scenes.checkerboard, output)
    trajectories(moon, scenes.moons, output)
    relaxation(output)
    uniform_prior(output)
