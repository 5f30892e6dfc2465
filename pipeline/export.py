"""The folder that stock diffusers loads: written whole or not at all, and read back as a field."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin
from diffusers.utils import logging
from torch import Tensor, nn

from .config import Config, FlowConfig
from .flow import velocity_field
from .generate import Sampler, Source, generate, grid, save_image
from .identity import identity_autoencoder
from .recipe import as_mapping, build
from .stock import read_scheduler, scheduler_of
from .tracking import last_loss

STOCK_NULL = 1000
"""The label that DiTPipeline passes for no class."""


@dataclass(frozen=True)
class Card:
    """What the model card says beside the configuration."""

    title: str
    images: int
    """Seen in training."""
    steps: int
    loss: float | None
    parameters: int

    @classmethod
    def of(cls, run: Path, images: int, steps: int, network: nn.Module) -> Card:
        """The facts of a run's folder and network."""
        return cls(run.name, images, steps, last_loss(run), sum(p.numel() for p in network.parameters()))


def write_folder(
    output: Path, network: ModelMixin, config: Config, class_names: tuple[str, ...], card: Card, progress: Callable[[str], None] = print
) -> Path:
    """Write a pipeline folder for stock diffusers.

    Args:
        output: the folder; replaced if it is one of ours already.
        network: a stock DiTTransformer2DModel or UNet2DModel, in stock's sign.
        config: of the run; kept as `config.yaml`.
        class_names: name of each label; none for an unconditional model.
        card: for README.md.
        progress: told what was written.

    Raises:
        ValueError: a path or prediction that no stock pipeline serves, or an
            `output` that holds something else.
    """
    scheduler = scheduler_of(config.flow)
    if output.exists() and any(output.iterdir()) and not (output / "model_index.json").exists():
        raise ValueError(f"{output} is not empty and no export: give another folder.")
    vae = identity_autoencoder(config.data.channels, config.data.resolution)
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipe = DiTPipeline(transformer=cast(Any, network), vae=vae, scheduler=cast(Any, scheduler))
        pipe.save_pretrained(temporary, safe_serialization=True)
        _name_labels(temporary / "model_index.json", class_names)
        (temporary / "config.yaml").write_text(yaml.safe_dump(as_mapping(config), sort_keys=False))
        count = len(class_names)
        labels = torch.arange(4 * min(count, 10)) % min(count, 10) if count else torch.full((16,), STOCK_NULL)
        guidance = 2.0 if count else 1.0
        images = generate(open_folder(temporary), labels, Sampler("heun", 25, guidance), seed=0).images
        save_image(grid(images, min(count, 10) or 8, scale=max(1, 48 // config.data.resolution)), temporary / "samples.png")
        (temporary / "README.md").write_text(_readme(config, class_names, card, guidance))
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    progress(f"exported to {output}: a {type(network).__name__} in DiTPipeline, because stock diffusers holds it exactly")
    return output


def _replace(temporary: Path, output: Path) -> None:
    """Put a finished folder in the place of an older one."""
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def _name_labels(index: Path, class_names: tuple[str, ...]) -> None:
    """`save_pretrained` drops id2label: write it afterwards, empty for an unconditional model."""
    content = json.loads(index.read_text())
    content["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    index.write_text(json.dumps(content, indent=2) + "\n")


def open_folder(folder: str | Path, device: torch.device | str = "cpu") -> Source:
    """A pipeline folder as a velocity field, for our own solvers.

    Args:
        folder: a DiTPipeline, such as `write_folder` makes.
        device: to compute on.

    Raises:
        ValueError: no such folder, a damaged one, or one with another scheduler.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"pipeline={str(folder)!r} is no pipeline folder (no model_index.json): "
            f"export one with `python sample.py export --run RUN --output FOLDER`."
        )
    progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns that the keys of id2label are words, as JSON has them
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        names = json.loads((folder / "model_index.json").read_text()).get("id2label")
    except Exception as error:  # diffusers raises many kinds for a damaged folder; each is the user's folder
        raise ValueError(
            f"pipeline={str(folder)!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}): export it again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    recipe = folder / "config.yaml"
    flow = build(Config, yaml.safe_load(recipe.read_text())).flow if recipe.exists() else None
    return pipeline_source(pipe.to(device), None if names is None else len(names), flow)


def pipeline_source(pipe: Any, num_classes: int | None = None, flow: FlowConfig | None = None) -> Source:
    """A loaded DiTPipeline as a velocity field.

    Args:
        pipe: with components transformer, vae, scheduler.
        num_classes: 0 for unconditional; None takes the size of the model's table.
        flow: the recipe that came with it.

    Raises:
        ValueError: a scheduler of another kind of model.
    """
    path, kind = read_scheduler(pipe.scheduler.config, flow)
    network = pipe.transformer

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = network(x.to(network.dtype), 1000 * (1 - t), class_labels=labels).sample.to(x.dtype)
        return -out if kind == "velocity" else out

    def decode(latents: Tensor) -> Tensor:
        return pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample

    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    count = STOCK_NULL if num_classes is None else num_classes
    return Source(velocity_field(predict, path, kind), path, shape, count, STOCK_NULL, network.device, decode, kind)


def _readme(config: Config, class_names: tuple[str, ...], card: Card, guidance: float) -> str:
    """The model card, from what was measured."""
    data, label = config.data, "0" if class_names else str(STOCK_NULL)
    classes = (
        f"{len(class_names)} classes: {', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}"
        if class_names
        else "no classes"
    )
    seen = f"{card.steps:,} steps of {config.train.batch_size} images ({card.images:,} images seen)"
    loss = "" if card.loss is None else f", last logged loss {card.loss:.4f}"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [condot, flow-matching, class-conditional]
---

# {card.title}

A {config.model.kind} of {card.parameters:,} parameters, trained from scratch by condot on
{data.resolution} x {data.resolution} images with {data.channels} channel(s), {classes}.

![samples](samples.png)

Samples of seed 0, 25 Heun steps, guidance {guidance:g}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe(class_labels=[{label}], guidance_scale={guidance}, num_inference_steps=25).images[0]
```

## Training

{config.flow.predict} prediction on the {config.flow.path} path, {seen}{loss}.
The whole configuration is in `config.yaml`.

## Limits

It draws what it was trained on, at that size, and nothing else. Check the licence of the training images before sharing.
"""
