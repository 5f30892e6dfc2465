"""What comes beside an image: its caption, and its caption as text encoders saw it before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .encoded import text_of
from .join import TextStates, length_of
from .shards import Shards


class Embeddings(NamedTuple):
    """Side shards of one encoder."""

    shards: Shards
    tokens: int
    """At most, of a caption; longer ones are cut."""
    width: int
    pooled_width: int


class Company(NamedTuple):
    """What goes with the images of a micro-batch, to be filled row by row."""

    captions: list[str]
    rows: list[list[tuple[np.ndarray, np.ndarray]]]
    """Of each encoder, of each image: states and pooled vector over the bytes that were read."""


NOTHING = np.zeros((0, 0), np.float16), np.zeros(0, np.float16)


class Beside:
    """Reads it.

    Args:
        images: the shards that hold the captions, whatever the images are read from.
        caption: "" for none, "txt", or "json.KEY".
        encoded: captions of each encoder, if they are wanted.
    """

    def __init__(self, images: Shards, caption: str, encoded: Sequence[Embeddings] = ()) -> None:
        self.images, self.caption, self.encoded = images, caption, tuple(encoded)

    def empty(self, count: int) -> Company:
        """For so many images."""
        return Company([""] * count if self.caption else [], [[NOTHING] * count for _ in self.encoded])

    def fill(self, company: Company, i: int, shard: int, number: int) -> None:
        """Read what goes with a sample into row i.

        Raises:
            ValueError: its bytes changed, or its shard is lost.
        """
        if self.caption:
            company.captions[i] = caption_of(self.images.read(shard, number).files, self.caption)
        for rows, (shards, _, width, pooled_width) in zip(company.rows, self.encoded, strict=True):
            block, size, crc32 = shards.records(shard)[number].item()[:3]
            rows[i] = text_of(shards.payload(shard, block, size, crc32), width, pooled_width)

    def text(self, company: Company) -> tuple[TextStates, ...]:
        """The filled rows as `Batch.text`."""
        return tuple(_stack(rows, one) for rows, one in zip(company.rows, self.encoded, strict=True))


def _stack(rows: list[tuple[np.ndarray, np.ndarray]], one: Embeddings) -> TextStates:
    """Rows of a micro-batch under a mask, float16."""
    counts = np.minimum([len(states) for states, _ in rows], one.tokens)
    length = length_of(int(counts.max()), one.tokens)
    whole = np.zeros((len(rows), length, one.width), np.float16)
    pooled = np.empty((len(rows), one.pooled_width), np.float16)
    for i, ((states, vector), count) in enumerate(zip(rows, counts.tolist(), strict=True)):
        whole[i, :count], pooled[i] = states[:count], vector
    mask = np.arange(length) < counts[:, None]
    return TextStates(torch.from_numpy(whole), torch.from_numpy(mask), torch.from_numpy(pooled))


def caption_of(files: dict[str, bytes], field: str) -> str:
    """A sample's caption.

    Args:
        files: of the sample, by extension.
        field: "txt", or "json.KEY".

    Returns:
        "" where it has none; the entries of a list with commas between.
    """
    extension, _, key = field.partition(".")
    text = files.get(extension, b"").decode("utf-8", "replace").strip()
    if not key or not text:
        return text
    try:
        found = json.loads(text)
    except ValueError:
        return ""
    value = found.get(key) if isinstance(found, dict) else None
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


PROBED = 100
"""Samples in which at least one caption must be."""


def check_captions(images: Shards, field: str) -> None:
    """Raises ValueError where none of the first samples has a caption, with what they have instead; arguments as in `Beside`."""
    there: dict[str, None] = {}
    count = min(PROBED, int(images.samples[0]))
    for number in range(count):
        files = images.read(0, number).files
        if caption_of(files, field):
            return
        there |= dict.fromkeys(f".{extension}" for extension in files)
        there |= dict.fromkeys(f"json.{key}" for key in _keys(files.get("json", b"")))
    raise ValueError(
        f"data.caption={field or '(empty)'}: none of the first {count} samples of {images.name(0)} has such a caption; "
        f"they have {', '.join(there)}. Choose `txt` or `json.KEY`, or pack the images with captions."
    )


def _keys(body: bytes) -> list[str]:
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        return []
    return list(found) if isinstance(found, dict) else []
