"""Texts beside images: what each encoding is read as, what is refused, and what is safe to print."""

import pytest

from condot.core.printable import printable
from condot.core.text_files import caption_text, decode_text, parse_json

CAPTION = "a café, 猫 and שלום"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marked_text_is_read_to_the_letter(encoding):
    assert decode_text(f"  {CAPTION}\r\n".encode(encoding)) == CAPTION


def test_big_endian_text_is_read_by_its_mark():
    assert decode_text(b"\xfe\xff" + CAPTION.encode("utf-16-be")) == CAPTION


def test_each_mark_goes_where_several_tools_wrote_one():
    assert decode_text(b"\xef\xbb\xbf" * 2 + b"cat") == decode_text("\ufeff\ufeffcat".encode("utf-16")) == "cat"
    assert decode_text("a\ufeffb".encode()) == "a\ufeffb"


@pytest.mark.parametrize("body", ["café".encode("latin-1"), "caf".encode("utf-16-le"), b"a\0b", b"x" * (1 << 20) + b"y"])
def test_what_could_only_be_guessed_is_refused(body):
    with pytest.raises(ValueError, match="text"):
        decode_text(body)


def test_json_is_read_behind_a_mark_and_refused_when_too_deep():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse_json(b"") is parse_json(b" \n") is parse_json(b"\xef\xbb\xbf") is None
    for body in (b"[" * 200_000, b"{", b"9" * 5000):
        with pytest.raises(ValueError):
            parse_json(body)


def test_nothing_is_no_caption():
    assert [caption_text(value) for value in (None, float("nan"), "  ", 5, " a ")] == ["", "", "", "5", "a"]


def test_what_strangers_wrote_cannot_steer_a_terminal():
    assert printable("plain café שלום 猫") == "plain café שלום 猫"
    assert printable("a\x1b[31mred\r\n\x9b\u202egpj.exe") == r"a\x1b[31mred\x0d\x0a\x9b\u202egpj.exe"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == r"caf\xe9"
    assert printable("one\n\x07two", lines=True) == "one\n\\x07two"
    for text in ("\ud800", "a\x1b", "\udc80"):
        printable(text).encode()
