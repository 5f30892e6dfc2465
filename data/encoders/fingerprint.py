"""What tells one frozen encoder from another: hashes of its configuration and of its weights' values, read from its files.

No network is built for it, so that training on a cache can compare without the
encoder. Weights count by value: the same numbers in float32, in bfloat16, in
one file or in ten are one encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from condot.core.hashing import sha256_of

VOLATILE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "transformers_version", "dtype", "torch_dtype")
"""Of a configuration: what does not change what the encoder gives; nor does what begins with an underscore."""


def resolve_encoder(name: str, field: str, part: str = "") -> Path:
    """The folder of an encoder: the one named, its sub-folder `part`, or a copy of the Hub's.

    Args:
        name: a folder, or a Hub id `owner/model`, or `owner/model/part` of a pipeline.
        field: how messages call it, as data.autoencoder.
        part: where a pipeline keeps it, as `vae`.

    Raises:
        ValueError: neither is there.
    """
    for folder in (Path(name), Path(name) / part):
        if (folder / "config.json").is_file():
            return folder
    inside = name.count("/") == 2 and bool(part) and name.rpartition("/")[2].startswith(part)
    if Path(name).exists() or not (name.count("/") == 1 or inside) or name.startswith((".", "/", "~")):
        nor = f" (nor {part}/config.json)" if part else ""
        raise ValueError(
            f"{field}={name!r} has no config.json{nor}: give the folder that `save_pretrained` writes, or a Hub id as owner/model."
        )
    return _of_hub(name, field, part)


def _of_hub(name: str, field: str, part: str) -> Path:
    """Download configuration, tokenizer and safetensors of a Hub id, never a pickle; of a pipeline the part alone."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    names = ("*.json", "*.safetensors", "*.txt", "*.model")
    owner, model, *inside = name.split("/")
    repository, part = f"{owner}/{model}", inside[0] if inside else part
    try:
        try:
            whole = "config.json" in HfApi().list_repo_files(repository) and not inside
            folders = [""] if whole or not part else [f"{part}/", f"{part.replace('text_encoder', 'tokenizer')}/"]
            patterns = [f"{folder}{kind}" for folder in folders for kind in names]
            found = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
        except (OSError, HTTPError):
            found = Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{field}={name!r} is no folder here and cannot be had from the Hub ({reason}): give a folder.") from error
    folder = found if (found / "config.json").is_file() and not inside else found / part
    if not (folder / "config.json").is_file():
        raise ValueError(f"{field}={name!r} has no config.json on the Hub: give the id of an encoder, or of a pipeline with a {part}.")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The encoder's `config.json`; a ValueError where it is damaged."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json cannot be read ({error}): copy the encoder again.") from error


def config_hash(config: Mapping[str, Any]) -> str:
    """A hash of what shapes an encoder; what it is called, and how its latents are scaled afterwards, do not."""
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in VOLATILE}
    return sha256_of(json.dumps(kept, sort_keys=True, default=str))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of an encoder.

    Raises:
        ValueError: there is none, or one that its index names is missing.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        files = [folder / file for file in sorted(_listed(index))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names: copy the encoder again.")
        return files
    for file in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / file).is_file():
            return [folder / file]
    raise ValueError(
        f"{folder} holds no .safetensors: pickled weights are not read here. Save it again with `save_pretrained(safe_serialization=True)`."
    )


def _listed(index: Path) -> set[str]:
    """Return the files that an index of weights names; a ValueError where they are none of its own folder."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} cannot be read ({error}): copy the encoder again.") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index} names what are no files of its folder: copy the encoder again.")
    return names


def weights_hash(files: list[Path]) -> str:
    """A hash of the weights' names, shapes and values; floating ones are compared as float32.

    Raises:
        ValueError: a damaged file.
    """
    digest = hashlib.sha256()
    try:
        readers = [safe_open(file, "pt") for file in files]
        where = {name: reader for reader in readers for name in reader.keys()}  # noqa: SIM118 (no mapping)
        for name in sorted(where):
            value = where[name].get_tensor(name)
            value = value.float() if value.is_floating_point() and value.dtype != torch.float64 else value
            digest.update(f"{name}:{value.dtype!s}:{tuple(value.shape)};".encode())
            digest.update(value.contiguous().numpy().tobytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{files[0].parent}: weights cannot be read ({error}): copy the encoder again.") from error
    return digest.hexdigest()


def weight_names(files: list[Path]) -> list[str]:
    """The names of all weights; a ValueError for a damaged file."""
    try:
        return [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{files[0].parent}: weights cannot be read ({error}): copy the encoder again.") from error


def fingerprint_differences(there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> list[str]:
    """Each fact of two fingerprints that is not the same, as `autoencoder weights are 12ab there and 34cd here`."""
    found = []
    for key in {**there, **here}:
        a, b = there.get(key), here.get(key)
        if a != b:
            short = [v[:12] if isinstance(v, str) and len(v) == 64 else v for v in (a, b)]
            found.append(f"{what} {key} {'are' if key in ('weights', 'max_tokens') else 'is'} {short[0]} there and {short[1]} here")
    return found
