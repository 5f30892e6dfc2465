"""What a solver costs beside the network: microseconds per step on a 1 x 4 x 32 x 32 latent.

The field of the bare loop and of the solvers is the same and does almost
nothing, so the difference is the solver's own arithmetic: times, noise,
updates. Both are measured in turns in one run, and the best of many is taken.

    python benchmarks/solver_overhead.py [--steps 50] [--repeats 30]
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from condot.pipeline.flow import ODE_SOLVERS, SDE_SOLVERS, CondOT, Purpose, diffusion_coefficient, normal, predictor_corrector, uniform_grid

LIMIT = 150.0  # microseconds a step
SHAPE = (4, 32, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description="Solver overhead per step on a 1 x 4 x 32 x 32 latent.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    index, times, path = torch.arange(1), uniform_grid(options.steps), CondOT()
    x = normal(0, Purpose.INITIAL, 0, index, SHAPE)
    calls = [0]

    def field(x, t):
        calls[0] += 1
        return -x

    def noise(k):
        return normal(0, Purpose.DIFFUSION, k, index, SHAPE)

    ready = noise(0)
    cases = {name: (lambda s=solver: s(field, x, times)) for name, solver in ODE_SOLVERS.items()}
    for name, solver in SDE_SOLVERS.items():
        cases[name] = lambda s=solver: s(field, x, times, path, diffusion_coefficient("noise"), lambda k: ready)
        cases[f"{name}, noise drawn"] = lambda s=solver: s(field, x, times, path, diffusion_coefficient("noise"), noise)
    cases["predictor_corrector"] = lambda: predictor_corrector(field, x, times, path, diffusion_coefficient("noise"), lambda k: ready)

    t = torch.zeros(1)
    best, best_field, evaluations = dict.fromkeys(cases, float("inf")), float("inf"), {}
    with torch.no_grad():
        for _ in range(options.repeats):  # in turns, so that a busy moment hits all alike
            start = time.perf_counter()
            for _ in range(options.steps):
                field(x, t)
            best_field = min(best_field, (time.perf_counter() - start) / options.steps)
            for name, run in cases.items():
                calls[0], start = 0, time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
                evaluations[name] = calls[0]
    print(f"{options.steps} steps, best of {options.repeats}; one evaluation of the field {best_field * 1e6:.1f} us")
    worst = 0.0
    for name, seconds in best.items():
        steps = options.steps if name != "dormand_prince" else evaluations[name] / 6
        overhead = (seconds - evaluations[name] * best_field) / steps * 1e6
        worst = max(worst, overhead)
        print(f"{name:32s} {overhead:7.1f} us a step   {overhead / LIMIT:5.2f} of {LIMIT:.0f} us   {evaluations[name]} evaluations")
    print(f"worst {worst:.1f} us: {'within' if worst < LIMIT else 'ABOVE'} {LIMIT:.0f} us")
    return worst >= LIMIT


if __name__ == "__main__":
    sys.exit(main())
