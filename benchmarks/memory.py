"""What activation checkpointing saves and costs: peak memory and time of a train step at depth 28, with and without.

A step is forward, backward and fused AdamW. Each measurement is a process of
its own, in turns, so that a busy moment hits both alike and no peak hides in
memory that another left behind; on a CPU the time is the process's own. The
peak is counted over what is held once the network, its gradients and the
optimiser's moments exist ("activations"), and as a whole: of the process on a
CPU, torch's libraries included, of what torch allocated on a GPU.

    python benchmarks/memory.py [--batch 24] [--width 128] [--turns 2] [--style dit|modern] [--device cuda --bf16]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from condot.models import registry

DEPTH = 28
TIME, MEMORY = 1.35, 0.5  # targets: so many times as long at most, so much of the whole peak at most


def held(device: str, most: bool) -> float:
    """MiB, now or at most since the start."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()) / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:" if most else "VmRSS:")[1].split()[0]) / 1024


def now(device: str) -> float:
    """Seconds: the process's own, or the clock's once the GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def child(options: argparse.Namespace) -> None:
    """Prints seconds of each step but the first, and MiB before and at most."""
    torch.set_num_threads(options.threads)
    device = options.device
    model = registry.build(
        "dit", seed=0, channels=4, resolution=32, num_classes=10, patch_size=2, depth=DEPTH, width=options.width,
        heads=options.heads or options.width // 64, style=options.style, gradient_checkpointing=options.child == "with",
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-8)
    optimizer.step()  # moments exist from here on
    x = torch.randn(options.batch, 4, 32, 32, device=device)
    t, labels = torch.rand(options.batch, device=device), torch.arange(options.batch, device=device) % 11
    base, seconds = held(device, False), []
    for _ in range(options.steps):
        start = now(device)
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            output = model(x, t, labels)
        (output.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(now(device) - start)
    print(json.dumps({"seconds": seconds[1:], "base": base, "peak": held(device, True)}))


def report(found: dict[str, list[dict]]) -> bool:
    """One line each, then the ratios; returns whether they are within the targets."""
    rows = []
    for name, turns in found.items():
        seconds = [s for turn in turns for s in turn["seconds"]]
        base, peak = (statistics.median(turn[key] for turn in turns) for key in ("base", "peak"))
        rows.append((min(seconds), statistics.median(seconds), peak - base, peak))
        print(
            f"{name:8s} {min(seconds):7.3f} s a step (median {rows[-1][1]:.3f})   base {base:6.0f} MiB   "
            f"activations {peak - base:6.0f} MiB   peak {peak:6.0f} MiB"
        )
    times, medians, activations, peaks = (b / a for a, b in zip(*rows, strict=True))
    print(f"with / without: time {times:.2f} (median {medians:.2f}), activations {activations:.2f}, whole peak {peaks:.2f}")
    return times <= TIME and peaks <= MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory and time of a train step with and without checkpointing.")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=0, help="0: of 64 channels")
    parser.add_argument("--steps", type=int, default=3, help="of each process; the first is not timed")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--style", default="dit", choices=("dit", "modern"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--child", default="", choices=("", "with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return 0
    found: dict[str, list[dict]] = {"without": [], "with": []}
    for turn in range(options.turns):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            done = subprocess.run([sys.executable, *sys.argv, "--child", name], capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout))
    precision = "bf16 autocast" if options.bf16 else "float32"
    print(
        f"DiT of {DEPTH} blocks, width {options.width}, 256 tokens, batch {options.batch}, {precision}, {options.style}, {options.device}"
    )
    met = report(found)
    print(f"{'within' if met else 'ABOVE'} {TIME:.2f} of the time at {MEMORY:.2f} of the whole peak")
    return not met


if __name__ == "__main__":
    sys.exit(main())
