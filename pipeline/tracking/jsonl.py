"""Lines of JSON in a file that only grows: a kill, a full disk or a lost folder costs no more than the lines of that time."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from condot.core.atomic_files import open_regular, write_whole

Line = dict[str, Any]
MAX_PENDING = 10_000
"""Lines that wait in memory for a disk; older ones are given up."""


def read_lines(path: Path, keep: Callable[[Line], Any] = lambda line: True) -> list[Line]:
    """Return the lines that `keep` keeps; one that a kill tore is none, nor is one that `keep` cannot read. What is no file has none."""
    kept = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            kept += [line] if keep(line) else []
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class JsonlWriter:
    """The writer's end of such a file; of one process.

    Args:
        path: of the file, made when the first line comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: deque[str] = deque(maxlen=MAX_PENDING)
        """Lines that the disk did not take yet."""
        self.dropped = 0
        self._failing = False

    def filter(self, rule: Callable[[Line], Any]) -> str:
        """Drop the lines that `rule` does not keep, of those that wait too; those at the end without any room on the disk.

        Returns:
            What is to be said: "" unless the file cannot be written, and keeps them.
        """
        remaining = [text for text in self.pending if rule(json.loads(text))]
        self.pending.clear()
        self.pending.extend(remaining)
        try:
            self._filter(rule)
        except OSError as error:
            return f"{self.path} cannot be written ({error.strerror}): it keeps lines of steps that are done again."
        return ""

    def _filter(self, rule: Callable[[Line], Any]) -> None:
        if not self.path.exists():
            return
        with open(self.path, "r+b", opener=open_regular) as file:  # what a link leads to is neither read nor cut
            wanted = "".join(_to_json(line) for line in read_lines(self.path, rule)).encode()
            if file.read().startswith(wanted):
                file.truncate(len(wanted))
            else:
                write_whole(self.path, wanted.decode())

    def append(self, lines: Iterable[Line]) -> str:
        """Write lines behind those that are there, or hold them until the next call.

        Args:
            lines: of values that JSON knows; NaN and infinities become null.

        Returns:
            What is to be said: "" while all is well, and while nothing is new.
        """
        for line in lines:
            self.dropped += len(self.pending) == MAX_PENDING
            self.pending.append(_to_json(line))
        if not self.pending:
            return ""
        try:
            self._write("".join(self.pending).encode())
        except OSError as error:
            message = "" if self._failing else f"{self.path.name} cannot be written ({error.strerror}); its lines wait in memory."
            self._failing = True
            return message
        lost = f", {self.dropped} are lost" if self.dropped else ""
        message = f"{self.path.name} can be written again; {len(self.pending)} lines caught up{lost}." if self._failing else ""
        self.pending.clear()
        self._failing = False
        return message

    def _write(self, text: bytes) -> None:
        """All of it, or nothing: of a line that a disk took in part the rest would follow another."""
        with open(self.path, "ab", buffering=0, opener=open_regular) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(size)
                raise


def _to_json(line: Line) -> str:
    try:
        return json.dumps(line, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps({name: _null_if_not_finite(value) for name, value in line.items()}) + "\n"


def _null_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
