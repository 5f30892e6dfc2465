"""A command whose words fill one dataclass: what becomes of an error, and what several processes must not share, said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from condot.core.plugins import take_plugins
from condot.core.process import report_errors
from condot.pipeline.config.parse import parse
from condot.pipeline.launch.distributed import require_single_process

Options = TypeVar("Options")


def options_command(options: type[Options], act: Callable[[Options], int], single_process: str = "") -> Callable[[list[str]], int]:
    """Return the command: from the user's words to an exit status.

    Args:
        options: the dataclass that the words fill.
        act: what is done with it; returns the exit status.
        single_process: the command's name where it is the work of one process; "" where several share it.
    """

    @report_errors
    def main(argv: list[str]) -> int:
        if single_process:
            require_single_process(single_process)
        return act(parse(options, take_plugins(argv)))

    return main
