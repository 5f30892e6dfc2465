"""The model that a command samples from: an exported folder or a run, its guide, its classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from condot.data.loader.read_samples import read_images
from condot.data.storage.shard_reader import Shards
from condot.models.convert import custom_classes
from condot.pipeline.evaluation.provenance import Provenance, read_provenance
from condot.pipeline.export.load import load_flow_model, read_model_index
from condot.pipeline.launch import distributed
from condot.pipeline.sampling.classifier_guidance import with_trained_classifier
from condot.pipeline.sampling.flow_model import FlowModel, with_autoguidance
from condot.pipeline.sampling.options import ModelOptions, SamplingOptions

from .trained_model import TrainedModel


class LoadedModel(NamedTuple):
    """A model read back."""

    model: FlowModel
    files: tuple[Path, ...]
    """Folders, exported or checkpoints, of the model and of its guide, if it has one."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty for a model that takes text, or nothing."""
    weights: tuple[Callable[[], Provenance], ...]
    """Which weights these are, of the model and of its guide."""


def load_model(pipeline: str, run: str, ema: str, device: torch.device, prefix: str = "") -> LoadedModel:
    """Read an exported folder, or a run and which of its weights.

    Args:
        pipeline: an exported folder, or "".
        run: a run's folder or one of its checkpoints, or "".
        ema: which weights of the run.
        device: to compute on.
        prefix: of the options in messages.

    Raises:
        ValueError: neither or both of them, or a folder that is none.
    """
    if bool(pipeline) == bool(run):
        raise ValueError(f"--{prefix}pipeline={pipeline!r} and --{prefix}run={run!r}: give one of them, an exported folder or a run's.")
    if pipeline and ema:
        raise ValueError(f"--{prefix}ema {ema} of --{prefix}pipeline {pipeline}, which holds one set of weights: give --{prefix}run.")
    if pipeline:
        model, index = load_flow_model(pipeline, device, custom_classes()), read_model_index(Path(pipeline))
        labels = index.get("id2label") or dict.fromkeys(map(str, range(model.num_classes)))
        names = tuple(labels[key] or key for key in sorted(labels, key=int))
        return LoadedModel(model, (Path(pipeline),), names, (partial(read_provenance, Path(pipeline)),))
    trained = TrainedModel(Path(run), None, ema, f"--{prefix}ema")
    names = () if trained.text else trained.class_names
    return LoadedModel(trained.build_model(device), (trained.checkpoint,), names, (trained.provenance,))


def load_models(options: ModelOptions) -> LoadedModel:
    """Read the model that the options name, with its guide and its classifier.

    Raises:
        ValueError: as `load_model` and `with_guides`.
    """
    if isinstance(options, SamplingOptions):
        check_guide_options(options)
    device = distributed.join_process_group(timeout=distributed.A_MONTH).device
    return with_guides(load_model(options.pipeline, options.run, options.ema, device), options)


def check_guide_options(options: SamplingOptions) -> None:
    """Raise ValueError for a guide that has no effect."""
    named = options.guide_pipeline or options.guide_run or options.guide_ema
    if named and getattr(options, "guidance_scale", 1.0) == 1:
        raise ValueError(f"--guide_run or --guide_pipeline {named!r} beside --guidance_scale 1, which is none: give 2.")


def with_guides(loaded: LoadedModel, options: ModelOptions) -> LoadedModel:
    """Return the model with the weaker model and the classifier that the options name to guide it.

    Raises:
        ValueError: a guide that has no effect, or is of other data; a classifier that cannot lead the model.
    """
    if not isinstance(options, SamplingOptions):
        return loaded
    check_guide_options(options)
    guide = (options.guide_pipeline, options.guide_run, options.guide_ema)
    if any(guide):
        weak = load_model(*guide, loaded.model.device, "guide_")
        model = with_autoguidance(loaded.model, weak.model)
        loaded = loaded._replace(model=model, files=loaded.files + weak.files, weights=loaded.weights + weak.weights)
    if options.classifier_reference:
        shards = Shards(options.classifier_reference, "train")
        model = with_trained_classifier(loaded.model, shards, read_images, options.classifier_reference)
        names = loaded.class_names or tuple(shards.manifest.class_names)
        loaded = loaded._replace(model=model, class_names=names)
    return loaded
