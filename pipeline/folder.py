"""A pipeline folder read back as a field, for our own solvers: its parts are loaded one by one, so no code of the folder runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from .captions_v1 import Captions
from .checksums import check_folder
from .config import Config, FlowConfig
from .flow import Condition, velocity_field
from .method import scaled
from .pipeline_condot_v1 import NO_CLASS, CondotPipeline
from .recipe import build
from .safe_yaml import read_yaml
from .scheduling_flow_ode_v1 import FlowODEScheduler
from .scheduling_flow_sde_v1 import FlowSDEScheduler
from .source import Source
from .stock import read_scheduler

NETWORKS = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DModel", "UNet2DConditionModel")
"""Stock networks that are known here."""
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
SCHEDULERS = {kind.__name__: kind for kind in (FlowODEScheduler, FlowSDEScheduler)}
TEXT = tuple(f"{part}{end}" for end in ("", "_2", "_3") for part in ("tokenizer", "text_encoder"))


def open_folder(folder: str | Path, device: torch.device | str = "cpu", own: Mapping[str, type] | None = None) -> Source:
    """A pipeline folder, such as `export.write_folder` makes, as a velocity field.

    Args:
        folder: a local folder.
        device: to compute on.
        own: networks of ours by the names of their classes.

    Raises:
        ValueError: no such folder, a damaged or changed one, or one of another kind of model.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"pipeline={str(folder)!r} is no pipeline folder (no model_index.json): "
            f"export one with `python sample.py export --run RUN --output FOLDER`."
        )
    check_folder(folder)
    try:
        pipeline = _pipeline(folder, json.loads((folder / "model_index.json").read_text()), own or {})
        recipe = folder / "config.yaml"
        config = build(Config, read_yaml(recipe)) if recipe.exists() else None
    except Exception as error:  # diffusers raises many kinds for a damaged folder; each is the user's folder
        raise ValueError(
            f"pipeline={str(folder)!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}): export it again."
        ) from error
    source = pipeline_source(pipeline.to(device), config.flow if config else None)
    return replace(source, bit_depth=config.data.bit_depth) if config else source


def _pipeline(folder: Path, index: dict[str, Any], own: Mapping[str, type]) -> CondotPipeline:
    """Our pipeline around the folder's parts."""
    parts: dict[str, Any] = {}
    for name, made in index.items():
        if not isinstance(made, list) or name.startswith("_") or made[1] is None:
            continue
        if name in ("transformer", "unet"):
            parts[name] = _part(folder / name, made[1], NETWORKS, own)
        elif name == "vae":
            parts[name] = _part(folder / name, made[1], AUTOENCODERS, {})
        elif name == "scheduler":
            kind: Any = SCHEDULERS.get(made[1]) or getattr(diffusers, made[1])
            parts[name] = kind.from_pretrained(folder / name, local_files_only=True)
        elif name in TEXT:
            import transformers

            safe = {"use_safetensors": True, "dtype": torch.float32} if name.startswith("text") else {}
            parts[name] = getattr(transformers, made[1]).from_pretrained(folder / name, local_files_only=True, **safe)
        else:
            raise ValueError(f"it has a {name}, a {made[1]}, which is not known here: sample it with diffusers")
    return CondotPipeline(**parts, id2label=index.get("id2label"), padding=index.get("padding", ""))


def _part(folder: Path, kind: str, classes: tuple[str, ...], own: Mapping[str, type]) -> Any:
    """A component, of one of the known stock classes or of our own."""
    if kind not in (*classes, *own):
        raise ValueError(f"its {folder.name} is a {kind}, known are {', '.join((*classes, *own))}")
    found: Any = own.get(kind) or getattr(diffusers, kind)
    return found.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()


def pipeline_source(pipeline: CondotPipeline, flow: FlowConfig | None = None) -> Source:
    """A pipeline's network as a velocity field.

    Args:
        pipeline: with all its parts, on its device.
        flow: the recipe they came with, if any.

    Raises:
        ValueError: a scheduler of another kind of model.
    """
    path, kind = read_scheduler(pipeline.scheduler, flow)
    network, sign = pipeline.network, -1.0 if pipeline.trained[0] == "flow_prediction" else 1.0
    side, factor, text = network.config.sample_size, pipeline.factor, bool(pipeline.encoders)
    pixels = torch.tensor([[factor * side, factor * side, 0, 0, factor * side, factor * side]], dtype=torch.float32, device=network.device)

    def predict(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = Captions(*condition) if text else condition
        return sign * pipeline.predict(x.to(network.dtype), 1000 * (1 - t), told, pixels.expand(len(x), 6)).to(x.dtype)

    names = pipeline.config.id2label
    image_channels = network.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels
    return Source(
        field=velocity_field(scaled(predict, flow) if flow else predict, path, kind),
        path=path,
        shape=(network.config.in_channels, side, side),
        num_classes=0 if text else NO_CLASS if names is None and type(network).__name__ == "DiTTransformer2DModel" else len(names or ()),
        null=pipeline.encode_prompt([""]) if text else NO_CLASS,
        device=network.device,
        decode=pipeline.decode,
        predict=kind,
        pixels=() if factor == 1 else (image_channels, factor * side, factor * side),
        read=pipeline.encode_prompt if text else None,
    )
