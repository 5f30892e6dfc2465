"""Work beside training: what fails of it is told once for each cause, and ends nothing.

Previews, snapshots, figures of utilisation and trackers are not the state:
whatever they raise, the run goes on, with the same weights. Saving is no such
work, nor is what all ranks decide together.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch

from condot.core.printable import one_line

T = TypeVar("T")
MAX_ERROR_CHARS = 300
"""Characters of an error that are told."""


class BestEffortError(Exception):
    """Why some work could not be done, in words that need no name of an exception before them."""


class BestEffort:
    """Does such work, and keeps what was told of it.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.failures: Counter[str] = Counter()
        """How often each kind of work failed for each cause."""

    def __call__(self, what: str, work: Callable[[], T], *, reraise: tuple[type[Exception], ...] = ()) -> T | None:
        """Return what `work` returns, or None where it failed.

        Args:
            what: of which kind the work is, as messages call it.
            work: it is called without arguments.
            reraise: exceptions that are no failure, and are raised.
        """
        try:
            return work()
        except reraise:
            raise
        except Exception as error:
            name = "" if isinstance(error, BestEffortError) else f"{type(error).__name__}: "
            message, memory = f"{name}{one_line(error)}"[:MAX_ERROR_CHARS], is_out_of_memory(error)
        if memory:
            free_memory()  # here, where the exception no longer holds what was computed
        self.fail(what, message)
        return None

    def fail(self, what: str, cause: str) -> None:
        """Count a failure, and tell it where it is the first of its cause."""
        self.failures[f"{what}: {cause}"] += 1
        if self.failures[f"{what}: {cause}"] == 1:
            self.say(f"{what} failed, and training goes on ({cause}). Further failures of this kind are not told.")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was lacking, of a device or of this machine, as torch or Python say it."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
    )


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
