"""The folder that stock diffusers loads: written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import DiTPipeline, ModelMixin, UNet2DModel
from torch import nn

from .card import Card, readme
from .checksums import write_checksums
from .config import Config
from .curve import draw_curve
from .fold import stock_autoencoder
from .folder import STOCK_NULL, open_folder
from .generate import Sampler, generate
from .identity import identity_autoencoder
from .leaks import scrubbed, without_origin
from .networks import ModelConfig
from .recipe import as_mapping
from .sheet import grid, save_image
from .space import Space
from .standing import standing_alone
from .stock import form_of, scheduler_of

OWN = {"FlowODEScheduler": "scheduling_flow_ode_v1", "FlowSDEScheduler": "scheduling_flow_sde_v1"}
"""The schedulers that travel with models which no stock one serves, and their files; the first is the default."""


def write_folder(
    output: Path,
    network: ModelMixin,
    config: Config,
    class_names: tuple[str, ...],
    card: Card,
    space: Space,
    vae: nn.Module | None = None,
    *,
    why: str = "",
    spoken: Sequence[Spoken] = (),
    captions: Sequence[str] = (),
    variant: str = "",
    progress: Callable[[str], None] = print,
) -> Path:
    """Write a pipeline folder that diffusers loads.

    Args:
        output: the folder; replaced if it is one of ours already.
<<<<<<< HEAD
        network: as `models.convert.to_exported` gives it, in the form that `stock.form_of` names.
        config: of the run; kept as `config.yaml`.
        class_names: name of each label; none for an unconditional model, or one on text.
=======
        network: a stock DiTTransformer2DModel or UNet2DModel, in the form that `stock.form_of` names.
        config: of the run; kept as `config.yaml`, without local paths.
        class_names: name of each label; none for an unconditional model.
>>>>>>> hub
        card: for README.md.
        space: what the network works on.
        vae: the autoencoder whose latents that is; None for pixels.
        why: the network is of no stock class; "" if it is.
        spoken: text encoders of a network on text, in the order of training.
        captions: to draw sample pictures of, of such a network.
        variant: fp16 or bf16: weights in that precision beside the full ones; "" for none.
        progress: told what was written.

    Raises:
        ValueError: a prior that no stock pipeline starts from, an unknown variant, or an `output` that holds something else.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown: choose fp16 or bf16, or leave it out.")
    if output.exists() and any(output.iterdir()) and not (output / "model_index.json").exists():
        raise ValueError(f"{output} is not empty and no export: give another folder.")
    vae = stock_autoencoder(vae, space) if vae is not None else None
    choice = choose(network, why, config.flow, space, class_names, vae, spoken)
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
<<<<<<< HEAD
        save(choice.pipeline, temporary, variant)
        _mend_index(temporary, choice.pipeline, class_names)
        (temporary / "config.yaml").write_text(yaml.safe_dump(as_mapping(config), sort_keys=False))
        guidance = 1.0 if not class_names and not spoken else 2.0
        draw_samples(temporary, network, class_names, captions or ("",), guidance)
        (temporary / "README.md").write_text(_readme(config, class_names, card, guidance))
=======
        pipe = DiTPipeline(transformer=cast(Any, labelled(network)), vae=cast(Any, vae), scheduler=cast(Any, scheduler))
        pipe.save_pretrained(temporary, safe_serialization=True)
        _mend_index(temporary, class_names, own_scheduler=not form.stock)
        _clean(temporary)
        (temporary / "config.yaml").write_text(yaml.safe_dump(scrubbed(as_mapping(config)), sort_keys=False))
        count = len(class_names)
        labels = torch.arange(4 * min(count, 10)) % min(count, 10) if count else torch.full((16,), STOCK_NULL)
        guidance = 2.0 if count else 1.0
        images = generate(open_folder(temporary), labels, Sampler("heun", 25, guidance), seed=0).images
        save_image(grid(images, min(count, 10) or 8, scale=max(1, 48 // images.shape[-1])), temporary / "samples.png")
        draw_curve(card.curve, temporary / "curve.png", x_label="images seen", y_label="loss")
        if card.evaluation:
            (temporary / "evaluation.json").write_text(json.dumps(card.evaluation, indent=1) + "\n")
        example = f"class_labels=[{0 if class_names else STOCK_NULL}]"
        (temporary / "README.md").write_text(readme(temporary, config, class_names, card, guidance, example))
        write_checksums(temporary)
>>>>>>> hub
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    how = f"with code of its own (trust_remote_code=True), for {choice.why}" if choice.trust else "which stock diffusers holds exactly"
    progress(f"exported to {output}: a {type(network).__name__} in {type(choice.pipeline).__name__}, {how}")
    return output


def save(pipeline: DiffusionPipeline, folder: Path, variant: str) -> None:
    """Write a pipeline's parts, weights as safetensors; with a variant in that precision too."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    if variant:
        parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        for name, part in parts.items():
            part.to(VARIANTS[variant]).save_pretrained(folder / name, variant=variant, safe_serialization=True)


def draw_samples(folder: Path, network: ModelMixin, class_names: tuple[str, ...], captions: Sequence[str], guidance: float) -> None:
    """Write the folder's `samples.png`: four of each of ten classes, or 16 images of the captions, or of nothing."""
    source = open_folder(folder, own={type(network).__name__: type(network)})
    count = min(len(class_names), 10)
    condition: Condition = torch.arange(4 * count) % count if count else torch.full((16,), NO_CLASS)
    if source.read:
        condition = source.read([captions[i % len(captions)] for i in range(16)])
    images = generate(source, condition, Sampler("heun", 25, guidance), seed=0).images
    save_image(grid(images, count or 8, scale=max(1, 48 // images.shape[-1])), folder / "samples.png")


def _replace(temporary: Path, output: Path) -> None:
    """Put a finished folder in the place of an older one."""
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def _mend_index(folder: Path, pipeline: DiffusionPipeline, class_names: tuple[str, ...]) -> None:
    """What `save_pretrained` leaves out: names of classes in model_index.json, and code of ours, one file for each part that needs it."""
    path = folder / "model_index.json"
    content = json.loads(path.read_text())
    content["id2label"] = {str(i): name for i, name in enumerate(class_names)}
<<<<<<< HEAD
    for name, part in pipeline.components.items():
        if part is not None and type(part).__module__.split(".")[0] not in ("diffusers", "transformers"):
            file = Path(inspect.getfile(type(part)))
            content[name] = [file.stem, type(part).__name__]
            (folder / name / file.name).write_text(standing_alone(file))
    for file in BESIDE:
        place = folder / "scheduler" if file.stem.startswith("scheduling") else folder
        (place / file.name).write_text(standing_alone(file))
    if isinstance(pipeline, CondotPipeline):
        content["_class_name"] = [Path(inspect.getfile(CondotPipeline)).stem, "CondotPipeline"]
=======
    if own_scheduler:
        content["scheduler"] = [OWN["FlowODEScheduler"], "FlowODEScheduler"]
        for name in OWN.values():
            (folder / "scheduler" / f"{name}.py").write_text(standing_alone(Path(__file__).with_name(f"{name}.py")))
>>>>>>> models
    path.write_text(json.dumps(content, indent=2) + "\n")


<<<<<<< HEAD
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
=======
def standing_alone(name: str) -> str:
    """The text of a scheduler's file with SHARED written into it: its docstring, the imports of both, both bodies."""
    rooms = [Path(__file__).with_name(f"{file}.py").read_text() for file in (name, SHARED)]
    trees = [ast.parse(text).body for text in rooms]
    found = [node for tree in trees for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = {ast.unparse(node): None for node in found if not getattr(node, "level", 0)}
    bodies = ["\n".join(text.splitlines()[_first_line(tree) :]).strip("\n") for text, tree in zip(rooms, trees, strict=True)]
    title = ast.get_source_segment(rooms[0], trees[0][0])
    return "\n\n".join([f"{title}", "\n".join(sorted(lines)), f"\n{bodies[1]}", f"\n{bodies[0]}\n"])


def _first_line(tree: list[ast.stmt]) -> int:
    """Where a file's text begins after its docstring and imports: the number of its last import's line."""
    return max(node.end_lineno or 0 for node in tree if isinstance(node, ast.Import | ast.ImportFrom))


def _clean(folder: Path) -> None:
    """Take the local paths that parts were loaded from out of their configurations."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        cleaned = without_origin(content)
        if cleaned != content:
            path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")
>>>>>>> hub
