"""Text that a stranger wrote, made safe to print: no escape sequence, no overwritten line, no byte that a terminal cannot take."""

from __future__ import annotations

import unicodedata

HIDDEN = ("Cc", "Cs", "Zl", "Zp")
"""Categories of Unicode that are escaped: controls, lone surrogates (bytes that were no UTF-8), separators of lines."""
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of what follows, so that a name can be made to read as another."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return text with its control characters written out, as `\x1b`.

    Args:
        text: names of files, keys, captions, what a server answered.
        lines: keep line breaks, for text of several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(sign) if _is_hidden(sign) and not (lines and sign == "\n") else sign for sign in text)


def _is_hidden(sign: str) -> bool:
    return sign in DIRECTIONS or unicodedata.category(sign) in HIDDEN


def _escaped(sign: str) -> str:
    code = ord(sign)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8, as os.fsdecode keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
