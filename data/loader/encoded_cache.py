"""An encoded cache as training reads it: what it must have been made from, and how a sample's bytes become an array.

A sample whose image could not be decoded is there as an array without rows, so
that keys stay aligned with the images'; reading it is an error as the image's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from condot.core.atomic_files import write_once
from condot.core.caption_fields import draw_index, parse_captions
from condot.core.data_config import DataConfig
from condot.core.hashing import sha256_of, sha256_of_file
from condot.core.text_states import TextStates

from ..encoders.fingerprint import fingerprint_differences
from ..format.manifest import Manifest

FormName = Literal["latents", "text"]
EXTENSIONS: dict[FormName, str] = {"latents": "moments.npy", "text": "text.npy"}
TEXT_VERSION = 2
"""Of the arrays of encoded captions: since 2 their first row is the pooled vector."""
SEVERAL_VERSION = 3
"""Of arrays with several captions: since 3 those of each stand one behind the other, a list of them before all."""
NULL = "null.safetensors"
"""Beside encoded captions: the encoding of the empty one."""
TRANSFORM = "upright, on white, resized by the short side (Lanczos), cropped at the centre"
"""What training makes of an image before the autoencoder sees it; a change of it is a change of this text."""


def encoded_folder(encoded: str | Path, name: str, number: int = 0, count: int = 1) -> Path:
    """Where the encoded shards of one of `count` sources lie; `name` is latents, or as `text_cache_name` has it."""
    return Path(encoded) / name if count == 1 else Path(encoded) / f"source-{number}" / name


def text_cache_name(number: int) -> str:
    """What the encoded shards of a text encoder are called: text, text-1, text-2."""
    return f"text-{number}" if number else "text"


def wanted_latents(options: DataConfig, images: Manifest, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a cache of latents must have been made from.

    Args:
        options: of the recipe.
        images: the manifest of the images.
        fingerprint: of the recipe's autoencoder; None where it names none, which takes the cache's.
    """
    wanted = {
        "form": "latents",
        "source": images.fingerprint,
        "transform": TRANSFORM,
        "resolution": options.resolution,
        "channels": options.channels,
        "aspect_ratios": list(options.aspect_ratios),
        "bucket_step": options.bucket_step if options.aspect_ratios else 0,
        "flips": ["plain", "mirrored"] if options.horizontal_flip else ["plain"],
    }
    if options.bit_depth != 8:  # caches of 8 bits do not say: older ones could not
        wanted["bit_depth"] = options.bit_depth
    return wanted | ({"encoder": dict(fingerprint)} if fingerprint else {})


def wanted_text(options: DataConfig, images: Manifest, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a cache of one encoder's text embeddings must have been made from; arguments as in `wanted_latents`.

    The weights of several captions do not count: all are encoded.
    """
    named = parse_captions(options.caption)
    version, caption = (SEVERAL_VERSION, list(named.fields)) if named.several else (TEXT_VERSION, "".join(named.fields))
    wanted = {"form": "text", "version": version, "source": images.fingerprint, "caption": caption}
    return wanted | ({"encoder": dict(fingerprint)} if fingerprint else {})


def check_encoding(manifest: Manifest, wanted: Mapping[str, Any], where: str) -> None:
    """Compare a cache with what is wanted.

    Raises:
        ValueError: it was made otherwise; every difference is named.
    """
    found = encoding_differences(manifest.encoding, wanted)
    if found:
        raise ValueError(
            f"the encoded cache {where} is of another making: {'; '.join(found)}. Give another data.encoded and run "
            f"`condot encode --config ...` for it, or the settings that this one was made with."
        )


def encoding_differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Each fact in which a cache is not what is wanted. Mirrored latents that nobody wants are no fault."""
    found = []
    for key, here in {"bit_depth": 8, **wanted}.items():
        had = there.get(key, 8 if key == "bit_depth" else None)
        if key == "name":  # the same weights may lie elsewhere
            continue
        if key == "encoder":
            differ = fingerprint_differences(had or {}, here, "autoencoder" if wanted["form"] == "latents" else "text encoder")
            if differ and there.get("name") != wanted.get("name", there.get("name")):
                found.append(f"it was made with {there['name']}, and {wanted['name']} is named here")
            found += differ
        elif key == "version" and there.get("form") == wanted["form"]:
            if had not in (TEXT_VERSION, SEVERAL_VERSION):
                found.append(f"its arrays are of version {had or 1}, without pooled vectors, and {here} is read: encode the captions again")
        elif key == "caption":
            found += [] if had == here else [f"caption is {_fields(had)} there and {_fields(here)} here"]
        elif key == "flips":
            found += [] if set(here) <= set(had or ()) else [f"flips are {had} there and {here} here (--flips both)"]
        elif key == "source":
            found += [] if had == here else [f"images are {str(had)[:12]} there and {here[:12]} here"]
        elif had != here:
            found.append(f"{key} is {had} there and {here} here")
    return found


def _fields(caption: str | Sequence[str] | None) -> str:
    """Return the fields that a cache has encoded, as a recipe writes them."""
    return caption if isinstance(caption, str) else ",".join(caption or ())


def merge_encodings(encodings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The encoding of several caches of one making, with the statistics of all their latents together."""
    counts = np.array([e["statistics"]["values"] for e in encodings], np.float64)[:, None]
    parts = {key: np.array([e["statistics"][key] for e in encodings]) for key in ("mean", "std", "mean_std")}
    mean = (counts * parts["mean"]).sum(0) / counts.sum()
    spread = {
        key: np.sqrt((counts * (parts[key] ** 2 + parts["mean"] ** 2)).sum(0) / counts.sum() - mean**2) for key in ("std", "mean_std")
    }
    statistics = {key: value.tolist() for key, value in {"mean": mean, **spread}.items()}
    return {**encodings[0], "statistics": {**statistics, "values": int(counts.sum())}} if len(encodings) > 1 else dict(encodings[0])


def latent_shape(encoding: Mapping[str, Any], height: int, width: int) -> tuple[int, int, int, int]:
    """Return the shape of a sample's array, encoded at so many pixels: (plain and mirrored, moments x channels, height, width)."""
    rows = encoding["latent_channels"] * len(encoding["moments"])
    return len(encoding["flips"]), rows, height // encoding["factor"], width // encoding["factor"]


def read_moments(payload: bytes | memoryview, shape: tuple[int, int, int, int], mirror: bool = False) -> np.ndarray:
    """The moments in the bytes of a `.moments.npy`, without a copy.

    Args:
        payload: the whole file.
        shape: as `latent_shape` gives it.
        mirror: those of the mirrored image.

    Returns:
        (moments x channels, height, width), float16, read-only.

    Raises:
        ValueError: an array of another size, as a sample has that could not be encoded.
    """
    flips, channels, height, width = shape
    size = channels * height * width
    start = len(payload) - 2 * flips * size
    if not 64 <= start <= 192 or mirror >= flips:
        raise ValueError(
            f"{len(payload)} bytes are no latents of shape {shape}: this sample could not be encoded (see the manifest's bad)."
        )
    return np.frombuffer(payload, "<f2", size, start + 2 * size * mirror).reshape(channels, height, width)


def text_rows(states: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """One caption as it is stored: the pooled vector, then its tokens' states; (1 + tokens, wider of both), zero beyond the narrower."""
    rows = np.zeros((1 + len(states), max(states.shape[1], len(pooled))), np.float16)
    rows[0, : len(pooled)], rows[1:, : states.shape[1]] = pooled, states
    return rows


def read_text_rows(payload: bytes | memoryview, width: int, pooled_width: int) -> tuple[np.ndarray, np.ndarray]:
    """The token states, (tokens, width), and the pooled vector, (pooled,), in the bytes of a `.text.npy`: float16, read-only, no copies.

    Raises:
        ValueError: no such array.
    """
    rows = _rows(payload, width, pooled_width)
    return rows[1:, :width], rows[0, :pooled_width]


def _rows(payload: bytes | memoryview, width: int, pooled_width: int) -> np.ndarray:
    start, across = 10 + int.from_bytes(payload[8:10], "little"), max(width, pooled_width)
    if (len(payload) - start) % (2 * across) or len(payload) < start + 4 * across:
        raise ValueError(
            f"{len(payload)} bytes are no token states of width {width}: this sample's text could not be read (see the manifest's bad), "
            f"or the cache is of another encoder: encode the captions again."
        )
    return np.frombuffer(payload, "<f2", -1, start).reshape(-1, across)


def multi_caption_rows(captions: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """Return all captions of a sample as they are stored: a list of them, filled up to whole rows, then the rows of each.

    Args:
        captions: at least one; the number of its field, and its rows as `text_rows` has them.

    Returns:
        (rows, channels), float16. The list is of uint16 in the places of
        float16: how many captions, then of each its field and its rows.
    """
    across = captions[0][1].shape[1]
    words = [len(captions), *(word for field, rows in captions for word in (field, len(rows)))]
    listed = np.zeros((-(-len(words) // across), across), np.uint16)
    listed.flat[: len(words)] = words
    return np.concatenate([listed.view(np.float16), *(rows for _, rows in captions)])


def draw_text_rows(
    payload: bytes | memoryview, width: int, pooled_width: int, weights: Sequence[float], uniform: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return one caption of those in the bytes of a `.text.npy`, as `read_text_rows` does of the only one.

    Args:
        payload: the whole file, of an array as `multi_caption_rows` makes it.
        width, pooled_width: of a state and of the pooled vector.
        weights, uniform: what draws it, see `caption_fields.draw_index`.

    Raises:
        ValueError: no such array.
    """
    rows = _rows(payload, width, pooled_width)
    words = rows.reshape(-1).view("<u2")
    count = int(words[0])
    fields, lengths = words[1 : 1 + 2 * count : 2].tolist(), words[2 : 2 + 2 * count : 2].tolist()
    first = -(-(1 + 2 * count) // rows.shape[1])
    if not count or len(lengths) < count or first + sum(lengths) != len(rows) or max(fields) >= len(weights):
        raise ValueError(f"{len(payload)} bytes are no list of captions of width {width}: encode the captions again.")
    at = draw_index(fields, weights, uniform)
    first += sum(lengths[:at])
    return rows[first + 1 : first + lengths[at], :width], rows[first, :pooled_width]


def write_null(folder: Path, make: Callable[[], TextStates]) -> str:
    """Write the encoding of the empty caption beside the others, unless somebody has; gives the file's sha256."""
    path = folder / NULL
    if not path.exists():
        null = make().to("cpu", torch.float16)
        write_once(path, save({name: part.contiguous() for name, part in null._asdict().items()}))
    return sha256_of_file(path)


def read_null(folder: str | Path, encoding: Mapping[str, Any]) -> TextStates:
    """The encoding of the empty caption, one row, float16.

    Raises:
        ValueError: it is not there, or not what the manifest says.
    """
    path = Path(folder) / NULL
    try:
        body = path.read_bytes()
        if sha256_of(body) != encoding["null"]:
            raise ValueError("its sha256 is not what the manifest says")
        return TextStates(**load(body))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}): encode the captions again.") from error


class MomentReader:
    """Payloads of latents as the arrays of a micro-batch: a `batch.Reader`.

    Args:
        encoding: of the cache's manifest.
    """

    def __init__(self, encoding: Mapping[str, Any]) -> None:
        self.encoding = encoding

    def empty(self, count: int, shape: tuple[int, int]) -> np.ndarray:
        """(count, moments x channels, h, w), float16."""
        return np.empty((count, *latent_shape(self.encoding, *shape)[1:]), np.float16)

    def fill(self, out: np.ndarray, payload: bytes, mirror: bool, corner: np.ndarray | tuple[float, float], plain: bool, /) -> None:
        """Copy a sample's moments; corner and plain say nothing here, for all were cropped at the centre."""
        out[:] = read_moments(payload, (len(self.encoding["flips"]), *out.shape), mirror)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return the array as a tensor, unchanged."""
        return torch.from_numpy(array)
