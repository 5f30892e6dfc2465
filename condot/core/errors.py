"""What an error says, and which things are meant, in one line that may be printed."""

from __future__ import annotations

import re

from .printable import printable


def describe_error(error: BaseException) -> str:
    """Return an error in one line, without the addresses of objects that Pillow puts into some."""
    text = printable(re.sub(r" <[^<>]* object at 0x[0-9a-f]+>", "", " ".join(str(error).split())))
    return text[:300] if text else type(error).__name__


def summarize_list(items: list[str], limit: int = 5) -> str:
    """Return the first few of a list, safe to print, and how many more there are."""
    return "; ".join(map(printable, items[:limit])) + (f"; and {len(items) - limit:,} more" if len(items) > limit else "")
