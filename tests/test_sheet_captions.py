"""Captions below pictures: cut to their line with bounded work, whatever strangers wrote."""

import codecs

import pytest
from PIL import Image, ImageDraw, ImageFont

from condot.data.prepare.report import LONGEST, SIDE, _tile_label, contact_sheet, shortened

TILE = Image.new("RGB", (8, 8))


def slow(line, measure):
    """The longest beginning that fits with three dots, found a character at a time."""
    if measure(line) <= SIDE:
        return line
    while line and measure(f"{line}...") > SIDE:
        line = line[:-1]
    return f"{line.rstrip()}..." if line else ""


@pytest.mark.parametrize("text", ["a cat", "W" * 60, "i" * 300, "many short words " * 20, "日本語" * 50, "", "   ", "x" * 23])
def test_a_line_is_cut_where_a_character_at_a_time_would_cut_it(text):
    pen, font = ImageDraw.Draw(TILE.copy()), ImageFont.load_default(11)

    def measure(line):
        return pen.textlength(line, font)

    assert shortened(text, SIDE, measure) == slow(" ".join(text.split()), measure)


@pytest.mark.parametrize("count", [1_200, 750_000, 3_000_000])
def test_the_work_for_a_caption_does_not_grow_with_it(count):
    """One measure of the whole line, and those of a bisection over LONGEST characters; none of more than LONGEST and three dots."""
    seen = []

    def measure(line):
        seen.append(len(line))
        return 3.0 * len(line)

    line = shortened("ab " * (count // 3), SIDE, measure)
    assert line.endswith("...") and 3 * len(line) <= SIDE < 3 * (len(line) + 2)
    assert len(seen) <= 1 + LONGEST.bit_length() and max(seen) <= LONGEST + 3


def test_any_text_is_drawn():
    """Line breaks, controls, escapes, lone surrogates, marks of direction, signs no font has: a sheet, and ink on its line."""
    texts = ["a\nb", "a\0b", "\x1b[2Jc", "\ud800\udfff\udc80", "שלום עולם " * 40, "\u202eabc", "👩\u200d👩\u200d👧" * 99, "e\u0301" * 400]
    for text in [*texts, "\u2028" * 5, "\u200b" * 9_999, "x" * (1 << 20)]:
        sheet = contact_sheet([(TILE, text)], 1)
        below = sheet.crop((0, 8 + SIDE + 1, sheet.width, sheet.height)).convert("L").getextrema()
        assert (below[0] < 128) == bool(text.split()) or text.startswith("\u200b"), ascii(text[:9])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (codecs.BOM_UTF8 + "añ".encode(), "añ"),
        (" añ ".encode("utf-16"), "añ"),
        (b"  ", "cat"),
        ("añ".encode("latin-1"), "cat"),
        (None, "cat"),
    ],
)
def test_below_a_picture_stands_the_caption_as_training_reads_it_else_the_class(body, line):
    assert _tile_label({} if body is None else {"txt": body}, 1, ("dog", "cat")) == line
