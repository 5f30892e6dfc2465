"""The samples that the stream had to replace: counted on all ranks, listed in bad_samples.jsonl, too many of them an error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from condot.core.printable import redact, say
from condot.core.process import DataError

from .jsonl import JsonlWriter, read_lines


class BadSamples:
    """The samples that the stream had to replace, on all ranks: counted, listed in bad_samples.jsonl, and too many of them an error.

    Args:
        folder: the run's.
        share: of all images seen that may be bad.
        main: is this the main process?
        start: images seen so far; lines of later positions are dropped, since they come again.
    """

    def __init__(self, folder: Path, *, share: float, main: bool, start: int) -> None:
        self.path, self.share, self.main = folder / "bad_samples.jsonl", share, main
        self.file = JsonlWriter(self.path)
        self.lines = read_lines(self.path, lambda line: line["position"] < start)
        if main and (said := self.file.filter(lambda line: line["position"] < start)):
            say(said, error=True)

    def report(self, found: Iterable[Any], images: int, *, any_rank: bool = True) -> int:
        """Take note of what all ranks replaced; all ranks together.

        Args:
            found: since the last call, on this rank; each with the fields position, shard, key, error.
            images: seen so far by all ranks together.
            any_rank: false where it is known that no rank found any; nothing is exchanged then.

        Returns:
            How many there were in this run.
        """
        new = (
            sorted(gather_object([{**fault._asdict(), "error": redact(fault.error)} for fault in found]), key=lambda line: line["position"])
            if any_rank
            else []
        )
        self.lines += new
        if self.main:
            self.file.append(new)
        return len(self.lines)

    def check(self, images: int) -> None:
        """Raises DataError where more than the share of the images seen was bad, or of a thousand while fewer were seen, with the list."""
        if len(self.lines) > self.share * max(images, 1000):
            listed = "; ".join(f"{line['shard']}: {line['key']} ({line['error']})" for line in self.lines[-10:])
            raise DataError(
                f"{len(self.lines)} bad samples among {images} images are more than data.max_bad_share={self.share:g} allows. The last: "
                f"{listed}. All are in {self.path}: mend or leave them out (`condot inspect` finds them), or raise the share."
            )
