"""What a notebook or a script calls, without a command line: `condot.train`, `load`, `sample`, `evaluate`, `export`.

Each is the function behind the command of its name, and takes that command's options as keywords
(`condot sample --help`); docs/python.md shows them at work. What a caller can mend is a ValueError.
No call ends the process, and each leaves its signals, random generators and Accelerate's state as
it found them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from PIL.Image import Image
from torch import Tensor

from condot.cli.assembly.load_models import LoadedModel, check_guide_options, load_model, with_guides
from condot.cli.evaluate import evaluate_samples, open_reference
from condot.cli.export import export_run
from condot.cli.host import guest_host
from condot.cli.train import train as train_run
from condot.core.plugins import load_plugins
from condot.guest_process import leave_process_as_found
from condot.keyword_options import build_config, fill_options
from condot.pipeline.config.schema import Config
from condot.pipeline.evaluation.metrics import EvaluationResult
from condot.pipeline.launch.distributed import join_process_group, require_single_process
from condot.pipeline.sampling.image_grid import tensor_to_pil
from condot.pipeline.sampling.images import generate_images
from condot.pipeline.sampling.options import EvaluateOptions, ExportOptions, ImagesOptions
from condot.pipeline.sampling.requests import read_requests
from condot.training_result import TrainingResult

__all__ = ["Config", "EvaluationResult", "LoadedModel", "TrainingResult", "evaluate", "export", "load", "sample", "train"]

Model = LoadedModel | TrainingResult | str | Path
"""A model that `load` read, or what `load` takes."""
LOADED = ("pipeline", "run", "ema")
"""Options of commands that name the model, which a call is given."""
FILES = ("output", "show", "format", "images_per_shard")
"""Options of `condot sample` about files, which a call does not write."""


def train(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | None = None,
    *,
    plugins: Iterable[str | Path] = (),
    **named: Any,
) -> TrainingResult:
    """Train a run, or go on with it, as `condot train` does; Ctrl-C saves, and returns.

    Args:
        config: the path of a recipe, its sections as a mapping, or a `Config`.
        overrides: values on top of it by dotted key: `{"train.max_steps": 100}`.
        plugins: Python files of yours that register kinds which the recipe names; they are run.
        named: more values on top: `output_dir="runs/a"`, `train={"max_steps": 100}`, or diffusers' names, `learning_rate=3e-4`.

    Returns:
        The run. Where `finished` is false it was stopped or diverged, and the same call goes on from its last checkpoint.

    Raises:
        ValueError: what can be mended: of the recipe, the data, the disk.
    """
    load_plugins(plugins)
    with leave_process_as_found():
        filled = build_config(config, {**(overrides or {}), **named})
        if filled.dry_run:
            raise ValueError("dry_run=True is the command's: `condot train --config RECIPE --dry_run`.")
        with guest_host() as host:
            return train_run(filled, host)


def load(folder: str | Path | TrainingResult, *, ema: str = "", plugins: Iterable[str | Path] = ()) -> LoadedModel:
    """Read a model back, on the GPU where there is one.

    Args:
        folder: an exported folder, a run's (its newest checkpoint is taken), or one checkpoint of a run.
        ema: which weights of a run: a half-life in images or a decay a step of its averages, `width=0.08`, or `raw`.
        plugins: as of `train`, where the model was trained with some.

    Raises:
        ValueError: a folder that is neither, or is damaged.
    """
    load_plugins(plugins)
    path = folder.folder if isinstance(folder, TrainingResult) else Path(folder).expanduser()
    exported = (path / "model_index.json").exists()
    with leave_process_as_found():
        device = join_process_group().device
        return load_model(str(path) if exported else "", "" if exported else str(path), ema, device)


@overload
def sample(model: Model, *, output_type: Literal["pil"] = ..., **options: Any) -> list[Image]: ...
@overload
def sample(model: Model, *, output_type: Literal["pt"], **options: Any) -> Tensor: ...
def sample(model: Model, *, output_type: Literal["pil", "pt"] = "pil", **options: Any) -> list[Image] | Tensor:
    """Draw images, as `condot sample` does: image i is a function of the seed, i and its condition.

    Args:
        model: read by `load`, or what `load` takes.
        output_type: `pil`, pictures of 8 bits a channel; or `pt`, (N, C, H, W) in -1..1, all bands and bits.
        options: of the command: `class_labels=[3, 7]` or `prompt=["a red apple"]`, `num_images=16`, `seed=0`,
            `guidance_scale=2.0`, `solver="heun"`, `num_inference_steps=25`, ...

    Raises:
        ValueError: an unknown option, or one that does not fit the model.
    """
    if output_type not in ("pil", "pt"):
        raise ValueError(f"condot.sample(output_type={output_type!r}): choose one of 'pil', 'pt'.")
    filled = fill_options(ImagesOptions, "condot.sample", options, (*LOADED, *FILES))
    check_guide_options(filled)
    filled.sampler()  # what it refuses is refused before a model is loaded
    requests = read_requests(filled)
    with leave_process_as_found():
        loaded = with_guides(as_loaded(model), filled)
        requests = requests.check(loaded.model, guided=filled.guidance_scale != 1 and not loaded.model.weak)
        images = generate_images(filled, loaded.model.with_image_size(filled.height, filled.width), requests).images
    return [tensor_to_pil(image) for image in images] if output_type == "pil" else images


def evaluate(model: Model, reference: str | Path, **options: Any) -> EvaluationResult:
    """Compare samples with real images, as `condot evaluate` does: accuracy, diversity, memorisation, Frechet distance.

    Args:
        model: read by `load`, or what `load` takes.
        reference: a folder of labelled shards, with a split that was trained on and one held out.
        options: of the command: `num_images=1000`, `guidance_scale=2.0`, ...

    Raises:
        ValueError: an unknown option; shards of other classes than the model's.
    """
    given = {**options, "reference": str(reference)}
    reserved = (*LOADED, "output", "min_accuracy", "min_diversity", "min_nearest")
    filled = fill_options(EvaluateOptions, "condot.evaluate", given, reserved)
    check_guide_options(filled)
    real = open_reference(filled)
    with leave_process_as_found():
        return evaluate_samples(with_guides(as_loaded(model), filled), real, filled)


def export(run: TrainingResult | str | Path, output: str | Path = "", **options: Any) -> Path:
    """Write a run's averaged weights as the folder that stock diffusers loads, as `condot export` does, and return it.

    Args:
        run: what `train` returned, or a run's folder.
        output: the folder; by default `export` in the run's.
        options: of the command: `ema="raw"`, `variant="fp16"`, `push_to_hub="user/name"`, ...

    Raises:
        ValueError: no whole checkpoint, or an output that holds something else.
    """
    folder = run.folder if isinstance(run, TrainingResult) else Path(run).expanduser()
    given = {**options, "run": str(folder), "output": str(output)}
    filled = fill_options(ExportOptions, "condot.export", given)
    require_single_process("condot.export")
    with leave_process_as_found():
        return export_run(filled)


def as_loaded(model: Model) -> LoadedModel:
    """Return the model, read if need be."""
    return model if isinstance(model, LoadedModel) else load(model)
