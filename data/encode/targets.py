"""What becomes of a sample in an encoded cache: its image as moments of latents, or its caption as token states.

A target turns the samples of a shard, in order, into one float16 array each, and
counts while it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from condot.core.caption_fields import CAPTION_SYNTAX, parse_captions, sample_captions
from condot.core.data_config import DataConfig

from ..encoders.autoencoder import Autoencoder, AutoencoderFacts, check_images
from ..encoders.text import TextEncoder
from ..encoders.text_states import TextFacts
from ..format.manifest import Manifest
from ..images.decode import DECODE_ERRORS, decode_into
from ..loader.buckets import Buckets
from ..loader.encoded_cache import multi_caption_rows, text_rows, wanted_latents, wanted_text, write_null
from ..loader.stream import to_unit
from .encoded_writer import Sums


@dataclass(frozen=True)
class EncodeItem:
    """One sample as it lies in the images' shard."""

    key: str
    where: str
    """Shard and key, for messages."""
    image: bytes
    files: dict[str, bytes]
    width: int
    height: int
    """Of the upright image, pixels."""


class EncodeTarget(Protocol):
    """One kind of encoded shard."""

    batch_size: int

    def facts(self, images: Manifest) -> dict[str, Any]:
        """What it is made from and how."""
        ...

    def prepare(self, item: EncodeItem) -> Any:
        """What a thread can do ahead."""
        ...

    def encode(self, items: list[EncodeItem], prepared: list[Any]) -> list[np.ndarray]:
        """One array a sample, float16."""
        ...

    def take_sums(self) -> Sums:
        """What was counted since the last call."""
        ...

    def summarize_sums(self, total: Sums) -> dict[str, Any]:
        """The sums of all shards as the manifest has them."""
        ...

    def write_extra(self, folder: Path) -> dict[str, Any]:
        """Write what lies beside the shards; gives facts of it for the manifest."""
        ...


class LatentTarget:
    """Images as posterior moments, plain and, if wanted, mirrored.

    Args:
        options: of the recipe.
        encoder_facts: the autoencoder's facts.
        load: builds it, when the first image comes.
        mirrored: encode the mirrored image too.
        batch_size: images at once.
        computed: name of the precision, for the facts.
    """

    def __init__(
        self,
        options: DataConfig,
        encoder_facts: AutoencoderFacts,
        load: Callable[[], Autoencoder],
        mirrored: bool,
        batch_size: int,
        computed: str,
    ) -> None:
        self.buckets = Buckets(options.aspect_ratios, options.resolution, options.bucket_step)
        for shape in self.buckets.shapes:
            check_images(encoder_facts, options.channels, *shape)
        self.options, self.encoder_facts, self._load, self.batch_size, self.computed = options, encoder_facts, load, batch_size, computed
        self.flips = ["plain", "mirrored"] if mirrored else ["plain"]
        self._start()

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Return the autoencoder, loaded on its device."""
        return self._load()

    def _start(self) -> None:
        self._bad: list[str] = []
        self._counts = np.zeros(2, np.int64)
        self._totals = np.zeros((3, self.encoder_facts.channels))

    def facts(self, images: Manifest) -> dict[str, Any]:
        return {
            **wanted_latents(self.options, images, self.encoder_facts.fingerprint),
            "name": self.encoder_facts.name,
            "flips": self.flips,
            "moments": ["value"] if self.encoder_facts.deterministic else ["mean", "std"],
            "latent_channels": self.encoder_facts.channels,
            "factor": self.encoder_facts.factor,
            "dtype": "float16",
            "computed": self.computed,
        }

    def prepare(self, item: EncodeItem) -> np.ndarray | str:
        """The image as training sees it, (C, H, W), uint8 or uint16, or why there is none."""
        bucket = self.buckets.nearest(np.array([item.width]), np.array([item.height]))[0]
        out = np.empty((*self.buckets.shapes[bucket], self.options.channels), f"uint{self.options.bit_depth}")
        try:
            decode_into(out, item.image)
        except DECODE_ERRORS as error:
            return " ".join(str(error).split()) or type(error).__name__
        return np.ascontiguousarray(out.transpose(2, 0, 1))

    def encode(self, items: list[EncodeItem], prepared: list[np.ndarray | str]) -> list[np.ndarray]:
        """(flips, moments x channels, h, w) each; without rows where the image cannot be decoded."""
        made: dict[int, np.ndarray] = {}
        shapes = [p.shape if isinstance(p, np.ndarray) else None for p in prepared]
        for shape in dict.fromkeys(s for s in shapes if s is not None):
            places = [i for i, s in enumerate(shapes) if s == shape]
            for first in range(0, len(places), self.batch_size):
                batch = places[first : first + self.batch_size]
                pixels = torch.from_numpy(np.stack([prepared[i] for i in batch]))
                made |= zip(batch, to_float16(self._moments(pixels), [items[i].where for i in batch]), strict=True)
        rows = self.encoder_facts.channels * (1 if self.encoder_facts.deterministic else 2)
        for i, reason in enumerate(prepared):
            if isinstance(reason, str):
                self._bad.append(f"{items[i].where} ({reason})")
                made[i] = np.zeros((0, rows, 1, 1), np.float16)
            else:
                self._count(made[i])
        return [made[i] for i in range(len(items))]

    def _moments(self, pixels: Tensor) -> Tensor:
        x = to_unit(pixels.to(self.autoencoder.model.device))
        views = (x, x.flip(-1))[: len(self.flips)]
        return torch.stack([self.autoencoder.moments(view) for view in views], dim=1)

    def _count(self, array: np.ndarray) -> None:
        values = array.astype(np.float64)
        mean, std = values[:, : self.encoder_facts.channels], values[:, self.encoder_facts.channels :]
        self._counts += (1, mean[:, 0].size)
        self._totals += [mean.sum((0, 2, 3)), (mean**2).sum((0, 2, 3)), (std**2).sum((0, 2, 3)) if std.size else 0 * self._totals[2]]

    def take_sums(self) -> Sums:
        count, values = self._counts.tolist()
        names = ("mean", "square", "variance")
        sums = {"count": count, "values": values, "bad": self._bad, **dict(zip(names, self._totals.tolist(), strict=True))}
        self._start()
        return sums

    def summarize_sums(self, total: Sums) -> dict[str, Any]:
        """Mean and deviation of each channel: of the means, and of samples, whose variance is larger by E[std^2]."""
        if not total["values"]:
            raise ValueError(f"none of the {len(total['bad'])} images can be decoded: {'; '.join(total['bad'][:5])}. Pack them again.")
        mean, square, variance = (np.array(total[key]) / total["values"] for key in ("mean", "square", "variance"))
        spread = np.maximum(square - mean**2, 0)
        statistics = {"mean": mean, "mean_std": np.sqrt(spread), "std": np.sqrt(spread + variance)}
        return {
            "statistics": {key: value.tolist() for key, value in statistics.items()}
            | {"samples": total["count"], "values": total["values"]},
            "bad": total["bad"],
        }

    def write_extra(self, folder: Path) -> dict[str, Any]:
        return {}


class TextTarget:
    """Captions as one encoder's pooled vectors and states, all of a sample; without one it has the empty caption, the null condition.

    Args:
        options: of the recipe.
        encoder_facts: the encoder's facts.
        load: builds it, when the first caption comes.
        batch_size: captions at once.
        computed: name of the precision, for the facts.
    """

    def __init__(
        self, options: DataConfig, encoder_facts: TextFacts, load: Callable[[], TextEncoder], batch_size: int, computed: str
    ) -> None:
        self.named = parse_captions(options.caption)
        if not self.named.fields:
            raise ValueError(f"data.caption is empty beside data.text_encoder: {CAPTION_SYNTAX}.")
        self.options, self.encoder_facts, self._load, self.batch_size, self.computed = options, encoder_facts, load, batch_size, computed
        self._start()

    def _start(self) -> None:
        names = ("count", "tokens", "missing", "cut", *(("captions",) if self.named.several else ()))
        self._counts, self._bad = dict.fromkeys(names, 0), list[str]()

    @cached_property
    def encoder(self) -> TextEncoder:
        """Return the text encoder, loaded on its device."""
        return self._load()

    def facts(self, images: Manifest) -> dict[str, Any]:
        said = {"width": self.encoder_facts.width, "pooled": self.encoder_facts.pooled_width, "padding": self.encoder_facts.padding}
        wanted = wanted_text(self.options, images, self.encoder_facts.fingerprint)
        return {**wanted, **said, "name": self.encoder_facts.name, "dtype": "float16", "computed": self.computed}

    def prepare(self, item: EncodeItem) -> list[tuple[int, str]] | str:
        """The captions, each with the number of its field, "" alone where there is none; or why they cannot be read."""
        try:
            return sample_captions(item.files, self.named.fields) or [(0, "")]
        except ValueError as error:
            return str(error)

    def encode(self, items: list[EncodeItem], prepared: list[list[tuple[int, str]] | str]) -> list[np.ndarray]:
        """(1 + tokens, channels) each, as `text_rows` has them, without what the mask hides; of several captions as `multi_caption_rows`.

        An array without rows where the text cannot be read.
        """
        captions = [(i, text) for i, found in enumerate(prepared) if not isinstance(found, str) for _, text in found]
        rows = self._rows([text for _, text in captions], [items[i].where for i, _ in captions])
        made, first = list[np.ndarray](), 0
        for item, found in zip(items, prepared, strict=True):
            if isinstance(found, str):
                self._bad.append(f"{item.where} ({found})")
                made.append(np.zeros((0, max(self.encoder_facts.width, self.encoder_facts.pooled_width)), np.float16))
                continue
            own = rows[first : first + len(found)]
            first += len(found)
            made.append(
                multi_caption_rows([(field, part) for (field, _), part in zip(found, own, strict=True)]) if self.named.several else own[0]
            )
            self._counts["count"] += 1
            self._counts["missing"] += not found[0][1]
        if self.named.several:
            self._counts["captions"] += sum(bool(text) for _, text in captions)
        return made

    def _rows(self, captions: list[str], where: list[str]) -> list[np.ndarray]:
        """The rows of each caption; `where` they are is for messages."""
        made, before = [np.zeros(0)] * len(captions), self.encoder.truncated
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))  # of like length together, for less padding
        for first in range(0, len(captions), self.batch_size):
            batch = order[first : first + self.batch_size]
            part, names = self.encoder.encode([captions[i] for i in batch]), [where[i] for i in batch]
            lengths = part.token_mask.sum(1).tolist()
            self._counts["tokens"] += sum(lengths)
            for i, states, pooled, length in zip(
                batch, to_float16(part.states, names), to_float16(part.pooled, names), lengths, strict=True
            ):
                made[i] = text_rows(states[:length], pooled)
        self._counts["cut"] += self.encoder.truncated - before
        return made

    def take_sums(self) -> Sums:
        sums = {**self._counts, "bad": self._bad}
        self._start()
        return sums

    def summarize_sums(self, total: Sums) -> dict[str, Any]:
        counted = {"samples": total["count"]} | {name: total[name] for name in ("captions", "tokens", "missing", "cut") if name in total}
        return {"statistics": counted, "bad": total["bad"]}

    def write_extra(self, folder: Path) -> dict[str, Any]:
        """The encoding of the empty caption."""
        return {"null": write_null(folder, lambda: self.encoder.null)}


def to_float16(values: Tensor, where: list[str]) -> list[np.ndarray]:
    """Arrays in float16.

    Raises:
        ValueError: a value that is not finite there, with the sample.
    """
    arrays = values.half().cpu().numpy()
    for array, name in zip(arrays, where, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} encodes to values that float16 does not hold (beyond 65504, or not finite): this encoder overflows. "
                f"Try --dtype fp32, or leave the sample out."
            )
    return list(arrays)
