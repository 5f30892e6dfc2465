"""The commands: `condot COMMAND`, `python -m condot COMMAND`, `accelerate launch -m condot train ...`.

Each is a row of COMMANDS. What it needs is imported when it runs, after signals are listened to.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from typing import NamedTuple, NoReturn

from condot.core.printable import guard_output
from condot.core.process import restart_with_allocator, take_signals
from condot.core.standard_streams import guard_streams


class Command(NamedTuple):
    """One command."""

    target: str
    """`module:function` of the words behind the command, which returns the exit status."""
    help: str
    words: tuple[str, ...] = ()
    """What stands before the user's words."""
    interrupted: str = ""
    """What an interruption leaves the user with while the slow imports run; empty where Python's own way will do."""
    allocator: bool = False
    """It frees and takes gigabytes at every step: see `restart_with_allocator`."""


WHOLE = "no file was left half-written"
COMMANDS: dict[str, Command] = {
    "train": Command(
        "condot.cli.train:program", "train, or go on with, a run", (), "the same command goes on from the last checkpoint", True
    ),
    "sample": Command("condot.cli.sample:main", "draw images from a run or a folder", ("images",), WHOLE),
    "evaluate": Command("condot.cli.sample:main", "measure how good samples are", ("evaluate",), WHOLE),
    "retrieve": Command("condot.cli.sample:main", "measure whether samples show what their captions say", ("retrieve",), WHOLE),
    "likelihood": Command("condot.cli.sample:main", "measure bits per dimension", ("likelihood",), WHOLE),
    "restore": Command("condot.cli.sample:main", "restore what is missing of an image", ("restore",), WHOLE),
    "export": Command("condot.cli.sample:main", "write the folder that diffusers loads", ("export",), WHOLE),
    "prepare": Command("condot.data.prepare.command:main", "pack images into shards"),
    "encode": Command("condot.data.encode.command:main", "encode shards once", (), "nothing was begun; run the same command again"),
    "inspect": Command("condot.data.inspect:main", "look at a folder of shards"),
    "recipes": Command("condot.cli.recipes:main", "list the example recipes, or copy one"),
}
"""A command is a row of this table; nothing else knows its name."""


def usage() -> str:
    """Return the help of `condot` itself: each command in a line."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    return "\n".join(("usage: condot COMMAND ...", "", *lines, "", "`condot COMMAND --help` lists the options of one."))


def version() -> str:
    """Return the installed version, or that of the checkout."""
    try:
        return metadata.version("condot")
    except metadata.PackageNotFoundError:
        return "0 (a checkout that is not installed)"


def start(name: str, argv: list[str]) -> NoReturn:
    """Run a command as the program that this process is."""
    command = COMMANDS[name]
    guard_streams()
    guard_output()
    if command.interrupted:
        take_signals(command.interrupted)
    if command.allocator:
        restart_with_allocator()
    module, _, function = command.target.partition(":")
    sys.exit(getattr(import_module(module), function)([*command.words, *argv]))


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command that the first word names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        start(name, rest)
    if name in ("--version", "-V"):
        print(f"condot {version()}")
        sys.exit(0)
    if name in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0)
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 1)
    meant = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}."
    print(f"error: {name!r} is no command of condot: {meant}", file=sys.stderr)
    sys.exit(2)
