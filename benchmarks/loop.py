"""What condot's loop costs beside a bare PyTorch loop: the same network, data, optimiser and average.

Both train a DiT on the digits' shards in one process, in turns of a few steps,
so that a busy moment hits both alike. The bare loop reads the same stream,
draws noise and times from torch's generator, has the same loss, backward pass,
clipping, fused AdamW and running average, and nothing else: no log, no
reduction, no judgement of steps, no order that survives a restart. Ours is all
of `pipeline.training.loop` with a log line every 50 steps. Printed is the median over
turns of the ratio of times. The aim: below 1.03.

    python benchmarks/loop.py [--turns 40] [--steps 5] [--width 256] [--depth 8] [--batch 64]
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from condot.cli.assembly.build_run import benchmark_precision, build_run
from condot.cli.assembly.open_inputs import open_inputs
from condot.cli.host import program_host
from condot.data.prepare.command import main as prepare
from condot.pipeline.checkpoint.store import CheckpointManager
from condot.pipeline.config.parse import parse
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.launch import distributed
from condot.pipeline.training import loop
from condot.pipeline.training.run import start_or_resume
from condot.pipeline.training.status import Status


def assembled(options: argparse.Namespace, scratch: Path):
    """A run as train.py makes it, at its first step."""
    assert prepare(["digits", "--output", str(scratch / "shards")]) == 0
    size = f"--model.width={options.width} --model.depth={options.depth} --model.heads={options.width // 64}"
    rest = "--data.resolution=8 --data.channels=1 --data.workers=1 --log.report_to=none --log.sample_every=0 --export=false"
    words = [f"--data.shards={scratch / 'shards'}", f"--output_dir={scratch / 'run'}", f"--train.batch_size={options.batch}"]
    config = parse(Config, [*words, *size.split(), *rest.split(), "--checkpoint.every=1000000", *options.more], ALIASES)
    sources, space = open_inputs(config)
    accelerator = distributed.create_accelerator(
        config, distributed.init_distributed(config), None, partial(benchmark_precision, config, sources, space)
    )
    status = Status(scratch / "run", True)
    (scratch / "run").mkdir()
    run = build_run(config, sources, space, accelerator, CheckpointManager(scratch / "run", 1), status, program_host(), fresh=True)
    start_or_resume(run, None, space)
    loop.prepare_first_step(run)
    run.wait_for_checkpoint()
    return run


def bare(run):
    """One step of a loop that anybody would write."""
    network, config = copy.deepcopy(run.network), run.config.train
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, fused=True)
    stream, null = run.open_stream(0), len(run.metadata["class_names"])
    weights, means = list(network.parameters()), list(average.parameters())

    def step() -> None:
        batch = next(stream)
        z, labels = batch.images.float() / 127.5 - 1, batch.labels
        labels = torch.where(torch.rand(len(z)) < 0.1, null, labels)
        noise, t = torch.randn_like(z), torch.rand(len(z))
        x = t[:, None, None, None] * z + (1 - t[:, None, None, None]) * noise
        loss = (network(x, t, labels).float() - (z - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(means, weights, 0.001)

    return step


def ours(run):
    """One step of pipeline.training.loop.fit."""
    recent: loop.Recent = loop.deque(maxlen=2)

    def step() -> None:
        recent.append((run.step, loop.train_step(run)))
        for stats in run.step_reducer.read(all=loop.needs_checked_step(run)):
            assert not loop.check_step(run, stats, recent)
        loop.run_callbacks(run)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("turns", 40), ("steps", 5), ("width", 256), ("depth", 8), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options, options.more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = assembled(options, Path(scratch))
        ways = {"bare": bare(run), "condot": ours(run)}
        for step in ways.values():
            step()
        ratios, seconds = [], {name: [] for name in ways}
        for turn in range(options.turns):
            order = list(ways.items()) if turn % 2 else list(ways.items())[::-1]
            spent = {}
            for name, step in order:
                start = time.perf_counter()
                for _ in range(options.steps):
                    step()
                spent[name] = time.perf_counter() - start
                seconds[name].append(spent[name] / options.steps)
            ratios.append(spent["condot"] / spent["bare"])
        run.watchdog.close()
        run.stream.close()
    quarter = statistics.quantiles(ratios, n=4)
    parameters = sum(p.numel() for p in run.network.parameters())
    turns = f"{options.turns} turns of {options.steps} steps, {run.accelerator.device}"
    print(f"\n{parameters / 1e6:.1f} M parameters, batches of {options.batch}, {turns}")
    for name, values in seconds.items():
        print(f"{name:8s} {statistics.median(values) * 1e3:8.2f} ms a step")
    print(f"condot / bare {statistics.median(ratios):.4f} (quartiles {quarter[0]:.4f} to {quarter[2]:.4f}); the aim is below 1.03")
    return 0


if __name__ == "__main__":
    sys.exit(main())
