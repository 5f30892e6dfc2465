"""What comes beside an image: its caption, and its caption as a text encoder saw it before."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from .encoded import text_of
from .shards import Shards


class Company(NamedTuple):
    """What goes with the images of a micro-batch, to be filled row by row."""

    captions: list[str]
    states: np.ndarray | None
    """(B, tokens, width), float16; zero behind a caption's end."""
    mask: np.ndarray | None
    """(B, tokens), bool: where there is a token."""


class Beside:
    """Reads it.

    Args:
        images: the shards that hold the captions, whatever the images are read from.
        caption: "" for none, "txt", or "json.KEY".
        text: side shards of encoded captions, or None.
        tokens: rows of their arrays; longer captions are cut.
        width: channels of a token.
    """

    def __init__(self, images: Shards, caption: str, text: Shards | None = None, tokens: int = 0, width: int = 0) -> None:
        self.images, self.caption, self.text, self.tokens, self.width = images, caption, text, tokens, width

    def empty(self, count: int) -> Company:
        """For so many images."""
        states = np.zeros((count, self.tokens, self.width), np.float16) if self.text else None
        mask = np.zeros((count, self.tokens), bool) if self.text else None
        return Company([""] * count if self.caption else [], states, mask)

    def fill(self, company: Company, i: int, shard: int, number: int) -> None:
        """Read what goes with a sample into row i.

        Raises:
            ValueError: its bytes changed, or its shard is lost.
        """
        if self.caption:
            company.captions[i] = caption_of(self.images.read(shard, number).files, self.caption)
        if self.text and company.states is not None and company.mask is not None:
            states = text_of(self.text.payload(shard, *self.text.records(shard)[number].item()[:3]), self.width)[: self.tokens]
            company.states[i, : len(states)], company.mask[i, : len(states)] = states, True


def caption_of(files: dict[str, bytes], field: str) -> str:
    """A sample's caption.

    Args:
        files: of the sample, by extension.
        field: "txt", or "json.KEY".

    Returns:
        "" where it has none.
    """
    extension, _, key = field.partition(".")
    text = files.get(extension, b"").decode("utf-8", "replace").strip()
    if not key or not text:
        return text
    try:
        found = json.loads(text)
        return str(found.get(key, "")) if isinstance(found, dict) else ""
    except ValueError:
        return ""
