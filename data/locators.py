"""Where things lie, as a person writes it: URLs without their secrets, values of the environment, `~`.

`pipeline/printable.py` has the same `redact`, since the rooms do not know each
other: the two are one rule, and a test holds them equal. Both belong into one
place that all rooms may import, as soon as there is one.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from typing import NoReturn

from .printable import printable

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


def redact_url(url: str) -> str:
    """Return a URL that is the whole of a text, blanks and all, without its secrets; a local path stays as it is."""
    whole = WHOLE.fullmatch(url)
    return whole[1] + _cut_rest(whole[2]) if whole else redact(url) if "://" in url else url


def shown(url: str) -> str:
    """Return the URL of a folder as messages call it: without user, query and fragment; any other place as it is."""
    return redact_url(url).partition("?")[0] if "://" in url else url


def last_name(url: str) -> str:
    """Return the last name of a URL or path, without the query of a URL."""
    return (url.partition("?")[0] if "://" in url else url).rstrip("/").rpartition("/")[2]


def expanded(place: str, option: str = "data.shards") -> str:
    """Return a place with `~/` and each `${NAME}` replaced by what the environment holds.

    Args:
        place: as it was written.
        option: where, for errors.

    Raises:
        ValueError: no such variable; a URL whose secrets were cut.
    """
    if "://" in place and CUT in place:
        raise ValueError(
            f"{option}={place!r} comes from a run's files, where signatures and passwords are not kept: "
            f"give the URL again, whole, or write ${{NAME}} in it for a value of the environment."
        )

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{option}={redact_url(place)!r}: the environment has no {match[1]}. Set it: `export {match[1]}=...`.")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, os.path.expanduser(place) if place.startswith("~/") else place)


class Parser(argparse.ArgumentParser):
    """A parser of words whose errors, which repeat what was typed, may be printed."""

    def error(self, message: str) -> NoReturn:
        """Print the message without secrets and control characters, on one line, and end with status 2."""
        super().error(printable(redact(" ".join(message.split()))))


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
