"""The still pictures: paths, fields, trajectories, Langevin dynamics, a uniform prior, convergence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from ..flow import (
    ODE_SOLVERS,
    PATHS,
    CondOT,
    CosMap,
    LinearPath,
    LogitNormal,
    LogNormalSigma,
    Mode,
    Purpose,
    Shifted,
    UniformPrior,
    annealed_langevin,
    coefficient,
    dormand_prince,
    exponential,
    finite_field,
    interpolate,
    langevin,
    normal,
    rk4,
    uniform,
    uniform_grid,
)
from ..flow.diffusion import VE
from . import scenes, style
from .scenes import Network, Sampler

Field = Callable[[Tensor, Tensor], Any]


def many(sample: Sampler, count: int) -> tuple[Tensor, Tensor]:
    """Points of data and noise, (count, 2) each."""
    index = torch.arange(count)
    return sample(10**6, index), normal(1, Purpose.NOISE, 0, index, (2,))


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
        ax.quiver(*shown.T, *length.T, speed, cmap="YlOrRd", clim=(-1.5, 4), scale=26, width=0.0062, headwidth=4, headlength=4.5, alpha=0.95)
        ax.set_title(f"$u_{{{t:g}}}(x)$")
        style.frame(ax, reach)
    figure.subplots_adjust(wspace=0.05)
    style.save(figure, str(output / "vector-field.png"))


def trajectories(model: Network, sample: Sampler, output: Path) -> None:
    """One model, five coefficients: the same starts along the ODE and along SDEs; below, where 20,000 samples end."""
    steps, reach = 400, 2.6
    cases = [("zero", 0.0, "ODE: $\\sigma_t = 0$"), ("noise", 1.0, "$\\sigma_t = 1 - t$"), ("noise", 3.0, "$\\sigma_t = 3\\,(1 - t)$"),
             ("constant", 1.0, "$\\sigma_t = 1$"), ("forward", 1.0, "forward: $\\sigma_t^2 = 2(1-t)/t$")]  # fmt: skip
    figure, axes = style.panels(2, len(cases), 2.5)
    index, few = torch.arange(20_000), 14
    start, times = normal(3, Purpose.INITIAL, 0, index, (2,)), 1 - (1 - uniform_grid(steps)) ** 2  # short steps at the end, where noise stops
    for column, (name, scale, title) in enumerate(cases):
        noise = lambda k: normal(4, Purpose.DIFFUSION, k, index, (2,))  # noqa: E731
        follow = lambda after, n=name, s=scale: exponential(model, start, times, CondOT(), coefficient(n, s), noise, after=after)  # noqa: E731
        line = recorded(follow, start)
        upper, lower = axes[:, column]
        upper.scatter(*line[-1, :3000].T, s=0.6, color="#dfe4ec", linewidths=0)
        for i in range(few):
            style.threaded(upper, line[:, i], times)
        upper.scatter(*line[0, :few].T, s=8, color=style.NOISE, zorder=3, linewidths=0)
        upper.scatter(*line[-1, :few].T, s=16, color=style.ACCENT, zorder=4, linewidths=0.5, edgecolors="white")
        upper.set_title(title)
        style.frame(upper, reach)
        style.histogram(lower, line[-1], reach, bins=110, top=99)
    axes[0, 0].set_ylabel("14 trajectories", labelpad=8)
    axes[1, 0].set_ylabel("20,000 ends", labelpad=8)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    style.save(figure, str(output / "ode-and-sde.png"))


def relaxation(output: Path) -> None:
    """Langevin dynamics from one corner to five modes; below, annealed over noise levels, from wide noise."""
    law, reach, count = scenes.five_modes(), 4.0, 1500
    score, index = scenes.score_of(law), torch.arange(count)
    noise = lambda k: normal(5, Purpose.DIFFUSION, k, index, (2,))  # noqa: E731
    x = torch.tensor([3.0, -3.2]) + 0.15 * noise(-1)
    stops, step = (0, 30, 150, 600, 3000), 0.02
    figure, axes = style.panels(2, len(stops), 2.4)
    done = 0
    for ax, stop in zip(axes[0], stops, strict=True):
        if stop > done:
            x = langevin(score, x, step, stop - done, lambda k, d=done: noise(d + k)).x
            done = stop
        style.contours(ax, law.log_prob, reach, filled=True)
        ax.scatter(*x.T, s=2.2, color=style.ACCENT, alpha=0.55, linewidths=0)
        ax.set_title(f"{stop} steps")
    path, levels = VE(0.05, 3.0), uniform_grid(24)
    at_level = lambda y, t: _smoothed(law, path, t)(y)  # noqa: E731
    shots = {0.0: 3 * noise(-2)}
    y = shots[0.0]
    for i, t in enumerate(levels.tolist()):
        times = torch.tensor([t, min(1.0, t + 1e-9)] if t < 1 else [1 - 1e-9, 1.0], dtype=torch.float64)
        scale = (path(torch.tensor(t)).b / path(torch.tensor(1.0)).b).item() ** 2
        y = annealed_langevin(at_level, y, times, path, 0.0025 * scale, 6, lambda k, i=i: normal(6, Purpose.DIFFUSION, 100 * i + k, index, (2,))).x
        shots[t] = y
    chosen = [0.0, *(levels[k].item() for k in (6, 10, 15, 24))]
    for ax, t in zip(axes[1], chosen, strict=True):
        b = path(torch.tensor(t)).b.item()
        style.contours(ax, lambda p, t=t: _density(law, path, torch.tensor([t]))(p), reach, filled=True)
        ax.scatter(*shots[t].T, s=2.2, color=style.ACCENT, alpha=0.55, linewidths=0)
        ax.set_title(f"$\\sigma = {b:.2g}$")
    axes[0, 0].set_ylabel("Langevin", labelpad=8)
    axes[1, 0].set_ylabel("annealed Langevin", labelpad=8)
    figure.subplots_adjust(wspace=0.05, hspace=0.16)
    style.save(figure, str(output / "langevin.png"))


def _density(law: Any, path: Any, t: Tensor) -> Callable[[Tensor], Tensor]:
    """log p_t of the five modes on a path with alpha = 1."""
    b = path(t[:1]).b.item()
    parts = law.component_distribution.base_dist
    wide = torch.distributions.Normal(parts.loc, torch.sqrt(parts.scale**2 + b**2))
    mixture = torch.distributions.MixtureSameFamily(law.mixture_distribution, torch.distributions.Independent(wide, 1))
    return mixture.log_prob


def _smoothed(law: Any, path: Any, t: Tensor) -> Callable[[Tensor], Tensor]:
    density = _density(law, path, t)

    class _Law:
        log_prob = staticmethod(density)

    return scenes.score_of(_Law())  # type: ignore[arg-type]


def uniform_prior(output: Path) -> None:
    """Straight lines from a uniform prior on [0, 2] to four data, two of them equal; left the bridges, right the marginal flow."""
    points, count = torch.tensor([[0.5], [0.5], [1.2], [1.7]], dtype=torch.float64), 48
    path = LinearPath(UniformPrior(0, 2, softness=1e-3))
    field = finite_field(path, points)
    times = uniform_grid(600, end=0.999)
    start = (2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    line = recorded(lambda after: rk4(field, start, times, after=after), start)[..., 0]
    colours = {0.5: style.SERIES[0], 1.2: style.SERIES[1], 1.7: style.SERIES[2]}
    figure, (left, middle, right, scale) = plt.subplots(1, 4, figsize=(12.6, 3.9), gridspec_kw={"width_ratios": [1, 1.15, 0.3, 0.035], "wspace": 0.09})
    pairs = uniform(8, Purpose.INITIAL, 0, torch.arange(60), (2,))
    for a, which in pairs.tolist():
        z = points[int(4 * which), 0].item()
        left.plot([0, 1], [2 * a, z], color=colours[z], alpha=0.5, linewidth=0.9)
    left.set_title("bridges  $x_t = t\\,z + (1 - t)\\,x_{\\rm init}$")
    t, x = torch.linspace(0, 0.985, 260, dtype=torch.float64), torch.linspace(0, 2, 261, dtype=torch.float64)[:, None]
    speed = torch.stack([field(x, torch.full((len(x),), s, dtype=torch.float64))[:, 0] for s in t.tolist()], 1)
    low = torch.minimum(t * 0.5, t * 1.7), torch.maximum(t * 0.5 + 2 * (1 - t), t * 1.7 + 2 * (1 - t))
    outside = (x < low[0]) | (x > low[1])
    mesh = middle.pcolormesh(t, x[:, 0], np.ma.masked_array(speed, outside), cmap="RdBu_r", vmin=-1.6, vmax=1.6, shading="auto", alpha=0.55, rasterized=True)
    for i in range(count):
        z = min(colours, key=lambda c, e=line[-1, i].item(): abs(c - e))
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


def schedules(output: Path) -> None:
    """alpha and beta of every path, their log signal-to-noise ratio, and the laws of t."""
    t = torch.linspace(0.002, 0.998, 400, dtype=torch.float64)
    names = {"condot": "CondOT", "cosine": "cosine", "vp": "VP", "sub_vp": "sub-VP", "ddpm_cosine": "DDPM cosine", "ve": "VE", "edm": "EDM"}
    figure, axes = plt.subplots(1, 4, figsize=(14.5, 3.3), gridspec_kw={"wspace": 0.28})
    for (name, label), colour in zip(names.items(), style.SERIES, strict=False):
        path = PATHS[name]()
        c = path(t)
        axes[2].plot(t, path.log_snr(t), color=colour, label=label, linewidth=1.6)
        if c.b.max() <= 1:
            dashes = (4, 3) if name in ("sub_vp", "ddpm_cosine") else (1, 0)
            axes[0].plot(t, c.a, color=colour, linewidth=1.6, dashes=dashes)
            axes[1].plot(t, c.b, color=colour, linewidth=1.6, dashes=dashes)
    laws = {"uniform": None, "logit-normal": LogitNormal(), "mode": Mode(), "cosmap": CosMap(), "shifted by 3": Shifted(3.0), "log-normal in sigma": LogNormalSigma()}
    for (label, law), colour in zip(laws.items(), style.SERIES, strict=False):
        axes[3].plot(t, torch.ones_like(t) if law is None else law.density(t), color=colour, label=label, linewidth=1.5)
    for ax, title in zip(axes, ("signal $\\alpha_t$", "noise $\\beta_t$", "$\\log\\,(\\alpha_t^2 / \\beta_t^2)$", "laws of $t$: density"), strict=True):
        ax.set_title(title)
        ax.set_xlabel("$t$   (0 noise, 1 data)")
        ax.spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(-13, 13)
    axes[3].set_ylim(0, 4)
    axes[2].legend(fontsize=8, frameon=False, loc="upper left")
    axes[3].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.save(figure, str(output / "paths.png"))


def convergence(model: Network, output: Path) -> None:
    """Error against evaluations, on the learned field in float64: the slope is the order."""
    field, index = model.double(), torch.arange(64)
    start = normal(9, Purpose.INITIAL, 0, index, (2,)).double()
    exact = dormand_prince(field, start, uniform_grid(1), rtol=1e-11, atol=1e-11, limit=200_000).x
    figure, ax = plt.subplots(figsize=(5.8, 4.1))
    labels = {"euler": "Euler (1)", "midpoint": "midpoint (2)", "heun": "Heun (2)", "multistep": "two-step (2)", "rk4": "RK4 (4)", "dormand_prince": "Dormand-Prince 5(4)"}
    for (name, label), colour in zip(labels.items(), style.SERIES, strict=False):
        spent, errors = [], []
        for k in range(9):
            if name == "dormand_prince":
                end = dormand_prince(field, start, uniform_grid(1), rtol=10.0 ** -(k / 1.1 + 1), atol=10.0 ** -(k / 1.1 + 1), limit=100_000)
            else:
                end = ODE_SOLVERS[name](field, start, uniform_grid(max(2, round((8 if name != "rk4" else 4) * 2 ** (k * 0.9)))))
            spent.append(end.evaluations)
            errors.append((end.x - exact).norm(dim=1).mean().item())
        ax.loglog(spent, errors, "o-", color=colour, label=label, markersize=3.5, linewidth=1.4)
    model.float()
    ax.set_xlabel("evaluations of the network")
    ax.set_ylabel("mean distance to the exact end")
    ax.grid(True, which="major", color="#e6e9ef", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    style.save(figure, str(output / "convergence.png"))


def draw_all(board: Network, moon: Network, output: Path) -> None:
    """Every still picture into a folder that exists."""
    conditional_and_marginal(scenes.checkerboard, output)
    field_over_time(board, scenes.checkerboard, output)
    trajectories(moon, scenes.moons, output)
    relaxation(output)
    uniform_prior(output)
    schedules(output)
    convergence(moon, output)


