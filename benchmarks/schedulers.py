"""How near each scheduler comes in so many evaluations of the network: ours beside stock diffusers' of the same order.

The network is perfect: the velocity of a mixture of three normal laws in the
plane, known in closed form (tests/oracles.py). Schedulers of the ODE are
measured by the root mean square distance of their ends from those of a fine
solution from the same start, which for DPMSolver++ is sigma = 0.999; those of the SDE by the Wasserstein-1 distance of their samples from
the mixture, averaged over 16 directions (`floor` is that of as many draws from
the mixture itself). `n` evaluations are the most that each may use.

Grids count as much as solvers do, so a stock scheduler that evaluates once a
step is held against ours on its own sigmas; FlowMatchHeun, two evaluations a
step, against our midpoint, and our Heun is shown beside it (1.576e-2 to its
1.574e-2 at n = 25, with one evaluation less); sde-DPMSolver++ 2 against our
two-step SDE, and stochastic Heun, two evaluations a step, is shown beside it. UniPC's corrector makes its
order p into p + 1 (observed here from 50 to 400 steps: about 2 for p = 1, 2 to 3
for p = 2): `UniPC 2` has no counterpart among ours, and is nearer than our order 2 from n = 25 on.

    python benchmarks/schedulers.py [--samples 4000] [--draws 40000]
    python benchmarks/schedulers.py --exported    # which one each recipe exports, and which may take its place: exported_schedulers.py

Fails unless ours is at least as near as the stock scheduler above it, at every budget, to a thousandth.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import oracles
from exported_schedulers import by_pipeline, by_recipe

from condot.pipeline.export.runtime.scheduling_flow_ode_v2 import FlowODEScheduler
from condot.pipeline.export.runtime.scheduling_flow_sde_v2 import FlowSDEScheduler
from condot.pipeline.flow import dormand_prince, uniform_grid

BUDGETS = (10, 25, 50)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ODE = [  # order, stock's scheduler if any, ours, and whether ours takes stock's sigmas
    (1, None, "", {"solver": "euler"}, False),
    (1, FlowMatchEulerDiscreteScheduler, "FlowMatchEuler", {"solver": "euler"}, True),
    (1, lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=1), "DPMSolver++ 1", {"solver": "euler"}, True),
    (2, None, "", {"solver": "dpmpp_2m"}, False),
    (2, None, "", {"solver": "multistep"}, False),
    (2, None, "", {"solver": "heun"}, False),
    (2, FlowMatchHeunDiscreteScheduler, "FlowMatchHeun", {"solver": "midpoint"}, False),
    (2, lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=2), "DPMSolver++ 2", {"solver": "multistep"}, True),
    (2, lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=2), "DPMSolver++ 2", {"solver": "dpmpp_2m"}, True),
    (2, lambda: UniPCMultistepScheduler(**FLOW, solver_order=1), "UniPC 1", {"solver": "multistep"}, True),
    (3, lambda: UniPCMultistepScheduler(**FLOW, solver_order=2), "UniPC 2", None, False),
    (4, None, "", {"solver": "rk4"}, False),
]
SDE_DPM = {**FLOW, "algorithm_type": "sde-dpmsolver++"}
SDE = [
    (
        1,
        lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        "FlowMatchEuler, stochastic",
        {"solver": "exponential", "sigma_t": "noise"},
        True,
    ),
    (
        1,
        lambda: DPMSolverMultistepScheduler(**SDE_DPM, solver_order=1),
        "sde-DPMSolver++ 1",
        {"solver": "exponential", "sigma_t": "forward"},
        True,
    ),
    (
        1,
        lambda: DPMSolverMultistepScheduler(**SDE_DPM, solver_order=1),
        "sde-DPMSolver++ 1",
        {"solver": "exponential", "sigma_t": "noise"},
        True,
    ),
    (1, None, "", {"solver": "euler_maruyama", "sigma_t": "noise"}, False),
    (2, None, "", {"solver": "stochastic_heun"}, False),
    (
        2,
        lambda: DPMSolverMultistepScheduler(**SDE_DPM, solver_order=2),
        "sde-DPMSolver++ 2",
        {"solver": "dpmpp_2m_sde", "sigma_t": "forward"},
        True,
    ),
    (2, None, "", {"solver": "dpmpp_2m_sde", "sigma_t": "noise"}, False),
]


def follow(scheduler, law, x, generator):
    """The loop of a pipeline with a planned schedule. The network is told the exact sigma, where stock rounds its timestep."""
    points = getattr(scheduler, "_points", None)
    sigmas = [p.sigma for p in points] if points else scheduler.sigmas.tolist()
    more = {} if isinstance(scheduler, UniPCMultistepScheduler) else {"generator": generator}
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        flow = -law.velocity(x.double(), 1 - sigma, sigma, 1.0, -1.0)
        x = scheduler.step(flow.to(x.dtype), t, x, **more).prev_sample
    return x, len(scheduler.timesteps)


def planned(make, budget, sigmas=None):
    """A scheduler with as many steps as the budget has room for, or with these sigmas."""
    scheduler = make()
    if sigmas is not None:
        scheduler.set_timesteps(sigmas=sigmas)
        return scheduler
    for steps in range(budget, 0, -1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= budget:
            break
    return scheduler


def wasserstein(x, reference):
    """W1 of projections on 16 directions, by their sorted values."""
    angles = torch.arange(16) * math.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()]).double()
    return ((x.double() @ directions).sort(0).values - (reference @ directions).sort(0).values).abs().mean().item()


def table(title, rows, kind, measure):
    """Print the errors; whether ours is at least as near as the stock scheduler above it, at every budget."""
    print(f"\n{title}\n{'order':>5}  {'scheduler':44}" + "".join(f"{f'n = {n}':>12}{'used':>5}" for n in BUDGETS))
    fine = True
    for order, make, name, how, same in rows:
        stock = [planned(make, n) if make else None for n in BUDGETS]
        theirs = [measure(scheduler) for scheduler in stock] if make else []
        if make:
            print(f"{order:5}  {name:44}" + "".join(f"{error:12.3e}{used:5}" for error, used in theirs))
        if how is None:
            continue
        mine = []
        for n, scheduler in zip(BUDGETS, stock, strict=True):
            mine.append(measure(planned(lambda how=how: kind(**how), n, scheduler.sigmas[:-1].tolist() if same else None)))
        label = "ours " + " ".join(how.values()) + (", on its sigmas" if same else "")
        print(f"{order:5}  {label:44}" + "".join(f"{error:12.3e}{used:5}" for error, used in mine))
        worse = [n for n, (a, _), (b, _) in zip(BUDGETS, mine, theirs or mine, strict=True) if a > 1.001 * b]
        fine &= not worse
        if worse:
            print(f"       FAILED: {name} is nearer at n = {worse}")
    return fine


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description="Errors of our schedulers beside diffusers' own.")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=40000)
    parser.add_argument("--exported", action="store_true", help="print the tables of docs/export.md instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.exported:
        by_recipe()
        by_pipeline()
        return 0
    law, generator = oracles.three(), torch.Generator().manual_seed(0)
    start = torch.randn(options.samples, 2, generator=generator, dtype=torch.float64)
    exact = {}

    def distance(scheduler):
        begin = 1 - scheduler.sigmas[0].item()
        if begin not in exact:
            exact[begin] = dormand_prince(law.field(oracles.condot), start, uniform_grid(1, begin), rtol=1e-9, atol=1e-9).x
        end, used = follow(scheduler, law, start, None)
        return (end - exact[begin]).square().sum(1).mean().sqrt().item(), used

    fine = table("ODE: root mean square distance from the exact end", ODE, FlowODEScheduler, distance)
    many = torch.randn(options.draws, 2, generator=generator)  # float32, so that all draw the same noise: stock draws no other
    reference = law.sample(options.draws, generator)
    floor = wasserstein(law.sample(options.draws, generator), reference)

    def of_law(scheduler):
        end, used = follow(scheduler, law, many, torch.Generator().manual_seed(1))
        return wasserstein(end, reference), used

    fine &= table(f"SDE: Wasserstein-1 distance from the law (floor {floor:.1e})", SDE, FlowSDEScheduler, of_law)
    print("\nours is at least as near as stock's, everywhere" if fine else "\nFAILED: stock is nearer somewhere")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
