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

from ..config.parse import config_to_mapping
from ..config.schema import Config
from ..evaluation.provenance import write_provenance
from ..flow import Condition
from ..hub.checksums import write_checksums
from ..hub.secrets import without_local_paths, without_origin
from ..latent_space import LatentSpace
from ..sampling.generate import generate
from ..sampling.image_grid import make_grid, save_image
from ..sampling.sampler import Sampler
from .autoencoder import fold_latent_scaling
from .bundle import bundle_module
from .load import load_flow_model
from .loss_plot import plot_loss
from .model_card import CardFacts, note_beyond_pil, render_readme
from .pipeline_class import ExportedTextEncoder, choose_pipeline
from .runtime.pipeline_condot_v1 import NO_CLASS
from .runtime.pipeline_condot_v2 import CondotPipeline

STOCK_LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes need no code of ours."""
VARIANT_DTYPES = {"": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_pipeline(
    output: Path,
    network: ModelMixin,
    config: Config,
    class_names: tuple[str, ...],
    card: CardFacts,
    space: LatentSpace,
    vae: nn.Module | None = None,
    *,
    why_not_stock: str = "",
    text_encoders: Sequence[ExportedTextEncoder] = (),
    captions: Sequence[str] = (),
    variant: str = "",
    progress: Callable[[str], None] = print,
) -> Path:
    """Write a pipeline folder that diffusers loads.

    Args:
        output: the folder; replaced if it is one of ours already.
        network: as `models.convert.to_diffusers` gives it, in the form that `scheduler_map.export_form` names.
        config: of the run; kept as `config.yaml`, without local paths.
        class_names: name of each label; none for an unconditional model, or one on text.
        card: for README.md.
        space: what the network works on.
        vae: the autoencoder whose latents that is; None for pixels.
        why_not_stock: the network is of no stock class; "" if it is.
        text_encoders: text encoders of a network on text, in the order of training.
        captions: to draw sample pictures of, of such a network.
        variant: fp16 or bf16: weights in that precision beside the full ones; "" for none.
        progress: told what was written.

    Raises:
        ValueError: a prior that no stock pipeline starts from, an unknown variant, or an `output` that holds something else.
    """
    if variant not in VARIANT_DTYPES:
        raise ValueError(f"variant={variant!r} is unknown: choose fp16 or bf16, or leave it out.")
    if output.exists() and any(output.iterdir()) and not (output / "model_index.json").exists():
        raise ValueError(f"{output} is not empty and no export: give another folder.")
    vae = fold_latent_scaling(vae, space) if vae is not None else None
    bucket_step = config.data.bucket_step if config.data.aspect_ratios else 0
    choice = choose_pipeline(network, why_not_stock, config.flow, space, class_names, vae, text_encoders, bucket_step)
    with folder_for(output) as temporary:
        save_pipeline(choice.pipeline, temporary, variant)
        _complete_model_index(temporary, choice.pipeline, class_names)
        _remove_local_paths(temporary)
        (temporary / "config.yaml").write_text(yaml.safe_dump(without_local_paths(config_to_mapping(config)), sort_keys=False))
        guidance = 2.0 if class_names or text_encoders else 1.0
        save_sample_grid(temporary, network, class_names, captions or ("",), guidance)
        plot_loss(card.curve, temporary / "curve.png", x_label="images seen", y_label="loss")
        for name, results in (("evaluation", card.evaluation), ("retrieval", card.retrieval)):
            if results:
                (temporary / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        calls = choice.example_calls(class_names, captions, guidance, bands=space.image_channels > 4)
        text = render_readme(temporary, config, class_names, card, guidance, calls, choice.why_not_stock)
        (temporary / "README.md").write_text(f"{text}\n## Schedulers\n\n{choice.schedulers}\n")
        if card.provenance:
            write_provenance(temporary, card.provenance, card.changes)
        write_checksums(temporary)
        put_in_place(temporary, output)
    pil_note = f"; {note}" if (note := note_beyond_pil(space.image_channels, config.data.bit_depth)) else ""
    progress(f"exported to {output}: a {type(network).__name__} in {type(choice.pipeline).__name__}, {choice.reason}{pil_note}")
    return output


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, variant: str) -> None:
    """Write a pipeline's parts, weights as safetensors; with a variant in that precision too."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # that half precision does not run on a CPU is no news to who asks for a file of it
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
        for name, part in pipeline.components.items():
            if variant and isinstance(part, nn.Module):
                settings, half = folder / name / "config.json", cast(Any, copy.deepcopy(part).to(VARIANT_DTYPES[variant]))
                whole = settings.read_text()
                half.save_pretrained(folder / name, variant=variant, safe_serialization=True)
                settings.write_text(whole)  # transformers writes the precision into it, and would load the full weights in half of it
    finally:
        logging.set_verbosity(before)


def save_sample_grid(folder: Path, network: ModelMixin, class_names: tuple[str, ...], captions: Sequence[str], guidance: float) -> None:
    """Write the folder's `samples.png`: four of each of ten classes, or 16 images of the captions, or of nothing."""
    model = load_flow_model(folder, own_classes={type(network).__name__: type(network)})
    count = min(len(class_names), 10)
    condition: Condition = torch.arange(4 * count) % count if count else torch.full((16,), NO_CLASS)
    if model.encode_text:
        condition = model.encode_text([captions[i % len(captions)] for i in range(16)])
    images = generate(model, condition, Sampler("heun", 25, guidance), seed=0).images
    save_image(make_grid(images, count or 8, scale=max(1, 48 // images.shape[-1])), folder / "samples.png")


def _complete_model_index(folder: Path, pipeline: DiffusionPipeline, class_names: tuple[str, ...]) -> None:
    """What `save_pretrained` leaves out: names of classes in model_index.json, and code of ours, one file for each part that needs it."""
    path = folder / "model_index.json"
    content = json.loads(path.read_text())
    if class_names or isinstance(pipeline, DiTPipeline):  # without the names it would be taken for ImageNet's
        content["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    for name, part in pipeline.components.items():
        if isinstance(part, (nn.Module, SchedulerMixin)) and type(part).__module__.split(".")[0] not in STOCK_LIBRARIES:
            file = Path(inspect.getfile(type(part)))
            content[name] = [file.stem, type(part).__name__]
            (folder / name / file.name).write_text(bundle_module(file))
    ours = Path(inspect.getfile(CondotPipeline))
    (folder / ours.name).write_text(bundle_module(ours))  # also beside a stock pipeline, for who asks for it
    if isinstance(pipeline, CondotPipeline):
        content["_class_name"] = [ours.stem, "CondotPipeline"]
    path.write_text(json.dumps(content, indent=2) + "\n")


def _remove_local_paths(folder: Path) -> None:
    """Take the local paths that parts were loaded from out of their configurations."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        cleaned = without_origin(content)
        if cleaned != content:
            path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")
