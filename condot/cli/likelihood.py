"""`condot likelihood`: measure bits per dimension of images under a model."""

from __future__ import annotations

import torch

from condot.core.printable import say
from condot.data.loader.read_samples import read_images
from condot.data.storage.shard_reader import Shards
from condot.pipeline.sampling.flow_model import check_labels, require_pixel_model
from condot.pipeline.sampling.likelihood import compute_bits_per_dimension, is_exact_affordable
from condot.pipeline.sampling.options import LikelihoodOptions

from .assembly.load_models import load_models
from .options_command import options_command


def run(options: LikelihoodOptions) -> int:
    """Measure and print bits per dimension."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards, as --reference runs/digits/shards.")
    model = load_models(options).model
    require_pixel_model(model, "likelihood measures bits of pixels")
    shards = Shards(options.reference, options.split)
    first = range(min(options.num_images, sum(shards.counts)))
    real, labels = read_images(shards, model.shape[0], model.shape[-1], first, bit_depth=model.bit_depth)
    if options.unconditional or not model.num_classes:
        labels = torch.full_like(labels, model.null)
    else:
        check_labels(labels, model.num_classes)
    exact = is_exact_affordable(model.shape) and not options.estimate
    say(compute_bits_per_dimension(model, real, labels, exact=exact, **options.solver_arguments()))
    return 0


main = options_command(LikelihoodOptions, run, single_process="likelihood")
