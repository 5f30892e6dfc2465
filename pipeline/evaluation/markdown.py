"""Strangers' words in Markdown: names of classes, folders and titles that can neither link, embed, format nor end what they stand in."""

from __future__ import annotations

import re

from condot.core.printable import printable

ACTIVE = re.compile(r"[&<>\[\]`*~|\\$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What CommonMark, GitHub's tables and links, and the Hub's formulas read as more than a letter; an underscore inside a word is one."""


def escape_markdown(text: str) -> str:
    """Return a stranger's text as one line that is read as it is spelt: active signs become entities, which never mark anything up.

    It may stand within a paragraph, a heading or a table's cell, behind a word of ours.
    """
    return ACTIVE.sub(lambda sign: f"&#{ord(sign[0])};", printable(" ".join(text.split())))


def code_span(text: str) -> str:
    """Return a stranger's text as a code span on one line, which no backtick in it ends; for a table see that it holds no pipe."""
    line = printable(" ".join(text.split()))
    ticks = "`" * (_longest(line) + 1)
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def code_block(text: str, language: str) -> str:
    """Return lines as a block of code that no line of them ends."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest(text: str) -> int:
    """Backticks of the longest row of them."""
    return max(map(len, re.findall("`+", text)), default=0)
