"""An encoded cache as training reads it: what it must have been made from, and how a sample's bytes become an array.

A sample whose image could not be decoded is there as an array without rows, so
that keys stay aligned with the images'; reading it is an error as the image's is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .fingerprint import differences
from .index import Manifest
from .options import Options

FormName = Literal["latents", "text"]
EXTENSIONS: dict[FormName, str] = {"latents": "moments.npy", "text": "text.npy"}
TRANSFORM = "upright, on white, resized by the short side (Lanczos), cropped at the centre"
"""What training makes of an image before the autoencoder sees it; a change of it is a change of this text."""


def side_folder(encoded: str | Path, form: FormName, number: int = 0, count: int = 1) -> Path:
    """Where the side shards of one of `count` sources lie."""
    return Path(encoded) / form if count == 1 else Path(encoded) / f"source-{number}" / form


def wanted_latents(options: Options, images: Manifest, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
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
    return wanted | ({"encoder": dict(fingerprint)} if fingerprint else {})


def wanted_text(options: Options, images: Manifest, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a cache of text embeddings must have been made from; arguments as in `wanted_latents`."""
    wanted = {"form": "text", "source": images.fingerprint, "caption": options.caption}
    return wanted | ({"encoder": dict(fingerprint)} if fingerprint else {})


def check_encoding(manifest: Manifest, wanted: Mapping[str, Any], where: str) -> None:
    """Compare a cache with what is wanted.

    Raises:
        ValueError: it was made otherwise; every difference is named.
    """
    found = disagreements(manifest.encoding, wanted)
    if found:
        raise ValueError(
            f"the encoded cache {where} is of another making: {'; '.join(found)}. Give another data.encoded and run "
            f"`accelerate launch -m data.encode --config ...` for it, or the settings that this one was made with."
        )


def disagreements(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Each fact in which a cache is not what is wanted. Mirrored latents that nobody wants are no fault."""
    found = []
    for key, here in wanted.items():
        had = there.get(key)
        if key == "name":  # the same weights may lie elsewhere
            continue
        if key == "encoder":
            found += differences(had or {}, here, "autoencoder" if wanted["form"] == "latents" else "text encoder")
        elif key == "flips":
            found += [] if set(here) <= set(had or ()) else [f"flips are {had} there and {here} here (--flips both)"]
        elif key == "source":
            found += [] if had == here else [f"images are {str(had)[:12]} there and {here[:12]} here"]
        elif had != here:
            found.append(f"{key} is {had} there and {here} here")
    return found


def pooled(encodings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
    """Of the array of a sample encoded at so many pixels: (plain and mirrored, moments x channels, height, width)."""
    rows = encoding["latent_channels"] * len(encoding["moments"])
    return len(encoding["flips"]), rows, height // encoding["factor"], width // encoding["factor"]


def latents_of(payload: bytes | memoryview, shape: tuple[int, int, int, int], mirror: bool = False) -> np.ndarray:
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


def text_of(payload: bytes | memoryview, width: int) -> np.ndarray:
    """The token states in the bytes of a `.text.npy`: (tokens, width), float16, read-only, without a copy.

    Raises:
        ValueError: no such array.
    """
    start = 10 + int.from_bytes(payload[8:10], "little")
    if (len(payload) - start) % (2 * width) or len(payload) <= start:
        raise ValueError(f"{len(payload)} bytes are no token states of width {width}: encode the captions again.")
    return np.frombuffer(payload, "<f2", -1, start).reshape(-1, width)


class Moments:
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
        out[:] = latents_of(payload, (len(self.encoding["flips"]), *out.shape), mirror)

    def tensor(self, array: np.ndarray) -> Tensor:
        """As it is."""
        return torch.from_numpy(array)
