"""Charts: coefficients of the paths and timestep distributions; error against evaluations of every ODE solver."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from condot.pipeline.flow import (
    ODE_SOLVERS,
    PATHS,
    CosMap,
    LogitNormal,
    LogNormalSigma,
    Mode,
    Purpose,
    Shifted,
    TimestepDistribution,
    Uniform,
    dormand_prince,
    normal,
    uniform_grid,
)
from docs.figures import style
from docs.figures.scenes import Network


def schedules(output: Path) -> None:
    """alpha and beta of every path, their log signal-to-noise ratio, and the timestep distributions."""
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
    distributions: dict[str, TimestepDistribution] = {
        "uniform": Uniform(), "logit-normal": LogitNormal(), "mode": Mode(),
        "cosmap": CosMap(), "shifted by 3": Shifted(3.0), "log-normal in sigma": LogNormalSigma(),
    }  # fmt: skip
    for (label, distribution), colour in zip(distributions.items(), style.SERIES, strict=False):
        axes[3].plot(t, distribution.density(t), color=colour, label=label, linewidth=1.5)
    for ax, title in zip(
        axes, ("signal $\\alpha_t$", "noise $\\beta_t$", "$\\log\\,(\\alpha_t^2 / \\beta_t^2)$", "laws of $t$: density"), strict=True
    ):
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
    exact = dormand_prince(field, start, uniform_grid(1), rtol=1e-11, atol=1e-11, max_evaluations=200_000).x
    figure, ax = plt.subplots(figsize=(5.8, 4.1))
    labels = {
        "euler": "Euler (1)",
        "midpoint": "midpoint (2)",
        "heun": "Heun (2)",
        "multistep": "two-step (2)",
        "rk4": "RK4 (4)",
        "dormand_prince": "Dormand-Prince 5(4)",
    }
    for (name, label), colour in zip(labels.items(), style.SERIES, strict=False):
        spent, errors = [], []
        for k in range(9):
            if name == "dormand_prince":
                end = dormand_prince(
                    field, start, uniform_grid(1), rtol=10.0 ** -(k / 1.1 + 1), atol=10.0 ** -(k / 1.1 + 1), max_evaluations=100_000
                )
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
