"""The folder that diffusers loads: written whole or not at all."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging
from torch import nn

from condot.core.atomic_files import folder_for, put_in_place

from ..config.parse import as_mapping
from ..config.schema import Config
from ..evaluation.provenance import write_provenance
from ..flow import Condition
from ..hub.checksums import write_checksums
from ..hub.secrets import scrubbed, without_origin
from ..latent_space import Space
from ..sampling.generate import generate
from ..sampling.image_grid import grid, save_image
from ..sampling.sampler import Sampler
from .autoencoder import stock_autoencoder
from .bundle import standing_alone
from .load import open_folder
from .loss_plot import draw_curve
from .model_card import Card, beyond_pil, readme
from .pipeline_class import Spoken, choose
from .runtime.pipeline_condot_v1 import NO_CLASS
from .runtime.pipeline_condot_v2 import CondotPipeline

STOCK = ("diffusers", "transformers")
"""Libraries whose classes need no code of ours."""
VARIANTS = {"": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        network: as `models.convert.to_exported` gives it, in the form that `stock.form_of` names.
        config: of the run; kept as `config.yaml`, without local paths.
        class_names: name of each label; none for an unconditional model, or one on text.
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
    bucket_step = config.data.bucket_step if config.data.aspect_ratios else 0
    choice = choose(network, why, config.flow, space, class_names, vae, spoken, bucket_step)
    with folder_for(output) as temporary:
        save(choice.pipeline, temporary, variant)
        _mend_index(temporary, choice.pipeline, class_names)
        _clean(temporary)
        (temporary / "config.yaml").write_text(yaml.safe_dump(scrubbed(as_mapping(config)), sort_keys=False))
        guidance = 2.0 if class_names or spoken else 1.0
        draw_samples(temporary, network, class_names, captions or ("",), guidance)
        draw_curve(card.curve, temporary / "curve.png", x_label="images seen", y_label="loss")
        for name, figures in (("evaluation", card.evaluation), ("retrieval", card.retrieval)):
            if figures:
                (temporary / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        calls = choice.calls(class_names, captions, guidance, bands=space.image_channels > 4)
        text = readme(temporary, config, class_names, card, guidance, calls, choice.why)
        (temporary / "README.md").write_text(f"{text}\n## Schedulers\n\n{choice.schedulers}\n")
        if card.provenance:
            write_provenance(temporary, card.provenance, card.changes)
        write_checksums(temporary)
        put_in_place(temporary, output)
    told = f"; {shown}" if (shown := beyond_pil(space.image_channels, config.data.bit_depth)) else ""
    progress(f"exported to {output}: a {type(network).__name__} in {type(choice.pipeline).__name__}, {choice.reason}{told}")
    return output


def save(pipeline: DiffusionPipeline, folder: Path, variant: str) -> None:
    """Write a pipeline's parts, weights as safetensors; with a variant in that precision too."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # that half precision does not run on a CPU is no news to who asks for a file of it
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
        for name, part in pipeline.components.items():
            if variant and isinstance(part, nn.Module):
                settings, half = folder / name / "config.json", cast(Any, copy.deepcopy(part).to(VARIANTS[variant]))
                whole = settings.read_text()
                half.save_pretrained(folder / name, variant=variant, safe_serialization=True)
                settings.write_text(whole)  # transformers writes the precision into it, and would load the full weights in half of it
    finally:
        logging.set_verbosity(before)


def draw_samples(folder: Path, network: ModelMixin, class_names: tuple[str, ...], captions: Sequence[str], guidance: float) -> None:
    """Write the folder's `samples.png`: four of each of ten classes, or 16 images of the captions, or of nothing."""
    source = open_folder(folder, own={type(network).__name__: type(network)})
    count = min(len(class_names), 10)
    condition: Condition = torch.arange(4 * count) % count if count else torch.full((16,), NO_CLASS)
    if source.read:
        condition = source.read([captions[i % len(captions)] for i in range(16)])
    images = generate(source, condition, Sampler("heun", 25, guidance), seed=0).images
    save_image(grid(images, count or 8, scale=max(1, 48 // images.shape[-1])), folder / "samples.png")


def _mend_index(folder: Path, pipeline: DiffusionPipeline, class_names: tuple[str, ...]) -> None:
    """What `save_pretrained` leaves out: names of classes in model_index.json, and code of ours, one file for each part that needs it."""
    path = folder / "model_index.json"
    content = json.loads(path.read_text())
    if class_names or isinstance(pipeline, DiTPipeline):  # without the names it would be taken for ImageNet's
        content["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    for name, part in pipeline.components.items():
        if isinstance(part, (nn.Module, SchedulerMixin)) and type(part).__module__.split(".")[0] not in STOCK:
            file = Path(inspect.getfile(type(part)))
            content[name] = [file.stem, type(part).__name__]
            (folder / name / file.name).write_text(standing_alone(file))
    ours = Path(inspect.getfile(CondotPipeline))
    (folder / ours.name).write_text(standing_alone(ours))  # also beside a stock pipeline, for who asks for it
    if isinstance(pipeline, CondotPipeline):
        content["_class_name"] = [ours.stem, "CondotPipeline"]
    path.write_text(json.dumps(content, indent=2) + "\n")


def _clean(folder: Path) -> None:
    """Take the local paths that parts were loaded from out of their configurations."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        cleaned = without_origin(content)
        if cleaned != content:
            path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")
