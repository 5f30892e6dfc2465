"""Folders of models that strangers made, looked at before a library opens them: no code, no foreign file, no size that is not there."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

MOST_BYTES = 1 << 26
"""Of a configuration."""
MOST_COUNT = 1_000_000
"""No number in a configuration that stands for a count or a size is larger."""
SPARE = 1 << 26
"""Numbers that a network may hold beyond its files: tables of positions that are computed, heads that are not published."""
WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError, SafetensorError)
"""What reading a folder ends in that is none."""
LAYERS = ("layer", "depth", "block")
"""In the names of numbers by which a network has parts, each with tensors of its own."""
CODE = (
    *("quantization_config", "custom_pipelines", "kernel_config", "trust_remote_code"),
    *("pretrained_model_name_or_path", "config", "gguf_file"),
)
"""Keys by which a configuration has other libraries imported, other folders opened, or code fetched."""
KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm")
"""Implementations that are part of the library; any other is a name on the Hub, whose code would be fetched and run."""
ADAPTER = "adapter_config.json"
"""transformers follows it to the folder, or the Hub id, that it names."""
TEXT_MODELS = (
    *("clip", "clip_text_model", "t5", "mt5", "umt5", "bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "distilbert", "albert"),
    *("electra", "deberta", "deberta-v2", "mpnet", "modernbert", "camembert", "roformer", "nomic_bert", "eurobert", "ernie", "xlm"),
    *("longformer", "mobilebert", "squeezebert", "big_bird", "nystromformer", "rembert", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt"),
    *("bloom", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2"),
    *("smollm3", "stablelm", "granite", "cohere", "glm", "glm4"),
)
"""Types of transformers' models that read text and build themselves of their configuration alone; others may open what it names."""
REMEDY = "Take a copy that you trust, or save it again with `save_pretrained`."


def check_model_folder(folder: Path) -> None:
    """Refuse a folder of a model that would have code run, open files of elsewhere, or never answer.

    Args:
        folder: of one model or tokenizer; what lies below it is looked at too.

    Raises:
        ValueError: which file, and why.
    """
    for path in _files(folder):
        if path.name == ADAPTER:
            raise _refused(path, "an adapter names another model, which would be opened")
        if path.suffix == ".json" and ("config" in path.name or "index" in path.name or path.name == "special_tokens_map.json"):
            content = read_json(path)
            _check_keys(path, content, path.parent)
            if path.name.endswith(".index.json"):
                _check_index(path, content)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a configuration.

    Raises:
        ValueError: it cannot be read, or is no mapping.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, or is no file")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        return content
    except WRONG as error:
        raise _refused(path, f"it cannot be read: {' '.join(str(error).split())[:200]}") from error


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in some safetensors files, by name, from their headers alone.

    Raises:
        ValueError: a file that is none.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except WRONG as error:
            raise _refused(path, f"it is no safetensors file: {' '.join(str(error).split())[:200]}") from error
    return found


def check_counts(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse, before it is built, a network of more layers than there are tensors, or of sizes beyond all sense.

    Args:
        path: of the configuration, for messages.
        config: what it says.
        tensors: in the files of the weights.

    Raises:
        ValueError: by the name of the number.
    """
    for name, value in _leaves(config):
        count = isinstance(value, int) and not isinstance(value, bool)
        layers = count and any(word in name for word in LAYERS) and not any(word in name for word in ("channels", "size"))
        if count and abs(value) > (max(tensors, 1) if layers else MOST_COUNT):
            raise _refused(path, f"{name}={value} for {tensors} tensors")


def check_size(path: Path, network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a network that would take far more memory than its files hold; it stands on the meta device.

    Raises:
        ValueError: how many numbers it has, and how many are there.
    """
    held = sum(math.prod(shape) for shape in shapes.values())
    needed = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if needed > 2 * held + SPARE:
        raise _refused(path, f"a network of {needed:,} numbers, and the files hold {held:,}")


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file of a folder, and of the folders in it: each is a file, and where it is a link one that leads to the folder's own."""
    try:
        first = sorted(folder.iterdir())
        found = [*first, *(path for place in first if place.is_dir() for path in sorted(place.iterdir()))]
    except OSError as error:
        raise _refused(folder, f"it cannot be read: {error.strerror}") from error
    for path in found:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _refused(path, f"it cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise _refused(path, "it is no file")
        if path.is_symlink() and not is_own(path, folder):
            raise _refused(path, "it is a link that leads out of the folder")
        if stat.S_ISREG(mode):
            yield path


def is_own(link: Path, folder: Path) -> bool:
    """Return whether a link leads to a file of its own folder or pipeline; or to the blobs of the Hub's cache, as its snapshots do."""
    real, whole = link.resolve(), folder.resolve()
    roots = [whole, whole.parent] if (whole.parent / "model_index.json").is_file() else [whole]
    roots += [place.parent.parent / "blobs" for place in (whole, *whole.parents) if place.parent.name == "snapshots"]
    return any(real.is_relative_to(root.resolve()) for root in roots)


def _check_keys(path: Path, content: Any, folder: Path) -> None:
    """Raise ValueError for keys by which a configuration reaches beyond itself, however deep they lie."""
    for name, value in _items(content):
        if name in CODE and value not in (None, {}, [], ""):
            raise _refused(path, f"it has a {name}")
        if name.endswith("_implementation") and value is not None and not (isinstance(value, dict) or value in KERNELS):
            raise _refused(path, f"{name}={str(value)[:60]!r} is none of {', '.join(KERNELS)}")
        for file in value if isinstance(value, list) and name.endswith("_files") else [value] if name.endswith("_file") else []:
            if file is not None and not (isinstance(file, str) and _is_harmless(file, folder)):
                raise _refused(path, f"{name}={str(file)[:60]!r} is a file of elsewhere")


def _is_harmless(name: str, folder: Path) -> bool:
    """Return whether a name is a plain one, or one that means nothing on this machine, such as where its author kept the file."""
    if os.path.basename(name) == name and name not in ("", ".", ".."):
        return "\0" not in name
    return "\0" not in name and not os.path.lexists(folder / name) and not os.path.lexists(name)


def _check_index(path: Path, content: dict[str, Any]) -> None:
    """Raise ValueError for a list of weights' files that names others than the folder's own."""
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) and os.path.basename(name) == name for name in listed.values()):
        raise _refused(path, "its weight_map names what are no files of the folder")


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value in nested mappings and lists, however deep."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _leaves(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every number, text and so on in nested mappings and lists, by the name of the field that holds it."""
    for name, value in _items(config):
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict | list):
                yield name, item


def _refused(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: {why}. {REMEDY}")
