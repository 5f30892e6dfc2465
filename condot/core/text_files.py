"""The texts that come beside images, captions and JSON, by one set of rules whatever they come from.

UTF-8, with or without its byte-order mark, or UTF-16 with one; anything else
is refused, since a wrong guess would be trained on. Blank text is no caption.
"""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

MAX_TEXT_BYTES = 1 << 20
"""A larger .json, .txt or .cls is refused."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(body: bytes) -> str:
    """Return the text of a `.txt`, `.json` or `.cls` file, stripped of blanks at both ends.

    Raises:
        ValueError: more than MAX_TEXT_BYTES, or neither UTF-8 nor marked as UTF-16; or NUL characters, which are UTF-16 without its mark.
    """
    if len(body) > MAX_TEXT_BYTES:
        raise ValueError(f"the text has {len(body)} bytes, at most {MAX_TEXT_BYTES} are read")
    try:  # utf-8-sig is written in Python, and this is read with every sample
        text = body.decode("utf-16") if body.startswith(UTF16) else body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is no UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("the text has NUL characters, as UTF-16 without its byte-order mark has: save it as UTF-8")
    if text[:1] == "\ufeff":  # also behind the mark, where two tools wrote one each
        text = text.lstrip("\ufeff")
    return text.strip()


def parse_json(body: bytes) -> Any:
    """Return what a `.json` file holds; None where it is blank.

    Raises:
        ValueError: no text by the rules of `decode_text`, or no JSON; nested too deeply counts as none.
    """
    text = decode_text(body)
    if not text:
        return None
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"the text is no JSON ({' '.join(str(error).split())})") from error


def caption_text(value: Any) -> str:
    """Return a caption from a value of a table or of JSON, stripped; "" for None, NaN and blanks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()
