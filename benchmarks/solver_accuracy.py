"""How near solvers come at equal evaluations, without a network: the exact field of mixtures, which is known in closed form.

    python benchmarks/solver_accuracy.py [--evaluations 10 25 50] [--part ode|sde|variance]

ODE: the root mean square distance of end points from those of a fine solution, data predictions converted; in 1e-3.
SDE: the Wasserstein distance of 20,000 end points from the data, one coordinate, and (variance) by how much the variance
of a normal law is missed, exactly, by linear response. Means over paths; each table names them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracles
import torch
from torch import Tensor

from condot.pipeline.flow import (
    PATHS,
    Purpose,
    convert,
    denoise,
    diffusion_coefficient,
    is_singular,
    normal,
    scale_initial_noise,
    time_grid,
    velocity_field,
    widen,
)
from condot.pipeline.sampling.flow_model import FlowModel
from condot.pipeline.sampling.sampler import Sampler
from condot.pipeline.sampling.solve import integrate

PATH_NAMES = ("condot", "cosine", "vp", "ddpm")
GRIDS = ("uniform", "shifted", "rho", "log_snr")
ODE = {"euler": 1, "multistep": 1, "dpmpp_2m": 1, "midpoint": 2, "heun": 2, "rk4": 4}
SDE = {"exponential": 1, "dpmpp_2m_sde": 1, "euler_maruyama": 1, "stochastic_heun": 2}
SIGMAS = ("noise", "constant", "forward")
DOUBLE = torch.float64


def sharp() -> oracles.Mixture:
    """Five narrow points of unlike spread in two dimensions, nearer to images than three wide ones are."""
    means = torch.tensor([[-0.8, 0.1], [-0.3, -0.7], [0.1, 0.6], [0.5, -0.2], [0.9, 0.8]], dtype=DOUBLE)
    spread = torch.tensor([0.02, 0.05, 0.1, 0.03, 0.2], dtype=DOUBLE) ** 2
    return oracles.Mixture(torch.full((5,), 0.2, dtype=DOUBLE), means, spread[:, None, None] * torch.eye(2, dtype=DOUBLE))


LAWS: dict[str, Callable[[], oracles.Mixture]] = {"wide": oracles.three, "sharp": sharp}


def source_of(law: oracles.Mixture, name: str, predict: str) -> FlowModel:
    """The exact prediction of a mixture on a path, as a source."""
    path = PATHS[name]()

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t.double().clamp(max=1 if predict == "data" else 1 - 1e-9)  # a velocity is known at the end too: by its limit
        c = path(t[:1])
        data = law.data(x, c.a.item(), c.b.item())
        return data if predict == "data" else convert(data, "data", predict, x, path(widen(t, x)))

    field = velocity_field(model, path, predict)
    return FlowModel(lambda x, t, y: field(x, t, y), path, (2,), 0, 0, torch.device("cpu"), lambda x: x, predict)


def solve(source: FlowModel, sampler: Sampler, count: int, seed: int = 0) -> tuple[Tensor, int]:
    """End points, (count, 2), and evaluations, noise that some paths end on taken off as `generate` does."""
    index = torch.arange(count)
    times = sampler.times(source)
    x = scale_initial_noise(source.path, normal(seed, Purpose.INITIAL, 0, index, (2,)).double(), float(times[0]))
    field = lambda x, t: source.field(x, t, index)  # noqa: E731
    end, many = integrate(source, field, x, times, sampler, seed, index)
    if source.path(times[-1]).b > 1e-6:
        end, many = denoise(field, end, float(times[-1]), source.path), many + 1
    return end, many


def steps_for(solver: str, per_step: int, evaluations: int, source: FlowModel) -> int:
    """As many steps as the evaluations pay for, with the last one of a field that is singular at the end."""
    extra = solver in ("midpoint", "heun", "multistep", "rk4") and is_singular(source.path, source.predict, 1.0)
    if solver == "stochastic_heun":
        return max(1, (evaluations + 1) // 2)
    return max(1, (evaluations - extra) // per_step)


def ode_table(evaluations: list[int]) -> None:
    print("\nODE: root mean square error of 400 end points, in 1e-3; means over paths", ", ".join(PATH_NAMES))
    for law in LAWS:
        for predict in ("data", "velocity"):
            known = {}
            for name in PATH_NAMES:
                source = source_of(LAWS[law](), name, predict)
                fine = Sampler("rk4", 600, given_times=tuple(time_grid("rho", 600, path=source.path).tolist()), clip="off")
                known[name] = (source, solve(source, fine, 400)[0])
            print(f"\n{law}, predicts {predict}: {'solver':14s} {'grid':9s}" + "".join(f"{n:>9d}" for n in evaluations))
            for solver, per in ODE.items():
                for kind in GRIDS:
                    row = []
                    for n in evaluations:
                        errors = []
                        for source, truth in known.values():
                            sampler = Sampler(solver, steps_for(solver, per, n, source), grid=kind, clip="off")
                            end, _ = solve(source, sampler, 400)
                            errors.append((end - truth).square().mean().sqrt().item())
                        row.append(1000 * sum(errors) / len(errors))
                    print(f"{'':24s}{solver:14s} {kind:9s}" + "".join(f"{error:9.2f}" for error in row))


def distance(x: Tensor, law: oracles.Mixture) -> float:
    """Wasserstein-1 distance of the first coordinate from 200,000 draws of the law."""
    draws = law.sample(200_000, torch.Generator().manual_seed(5))[:, 0].sort().values
    places = ((torch.arange(len(x), dtype=DOUBLE) + 0.5) / len(x) * len(draws)).long()
    return (x[:, 0].sort().values - draws[places]).abs().mean().item()


def sde_table(evaluations: list[int]) -> None:
    print("\nSDE: Wasserstein distance of 20,000 end points, in 1e-3; means over paths", ", ".join(PATH_NAMES))
    for law in LAWS:
        mixture = LAWS[law]()
        print(f"\n{law}: {'solver':15s} {'sigma_t':9s} {'grid':9s}" + "".join(f"{n:>9d}" for n in evaluations))
        for solver, per in SDE.items():
            for sigma in SIGMAS:
                if sigma == "forward" and per == 2:
                    continue
                for kind in ("uniform", "log_snr"):
                    row = []
                    for n in evaluations:
                        found = []
                        for name in PATH_NAMES:
                            source = source_of(mixture, name, "data")
                            sampler = Sampler(solver, steps_for(solver, per, n, source), sigma_t=sigma, grid=kind, clip="off")
                            try:
                                found.append(distance(solve(source, sampler, 20_000)[0], mixture))
                            except ValueError:
                                found.append(math.nan)
                        row.append(1000 * sum(found) / len(found))
                    print(f"{'':6s}{solver:15s} {sigma:9s} {kind:9s}" + "".join(f"{error:9.2f}" for error in row))


def variance(solver: Callable[..., object], name: str, steps: int, sigma: str, std: float = 0.5) -> float:
    """By how much, relatively, the variance of N(0.7, std^2) is missed: exactly, as the response to each step's noise."""
    path = PATHS[name]()
    coefficients = lambda t: tuple(v.item() for v in path(torch.tensor(t, dtype=DOUBLE)))  # noqa: E731
    field = oracles.gaussian([0.7], [[std**2]]).field(coefficients)
    times, x = time_grid("uniform", steps), torch.zeros(steps + 2, 1, dtype=DOUBLE)
    x[1] = path(times[:1]).b

    def unit(k: int) -> Tensor:
        return torch.zeros(steps + 2, 1, dtype=DOUBLE).index_fill(0, torch.tensor([k + 2]), 1)

    end = solver(field, x, times, path, diffusion_coefficient(sigma), unit).x  # type: ignore[attr-defined]
    end = denoise(field, end, 1.0, path) if path(times[-1]).b > 1e-6 else end
    return (end[1:] - end[0]).square().sum().item() / std**2 - 1


def variance_table(evaluations: list[int]) -> None:
    from condot.pipeline.flow import SDE_SOLVERS

    print("\nVariance of N(0.7, 0.5^2) missed by the SDE, percent, uniform grid")
    print(f"{'solver':15s} {'sigma_t':9s}" + "".join(f"{f'{name} {n}':>12s}" for name in PATH_NAMES for n in evaluations))
    for solver in ("exponential", "dpmpp_2m_sde"):
        for sigma in ("zero", *SIGMAS):
            row = [100 * variance(SDE_SOLVERS[solver], name, n, sigma) for name in PATH_NAMES for n in evaluations]
            print(f"{solver:15s} {sigma:9s}" + "".join(f"{error:+12.1f}" for error in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--part", choices=("ode", "sde", "variance"), default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part, table in (("ode", ode_table), ("sde", sde_table), ("variance", variance_table)):
        if options.part in (None, part):
            with torch.no_grad():
                table(options.evaluations)


if __name__ == "__main__":
    main()
