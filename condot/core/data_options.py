"""What a recipe's section `data` says, for the commands of this room: `pipeline/config.py` describes the same fields to `train.py`.

A test holds the two to the same names and defaults.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .caption_fields import format_caption_fields, parse_captions
from .printable import redact_url
from .safe_yaml import read_yaml

MOST_CHANNELS = 1024
"""Hyperspectral cameras have some hundred bands; more is a slip."""
BIT_DEPTHS = (8, 16)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _require(rule: bool, name: str, value: object, text: str) -> None:
    if not rule:
        raise ValueError(f"data.{name}={value}: {text}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which samples, in what shape, from where.

    Raises:
        ValueError: a value that can be wrong by itself.
    """

    shards: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    split: str = "train"
    resolution: int = 256
    channels: int = 3
    bit_depth: int = 8
    horizontal_flip: bool = False
    random_crop: bool = False
    aspect_ratios: tuple[float, ...] = ()
    bucket_step: int = 32
    caption: str = "txt"
    """One field or several by weight, as `caption_fields` writes them; "" for none."""
    shuffle_block: int = 16
    workers: int = 2
    max_bad_share: float = 0.001
    lost_shards: str = "stop"
    cache_dir: str = ""
    cache_size: str = "100GB"
    retry_seconds: float = 300.0
    autoencoder: str = ""
    text_encoder: tuple[str, ...] = ()
    max_tokens: tuple[int, ...] = (128,)
    text_padding: str = "mask"
    encoding: str = "online"
    encoded: str = ""
    latent_scale: tuple[float, ...] = ()
    latent_shift: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, float)]
            _require(all(map(math.isfinite, numbers)), item.name, value, "numbers that are finite.")
        _require(self.resolution >= 1, "resolution", self.resolution, "at least 1 pixel. Use the side of your images, or 256.")
        channels = f"1 (gray), 2 (gray, alpha), 3 (RGB), 4 (RGB, alpha), or up to {MOST_CHANNELS} (the bands of TIFF or .npy files)."
        _require(1 <= self.channels <= MOST_CHANNELS, "channels", self.channels, f"choose {channels}")
        _require(self.bit_depth in BIT_DEPTHS, "bit_depth", self.bit_depth, "8, or 16 to keep what 16-bit files hold. Use 8.")
        _require(self.shuffle_block >= 1, "shuffle_block", self.shuffle_block, "at least 1 shard. Use 16 or more.")
        _require(self.workers >= 0, "workers", self.workers, "0 or more threads.")
        _require(0 <= self.max_bad_share < 1, "max_bad_share", self.max_bad_share, "a share below 1. Use 0.001; 0 stops at the first.")
        _require(self.lost_shards in ("stop", "skip"), "lost_shards", self.lost_shards, "choose `stop` or `skip`.")
        parse_captions(self.caption)
        for name, place in (("encoded", self.encoded), ("cache_dir", self.cache_dir)):
            if "://" in place:
                raise ValueError(f"data.{name}={redact_url(place)!r}: it is written to, so give a folder of this machine.")
        _require(self.retry_seconds > 0, "retry_seconds", self.retry_seconds, "a positive number of seconds.")
        parse_size(self.cache_size, "data.cache_size")
        self._check_buckets()
        self._check_weights()
        self._check_encoding()
        self._check_text()

    def _check_buckets(self) -> None:
        if not self.aspect_ratios:
            return
        _require(
            min(self.aspect_ratios) > 0, "aspect_ratios", self.aspect_ratios, "width / height of each bucket, positive. Use 0.75 1 1.33."
        )
        _require(1 <= self.bucket_step <= self.resolution, "bucket_step", self.bucket_step, "1 pixel to data.resolution.")

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if len(self.weights) != len(self.shards):
            raise ValueError(f"data.weights has {len(self.weights)} numbers for {len(self.shards)} sources in data.shards: give one each.")
        total = sum(self.weights)
        if min(self.weights) <= 0 or abs(total - 1) > 1e-6:
            share = ", ".join(f"{w / total:.6g}" for w in self.weights) if min(self.weights) > 0 else "positive shares"
            raise ValueError(f"data.weights={self.weights} sum to {total:g}: positive shares that sum to 1. Use {share}.")

    def _check_encoding(self) -> None:
        if self.encoding not in ("online", "cached"):
            raise ValueError(f"data.encoding={self.encoding!r}: choose `online` or `cached`.")
        if self.encoding == "cached" and not self.encoded:
            raise ValueError(
                "data.encoding=cached without data.encoded: name the folder that `accelerate launch -m data.encode --config ...` writes."
            )
        if self.latent_scale:
            _require(
                min(self.latent_scale) > 0,
                "latent_scale",
                self.latent_scale,
                "positive: one number, or one a channel. Use 0.18215 for SD's.",
            )
        if self.encoding == "cached" and self.autoencoder and self.random_crop:
            raise ValueError(
                "data.random_crop=true with data.encoding=cached: latents are encoded once. Crop at the centre, or encode online."
            )

    def _check_text(self) -> None:
        object.__setattr__(self, "text_encoder", tuple(name for name in self.text_encoder if name))  # `--data.text_encoder=` names none
        counts = " ".join(map(str, self.max_tokens))
        _require(min(self.max_tokens, default=0) >= 1, "max_tokens", counts, "at least one token. Use 77 or 128.")
        _require(self.text_padding in ("mask", "attend"), "text_padding", self.text_padding, "choose `mask` or `attend`.")
        if len(self.max_tokens) not in (1, max(1, len(self.text_encoder))):
            raise ValueError(
                f"data.max_tokens={counts} has {len(self.max_tokens)} numbers for {len(self.text_encoder)} encoders in data.text_encoder: "
                f"give one for all, or one each."
            )

    @property
    def cache_bytes(self) -> int:
        """Bytes that cached shards may take."""
        return parse_size(self.cache_size, "data.cache_size")


def parse_size(text: str, name: str) -> int:
    """`256MB` as a number of bytes; a ValueError that calls the value `name` for what is no size."""
    number = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        return int(float(number) * UNITS[unit if unit in UNITS else f"{unit}B"])
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{name} {text!r} is no size: write 256MB, 1GB or a number of bytes.") from error


def read_options(recipe: str | Path, over: dict[str, Any] | None = None) -> tuple[Options, dict[str, Any]]:
    """The section `data` of a recipe, and the whole recipe as a mapping.

    Args:
        recipe: a YAML file; what it `extends` is read first.
        over: fields of the section that replace the recipe's.

    Raises:
        ValueError: no such file, an unknown field, a value that cannot be right.
    """
    whole = _load(Path(recipe))
    section = {**whole.get("data", {}), **(over or {})}
    known = {item.name: str(item.type) for item in fields(Options)}
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            raise ValueError(f"unknown key 'data.{key}'" + (f": did you mean 'data.{near[0]}'?" if near else "."))
        section[key] = _typed(key, format_caption_fields(value) if key == "caption" else value, known[key])
    return Options(**section), whole


READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda word: int(str(word)),
    "float": lambda word: float(str(word)),
    "bool": lambda word: {"true": True, "false": False}[str(word).lower()],
    "str": lambda word: "" if word is None else os.path.expanduser(str(word)) if str(word).startswith("~/") else str(word),
}


def _typed(name: str, value: Any, kind: str) -> Any:
    """A YAML value, or words of a command, as a field's type `int` or `tuple[int, ...]` has it: YAML takes 1e-3 for a word."""
    one = kind.removeprefix("tuple[").split(",")[0]
    words = list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        values = tuple(READERS[one](word) for word in words)
        if len(values) > 1 and not kind.startswith("tuple"):
            raise ValueError
        return values if kind.startswith("tuple") else values[-1]
    except (ValueError, KeyError, IndexError):
        raise ValueError(f"data.{name}={' '.join(map(str, words))}: give {one}{', one alone' if len(words) > 1 else ''}.") from None


def _load(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe on top of what it extends; `pipeline/recipe.py` reads the same form, and the rooms are sealed."""
    if not path.is_file():
        raise ValueError(f"--config {path}: no such recipe. The shipped ones are in configs/.")
    if path.resolve() in seen:
        raise ValueError(f"{path}: recipes extend one another in a circle: {' -> '.join(p.name for p in (*seen, path))}.")
    recipe = read_yaml(path) or {}
    if not isinstance(recipe, dict) or not isinstance(recipe.get("data", {}), dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections (data, model, flow, train, ...).")
    base = recipe.pop("extends", None)
    return _over(_load(path.parent / str(base), (*seen, path.resolve())), recipe) if base else recipe


def _over(base: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe on top of another, section by section."""
    both = {key: {**base[key], **value} for key, value in recipe.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return {**base, **recipe, **both}
