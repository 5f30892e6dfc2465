"""`condot evaluate`: compare samples with real images, class by class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from condot.core.atomic_files import write_whole
from condot.core.printable import say
from condot.data.loader.read_samples import read_images
from condot.data.storage.shard_reader import Shards
from condot.pipeline.evaluation.features import FeatureExtractor, check_features, load_features
from condot.pipeline.evaluation.metrics import EvaluationResult, evaluate
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.options import EvaluateOptions

from .assembly.load_models import LoadedModel, load_models
from .options_command import options_command


class Reference(NamedTuple):
    """The real images that samples are compared with."""

    train: Shards
    held_out: Shards
    features: FeatureExtractor | None
    """For the Frechet distance; None for those of a classifier that learns the images."""


def open_reference(options: EvaluateOptions) -> Reference:
    """Open what the options name, before a model is loaded.

    Raises:
        ValueError: no reference, or a folder, split or function that is not there.
    """
    if not options.reference:
        raise ValueError("--reference is missing: give the folder of shards, as --reference runs/digits/shards.")
    train, held_out = (Shards(options.reference, split) for split in (options.train_split, options.held_out_split))
    return Reference(train, held_out, load_features(options.features) if options.features else None)


def evaluate_samples(loaded: LoadedModel, reference: Reference, options: EvaluateOptions) -> EvaluationResult:
    """Sample every class alike and compare with real images.

    Raises:
        ValueError: shards of other classes than the model's, features that are none.
    """
    model, features = loaded.model, reference.features
    channels, _, resolution = model.image_shape
    train, held_out = (
        read_images(shards, channels, resolution, bit_depth=model.bit_depth) for shards in (reference.train, reference.held_out)
    )
    if (there := len(reference.train.manifest.class_names)) != model.num_classes or not there:
        raise ValueError(f"the model has {model.num_classes} classes, {options.reference} has {there}: give its own shards.")
    check_features(features, held_out[0][:2], options.features)
    labels = torch.arange(options.num_images) % model.num_classes
    made = generate(model, labels, options.sampler(), seed=options.seed, batch_size=options.batch_size).images
    return evaluate(made.clamp(-1, 1), labels, train, held_out, features)


def write_figures(result: EvaluationResult, loaded: LoadedModel, options: EvaluateOptions, output: Path) -> None:
    """Write the figures as JSON, with how the samples were drawn and by which weights."""
    metadata = options.sampling_metadata(*(weights() for weights in loaded.weights))
    write_whole(output, json.dumps({**result.as_dict(), **metadata}, indent=1) + "\n")


def run(options: EvaluateOptions) -> int:
    """Print and write the figures; returns 1 where one is below what was asked."""
    reference = open_reference(options)
    loaded = load_models(options)
    result = evaluate_samples(loaded, reference, options)
    say(result)
    output = Path(options.output or Path(options.pipeline or options.run) / "evaluation.json")
    write_figures(result, loaded, options, output)
    say(f"figures in {output}")
    return 0 if result.meets(options.min_accuracy, options.min_diversity, options.min_nearest) else 1


main = options_command(EvaluateOptions, run, single_process="evaluate")
