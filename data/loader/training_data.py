"""What a run learns from, opened once: images or their latents, and captions as its text encoders see them."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass, replace

import torch

from condot.core.data_options import Options

from ..encoders.autoencoder import AutoencoderFacts, read_autoencoder
from ..encoders.text import TextFacts, read_text_encoders
from ..encoders.text_states import TextStates, layout
from ..storage.shard_reader import BadSample, Shards
from .build import Encoded, build, check_shapes, open_latents, open_shards, open_text
from .captions import check_captions
from .read_samples import read_captions
from .stream import Share, Stream
from .text_conditioner import Words


@dataclass
class Sources:
    """A recipe's section `data`, opened."""

    options: Options
    images: Shards
    autoencoder: AutoencoderFacts | None
    """Of the latents that are learned; None for pixels."""
    latents: Encoded | None
    """What was encoded before, whether it is read or only its statistics are."""
    spoken: tuple[TextFacts, ...]
    """The text encoders, of a network that takes text."""
    text: tuple[Encoded, ...]
    """Captions encoded before, by each."""
    note: str = ""
    """What is to be said of the captions at the start."""
    words: Words | None = None
    """The text encoders at work, once `listen` has said where."""

    @classmethod
    def open(cls, options: Options, takes_text: bool) -> Sources:
        """Open everything, build no network.

        Raises:
            ValueError: shards, encoders or caches that are not there or do not fit.
        """
        images = open_shards(options)
        known = read_autoencoder(options.autoencoder) if options.autoencoder else None
        if known:
            check_shapes(options, known)
        latents = open_latents(options, images, known) if known else None
        spoken = read_text_encoders(options) if takes_text else ()
        note = check_captions(images, options.caption) if spoken else ""
        text = open_text(options, images, spoken) if options.encoding == "cached" else ()
        return cls(options, images, known, latents, spoken, text, note)

    @property
    def cached(self) -> bool:
        """Whether batches hold moments of latents that were encoded before."""
        return self.latents is not None and self.options.encoding == "cached"

    @property
    def widths(self) -> tuple[int, int] | None:
        """Channels of a token and of the pooled vector, as a network takes them; None without text."""
        plan = layout(self.spoken) if self.spoken else None
        return (plan.width, plan.pooled_width) if plan else None

    def listen(self, device: torch.device) -> Words | None:
        """Put the text encoders on a device; None where there are none."""
        self.words = Words(self.spoken, device, self.text) if self.spoken else None
        return self.words

    def stream(self, seed: int, share: Share, start: int = 0, workers: int | None = None) -> Stream:
        """A rank's batches from a position on; arguments as in `opening.build`."""
        options = self.options if workers is None else replace(self.options, workers=workers)
        latents, captions = self.latents if self.cached else None, bool(self.spoken) and not self.text
        return build(options, seed=seed, share=share, start=start, captions=captions, images=self.images, latents=latents, text=self.text)

    def shown(self, seed: int, count: int) -> tuple[TextStates, TextStates] | None:
        """The first captions of the order, as the network takes them, and no caption, (1, ...); None without text."""
        if self.words is None:
            return None
        with closing(self.stream(seed, Share(batch_size=count), workers=0)) as stream:
            batch = next(stream)
        kept = torch.zeros(count, self.words.encoders, dtype=torch.bool)
        return self.words.told(batch, kept[:, 0], kept), self.words.null

    def examples(self, count: int) -> list[str]:
        """The first captions of the shards, at most so many, without the empty ones and those that cannot be read."""
        found = []
        for number in range(min(count, int(self.images.samples.sum()))):
            with suppress(BadSample):
                found += read_captions(self.images, self.options.caption, [number])
        return [caption for caption in found if caption]

    @property
    def cut(self) -> str:
        """What is to be said of captions that were too long; "" where none was."""
        if not self.words or not self.words.cut:
            return ""
        limits = " ".join(str(one.max_tokens) for one in self.spoken)
        return f"{self.words.cut:,} captions were longer than data.max_tokens={limits}, and cut."
