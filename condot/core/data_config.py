"""The section `data` of a recipe: which samples, in what shape, from where.

The commands of `data/` and the recipe of a run are filled from this one dataclass. The comment
behind a field is its help text (`condot train --help`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .caption_fields import parse_captions
from .option_ranges import FloatRange, IntRange, check_numbers
from .printable import redact_url

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _require(rule: bool, name: str, value: object, text: str) -> None:
    if not rule:
        raise ValueError(f"data.{name}={value}: {text}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at what size, seen through which encoders."""

    # folders of shards with a manifest, as `condot prepare` makes them
    shards: tuple[str, ...] = ()
    # share of each folder in every batch; none shuffles all together
    weights: tuple[Annotated[float, FloatRange("(0, 1]", "positive shares that sum to 1.")], ...] = ()
    split: str = "train"  # which of the manifest's splits to train on
    # pixels; images are resized by the short side and cropped to this square
    resolution: Annotated[int, IntRange("[1, inf)", "at least 1 pixel. Use the side of your images, or 256.")] = 256
    # 1: gray; 2: gray and alpha; 3: RGB; 4: RGB and alpha; 5 and more: the bands of TIFF and .npy files
    channels: Annotated[int, IntRange("[1, 1024]", "choose 1 (gray), 2 (gray, alpha), 3 (RGB), 4 (RGB, alpha), or up to 1024.")] = 3
    # of a pixel's values as they are trained on; 16 keeps what 16-bit files hold, beside 8-bit ones
    bit_depth: Literal[8, 16] = 8
    horizontal_flip: bool = False  # mirror half of the images, chosen by (seed, position)
    random_crop: bool = False  # crop anywhere, chosen by (seed, position), instead of at the centre
    # width / height of each bucket, all of about resolution^2 pixels; none for squares
    aspect_ratios: tuple[Annotated[float, FloatRange("(0, inf)", "width / height of each bucket, positive. Use 0.75 1 1.33.")], ...] = ()
    # pixels of which every bucket's sides are multiples
    bucket_step: Annotated[int, IntRange("[1, inf)")] = 32
    # where captions are: txt, json.KEY (a list is joined with commas), json.KEY[*] (one entry of a list, drawn), or several by weight, as
    # txt=0.7,json.short=0.3; which a sample is shown with is drawn by (seed, position)
    caption: str = "txt"
    # shards; so many are mixed with one another, which bounds the memory of the order
    shuffle_block: Annotated[int, IntRange("[1, inf)", "at least 1 shard. Use 16 or more.")] = 16
    # threads that read and decode ahead on each rank; 0 reads inside the loop
    workers: Annotated[int, IntRange("[0, inf)", "0 or more threads.")] = 2
    # of samples that cannot be read; more stop training with the list
    max_bad_share: Annotated[float, FloatRange("[0, 1)", "a share below 1. Use 0.001; 0 stops at the first.")] = 0.001
    lost_shards: str = "stop"  # or skip: go on without a shard that is gone
    cache_dir: str = ""  # where copies of remote shards are kept
    cache_size: str = "100GB"  # of all copies
    retry_seconds: Annotated[float, FloatRange("(0, inf)", "a positive number of seconds.")] = (
        300.0  # a remote source is tried again for so long
    )
    # folder or Hub id of a frozen AutoencoderKL, AutoencoderTiny or AutoencoderDC; none trains on pixels
    autoencoder: str = ""
    # folders or Hub ids of frozen text encoders: CLIP, T5, or any that gives token states
    text_encoder: tuple[str, ...] = ()
    # longer captions are cut; one number for all encoders, or one each
    max_tokens: tuple[Annotated[int, IntRange("[1, inf)", "at least one token. Use 77 or 128.")], ...] = (128,)
    # mask: no attention to what stands behind a caption's end; attend: full length, all of it seen, as Stable Diffusion 3 and Flux do
    text_padding: Literal["mask", "attend"] = "mask"
    encoding: str = "online"  # or cached: read what `condot encode` wrote into data.encoded
    encoded: str = ""  # folder of that cache
    # multiplies latents after the shift, one number or one a channel; none: as measured (cached), or as the autoencoder says (online)
    latent_scale: tuple[Annotated[float, FloatRange("(0, inf)", "positive: one number, or one a channel. Use 0.18215 for SD's.")], ...] = ()
    # subtracted from latents, one number or one a channel; none: likewise
    latent_shift: tuple[Annotated[float, FloatRange("(-inf, inf)")], ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        _require(self.bit_depth in (8, 16), "bit_depth", self.bit_depth, "8, or 16 to keep what 16-bit files hold. Use 8.")
        _require(self.lost_shards in ("stop", "skip"), "lost_shards", self.lost_shards, "choose `stop` or `skip`.")
        parse_captions(self.caption)
        for name, place in (("encoded", self.encoded), ("cache_dir", self.cache_dir)):
            if "://" in place:
                raise ValueError(f"data.{name}={redact_url(place)!r}: it is written to, so give a folder of this machine.")
        parse_size(self.cache_size, "data.cache_size")
        self._check_buckets()
        self._check_weights()
        self._check_encoding()
        self._check_text()

    def _check_buckets(self) -> None:
        if not self.aspect_ratios:
            return
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
            raise ValueError("data.encoding=cached without data.encoded: name the folder that `condot encode --config ...` writes.")
        if self.encoding == "cached" and self.autoencoder and self.random_crop:
            raise ValueError(
                "data.random_crop=true with data.encoding=cached: latents are encoded once. Crop at the centre, or encode online."
            )

    def _check_text(self) -> None:
        # `--data.text_encoder=` names none
        object.__setattr__(self, "text_encoder", tuple(name for name in self.text_encoder if name))
        counts = " ".join(map(str, self.max_tokens))
        _require(bool(self.max_tokens), "max_tokens", counts, "at least one token. Use 77 or 128.")
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
