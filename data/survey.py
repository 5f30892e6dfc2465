"""What a recipe's section `data` would open, as far as it can be opened, and all that stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from .beside import check_captions
from .buckets import Buckets
from .encoders import AutoencoderFacts, read_autoencoder
from .hollow import hollow_autoencoder, hollow_text_encoder
from .index import Tally
from .join import layout
from .opening import Encoded, check_shapes, open_latents, open_shards, open_text
from .options import Options
from .shards import Shards
from .text_encoders import TextFacts, read_text_encoders

T = TypeVar("T")


@dataclass
class Survey:
    """A section `data`, looked at; what could not be had is None or empty."""

    options: Options
    takes_text: bool
    images: Shards | None = None
    autoencoder: AutoencoderFacts | None = None
    latents: Encoded | None = None
    spoken: tuple[TextFacts, ...] = ()
    widths: tuple[int, int] | None = None
    """Channels of a token and of the pooled vector."""
    tokens: int = 0
    """Of a caption, at most."""
    mistakes: list[str] = field(default_factory=list)

    def tried(self, act: Callable[..., T], *arguments: Any) -> T | None:
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
        shapes = self.tried(Buckets, self.options.aspect_ratios, self.options.resolution, self.options.bucket_step)
        return max(shapes.shapes, key=lambda shape: shape[0] * shape[1]) if shapes else (self.options.resolution,) * 2

    @property
    def samples(self) -> list[int]:
        """Of each shard."""
        return list(self.images.counts) if self.images else []

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.manifest.class_names if self.images else ()

    @property
    def fingerprint(self) -> str:
        """Of the shards."""
        return self.images.fingerprint if self.images else ""

    def at_work(self) -> Iterable[tuple[str, nn.Module, Callable[[nn.Module, int], Any]]]:
        """The frozen encoders that work in every step: name, network on the meta device, and what it computes of so many images."""
        if self.options.encoding != "online":
            return
        if self.autoencoder:
            height, width = self.shape
            channels = self.autoencoder.image_channels
            network = self.tried(hollow_autoencoder, self.autoencoder)
            if network is not None:
                yield "autoencoder", network, lambda it, images: it.encode(torch.zeros(images, channels, height, width))
        for one in self.spoken:
            network = self.tried(hollow_text_encoder, one)
            if network is not None:
                yield "text encoder", network, lambda it, images, n=one.max_tokens: it(torch.zeros(images, n, dtype=torch.int64))


def survey(options: Options, takes_text: bool) -> Survey:
    """Look at everything, build nothing; a mistake does not keep the rest from being looked at."""
    seen = Survey(options, takes_text)
    seen.images = _images(seen, options)
    if options.autoencoder:
        seen.autoencoder = seen.tried(read_autoencoder, options.autoencoder)
    if seen.autoencoder:
        seen.tried(check_shapes, options, seen.autoencoder)
    if seen.images and seen.autoencoder:
        seen.latents = seen.tried(open_latents, options, seen.images, seen.autoencoder)
    if takes_text:
        seen.spoken = _encoders(seen, options)
        _text(seen, options)
    if seen.images:
        buckets = seen.tried(Buckets, options.aspect_ratios, options.resolution, options.bucket_step)
        sizes = sum((folder.manifest.tally for folder in seen.images.folders), Tally()).sizes
        if buckets:
            seen.tried(buckets.check, sizes)
    return seen


def _images(seen: Survey, options: Options) -> Shards | None:
    """The shards; where they cannot be opened together, each source is asked what is wrong with it."""
    found = len(seen.mistakes)
    images = seen.tried(open_shards, options)
    if images is None and len(options.shards) > 1:
        for source in options.shards:
            seen.tried(open_shards, replace(options, shards=(source,), weights=()))
        if len(seen.mistakes) > found + 1 and seen.mistakes[found] in seen.mistakes[found + 1 :]:
            del seen.mistakes[found]
    return images


def _encoders(seen: Survey, options: Options) -> tuple[TextFacts, ...]:
    """The text encoders; all or none, since a network's width hangs on all."""
    found = seen.tried(read_text_encoders, options)
    if found is None and len(options.text_encoder) > 1:
        for number, name in enumerate(options.text_encoder):
            tokens = options.max_tokens if len(options.max_tokens) == 1 else options.max_tokens[number : number + 1]
            seen.tried(read_text_encoders, replace(options, text_encoder=(name,), max_tokens=tokens))
    plan = seen.tried(layout, found) if found else None
    if plan:
        seen.widths, seen.tokens = (plan.width, plan.pooled_width), plan.tokens
    return found or ()


def _text(seen: Survey, options: Options) -> None:
    """Captions, and what was encoded of them before."""
    if seen.images:
        seen.tried(check_captions, seen.images, options.caption)
    if seen.images and seen.spoken and options.encoding == "cached":
        seen.tried(open_text, options, seen.images, seen.spoken)
