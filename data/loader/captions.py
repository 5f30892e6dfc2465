"""What comes with an image: its caption, and its captions as text encoders saw them before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from condot.core.caption_fields import ALL_ENTRIES, CAPTION_PURPOSE, caption_reader, parse_captions, sample_captions
from condot.core.printable import printable
from condot.core.text_files import parse_json
from condot.core.text_states import TextStates

from ..encoders.text_states import padded_length
from ..storage.shard_reader import LostShard, Shards
from .encoded_cache import draw_text_rows, read_text_rows
from .shuffle import uniform_at


class EncodedCaptions(NamedTuple):
    """Encoded shards of one encoder."""

    shards: Shards
    tokens: int
    """At most, of a caption; longer ones are cut."""
    width: int
    pooled_width: int


class CaptionBatch(NamedTuple):
    """What goes with the images of a micro-batch, to be filled row by row."""

    captions: list[str]
    rows: list[list[tuple[np.ndarray, np.ndarray]]]
    """Of each encoder, of each image: states and pooled vector over the bytes that were read."""
    uniforms: list[float]
    """Of each position, from 0 to below 1: names the caption that it draws, read now or encoded before."""


NO_STATES = np.zeros((0, 0), np.float16), np.zeros(0, np.float16)
NO_CAPTIONS = CaptionBatch([], [], [])
"""Of images that come with nothing."""


class CaptionReader:
    """Reads what goes with an image.

    Args:
        images: the shards that hold the captions, whatever the images are read from.
        caption: as `data.caption` has it.
        encoded: captions of each encoder, if they are wanted.
        seed: of the draw among several captions, which is a function of (seed, position).
        read: whether captions themselves are wanted.
    """

    def __init__(self, images: Shards, caption: str, encoded: Sequence[EncodedCaptions] = (), seed: int = 0, read: bool = True) -> None:
        self.images, self.encoded, self.seed = images, tuple(encoded), seed
        named, self.draw_caption = parse_captions(caption), caption_reader(caption)
        self.read, self.several, self.weights = read and bool(named.fields), named.several, named.weights

    def empty(self, positions: np.ndarray) -> CaptionBatch:
        """Return what is to be filled for the images of these positions, (B,)."""
        count = len(positions)
        uniforms = uniform_at(positions, self.seed, CAPTION_PURPOSE).tolist() if self.several else [0.0] * count
        return CaptionBatch([""] * count if self.read else [], [[NO_STATES] * count for _ in self.encoded], uniforms)

    def fill(self, caption_batch: CaptionBatch, i: int, shard: int, number: int) -> None:
        """Read what goes with a sample into row i.

        Raises:
            ValueError: its bytes changed, its shard is lost, or its text cannot be read.
        """
        if self.read:
            caption_batch.captions[i] = self.draw_caption(self.images.read(shard, number).files, caption_batch.uniforms[i])
        for rows, (shards, _, width, pooled_width) in zip(caption_batch.rows, self.encoded, strict=True):
            block, size, crc32 = shards.records(shard)[number].item()[:3]
            payload = shards.payload(shard, block, size, crc32)
            if self.several:
                rows[i] = draw_text_rows(payload, width, pooled_width, self.weights, caption_batch.uniforms[i])
            else:
                rows[i] = read_text_rows(payload, width, pooled_width)

    def text(self, caption_batch: CaptionBatch) -> tuple[TextStates, ...]:
        """The filled rows as `Batch.text`."""
        return tuple(_stack(rows, one) for rows, one in zip(caption_batch.rows, self.encoded, strict=True))


def _stack(rows: list[tuple[np.ndarray, np.ndarray]], one: EncodedCaptions) -> TextStates:
    """Rows of a micro-batch under a mask, float16."""
    counts = np.minimum([len(states) for states, _ in rows], one.tokens)
    length = padded_length(int(counts.max()), one.tokens)
    whole = np.zeros((len(rows), length, one.width), np.float16)
    pooled = np.empty((len(rows), one.pooled_width), np.float16)
    for i, ((states, vector), count) in enumerate(zip(rows, counts.tolist(), strict=True)):
        whole[i, :count], pooled[i] = states[:count], vector
    mask = np.arange(length) < counts[:, None]
    return TextStates(torch.from_numpy(whole), torch.from_numpy(mask), torch.from_numpy(pooled))


PROBED_SAMPLES = 100
"""Samples of a folder in which each field must be at least once."""
LISTED_FIELDS = 20
"""Fields that a message names of those that samples have."""
SENTENCE_WORDS = 4
"""A text of so many words is a sentence, and no tag."""
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
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
            there |= dict.fromkeys(f"json.{key}" for key in _json_mapping(files.get("json", b"")))
            for field in fields:
                try:
                    if sample_captions(files, (field,)):
                        missing.pop(field, None)
                except ValueError as error:
                    notes.append(f"; of one the text cannot be read ({error})")
                joined = joined or (field if _holds_sentences(files, field) else "")
            if fields == ("txt",) and not missing:
                return ""
        if fields and not missing:
            return f"data.caption={joined} joins lists of sentences with commas; {joined}{ALL_ENTRIES} draws one of them." if joined else ""
    raise ValueError(
        f"data.caption={next(iter(missing), '(empty)')}: none of the first {count} samples of {opened[0].name(0)} has such a caption; "
        f"they have {_list_fields(there)}{''.join(notes[:1])}. Choose `txt` or `json.KEY`, or pack the images with captions."
    )


def caption_warning(images: Shards, caption: str) -> str:
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
    for number in range(min(PROBED_SAMPLES, images.counts[shard])):
        try:
            yield images.read(shard, number).files
        except LostShard:
            raise
        except ValueError:
            yield {}


def _list_fields(there: dict[str, None]) -> str:
    more = len(there) - LISTED_FIELDS
    return ", ".join(map(printable, list(there)[:LISTED_FIELDS])) + (f" and {more} more" if more > 0 else "") or "nothing that can be read"


def _holds_sentences(files: dict[str, bytes], field: str) -> bool:
    """Whether a list of sentences would be joined into one caption; tags are mostly shorter than a sentence."""
    key = field.removeprefix("json.")
    if key == field or key.endswith(ALL_ENTRIES):
        return False
    value = _json_mapping(files.get("json", b"")).get(key)
    texts = value if isinstance(value, list) else []
    long = [isinstance(text, str) and (len(text.split()) >= SENTENCE_WORDS or text.strip().endswith(SENTENCE_ENDS)) for text in texts]
    return len(long) > 1 and 2 * sum(long) > len(long)


def _json_mapping(body: bytes) -> Mapping[str, object]:
    """Return the mapping that a `.json` holds; an empty one where it holds none."""
    try:
        found = parse_json(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
