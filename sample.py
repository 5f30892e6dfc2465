"""Sample, evaluate and export: `python sample.py --pipeline runs/digits/export --class_labels 0 1 2 --output three.png`.

Verbs: `images` (the default), `evaluate`, `export`; each has its own `--help`.
"""

from __future__ import annotations

import os
import sys

from pipeline.stopping import Stopper

Stopper()  # before the slow imports: from here on Ctrl-C is a clean exit

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import models
from data.decode import to_unit
from data.stream import Shards
from models.convert import to_stock
from pipeline.checkpoint import Store, load_state, load_tensors
from pipeline.config import Config, model_options
from pipeline.evaluate import evaluate
from pipeline.export import Card, open_folder, save_image, write_folder
from pipeline.generate import Sampler, Source, generate, grid, network_source
from pipeline.recipe import build, parse
from pipeline.tracking import last_loss


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What every verb that samples takes."""

    pipeline: str = ""  # an exported folder; or give --run
    run: str = ""  # a run's folder: its newest checkpoint is sampled, averaged weights
    guidance_scale: float = 1.0  # 1 is none
    num_inference_steps: int = 25  # solver steps; evaluations are reported
    solver: Literal[
        "euler", "midpoint", "heun", "rk4", "multistep", "dormand_prince", "exponential", "euler_maruyama", "stochastic_heun"
    ] = "heun"  # euler to dormand_prince follow the ODE, exponential to stochastic_heun the SDE
    sigma_t: Literal["zero", "constant", "noise", "forward"] = (
        "noise"  # diffusion coefficient of the SDE; noise is in proportion to the path's
    )
    sigma_scale: float = 1.0  # factor on sigma_t
    seed: int = 0  # image i is a function of (seed, i)
    batch_size: int = 256  # images at once

    def sampler(self) -> Sampler:
        """The options as the pipeline knows them."""
        return Sampler(self.solver, self.num_inference_steps, self.guidance_scale, self.sigma_t, self.sigma_scale)

    def source(self) -> Source:
        """The field to sample from.

        Raises:
            ValueError: neither or both of --pipeline and --run, or a folder that is none.
        """
        if bool(self.pipeline) == bool(self.run):
            raise ValueError(f"--pipeline={self.pipeline!r} and --run={self.run!r}: give one of them, an exported folder or a run's.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return open_folder(self.pipeline, device) if self.pipeline else Trained(Path(self.run)).source(device)


@dataclass(frozen=True, kw_only=True)
class Images(Sampling):
    """Sample images and write them as one grid."""

    class_labels: tuple[int, ...] = ()  # classes; taken in turn until there are num_images. None: all in turn
    num_images: int = 0  # images in all; 0 for one of each label
    output: str = "samples.png"  # the grid


@dataclass(frozen=True, kw_only=True)
class Evaluate(Sampling):
    """Compare samples with real images: accuracy, diversity, memorisation. For small labelled images."""

    reference: str = ""  # folder of shards with a split to train on and one held out
    num_images: int = 1000  # samples, the same number of each class
    guidance_scale: float = 2.0  # 1 is none
    train_split: str = "train"  # what the model was trained on
    held_out_split: str = "val"  # what it was not
    output: str = ""  # figures as JSON; by default evaluation.json in the pipeline's or the run's folder
    min_accuracy: float = 0.0  # fail below this share of samples in their class
    min_diversity: float = 0.0  # fail below this ratio to real images
    min_nearest: float = 0.0  # fail below this ratio of distances to the nearest training image


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's averaged weights as a folder that stock diffusers loads."""

    run: str = ""  # the run's folder; its newest checkpoint is taken
    checkpoint: str = ""  # another of its checkpoints
    output: str = ""  # the folder; by default `export` in the run's


class Trained:
    """A checkpoint of a run, read back.

    Raises:
        ValueError: no whole checkpoint there.
    """

    def __init__(self, run: Path, checkpoint: Path | None = None) -> None:
        found = checkpoint or Store(run, keep=1).latest()
        if found is None:
            raise ValueError(
                f"run={str(run)!r} holds no whole checkpoint: train first, `accelerate launch train.py --config ... --output_dir {run}`."
            )
        self.run, self.state = run, load_state(found)
        self.config = build(Config, self.state["config"])
        self.class_names = tuple(self.state["class_names"])
        self.network = models.build(**model_options(self.config, len(self.class_names))).eval()
        weights = load_tensors(found)
        self.network.load_state_dict({k.removeprefix("ema."): v for k, v in weights.items() if k.startswith("ema.")})

    def source(self, device: str) -> Source:
        """The averaged network as a field."""
        data = self.config.data
        shape = (data.channels, data.resolution, data.resolution)
        return network_source(self.network.to(device), self.config.flow, shape, len(self.class_names), lambda x: x)

    def export(self, output: Path) -> Path:
        """Write it for stock diffusers."""
        card = Card(
            title=Path(self.config.output_dir).name,
            images=self.state["images"],
            steps=self.state["step"],
            loss=last_loss(self.run),
            parameters=sum(p.numel() for p in self.network.parameters()),
        )
        return write_folder(
            output, to_stock(self.network, flip=self.config.flow.predict == "velocity"), self.config, self.class_names, card
        )


def images(options: Images) -> int:
    """Sample a grid and print its path."""
    source, sampler = options.source(), options.sampler()
    classes = options.class_labels or tuple(range(source.num_classes))
    if options.class_labels and not source.num_classes:
        raise ValueError(f"--class_labels {options.class_labels[0]} of a model without classes: leave the option out.")
    count = options.num_images or len(classes) or 16
    if count < 1:
        raise ValueError(f"--num_images {count}: at least one.")
    labels = torch.tensor([classes[i % len(classes)] for i in range(count)]) if classes else torch.full((count,), source.null)
    made, evaluations = generate(source, labels, sampler, seed=options.seed, batch_size=options.batch_size)
    columns = len(classes) if 1 < len(classes) <= 16 else math.ceil(math.sqrt(count))
    save_image(grid(made, min(columns, count), scale=max(1, 64 // source.shape[-1])), Path(options.output))
    print(f"{options.output}: {count} images, {options.num_inference_steps} steps of {options.solver}, {evaluations} evaluations each")
    return 0


def compare(options: Evaluate) -> int:
    """Sample every class alike, compare with real images, print and write the figures."""
    if not options.reference:
        raise ValueError("--reference is missing: give the folder of shards, as --reference runs/digits/shards.")
    shards = {
        name: Shards(options.reference, split) for name, split in (("train", options.train_split), ("held out", options.held_out_split))
    }
    source = options.source()
    channels, resolution = source.shape[0], source.shape[-1]
    train, held_out = (_read_all(s, channels, resolution) for s in shards.values())
    if source.num_classes != len(shards["train"].manifest.class_names) or not source.num_classes:
        raise ValueError(
            f"the model has {source.num_classes} classes, {options.reference} "
            f"has {len(shards['train'].manifest.class_names)}: give its own shards."
        )
    labels = torch.arange(options.num_images) % source.num_classes
    made = generate(source, labels, options.sampler(), seed=options.seed, batch_size=options.batch_size).images
    report = evaluate(made.clamp(-1, 1), labels, train, held_out)
    print(report)
    output = Path(options.output or Path(options.pipeline or options.run) / "evaluation.json")
    output.write_text(
        json.dumps(
            {**report.as_dict(), "guidance_scale": options.guidance_scale, "solver": options.solver, "steps": options.num_inference_steps},
            indent=1,
        )
        + "\n"
    )
    print(f"figures in {output}")
    wanted = (
        (report.accuracy, options.min_accuracy),
        (report.diversity_ratio, options.min_diversity),
        (report.nearest_ratio, options.min_nearest),
    )
    return 0 if all(figure >= least for figure, least in wanted) else 1


def _read_all(shards: Shards, channels: int, resolution: int) -> tuple[Tensor, Tensor]:
    """Every image of a split, in -1..1, and its class."""
    pairs = [shards.pixels(s, n, channels, resolution) for s, count in enumerate(shards.counts) for n in range(count)]
    return to_unit(torch.from_numpy(np.stack([pixels for pixels, _ in pairs]))), torch.tensor([label for _, label in pairs])


def export(options: Export) -> int:
    """Write the folder."""
    if not options.run:
        raise ValueError("--run is missing: give the folder of a run, as --run runs/digits.")
    trained = Trained(Path(options.run), Path(options.checkpoint) if options.checkpoint else None)
    trained.export(Path(options.output) if options.output else Path(options.run) / "export")
    return 0


VERBS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "images": (Images, images),
    "evaluate": (Evaluate, compare),
    "export": (Export, export),
}


def main(argv: list[str]) -> int:
    """The command; returns its exit status. CONDOT_DEBUG=1 shows where an error came from."""
    verb, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("images", argv)
    try:
        if verb not in VERBS:
            raise ValueError(f"verb {verb!r} is unknown: choose one of {', '.join(VERBS)}.")
        options, act = VERBS[verb]
        return act(parse(options, rest))
    except (ValueError, OSError) as error:
        if os.environ.get("CONDOT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
