"""A pipeline folder read back as a field, for our own solvers: its parts are loaded one by one, so no code of the folder runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from torch import Tensor

from .checksums import check_folder
from .config import Config, FlowConfig
from .flow import velocity_field
from .generate import Source
from .method import scaled
from .recipe import build
from .stock import read_scheduler

STOCK_NULL = 1000
"""The label that DiTPipeline passes for no class."""
NETWORKS = ("DiTTransformer2DModel", "UNet2DModel")
"""Stock classes that predict for (x, timestep, class_labels)."""
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
"""Stock classes whose latents a DiTPipeline decodes."""


def open_folder(folder: str | Path, device: torch.device | str = "cpu") -> Source:
    """A DiTPipeline folder, such as `export.write_folder` makes, as a velocity field.

    Args:
        folder: a local folder.
        device: to compute on.

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
        index = json.loads((folder / "model_index.json").read_text())
        network = _part(folder, index, "transformer", NETWORKS).to(device)
        vae = _part(folder, index, "vae", AUTOENCODERS).to(device)
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        recipe = folder / "config.yaml"
        flow = build(Config, yaml.safe_load(recipe.read_text())).flow if recipe.exists() else None
    except Exception as error:  # diffusers raises many kinds for a damaged folder; each is the user's folder
        raise ValueError(
            f"pipeline={str(folder)!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}): export it again."
        ) from error
    names = index.get("id2label")
    return stock_source(network, vae, scheduler, STOCK_NULL if names is None else len(names), flow)


def _part(folder: Path, index: dict[str, Any], name: str, classes: tuple[str, ...]) -> Any:
    """A component, of one of the known stock classes."""
    kind = index[name][1]
    if kind not in classes:
        raise ValueError(f"its {name} is a {kind}, known are {', '.join(classes)}")
    return getattr(diffusers, kind).from_pretrained(folder / name, use_safetensors=True, local_files_only=True)


def stock_source(network: Any, vae: Any, scheduler: Any, num_classes: int, flow: FlowConfig | None = None) -> Source:
    """Stock components as a velocity field.

    Args:
        network: a DiTTransformer2DModel or UNet2DModel.
        vae: decodes its latents.
        scheduler: the configuration of the scheduler they came with.
        num_classes: 0 for an unconditional model.
        flow: the recipe they came with, if any.

    Raises:
        ValueError: a scheduler of another kind of model.
    """
    path, kind = read_scheduler(scheduler, flow)
    sign = -1.0 if scheduler.get("prediction_type") == "flow_prediction" else 1.0

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return sign * network(x.to(network.dtype), 1000 * (1 - t), class_labels=labels).sample.to(x.dtype)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample

    side = network.config.sample_size
    shape = (network.config.in_channels, side, side)
    factor = 2 ** (len(vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels) - 1)
    pixels = () if factor == 1 else (vae.config.in_channels, factor * side, factor * side)
    model = scaled(predict, flow) if flow else predict
    return Source(velocity_field(model, path, kind), path, shape, num_classes, STOCK_NULL, network.device, decode, kind, pixels=pixels)
