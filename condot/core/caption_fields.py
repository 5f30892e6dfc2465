"""The captions of a sample that a recipe names, by weight, and which of them a position draws.

A field is `txt`, `json.KEY`, or `json.KEY[*]`, each entry of a list. Several
fields are written `txt=0.7,json.short=0.3`; weights are shares of their sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from .text_files import caption_text, decode_text, parse_json

CAPTION_SYNTAX = "choose `txt`, `json.KEY`, or `json.KEY[*]` for one entry of a list; several with weights as txt=0.7,json.KEY=0.3"
ALL_ENTRIES = "[*]"
MAX_ENTRIES = 64
"""A list with more captions is refused: a cache holds an encoding of each."""
CAPTION_PURPOSE = 10
"""Of the draw, among the numbers that hashes are named by; see `order.share_at`."""


class CaptionFields(NamedTuple):
    """What `data.caption` names, in the order of its fields' names, so that a recipe may list them in any."""

    fields: tuple[str, ...]
    weights: tuple[float, ...]
    """Of each field; they sum to 1."""

    @property
    def several(self) -> bool:
        """Whether a sample can have more than one caption."""
        return len(self.fields) > 1 or any(field.endswith(ALL_ENTRIES) for field in self.fields)


def format_caption_fields(value: Any) -> Any:
    """Return a mapping of fields to weights, or a list of fields, as the one text that `data.caption` is kept as; all else as it is."""
    if isinstance(value, Mapping) and value:
        return ",".join(f"{field}={weight}" for field, weight in value.items())
    if isinstance(value, (list, tuple)) and value:
        return ",".join(map(str, value))
    return str(value) if isinstance(value, (Mapping, list, tuple)) else value


@lru_cache
def parse_captions(text: str) -> CaptionFields:
    """Return what the text of `data.caption` names; "" names none.

    Raises:
        ValueError: an unknown field, one named twice, a weight that is not positive and finite.
    """
    if not text.strip():
        return CaptionFields((), ())
    pairs = [(field.strip(), equals, weight.strip()) for field, equals, weight in (part.partition("=") for part in text.split(","))]
    weights: dict[str, float] = {}
    for field, equals, weight in pairs:
        _check_field(field, text)
        if field in weights:
            raise ValueError(f"data.caption={text}: {field} is named twice. Name each field once, with the sum of its weights.")
        weights[field] = _weight(weight, text) if equals else 1.0
    if len({equals for _, equals, _ in pairs}) > 1:
        raise ValueError(f"data.caption={text}: only some fields have a weight. Give each one, or none for equal weights.")
    try:
        total = math.fsum(weights.values())  # exact, so in any order the same
    except OverflowError:
        raise ValueError(f"data.caption={text}: the weights are too large to be added. Use smaller ones; only ratios count.") from None
    fields = tuple(sorted(weights))
    return CaptionFields(fields, tuple(weights[field] / total for field in fields))


def _check_field(field: str, text: str) -> None:
    key = field.removeprefix("json.").removesuffix(ALL_ENTRIES)
    if field == f"txt{ALL_ENTRIES}":
        raise ValueError(f"data.caption={text}: a .txt is one caption; only a list in JSON has entries. Use txt, or json.KEY[*].")
    if field != "txt" and not (field.startswith("json.") and key):
        raise ValueError(f"data.caption={text}: {field or '(empty)'!s} is no field of a sample: {CAPTION_SYNTAX}.")


def _weight(word: str, text: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"data.caption={text}: the weight {word or '(empty)'} is no positive number. Use 0.7, or leave the field out.")
    return weight


def sample_captions(files: Mapping[str, bytes], fields: Sequence[str]) -> list[tuple[int, str]]:
    """Return a sample's captions, none of them blank, each with the number of its field, in the order of fields.

    Args:
        files: of the sample, by extension.
        fields: as `CaptionFields` has them.

    Raises:
        ValueError: a text or JSON that cannot be read, or that holds no text where a caption should be.
    """
    found: list[tuple[int, str]] = []
    parsed: Any = None
    extension = "txt"
    try:
        for number, field in enumerate(fields):
            extension = field[:4].rstrip(".")
            if extension not in files:
                continue
            if extension == "txt":
                texts = [decode_text(files["txt"])]
            else:
                parsed = parse_json(files["json"]) if parsed is None else parsed
                texts = _texts(parsed, field[5:])
            found += [(number, text) for text in texts if text]
    except ValueError as error:
        raise ValueError(f".{extension}: {error}") from error
    return found


def _texts(parsed: Any, key: str) -> list[str]:
    """Return the captions under a key of JSON: the entries of a list where the key ends in `[*]`, else one, a list joined with commas."""
    entries = key.endswith(ALL_ENTRIES)
    name = key.removesuffix(ALL_ENTRIES) if entries else key
    value = parsed.get(name) if isinstance(parsed, dict) else None
    if not isinstance(value, list):
        return [_text(value, name)]
    texts = [text for text in (_text(entry, name) for entry in value) if text]
    if not entries:
        return [", ".join(texts)]
    if len(texts) > MAX_ENTRIES:
        raise ValueError(f"{name} holds {len(texts)} captions, at most {MAX_ENTRIES} are read: shorten the list")
    return texts


def _text(value: Any, name: str) -> str:
    if isinstance(value, (dict, list)):
        raise ValueError(f"{name} holds a {'mapping' if isinstance(value, dict) else 'list within a list'} where a caption should be")
    text = caption_text(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a character, and no tokenizer takes it
            raise ValueError(f"{name} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character") from error
    return text


def draw_index(numbers: Sequence[int], weights: Sequence[float], uniform: float) -> int:
    """Return which of a sample's captions is drawn.

    Args:
        numbers: of each caption's field, at least one.
        weights: of each field; those of fields that the sample lacks fall to
            the others in proportion, and captions of one field have equal odds.
        uniform: of the position, from 0 to below 1.
    """
    counts = Counter(numbers)
    left = uniform * math.fsum(weights[number] for number in counts)
    for i, number in enumerate(numbers):
        left -= weights[number] / counts[number]
        if left < 0:
            return i
    return len(numbers) - 1  # by rounding


def draw_caption(files: Mapping[str, bytes], caption: str, uniform: float = 0.0) -> str:
    """Return the caption that a sample is shown with.

    Args:
        files: of the sample, by extension.
        caption: as `data.caption` has it.
        uniform: of the position, see `draw_index`.

    Returns:
        "" where it has none; the entries of a list with commas between, unless `[*]` asks for one.

    Raises:
        ValueError: see `sample_captions`.
    """
    return caption_reader(caption)(files, uniform)


@lru_cache
def caption_reader(caption: str) -> Callable[[Mapping[str, bytes], float], str]:
    """Return `draw_caption` for one `data.caption`, without what need not be done for each sample."""
    named = parse_captions(caption)
    if not named.fields:
        return lambda files, uniform: ""
    if named.several:
        return partial(_drawn, named)
    return _plain if named.fields == ("txt",) else partial(_keyed, named.fields[0].removeprefix("json."))


def _drawn(named: CaptionFields, files: Mapping[str, bytes], uniform: float) -> str:
    found = sample_captions(files, named.fields)
    return found[draw_index([number for number, _ in found], named.weights, uniform)][1] if found else ""


def _plain(files: Mapping[str, bytes], uniform: float) -> str:
    try:
        return decode_text(files["txt"]) if "txt" in files else ""
    except ValueError as error:
        raise ValueError(f".txt: {error}") from error


def _keyed(key: str, files: Mapping[str, bytes], uniform: float) -> str:
    try:
        return _texts(parse_json(files["json"]), key)[0] if "json" in files else ""
    except ValueError as error:
        raise ValueError(f".json: {error}") from error
