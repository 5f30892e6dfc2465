"""Published weights where they lie: a folder of diffusers, an id on the Hub, or a file of the original DiT or SiT; read, never executed."""

from __future__ import annotations

import argparse
import inspect
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .common.spec import PublishedWeights
from .convert import stock_classes
from .registry import NETWORKS

ORIGINAL = "original"
"""Stands for the class of a checkpoint that the authors' own code wrote."""
SUBFOLDERS = ("transformer", "unet")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".safetensors")
COPY_AGAIN = "Copy the weights again."
STEM = "diffusion_pytorch_model"
VARIANTS = ("", "fp16", "bf16")
"""In the order in which they are taken: no variant is full; fp16 has more digits than bf16; others come last."""
WEIGHTS = re.compile(
    rf"{STEM}(?:\.(?P<variant>[\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?\.(?P<ending>safetensors|bin)(?:\.index(?:\.(?P<indexed>[\w-]+))?\.json)?"
)
"""Names of files of weights and of their index, as diffusers writes them: a part's variant stands before its number, an index's behind."""
STATE_KEYS = ("ema", "model", "state_dict")
"""Where a checkpoint keeps its weights; the average is what was published figures were measured with."""


def load_published(name: str) -> PublishedWeights:
    """Locate and read weights.

    Args:
        name: a folder that `save_pretrained` wrote, of a network or of a pipeline with one; a Hub id `owner/model` of the same; or
            a file .pt, .pth or .safetensors with a checkpoint of DiT or SiT.

    Raises:
        ValueError: nothing there, a class that ours cannot hold, damaged files, or tensors that the class does not have.
    """
    path = Path(name)
    if path.suffix in CHECKPOINT_SUFFIXES and path.is_file():
        weights, arguments = _read_checkpoint(path)
        return PublishedWeights(name, ORIGINAL, {}, _to_float32(weights), {}, arguments=arguments)
    folder = _network_folder(path) if path.is_dir() else _network_folder(_download(name))
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        schedule = folder.parent / "scheduler" / "scheduler_config.json"
        scheduler = dict(json.loads(schedule.read_text())) if folder.name in SUBFOLDERS and schedule.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"init_from={name!r}: the configuration cannot be read ({error}). Copy the weights again.") from error
    kind = str(config.get("_class_name", "none"))
    if kind == "Transformer2DModel":
        kind = _legacy_classes().get(str(config.get("norm_type")), kind)
    if kind not in stock_classes():
        titles = " and ".join(spec.checkpoint.title.replace(" or ", " and ") for spec in NETWORKS.values() if spec.checkpoint)
        raise ValueError(
            f"init_from={name!r} holds a {kind}: ours can hold {', '.join(stock_classes())}, and files of the original {titles}."
        )
    variant, files = _weight_files(folder)
    state = _to_float32({key: value for file in files for key, value in _read_file(file).items()})
    _check_layers(name, config, len(state))
    try:
        with torch.device("meta"):
            stock = build_stock(kind, config)
    except Exception as error:  # diffusers raises many kinds for what a stranger may write there
        raise ValueError(
            f"init_from={name!r}: its configuration makes no {kind} ({' '.join(str(error).split())[:200]}). {COPY_AGAIN}"
        ) from error
    check_tensors(name, f"its own {kind}", state, {key: value.shape for key, value in stock.state_dict().items()}, COPY_AGAIN)
    return PublishedWeights(name, kind, dict(stock.config), state, scheduler, variant)  # type: ignore[arg-type]


def _legacy_classes() -> dict[str, str]:
    """Return what diffusers called Transformer2DModel, by its norm_type: so are the published DiT and PixArt-alpha."""
    forms = [spec.stock for spec in NETWORKS.values() if spec.stock and spec.stock.legacy_norm]
    return {form.legacy_norm: next(iter(form.classes)).__name__ for form in forms}


def _check_layers(name: str, config: Mapping[str, Any], tensors: int) -> None:
    """Raises ValueError for more layers than there are tensors: they would be built before anything shows that they do not fit."""
    for key in ("num_layers", "layers_per_block", "num_single_layers", "transformer_layers_per_block"):
        value = config.get(key)
        if any(isinstance(count, int) and count > tensors for count in (value if isinstance(value, list) else [value])):
            raise ValueError(f"init_from={name!r}: {key}={str(value)[:60]} for {tensors} tensors. {COPY_AGAIN}")


def build_stock(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A network of the stock class; what a configuration says beside its arguments is left aside."""
    cls = stock_classes()[kind]
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in known})


def check_tensors(
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


def _to_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _network_folder(folder: Path) -> Path:
    """The folder of the network in that of a pipeline."""
    for inner in (folder, *(folder / part for part in SUBFOLDERS)):
        if (inner / "config.json").is_file():
            return inner
    raise ValueError(
        f"init_from={str(folder)!r} has no config.json, nor a transformer/ or unet/ with one: "
        f"give a folder that `save_pretrained` writes, a Hub id as owner/model, or a file {', '.join(CHECKPOINT_SUFFIXES)}."
    )


def _download(name: str) -> Path:
    """Download the configuration and weights of a Hub id; safetensors where there are some."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(CHECKPOINT_SUFFIXES):
        raise ValueError(f"init_from={name!r}: there is no such folder or file. Give one, or a Hub id as owner/model.")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        try:
            files = HfApi().list_repo_files(name)
            under = next((f"{part}/" for part in SUBFOLDERS if f"{part}/config.json" in files), "")
            wanted = _choose_files([file.removeprefix(under) for file in files if file.startswith(under)])[1]
            patterns = [f"{under}{file}" for file in ("config.json", *(wanted or ["*.safetensors"]))] + ["scheduler/scheduler_config.json"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, HTTPError):
            return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"init_from={name!r} is no folder or file here and cannot be had from the Hub ({reason}). Give a folder."
        ) from error


def _choose_files(names: Iterable[str]) -> tuple[str, list[str]]:
    """Choose among the names of a folder's files: the full weights, else those of a variant, fp16 first; safetensors before pickles.

    Returns:
        The variant, "" for none; and its files, index and parts. Nothing where there are no weights.
    """
    found: dict[tuple[int, str, bool], list[str]] = {}
    for name in sorted(names):
        if parts := WEIGHTS.fullmatch(name):
            variant = parts["variant"] or parts["indexed"] or ""
            order = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
            found.setdefault((order, variant, parts["ending"] == "bin"), []).append(name)
    full = {key: files for key, files in found.items() if any(not file.endswith(".json") for file in files)}
    key = min(full or found, default=None)  # an index alone may name its parts as it likes
    return (key[1], found[key]) if key else ("", [])


def _weight_files(folder: Path) -> tuple[str, list[Path]]:
    """Return the variant and the files of a folder's weights, in one file or many."""
    variant, names = _choose_files(path.name for path in folder.iterdir())
    if not names:
        raise ValueError(f"init_from: {folder} holds no {STEM}.safetensors. Copy the weights again.")
    index = next((folder / name for name in names if name.endswith(".json")), None)
    if index is None:
        return variant, [folder / name for name in names]
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(part).name != part for part in parts):
            raise ValueError("it names files of other folders")
        return variant, [folder / part for part in parts]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"init_from: {index} cannot be read ({error}). Copy the weights again.") from error


def _read_file(file: Path) -> dict[str, Any]:
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


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the weights in a checkpoint and its training arguments; the average where there is one, without wrappers' prefixes."""
    held = _read_file(file)
    arguments = held.get("args")
    for key in STATE_KEYS:
        if isinstance(held.get(key), Mapping):
            held = dict(held[key])
            break
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in held.items()}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        raise ValueError(
            f"init_from={str(file)!r} holds no weights under {', '.join(STATE_KEYS)} or by themselves ({_few(other) or 'it is empty'}). "
            f"Save the state dict alone."
        )
    return state, arguments
