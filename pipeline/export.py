"""The folder that stock diffusers loads: written whole or not at all."""

from __future__ import annotations

import ast
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
from .stock import form_of, scheduler_of

SHARED = "scheduling_flow_v1"
"""The file that is written into those of both schedulers of ours."""
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
    progress: Callable[[str], None] = print,
) -> Path:
    """Write a pipeline folder for stock diffusers.

    Args:
        output: the folder; replaced if it is one of ours already.
        network: a stock DiTTransformer2DModel or UNet2DModel, in the form that `stock.form_of` names.
        config: of the run; kept as `config.yaml`, without local paths.
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
            (folder / "scheduler" / f"{name}.py").write_text(standing_alone(name))
    path.write_text(json.dumps(content, indent=2) + "\n")


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
