"""What comes beside an image: its caption, and its captions as text encoders saw them before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from condot.core.caption_fields import ENTRIES, PURPOSE, caption_reader, captions_in, parse_captions
from condot.core.printable import printable
from condot.core.text_files import parse_json

from ..encoders.text_states import TextStates, length_of
from ..storage.shard_reader import LostShard, Shards
from .encoded_cache import drawn_text, text_of
from .shuffle import share_at


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
    shares: list[float]
    """Of each position, from 0 to below 1: names the caption that it draws, read now or encoded before."""


NOTHING = np.zeros((0, 0), np.float16), np.zeros(0, np.float16)
ALONE = Company([], [], [])
"""Of images that come with nothing."""


class Beside:
    """Reads what goes with an image.

    Args:
        images: the shards that hold the captions, whatever the images are read from.
        caption: as `data.caption` has it.
        encoded: captions of each encoder, if they are wanted.
        seed: of the draw among several captions, which is a function of (seed, position).
        read: whether captions themselves are wanted.
    """

    def __init__(self, images: Shards, caption: str, encoded: Sequence[Embeddings] = (), seed: int = 0, read: bool = True) -> None:
        self.images, self.encoded, self.seed = images, tuple(encoded), seed
        named, self.caption_of = parse_captions(caption), caption_reader(caption)
        self.read, self.several, self.weights = read and bool(named.fields), named.several, named.shares

    def empty(self, positions: np.ndarray) -> Company:
        """Return what is to be filled for the images of these positions, (B,)."""
        count = len(positions)
        shares = share_at(positions, self.seed, PURPOSE).tolist() if self.several else [0.0] * count
        return Company([""] * count if self.read else [], [[NOTHING] * count for _ in self.encoded], shares)

    def fill(self, company: Company, i: int, shard: int, number: int) -> None:
        """Read what goes with a sample into row i.

        Raises:
            ValueError: its bytes changed, its shard is lost, or its text cannot be read.
        """
        if self.read:
            company.captions[i] = self.caption_of(self.images.read(shard, number).files, company.shares[i])
        for rows, (shards, _, width, pooled_width) in zip(company.rows, self.encoded, strict=True):
            block, size, crc32 = shards.records(shard)[number].item()[:3]
            payload = shards.payload(shard, block, size, crc32)
            if self.several:
                rows[i] = drawn_text(payload, width, pooled_width, self.weights, company.shares[i])
            else:
                rows[i] = text_of(payload, width, pooled_width)

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


PROBED = 100
"""Samples of a folder in which each field must be at least once."""
LISTED = 20
"""Fields that a message names of those that samples have."""
WORDS = 4
"""A text of so many words is a sentence, and no tag."""
ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
"""Of sentences, the last three Chinese and Japanese ones."""


def check_captions(images: Shards | Sequence[Shards], caption: str) -> str:
    """Raise ValueError where none of the first samples has a caption of some field, with what they have instead.

    Args:
        images: shards of all folders, which may have different fields.
        caption: as `data.caption` has it.

    Returns:
        What is to be said of fields that hold several captions each; mostly "".
    """
    fields, opened = parse_captions(caption).fields, [images] if isinstance(images, Shards) else list(images)
    missing, there, notes = dict.fromkeys(fields), dict[str, None](), list[str]()
    count, joined = 0, ""
    for shards, first in [(one, shard) for one in opened for shard in _first_shards(one)]:
        for files in _samples(shards, first):
            count += 1
            there |= dict.fromkeys(f".{extension}" for extension in files)
            there |= dict.fromkeys(f"json.{key}" for key in _object(files.get("json", b"")))
            for field in fields:
                try:
                    if captions_in(files, (field,)):
                        missing.pop(field, None)
                except ValueError as error:
                    notes.append(f"; of one the text cannot be read ({error})")
                joined = joined or (field if _holds_sentences(files, field) else "")
            if fields == ("txt",) and not missing:
                return ""
        if fields and not missing:
            return f"data.caption={joined} joins lists of sentences with commas; {joined}{ENTRIES} draws one of them." if joined else ""
    raise ValueError(
        f"data.caption={next(iter(missing), '(empty)')}: none of the first {count} samples of {opened[0].name(0)} has such a caption; "
        f"they have {_listed(there)}{''.join(notes[:1])}. Choose `txt` or `json.KEY`, or pack the images with captions."
    )


def sentences_note(images: Shards, caption: str) -> str:
    """Return what `check_captions` says, "" where it raises: for those who only look."""
    try:
        return check_captions(images, caption)
    except ValueError:
        return ""


def _first_shards(images: Shards) -> list[int]:
    """Return the first shard of each folder."""
    return [0, *np.cumsum([len(part) for part in images.parts])[:-1].tolist()]


def _samples(images: Shards, shard: int) -> Iterator[dict[str, bytes]]:
    """Yield the files of a shard's first samples; none of one whose bytes changed, which is left to training to count."""
    for number in range(min(PROBED, images.counts[shard])):
        try:
            yield images.read(shard, number).files
        except LostShard:
            raise
        except ValueError:
            yield {}


def _listed(there: dict[str, None]) -> str:
    more = len(there) - LISTED
    return ", ".join(map(printable, list(there)[:LISTED])) + (f" and {more} more" if more > 0 else "") or "nothing that can be read"


def _holds_sentences(files: dict[str, bytes], field: str) -> bool:
    """Whether a list of sentences would be joined into one caption; tags are mostly shorter than a sentence."""
    key = field.removeprefix("json.")
    if key == field or key.endswith(ENTRIES):
        return False
    value = _object(files.get("json", b"")).get(key)
    texts = value if isinstance(value, list) else []
    long = [isinstance(text, str) and (len(text.split()) >= WORDS or text.strip().endswith(ENDS)) for text in texts]
    return len(long) > 1 and 2 * sum(long) > len(long)


def _object(body: bytes) -> Mapping[str, object]:
    """Return the mapping that a `.json` holds; an empty one where it holds none."""
    try:
        found = parse_json(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
