"""What a checkpoint costs the loop: a save that waits for the disk, beside one that is copied and written while steps go on.

Both take turns in one run on the same state. A stall is the time that the loop
spends in `begin` and `finish`; what the steps lose is how much longer those
beside a save take than those without one, which is the thread's share of the
processors and of the memory. The first save takes the memory that the others
use again, and is told apart; so is that of a run that reserved it. Figures are medians.

    python benchmarks/checkpoint.py [--megabytes 300] [--rounds 7] [--threads 1] [--folder .]
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from condot.pipeline.checkpoint.store import CheckpointManager

GOAL = 0.10
"""Of the time of a save that waits."""


def state_of(megabytes, width=1024):
    """Weights, an average and two moments, float32, in matrices of 4 MB and vectors of 4 kB."""
    each = max(1, round(megabytes / 4 / (4 * width * (width + 1) / 1e6)))
    kinds = ("model", "ema", "optim.exp_avg", "optim.exp_avg_sq")
    state = {f"{kind}.{i}.weight": torch.randn(width, width) for kind in kinds for i in range(each)}
    return state | {f"{kind}.{i}.bias": torch.randn(width) for kind in kinds for i in range(each)}


def step_of(state, width=1024, products=2):
    """A function that does what a training step does, in seconds: products of matrices, and a change of the state."""
    a, b, changed = torch.randn(width, width), torch.randn(width, width), list(state.values())[:16]

    def step():
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        torch._foreach_mul_(changed, 0.999)
        return time.perf_counter() - start

    return step


def timed(action, *arguments):
    start = time.perf_counter()
    errors = action(*arguments)
    assert not errors, errors
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=".", help="on the disk in question")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="checkpoint-benchmark-"))
    state = state_of(options.megabytes)
    store, step, number = CheckpointManager(folder, keep=1), step_of(state), 0
    ready = CheckpointManager(folder / "ready", keep=1)
    ready.reserve_memory(state)
    waits, begins, ends, alone, beside, spans = [], [], [], [], [], []
    try:
        time.sleep(3)  # the thread takes the memory
        reserved = timed(ready.begin, 1, state, {})
        timed(ready.finish)
        for turn in range(options.rounds + 1):
            alone += [step() for _ in range(20)]
            begins.append(timed(store.begin, number := number + 1, state, {}))
            start, steps = time.perf_counter(), []
            while store.is_writing():
                steps.append(step())
            spans.append(time.perf_counter() - start)
            beside += steps if turn else []
            ends.append(timed(store.finish))
            store.wait_for_cleanup()
            waits.append(timed(store.save, number := number + 1, state, {}))
    finally:
        shutil.rmtree(folder)
    size = sum(t.nbytes for t in state.values()) / 1e6
    wait, begin, end = (statistics.median(figures[1:]) for figures in (waits, begins, ends))
    plain, loaded = statistics.median(alone), statistics.fmean(beside)
    ratio = (begin + end) / wait
    span = statistics.median(spans[1:])
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), {size:.0f} MB in {len(state)} tensors, {options.rounds} rounds in turns"
    )
    print(f"  a save that waits for the disk           {wait * 1e3:8.1f} ms   {size / wait:.0f} MB/s, pruning the one before included")
    first = f"the first {begins[0] * 1e3:.1f}, or {reserved * 1e3:.1f} into memory reserved"
    print(f"  stall of one beside training: begin      {begin * 1e3:8.1f} ms   the copy; {first}")
    print(f"                                finish     {end * 1e3:8.1f} ms   the commit")
    print(f"  written in the meantime                  {span * 1e3:8.1f} ms   {len(beside) / options.rounds:.0f} steps")
    print(f"  a step without a save, and beside one    {plain * 1e3:8.1f} ms {loaded * 1e3:8.1f} ms   {loaded / plain:.2f} times")
    lost = (begin + end + span * (1 - plain / loaded)) / wait
    print(f"  lost in all, stall and slower steps: {lost:.2f} of a save that waits")
    print(f"  target: a stall below {GOAL:.2f} of a save that waits: {ratio:.3f}{'' if ratio < GOAL else '   NOT REACHED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
