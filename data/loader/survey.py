"""What a recipe's section `data` would open, as far as it can be opened, and all that stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from condot.core.data_config import DataConfig
from condot.core.urls import expand_path

from ..encoders.autoencoder import AutoencoderFacts, read_autoencoder
from ..encoders.meta import meta_autoencoder, meta_text_encoder
from ..encoders.text import read_text_encoders
from ..encoders.text_states import TextFacts, text_layout
from ..format.manifest import Tally
from ..format.shard_table import Shard
from ..storage.local import LocalFolder, ShardFolder, expand_braces
from ..storage.shard_reader import Shards
from .buckets import Buckets
from .build import EncodedCache, check_shapes, open_encoded_latents, open_encoded_text, open_shards
from .captions import check_captions

T = TypeVar("T")
NAMED = 3
"""Faults of a folder's shards that are reported one by one."""


@dataclass
class Survey:
    """A section `data`, looked at; what could not be had is None or empty."""

    options: DataConfig
    takes_text: bool
    images: Shards | None = None
    autoencoder: AutoencoderFacts | None = None
    latents: EncodedCache | None = None
    text_encoders: tuple[TextFacts, ...] = ()
    widths: tuple[int, int] | None = None
    """Channels of a token and of the pooled vector."""
    tokens: int = 0
    """Of a caption, at most."""
    here: bool = False
    """All shards are."""
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no mistake, and perhaps not meant."""

    def attempt(self, act: Callable[..., T], *arguments: Any) -> T | None:
        """What a function gives, or None and one mistake more."""
        try:
            return act(*arguments)
        except (ValueError, OSError) as error:
            text = " ".join(str(error).split())
            if text not in self.mistakes:
                self.mistakes.append(text)
            return None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, pixels, of the largest batch's images."""
        shapes = self.attempt(Buckets, self.options.aspect_ratios, self.options.resolution, self.options.bucket_step)
        return max(shapes.shapes, key=lambda shape: shape[0] * shape[1]) if shapes else (self.options.resolution,) * 2

    @property
    def samples(self) -> list[int]:
        """Return the number of samples of each shard."""
        return self.images.counts if self.images else []

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.manifest.class_names if self.images else ()

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the shards."""
        return self.images.fingerprint if self.images else ""

    def at_work(self) -> Iterator[tuple[str, nn.Module, Callable[[Any, int], Any]]]:
        """The frozen encoders that work in every step: name, network on the meta device, and what it computes of so many images."""
        if self.options.encoding != "online":
            return
        autoencoder = self.attempt(meta_autoencoder, self.autoencoder) if self.autoencoder else None
        if autoencoder is not None and self.autoencoder:
            yield "autoencoder", autoencoder, partial(_encode, sample=(self.autoencoder.image_channels, *self.shape))
        for one in self.text_encoders:
            network = self.attempt(meta_text_encoder, one)
            if network is not None:
                yield "text encoder", network, partial(_read, tokens=one.max_tokens)


def _encode(network: Any, images: int, sample: tuple[int, ...]) -> Any:
    return network.encode(torch.zeros(images, *sample))


def _read(network: Any, images: int, tokens: int) -> Any:
    return network(torch.zeros(images, tokens, dtype=torch.int64))


def survey(options: DataConfig, takes_text: bool) -> Survey:
    """Look at everything, build nothing; a mistake does not keep the rest from being looked at."""
    seen = Survey(options, takes_text)
    seen.images = _images(seen, options)
    if options.autoencoder:
        seen.autoencoder = seen.attempt(read_autoencoder, options.autoencoder)
    if seen.autoencoder:
        seen.attempt(check_shapes, options, seen.autoencoder)
    if seen.images and seen.autoencoder:
        seen.latents = seen.attempt(open_encoded_latents, options, seen.images, seen.autoencoder)
    if takes_text:
        seen.text_encoders = _encoders(seen, options)
        _text(seen, options)
    if seen.images:
        buckets = seen.attempt(Buckets, options.aspect_ratios, options.resolution, options.bucket_step)
        sizes = sum((folder.manifest.tally for folder in seen.images.folders), Tally()).sizes
        if buckets:
            seen.attempt(buckets.check, sizes)
    return seen


def _images(seen: Survey, options: DataConfig) -> Shards | None:
    """The shards. Where they cannot be opened together, each source is asked what is wrong with it, and manifests alone tell the rest."""
    try:
        images = open_shards(options)
        seen.here = True
        return images
    except (ValueError, OSError) as error:
        first = " ".join(str(error).split())
    found: list[ShardFolder] = []
    for place in [place for source in options.shards for place in seen.attempt(expand_braces, source) or []]:
        if place.endswith(".tar") or "://" in place:
            seen.attempt(open_shards, replace(options, shards=(place,), weights=()))
        elif folder := seen.attempt(lambda place: ManifestFolder(expand_path(place)), place):
            seen.mistakes += folder.first_faults()
            found.append(folder)
    if not seen.mistakes:
        seen.mistakes.append(first)  # it is wrong with all together
    return seen.attempt(Shards, found, options.split) if found else None


class ManifestFolder(LocalFolder):
    """A folder of shards of which the manifest is read; the shards need not be here.

    Raises:
        ValueError: no such folder, no manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.faults: list[str] = []
        super().__init__(path)

    def file(self, shard: Shard) -> Path:
        """Where the tar should lie; what is wrong with it goes into `faults`."""
        try:
            return super().file(shard)
        except ValueError as error:
            self.faults.append(str(error))
            return self.path / shard.name

    def first_faults(self) -> list[str]:
        """The first faults, and how many there are."""
        more = len(self.faults) - NAMED
        return [
            *self.faults[:NAMED],
            *([f"{self.name}: so it is with {more} more of {len(self.manifest.shards)} shards."] if more > 0 else []),
        ]


def _encoders(seen: Survey, options: DataConfig) -> tuple[TextFacts, ...]:
    """The text encoders; all or none, since a network's width hangs on all."""
    found = seen.attempt(read_text_encoders, options)
    if found is None and len(options.text_encoder) > 1:
        for number, name in enumerate(options.text_encoder):
            tokens = options.max_tokens if len(options.max_tokens) == 1 else options.max_tokens[number : number + 1]
            seen.attempt(read_text_encoders, replace(options, text_encoder=(name,), max_tokens=tokens))
    plan = seen.attempt(text_layout, found) if found else None
    if plan:
        seen.widths, seen.tokens = (plan.width, plan.pooled_width), plan.tokens
    return found or ()


def _text(seen: Survey, options: DataConfig) -> None:
    """Captions, and what was encoded of them before."""
    if seen.images and seen.here:
        note = seen.attempt(check_captions, seen.images, options.caption)
        seen.notes += [note] if note else []
    if seen.images and seen.text_encoders and options.encoding == "cached":
        seen.attempt(open_encoded_text, options, seen.images, seen.text_encoders)
