"""DDPM's U-Net beside the flow's transformer on Fashion-MNIST: the Frechet distance of their exported folders, each beside real images.

    python benchmarks/fashion.py --ddpm runs/fashion_unet/export --flow runs/fashion_dit/export --shards runs/fashion/shards

Each row is so many samples, as many of each class, against the 5,000 held-out images, in the features of one classifier that was learnt on
the training images; the last row is as many training images. 2,000 samples of every row take about 20 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import condot.core.process  # noqa: F401  first: it sets how threads wait, before torch is imported

# isort: split
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, logging
from torch import Tensor

from condot.data.loader.read_samples import read_images
from condot.data.storage.shard_reader import Shards
from condot.pipeline.evaluation.classifier import train_classifier
from condot.pipeline.evaluation.frechet import FeatureMoments, frechet_distance
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.sampler import Sampler

ROWS = (
    ("ddpm", "stock DPM++", 25, 1.5),
    ("ddpm", "multistep", 50, 1.5),
    ("ddpm", "exponential", 50, 1.0),
    ("ddpm", "exponential", 50, 1.5),
    ("flow", "heun", 25, 1.0),
    ("flow", "heun", 25, 1.5),
    ("flow", "heun", 25, 2.0),
)
"""Model, solver, steps, guidance; Heun evaluates twice a step."""


def draw(folder: Path, solver: str, steps: int, guidance: float, labels: Tensor) -> Tensor:
    """Samples (N, 1, 28, 28) in -1..1: by our solvers, or by stock diffusers alone."""
    if solver != "stock DPM++":
        return generate(load_flow_model(folder), labels, Sampler(solver, steps, guidance), seed=0, batch_size=250).images.clamp(-1, 1)
    pipe = DiTPipeline.from_pretrained(folder)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    pipe.set_progress_bar_config(disable=True)
    noise, made = torch.Generator().manual_seed(0), []
    for part in labels.split(250):
        images = pipe(part.tolist(), guidance_scale=guidance, num_inference_steps=steps, generator=noise, output_type="np").images
        made.append(torch.from_numpy(images).permute(0, 3, 1, 2)[:, :1] * 2 - 1)
    return torch.cat(made)


def main() -> int:
    parser = argparse.ArgumentParser(description="Frechet distances on Fashion-MNIST, beside real against real.")
    for name in ("ddpm", "flow", "shards"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--most", type=int, help="of the training images, to learn the classifier from")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    most = None if options.most is None else range(options.most)
    train, held_out = (read_images(Shards(str(options.shards), split), 1, 28, most) for split in ("train", "test"))
    start = time.perf_counter()
    judge = train_classifier(*train)
    right = (judge.predict(held_out[0]) == held_out[1]).double().mean()
    print(f"classifier: {right:.1%} of held-out images, learnt in {time.perf_counter() - start:.0f} s\n", flush=True)
    fresh, labels = FeatureMoments.from_features(judge.features(held_out[0])), torch.arange(options.num_images) % 10
    print(f"{'model':6} {'solver':12} {'steps':>5} {'guidance':>8} {'Frechet':>9} {'accuracy':>9} {'seconds':>8}")
    for name, solver, steps, guidance in ROWS:
        start = time.perf_counter()
        made = draw(getattr(options, name), solver, steps, guidance, labels)
        seconds, far = time.perf_counter() - start, frechet_distance(FeatureMoments.from_features(judge.features(made)), fresh)
        accuracy = (judge.predict(made) == labels).double().mean()
        print(f"{name:6} {solver:12} {steps:5} {guidance:8} {far:9.3f} {accuracy:9.1%} {seconds:8.0f}", flush=True)
    as_many = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[: options.num_images]
    real = train[0][as_many]
    accuracy = (judge.predict(real) == train[1][as_many]).double().mean()
    print(
        f"{'real':6} {'training images':27}"
        f" {frechet_distance(FeatureMoments.from_features(judge.features(real)), fresh):9.3f} {accuracy:9.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
