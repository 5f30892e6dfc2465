"""What a second process gives on this machine's CPU, beside what its cores give to two processes that know nothing of each other.

Each turn trains the same network on the digits four times, each process with one
thread: one process; two side by side, each on its own, which is the most that
the cores allow; two together by DDP; two together by FSDP2 (`full`). Printed are
images a second of all processes, medians over turns, and their ratios to twice
one process's.

    python benchmarks/scaling.py [--turns 3] [--steps 60] [--width 384] [--depth 6] [--batch 64]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from condot.data.prepare.command import main as prepare

ALONE, PAIR = (
    [sys.executable, "train.py"],
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"],
)


def start(command: list[str], options: argparse.Namespace, scratch: Path, name: str, batch: int, *more: str) -> subprocess.Popen:
    """Begin a run of so many steps that logs each tenth."""
    size = f"--model.width={options.width} --model.depth={options.depth} --model.heads={options.width // 64}"
    rest = "--data.resolution=8 --data.channels=1 --data.workers=1 --log.report_to=none --log.sample_every=0 --export=false --log.every=10"
    run = (
        f"--train.cpu_threads=1 --train.max_steps={options.steps} --checkpoint.every=100000 --train.batch_size={batch} --log.peak_tflops=1"
    )
    words = [f"--data.shards={scratch / 'shards'}", f"--output_dir={scratch / name}", *size.split(), *rest.split(), *run.split(), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rate(scratch: Path, name: str) -> float:
    """Images a second of all its processes; without the first lines, which begin."""
    lines = [json.loads(line) for line in (scratch / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("turns", 3), ("steps", 60), ("width", 384), ("depth", 6), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"one process": [], "two apart": [], "two by DDP": [], "two by FSDP2": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        assert prepare(["digits", "--output", str(scratch / "shards")]) == 0
        for turn in range(options.turns):
            jobs = {
                "one process": [(ALONE, options.batch)],
                "two apart": [(ALONE, options.batch)] * 2,
                "two by DDP": [(PAIR, 2 * options.batch)],
                "two by FSDP2": [(PAIR, 2 * options.batch, "--train.sharding=full")],
            }
            for way, commands in jobs.items():
                names = [f"{way}-{turn}-{i}".replace(" ", "-") for i in range(len(commands))]
                running = [start(command, options, scratch, name, *more) for name, (command, *more) in zip(names, commands, strict=True)]
                assert not any(process.wait() for process in running), way
                found[way].append(sum(rate(scratch, name) for name in names))
    single = found["one process"]
    for way, rates in found.items():
        share = statistics.median(r / (2 * one) for r, one in zip(rates, single, strict=True))
        print(f"{way:13s} {statistics.median(rates):8.1f} images/s   {share:.2f} of twice one process's")
    apart = found["two apart"]
    for way in ("two by DDP", "two by FSDP2"):
        share = statistics.median(r / a for r, a in zip(found[way], apart, strict=True))
        print(f"{way}: {share:.2f} of what the cores give two processes apart")
    return 0


if __name__ == "__main__":
    sys.exit(main())
