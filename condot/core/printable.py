"""Text made safe to print and to keep: secrets of URLs cut, control characters written out."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import unicodedata
import warnings
from typing import Any

CUT = "…"
"""What stands where a secret stood."""
SECRET = re.compile(
    r"""(?P<scheme>[A-Za-z][\w+.-]+:/+)(?P<rest>(?:[^\s/?\#<>]*@)?(?:[^\s'"<>`]|['"](?=[^\s,;:.)\]}'"]))*)"""  # a URL
    r"""|\?(?P<query>(?=[\w.~%-]+=)[^\s'"<>`]*)"""  # of a URL that its library printed without its host
    r"""|\b(?P<token>hf_|api_org_)[A-Za-z0-9]{16,}""",
    re.VERBOSE,
)
HOST = re.compile(r"[^:\[]*(:\d*)?|\[[^\]]*\](:\d*)?")
"""A name or address with or without a port; anything else in its place holds a password."""
WHOLE = re.compile(r"([A-Za-z][\w+.-]+:/+)(.*)", re.DOTALL)
"""A text that is one URL; a single slash is left where a `Path` was made of it."""
PARAMETER = re.compile(r"[;&](?=[\w.~%-]+=)|%3[fF]")
"""Behind it in a path stands a value, as behind the question mark of a query."""
REFERENCE = re.compile(r"(?:[^\s:=&]*[:=])?\$\{\w+\}")
"""A value that the environment holds: no secret by itself."""
HIDDEN = ("Cc", "Cs", "Zl", "Zp")
"""Categories of Unicode that are escaped: controls, lone surrogates (bytes that were no UTF-8), separators of lines."""
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of what follows, so that a name can be made to read as another."""


def redact(text: str) -> str:
    """Return a text without the secrets of the URLs in it: `https://ann:pw@host/x?sig=1` becomes `https://host/x?…`.

    Users, passwords and queries are cut whatever they are called, fragments
    that hold a value, and tokens of the Hub anywhere. `${NAME}` stays.
    """
    return SECRET.sub(_cut, text) if ":/" in text or "?" in text or "hf_" in text or "api_org_" in text else text


def _cut(match: re.Match[str]) -> str:
    if match["token"]:
        return match["token"] + CUT
    if match["query"] is not None:
        return _cut_query(f"?{match['query']}")
    end = re.search(r"[:;,.)]*$", match["rest"])  # of the sentence, not of the URL
    assert end is not None
    return match["scheme"] + _cut_rest(match["rest"][: end.start()]) + end[0]


def _cut_rest(rest: str) -> str:
    """Return what follows the scheme of one URL, without its secrets."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    odd = not HOST.fullmatch(host) or (":" in host and rest[len(host) : len(host) + 1] in ("?", "#"))
    user, at, _ = (rest if odd and "@" not in host else host).rpartition("@")  # a password may hold a slash, ? or #
    if at and not REFERENCE.fullmatch(user):
        rest = rest[len(user) + 1 :]
    elif not at and not HOST.fullmatch(host):
        rest = host.partition(":")[0] + f":{CUT}"
    return _cut_query(rest)


def _cut_query(rest: str) -> str:
    """What follows the scheme, without query; without fragment where that is a value."""
    rest, sharp, fragment = rest.partition("#")
    path, question, query = rest.partition("?")
    if (value := PARAMETER.search(path)) and not REFERENCE.fullmatch(path[value.end() :]):
        path = path[: value.end()] + CUT
    if query and not all(REFERENCE.fullmatch(part) for part in query.split("&")):
        return f"{path}?{CUT}"
    return path + question + query + (sharp + (CUT if "=" in fragment or "?" in fragment else fragment))


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


def redact_url(url: str) -> str:
    """Return a URL that is the whole of a text, blanks and all, without its secrets; a local path stays as it is."""
    whole = WHOLE.fullmatch(url)
    return whole[1] + _cut_rest(whole[2]) if whole else redact(url) if "://" in url else url


def redacted(value: Any) -> Any:
    """Return nested settings with the secrets of their URLs cut: lists, mappings and texts; a local path stays as it is."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return redact_url(value) if isinstance(value, str) else value


def one_line(error: object, at_most: int = 0) -> str:
    """Return what an error says, whatever library raised it, on one line that may be printed.

    Args:
        error: the error, or its text.
        at_most: characters; 0 for all of them, as of errors of our own.
    """
    text = printable(redact(" ".join(str(error).split()))) or type(error).__name__
    return f"{text[:at_most]}..." if 0 < at_most < len(text) else text


def say(text: object, *, error: bool = False) -> None:
    """Print text, of one or more lines, to the screen or as an error."""
    print(printable(redact(str(text)), lines=True), file=sys.stderr if error else sys.stdout, flush=True)


def guard_output() -> None:
    """Keep secrets and control characters out of what Python prints by itself: tracebacks, warnings, log lines without a handler.

    To be called by a main program.
    """
    plain = warnings.formatwarning

    def told(error: BaseException | None) -> None:
        text = "".join(traceback.format_exception(error)) if error else ""
        print(printable(redact(text), lines=True), end="", file=sys.stderr, flush=True)

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(redact(super().format(record)), lines=True)

    sys.excepthook = lambda kind, error, trace: told(error)
    threading.excepthook = lambda args: told(args.exc_value)
    warnings.formatwarning = lambda *given, **more: printable(redact(plain(*given, **more)), lines=True)
    if logging.lastResort:
        logging.lastResort.setFormatter(Formatter())
