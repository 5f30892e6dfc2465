"""What sampling costs beside the bare network: a DiT of 32 million parameters at 32 x 32, guided, by each way of drawing.

    python benchmarks/sampling.py [--rounds 5] [--batch 8] [--steps 10]

Each round runs the bare network as often as the sampler evaluates it, on the same batch, then each way; printed are medians
of the ratios within a round. The aim: below 1.02.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from condot.models import registry
from condot.models.convert import to_stock
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.export.identity_autoencoder import identity_autoencoder
from condot.pipeline.export.load import flow_model_from_pipeline
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.export.scheduler_map import build_scheduler
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.sampler import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="the network compiled, in every way")
    args = parser.parse_args()
    size = {"channels": 3, "resolution": 32, "num_classes": 10, "patch_size": 4, "width": 384, "depth": 12, "heads": 6}
    network = to_stock(registry.build("dit", **size), -1.0)
    flow = FlowConfig()
    names = {str(i): str(i) for i in range(10)}
    pipe = CondotPipeline(build_scheduler(flow), transformer=network, vae=identity_autoencoder(3, 32), id2label=names)
    pipe.set_progress_bar_config(disable=True)
    if args.compile:
        network.compile()
    labels, both = list(range(args.batch)), torch.arange(2 * args.batch) % 10
    source = flow_model_from_pipeline(pipe, flow)
    x, t = torch.randn(2 * args.batch, 3, 32, 32), torch.full((2 * args.batch,), 500.0)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(args.steps):
            network(x, timestep=t, class_labels=both)

    ways = {
        "pipeline, its own scheduler": lambda: pipe(labels, num_inference_steps=args.steps, guidance_scale=2.0),
        "pipeline, euler": lambda: pipe(labels, num_inference_steps=args.steps, guidance_scale=2.0, solver="euler"),
        "pipeline, exponential SDE": lambda: pipe(labels, num_inference_steps=args.steps, guidance_scale=2.0, solver="exponential"),
        "sample.py, euler": lambda: generate(source, torch.tensor(labels), Sampler("euler", args.steps, 2.0), seed=0),
    }
    bare()
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(args.rounds):
        for name, way in ways.items():
            first, took, second = timed(bare), timed(way), timed(bare)
            ratios[name].append(2 * took / (first + second))
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {args.batch} images, guided, {args.steps} steps; times of the bare network:")
    for name, found in ratios.items():
        print(f"{name:30} {statistics.median(found):.3f}  ({min(found):.3f} to {max(found):.3f})")


def timed(act) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
