"""Where things lie, as a person writes it: URLs, values of the environment, `~`."""

from __future__ import annotations

import argparse
import os
import re
from typing import NoReturn

from .printable import CUT, printable, redact, redact_url


def display_url(url: str) -> str:
    """Return the URL of a folder as messages call it: without user, query and fragment; any other place as it is."""
    return redact_url(url).partition("?")[0] if "://" in url else url


def last_name(url: str) -> str:
    """Return the last name of a URL or path, without the query of a URL."""
    return (url.partition("?")[0] if "://" in url else url).rstrip("/").rpartition("/")[2]


def expand_path(place: str, option: str = "data.shards") -> str:
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


class RedactingParser(argparse.ArgumentParser):
    """A parser of words whose errors, which repeat what was typed, may be printed."""

    def error(self, message: str) -> NoReturn:
        """Print the message without secrets and control characters, on one line, and end with status 2."""
        super().error(printable(redact(" ".join(message.split()))))
