"""The commands: `condot COMMAND`, `python -m condot COMMAND`, `accelerate launch -m condot train ...`.

Each is a line of COMMANDS. What it needs is imported when it runs, after signals are listened to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module, metadata
from typing import NamedTuple, NoReturn

from condot.core.plugins import load_plugins, split_plugin_words
from condot.core.printable import guard_output
from condot.core.process import EXIT_USER_ERROR, report_errors, restart_with_allocator, take_signals
from condot.core.registry import Registry
from condot.core.standard_streams import guard_streams

Program = Callable[[list[str]], int]
"""From the user's words to the exit status."""


class Command(NamedTuple):
    """One command."""

    target: str | Program
    """The function behind it, or `module:function`, which is imported when the command runs."""
    help: str
    """One line."""
    group: str = "your own"
    """Its heading in `condot --help`."""
    interrupted: str = ""
    """What an interruption during the slow imports leaves the user with; "" where Python's own way will do."""
    allocator: bool = False
    """It frees and takes gigabytes at every step: see `restart_with_allocator`."""


WHOLE = "no file was left half-written"
RESUMES = "the same command goes on from the last checkpoint"
AGAIN = "nothing was begun; run the same command again"
COMMANDS: Registry[Command] = Registry(
    "command",
    {
        "prepare": Command("condot.data.prepare.command:main", "pack images into shards", "data"),
        "encode": Command("condot.data.encode.command:main", "encode shards once, into latents or text states", "data", AGAIN),
        "inspect": Command("condot.data.inspect:main", "check shards, and draw the batches of a run", "data"),
        "train": Command("condot.cli.train:program", "train a run, or go on with it", "training", RESUMES, True),
        "recipes": Command("condot.cli.recipes:main", "list the example recipes, or copy one", "training"),
        "sample": Command("condot.cli.sample:main", "draw images from a run or an exported folder", "models", WHOLE),
        "restore": Command("condot.cli.restore:main", "fill in, colour or enlarge an image", "models", WHOLE),
        "export": Command("condot.cli.export:main", "write the folder that diffusers loads", "models", WHOLE),
        "evaluate": Command("condot.cli.evaluate:main", "measure how good samples are", "figures", WHOLE),
        "retrieve": Command("condot.cli.retrieve:main", "measure whether samples show their captions", "figures", WHOLE),
        "likelihood": Command("condot.cli.likelihood:main", "measure bits per dimension", "figures", WHOLE),
    },
)
"""A command is a line of this table, or of a file given as `--plugin`; nothing else knows its name."""


def usage() -> str:
    """Return the help of `condot` itself: the commands by group, a line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: condot COMMAND ...", "       condot --plugin FILE.py COMMAND ..."]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}  {each.help}" for name, each in COMMANDS.items() if each.group == group]
    return "\n".join([*lines, "", "`condot COMMAND --help` lists the options of one; `condot --version` says which condot this is."])


def version() -> str:
    """Return the installed version, or say that there is none."""
    try:
        return metadata.version("condot")
    except metadata.PackageNotFoundError:
        return "0 (a checkout that is not installed)"


def start(name: str, argv: list[str]) -> NoReturn:
    """Run a command as the program that this process is."""
    words, plugins = _split_plugins(argv)
    _prepare_process(COMMANDS[name])
    _run(name, words, plugins)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command that the first word names."""
    words, plugins = _split_plugins(sys.argv[1:] if argv is None else argv)
    name, *rest = words or ["--help"]
    _prepare_process(COMMANDS.get(name))
    _run(name, rest, plugins)


def _split_plugins(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words without `--plugin FILE`, wherever it stands, and the files; ends the process where no file is named."""
    try:
        plugins, words = split_plugin_words(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    return words, plugins


def _prepare_process(command: Command | None) -> None:
    """Listen to signals before anything slow."""
    guard_streams()
    guard_output()
    if command and command.interrupted:
        take_signals(command.interrupted)
    if command and command.allocator:
        restart_with_allocator()


def _run(name: str, words: list[str], plugins: list[str]) -> NoReturn:
    sys.exit(_run_command([name, *words], plugins) if plugins else _find(name)(words))


def _run_command(argv: list[str], plugins: list[str]) -> int:
    """Run the user's own files, and then the command, which may be theirs."""

    @report_errors
    def run(words: list[str]) -> int:
        load_plugins(plugins)
        return _find(words[0])(words[1:])

    return run(argv)


def _find(name: str) -> Program:
    """Return the function behind a command, or behind the word that stands in its place."""
    if name in ("--version", "-V"):
        return lambda words: _say(f"condot {version()}")
    if name in ("--help", "-h", "help"):
        return lambda words: _say(usage())
    if name not in COMMANDS:
        return lambda words: _refuse(name)
    target = COMMANDS[name].target
    if not isinstance(target, str):
        return report_errors(target)
    module, _, function = target.partition(":")
    program: Program = getattr(import_module(module), function)
    return program


def _say(text: str) -> int:
    print(text)
    return 0


def _refuse(name: str) -> int:
    """Say which command was meant."""
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 1)
    meant = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}."
    print(f"error: {name!r} is no command of condot: {meant}", file=sys.stderr)
    return 2
