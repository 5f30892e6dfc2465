"""The folder that stock diffusers loads: written whole or not at all."""

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
from diffusers import DiTPipeline, ModelMixin, UNet2DModel
from torch import nn

from .config import Config
from .fold import stock_autoencoder
from .folder import STOCK_NULL, open_folder
from .generate import Sampler, generate
from .identity import identity_autoencoder
from .networks import ModelConfig
from .recipe import as_mapping
from .sheet import grid, save_image
from .space import Space
from .standing import standing_alone
from .stock import form_of, scheduler_of
from .tracking import last_loss

OWN = {"FlowODEScheduler": "scheduling_flow_ode_v1", "FlowSDEScheduler": "scheduling_flow_sde_v1"}
"""The schedulers that travel with models which no stock one serves, and their files; the first is the default."""


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
    output: Path,
    network: ModelMixin,
    config: Config,
    class_names: tuple[str, ...],
    card: Card,
    space: Space,
    vae: nn.Module | None = None,
    progress: Callable[[str], None] = print,
) -> Path:
    """Write a pipeline folder for stock diffusers.

    Args:
        output: the folder; replaced if it is one of ours already.
        network: a stock DiTTransformer2DModel or UNet2DModel, in the form that `stock.form_of` names.
        config: of the run; kept as `config.yaml`.
        class_names: name of each label; none for an unconditional model.
        card: for README.md.
        space: what the network works on.
        vae: the autoencoder whose latents that is; None for pixels.
        progress: told what was written.

    Raises:
        ValueError: a prior that no stock pipeline starts from, or an `output`
            that holds something else.
    """
    form, scheduler = form_of(config.flow), scheduler_of(config.flow)
    if output.exists() and any(output.iterdir()) and not (output / "model_index.json").exists():
        raise ValueError(f"{output} is not empty and no export: give another folder.")
    vae = stock_autoencoder(vae, space) if vae is not None else identity_autoencoder(space.channels, space.height)
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipe = DiTPipeline(transformer=cast(Any, labelled(network)), vae=cast(Any, vae), scheduler=cast(Any, scheduler))
        pipe.save_pretrained(temporary, safe_serialization=True)
        _mend_index(temporary, class_names, own_scheduler=not form.stock)
        (temporary / "config.yaml").write_text(yaml.safe_dump(as_mapping(config), sort_keys=False))
        count = len(class_names)
        labels = torch.arange(4 * min(count, 10)) % min(count, 10) if count else torch.full((16,), STOCK_NULL)
        guidance = 2.0 if count else 1.0
        images = generate(open_folder(temporary), labels, Sampler("heun", 25, guidance), seed=0).images
        save_image(grid(images, min(count, 10) or 8, scale=max(1, 48 // images.shape[-1])), temporary / "samples.png")
        (temporary / "README.md").write_text(_readme(config, class_names, card, guidance))
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    why = (
        "which stock diffusers holds exactly"
        if form.stock
        else "with our own scheduler (trust_remote_code=True), for no stock one serves it"
    )
    progress(f"exported to {output}: a {type(network).__name__} in DiTPipeline, {why}")
    return output


def check_kind(model: ModelConfig) -> None:
    """Raises ValueError for a network on text, which has no folder yet."""
    if model.takes == "text":
        raise ValueError(
            f"model.kind={model.kind} on text is not exported yet: give --export=false, sample with `sample.py --run RUN --prompt ...`."
        )


def labelled(network: ModelMixin) -> ModelMixin:
    """The network, with a place for the class that DiTPipeline always passes: a U-Net without classes gets a table of zeros."""
    if not isinstance(network, UNet2DModel) or network.class_embedding is not None:
        return network
    facts = {key: value for key, value in network.config.items() if not key.startswith("_")}  # `_use_default_values` would undo the table
    wider = UNet2DModel(**{**facts, "num_class_embeds": STOCK_NULL + 1})
    table = torch.zeros_like(wider.class_embedding.weight)
    wider.load_state_dict({**network.state_dict(), "class_embedding.weight": table})
    return wider.eval()


def _replace(temporary: Path, output: Path) -> None:
    """Put a finished folder in the place of an older one."""
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def _mend_index(folder: Path, class_names: tuple[str, ...], own_scheduler: bool) -> None:
    """What `save_pretrained` leaves out of model_index.json: id2label (empty for an unconditional model), and code of ours."""
    path = folder / "model_index.json"
    content = json.loads(path.read_text())
    content["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    if own_scheduler:
        content["scheduler"] = [OWN["FlowODEScheduler"], "FlowODEScheduler"]
        for name in OWN.values():
            (folder / "scheduler" / f"{name}.py").write_text(standing_alone(Path(__file__).with_name(f"{name}.py")))
    path.write_text(json.dumps(content, indent=2) + "\n")


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
    latents = f", in the latents of {data.autoencoder}" if data.autoencoder else ""
    trust = "" if form_of(config.flow).stock else ", trust_remote_code=True"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [condot, flow-matching, class-conditional]
---

# {card.title}

A {config.model.kind} of {card.parameters:,} parameters, trained from scratch by condot on
{data.resolution} x {data.resolution} images with {data.channels} channel(s), {classes}{latents}.

![samples](samples.png)

Samples of seed 0, 25 Heun steps, guidance {guidance:g}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{trust})
image = pipe(class_labels=[{label}], guidance_scale={guidance}, num_inference_steps=25).images[0]
```

## Training

{config.flow.predict} prediction on the {config.flow.path} path, {seen}{loss}.
The whole configuration is in `config.yaml`.

## Limits

It draws what it was trained on, at that size, and nothing else. Check the licence of the training images before sharing.
"""
