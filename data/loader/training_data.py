"""What a run learns from, opened once: images or their latents, and captions as its text encoders see them."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass, replace

import torch

from condot.core.data_config import DataConfig
from condot.core.text_states import TextStates

from ..encoders.autoencoder import AutoencoderFacts, read_autoencoder
from ..encoders.text import read_text_encoders
from ..encoders.text_states import TextFacts, text_layout
from ..storage.shard_reader import BadSample, Shards
from .build import EncodedCache, build, check_shapes, open_encoded_latents, open_encoded_text, open_shards
from .captions import check_captions
from .read_samples import read_captions
from .stream import BatchStream, Share
from .text_conditioner import TextConditioner


@dataclass
class TrainingData:
    """A recipe's section `data`, opened."""

    options: DataConfig
    images: Shards
    autoencoder: AutoencoderFacts | None
    """Of the latents that are learned; None for pixels."""
    latents: EncodedCache | None
    """What was encoded before, whether it is read or only its statistics are."""
    text_encoders: tuple[TextFacts, ...]
    """The text encoders, of a network that takes text."""
    text: tuple[EncodedCache, ...]
    """Captions encoded before, by each."""
    caption_note: str = ""
    """What is to be said of the captions at the start."""
    text_conditioner: TextConditioner | None = None
    """The text encoders at work, once `build_text_conditioner` has said where."""

    @classmethod
    def open(cls, options: DataConfig, takes_text: bool) -> TrainingData:
        """Open everything, build no network.

        Raises:
            ValueError: shards, encoders or caches that are not there or do not fit.
        """
        images = open_shards(options)
        facts = read_autoencoder(options.autoencoder) if options.autoencoder else None
        if facts:
            check_shapes(options, facts)
        latents = open_encoded_latents(options, images, facts) if facts else None
        text_encoders = read_text_encoders(options) if takes_text else ()
        note = check_captions(images, options.caption) if text_encoders else ""
        text = open_encoded_text(options, images, text_encoders) if options.encoding == "cached" else ()
        return cls(options, images, facts, latents, text_encoders, text, note)

    @property
    def cached(self) -> bool:
        """Whether batches hold moments of latents that were encoded before."""
        return self.latents is not None and self.options.encoding == "cached"

    @property
    def widths(self) -> tuple[int, int] | None:
        """Channels of a token and of the pooled vector, as a network takes them; None without text."""
        plan = text_layout(self.text_encoders) if self.text_encoders else None
        return (plan.width, plan.pooled_width) if plan else None

    def build_text_conditioner(self, device: torch.device) -> TextConditioner | None:
        """Put the text encoders on a device; None where there are none."""
        self.text_conditioner = TextConditioner(self.text_encoders, device, self.text) if self.text_encoders else None
        return self.text_conditioner

    def stream(self, seed: int, share: Share, start: int = 0, workers: int | None = None) -> BatchStream:
        """A rank's batches from a position on; arguments as in `opening.build`."""
        options = self.options if workers is None else replace(self.options, workers=workers)
        latents, captions = self.latents if self.cached else None, bool(self.text_encoders) and not self.text
        return build(options, seed=seed, share=share, start=start, captions=captions, images=self.images, latents=latents, text=self.text)

    def preview_captions(self, seed: int, count: int) -> tuple[TextStates, TextStates] | None:
        """The first captions of the order, as the network takes them, and no caption, (1, ...); None without text."""
        if self.text_conditioner is None:
            return None
        with closing(self.stream(seed, Share(batch_size=count), workers=0)) as stream:
            batch = next(stream)
        kept = torch.zeros(count, self.text_conditioner.encoders, dtype=torch.bool)
        return self.text_conditioner.build_condition(batch, kept[:, 0], kept), self.text_conditioner.null

    def example_captions(self, count: int) -> list[str]:
        """The first captions of the shards, at most so many, without the empty ones and those that cannot be read."""
        found = []
        for number in range(min(count, int(self.images.samples.sum()))):
            with suppress(BadSample):
                found += read_captions(self.images, self.options.caption, [number])
        return [caption for caption in found if caption]

    @property
    def truncation_note(self) -> str:
        """What is to be said of captions that were too long; "" where none was."""
        if not self.text_conditioner or not self.text_conditioner.truncated:
            return ""
        limits = " ".join(str(one.max_tokens) for one in self.text_encoders)
        return f"{self.text_conditioner.truncated:,} captions were longer than data.max_tokens={limits}, and cut."
