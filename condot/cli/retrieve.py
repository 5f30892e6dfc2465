"""`condot retrieve`: measure whether samples show what their captions say, by looking each up among real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condot.core.atomic_files import write_whole
from condot.core.printable import say
from condot.data.loader.captions import check_captions
from condot.data.loader.read_samples import read_captions, read_images
from condot.data.storage.shard_reader import Shards
from condot.pipeline.evaluation.retrieval import retrieve
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.image_grid import make_comparison_grid, save_image
from condot.pipeline.sampling.options import RetrieveOptions

from .assembly.load_models import load_models
from .options_command import options_command


def sample_captions(options: RetrieveOptions) -> tuple[Tensor, Tensor, list[str], dict[str, Any]]:
    """Sample captions that the seed draws.

    Returns:
        Real images of the captions, (N, C, H, W), a sample of each caption, the captions, and how they were drawn.
    """
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards with captions, as --reference runs/emoji/shards.")
    loaded, shards = load_models(options), Shards(options.reference, options.split)
    model = loaded.model
    if model.encode_text is None:
        raise ValueError("retrieve asks by caption, and the model takes no text: use evaluate for classes.")
    check_captions(shards, options.caption)
    total, metadata = sum(shards.counts), options.sampling_metadata(*(weights() for weights in loaded.weights))
    if not 2 <= options.candidates <= total:
        raise ValueError(f"--candidates {options.candidates}: 2 or more, of the {total} images of split {options.split!r}.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed))
    chosen = order[: options.candidates].tolist()
    channels, _, side = model.image_shape
    real, _ = read_images(shards, channels, side, chosen, bit_depth=model.bit_depth)
    captions = read_captions(shards, options.caption, chosen)
    condition, sampler = model.encode_text(captions), options.sampler()
    made = generate(model, condition, sampler, seed=options.seed, batch_size=options.batch_size).images
    return real, made.clamp(-1, 1), captions, metadata


def run(options: RetrieveOptions) -> int:
    """Sample captions of real images, look each up among them, print and write the figures."""
    real, made, captions, metadata = sample_captions(options)
    found = retrieve(made, real, torch.arange(len(real)))
    output = Path(options.output or Path(options.pipeline or options.run) / "retrieval.png")
    figures = output.with_suffix(".json")
    save_image(make_comparison_grid(real, made, scale=max(1, 64 // real.shape[-1])), output)
    write_whole(figures, json.dumps({**found.as_dict(), **metadata, "captions": captions}, indent=1) + "\n")
    say(f"{found}\n{output}: rows of real images, then their samples; figures in {figures}")
    return 0


main = options_command(RetrieveOptions, run, single_process="retrieve")
