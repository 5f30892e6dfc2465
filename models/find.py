"""Published weights where they lie: a folder of diffusers, an id on the Hub, or a file of the original DiT or SiT; read, never executed."""

from __future__ import annotations

import argparse
import inspect
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (DiTTransformer2DModel, SD3Transformer2DModel, PixArtTransformer2DModel, UNet2DModel, UNet2DConditionModel)
}
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What diffusers called Transformer2DModel, by its norm_type: so are the published DiT and PixArt-alpha."""
ORIGINAL = "original"
"""Stands for the class of a checkpoint of DiT's or SiT's own code."""
PARTS = ("transformer", "unet")
FILES = (".pt", ".pth", ".safetensors")
AGAIN = "Copy the weights again."
NESTED = ("ema", "model", "state_dict")
"""Where a checkpoint keeps its weights; the average is what was published figures were measured with."""


class Found(NamedTuple):
    """Published weights, on the CPU, in float32."""

    name: str
    kind: str
    """A key of CLASSES, or ORIGINAL."""
    config: Mapping[str, Any]
    """Complete, of the stock class; empty for an original."""
    state: Mapping[str, Tensor]
    scheduler: Mapping[str, Any]
    """The configuration of the scheduler beside them; empty where there is none."""


def find(name: str) -> Found:
    """Locate and read weights.

    Args:
        name: a folder that `save_pretrained` wrote, of a network or of a pipeline with one; a Hub id `owner/model` of the same; or
            a file .pt, .pth or .safetensors with a checkpoint of DiT or SiT.

    Raises:
        ValueError: nothing there, a class that ours cannot hold, damaged files, or tensors that the class does not have.
    """
    path = Path(name)
    if path.suffix in FILES and path.is_file():
        return Found(name, ORIGINAL, {}, _floats(_checkpoint(path)), {})
    folder = _inner(path) if path.is_dir() else _inner(_of_hub(name))
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        schedule = folder.parent / "scheduler" / "scheduler_config.json"
        scheduler = dict(json.loads(schedule.read_text())) if folder.name in PARTS and schedule.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"init_from={name!r}: the configuration cannot be read ({error}). Copy the weights again.") from error
    kind = str(config.get("_class_name", "none"))
    kind = LEGACY.get(str(config.get("norm_type")), kind) if kind == "Transformer2DModel" else kind
    if kind not in CLASSES:
        raise ValueError(f"init_from={name!r} holds a {kind}: ours can hold {', '.join(CLASSES)}, and files of the original DiT and SiT.")
    state = _floats(_weights(folder))
    _check_layers(name, config, len(state))
    try:
        with torch.device("meta"):
            stock = stock_of(kind, config)
    except Exception as error:  # diffusers raises many kinds for what a stranger may write there
        raise ValueError(
            f"init_from={name!r}: its configuration makes no {kind} ({' '.join(str(error).split())[:200]}). {AGAIN}"
        ) from error
    check(name, f"its own {kind}", state, {key: value.shape for key, value in stock.state_dict().items()}, AGAIN)
    return Found(name, kind, dict(stock.config), state, scheduler)  # type: ignore[arg-type]


def _check_layers(name: str, config: Mapping[str, Any], tensors: int) -> None:
    """Raises ValueError for more layers than there are tensors: they would be built before anything shows that they do not fit."""
    for key in ("num_layers", "layers_per_block", "num_single_layers", "transformer_layers_per_block"):
        value = config.get(key)
        if any(isinstance(count, int) and count > tensors for count in (value if isinstance(value, list) else [value])):
            raise ValueError(f"init_from={name!r}: {key}={str(value)[:60]} for {tensors} tensors. {AGAIN}")


def stock_of(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A network of the stock class; what a configuration says beside its arguments is left aside."""
    known = inspect.signature(CLASSES[kind].__init__).parameters
    return CLASSES[kind](**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in known})


def check(
    name: str, what: str, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], remedy: str = "Copy the weights again."
) -> None:
    """Raises ValueError listing all tensors of `state` that are missing, unexpected or misshapen beside `shapes`."""
    other = [key for key, shape in shapes.items() if key in state and state[key].shape != shape]
    wrong = {
        "missing": sorted(shapes.keys() - state.keys()),
        "unexpected": sorted(state.keys() - shapes.keys()),
        "misshapen": [f"{key} {tuple(state[key].shape)} for {tuple(shapes[key])}" for key in other],
    }
    if any(wrong.values()):
        said = ", ".join(f"{len(keys)} {how} ({_few(keys)})" for how, keys in wrong.items() if keys)
        raise ValueError(f"init_from={name!r} does not fit {what}: {said}. {remedy}")


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _inner(folder: Path) -> Path:
    """The folder of the network in that of a pipeline."""
    for inner in (folder, *(folder / part for part in PARTS)):
        if (inner / "config.json").is_file():
            return inner
    raise ValueError(
        f"init_from={str(folder)!r} has no config.json, nor a transformer/ or unet/ with one: "
        f"give a folder that `save_pretrained` writes, a Hub id as owner/model, or a file {', '.join(FILES)}."
    )


def _of_hub(name: str) -> Path:
    """Download the configuration and weights of a Hub id; safetensors where there are some."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(FILES):
        raise ValueError(f"init_from={name!r}: there is no such folder or file. Give one, or a Hub id as owner/model.")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        try:
            files = HfApi().list_repo_files(name)
            under = next((f"{part}/" for part in PARTS if f"{part}/config.json" in files), "")
            safe = any(file.startswith(under) and file.endswith(".safetensors") for file in files)
            kinds = ("config.json", "*.index.json", "*.safetensors" if safe else "*.bin")
            patterns = [f"{under}{kind}" for kind in kinds] + ["scheduler/scheduler_config.json"]
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.bf16.*", "*.non_ema.*"]))
        except (OSError, HTTPError):
            return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"init_from={name!r} is no folder or file here and cannot be had from the Hub ({reason}). Give a folder."
        ) from error


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, in one file or many."""
    stem = "diffusion_pytorch_model"
    for ending in ("safetensors", "bin"):
        files = [folder / f"{stem}.{ending}"]
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                if not all(Path(file).name == file for file in names):
                    raise ValueError("it names files of elsewhere")
                files = [folder / file for file in names]
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"init_from: {index} cannot be read ({error}). Copy the weights again.") from error
        elif not files[0].is_file():
            continue
        state: dict[str, Tensor] = {}
        for file in files:
            state |= _tensors(file)
        return state
    raise ValueError(f"init_from: {folder} holds no {stem}.safetensors. Copy the weights again.")


def _tensors(file: Path) -> dict[str, Any]:
    """What a file holds; of pickles only tensors and plain values are read, and a checkpoint's argparse.Namespace."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, SafetensorError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"init_from: {file} cannot be read ({' '.join(str(error).split())[:200]}). Copy it again.") from error
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"init_from: {file} holds more than tensors, which would have to be executed ({reason}). "
            f"Save its state dict alone, as safetensors."
        ) from error


def _checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, the average where there is one, without what wrappers put before their names."""
    held = _tensors(file)
    for key in NESTED:
        if isinstance(held.get(key), Mapping):
            held = dict(held[key])
            break
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in held.items()}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        raise ValueError(
            f"init_from={str(file)!r} holds no weights under {', '.join(NESTED)} or by themselves ({_few(other) or 'it is empty'}). "
            f"Save the state dict alone."
        )
    return state
