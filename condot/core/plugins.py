"""A user's own files, which add to the tables of kinds: run when `--plugin FILE` names them, and never otherwise.

No recipe, checkpoint or exported folder can name code to run. A run records the name and the hash of each file instead,
and says which one to give when it is read back without it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import describe_error
from .registry import Registry, UnknownKindError, registering_from

MODULE_PREFIX = "condot_plugin_"
"""Of the name by which Python knows a plugin, so that worker processes can be told it."""


@dataclass(frozen=True)
class Plugin:
    """A file that was run."""

    path: Path
    sha256: str
    entries: tuple[tuple[Registry[Any], str], ...]
    """What it added."""

    def as_dict(self) -> dict[str, str]:
        """Return what a run records: the file's name, without its folder, and its hash."""
        return {"name": self.path.name, "sha256": self.sha256}


_loaded: dict[Path, Plugin] = {}


def load_plugins(paths: Iterable[str | Path]) -> list[Plugin]:
    """Run plugins, in order, each once; one that was edited since replaces what it had added.

    Raises:
        ValueError: no such file, or one that fails or adds nothing; what it had added until then is taken back.
    """
    return [_load(Path(path).expanduser()) for path in paths]


def loaded_plugins() -> list[dict[str, str]]:
    """Return the name and hash of every plugin of this process, in order."""
    return [plugin.as_dict() for plugin in _loaded.values()]


def plugin_paths() -> tuple[Path, ...]:
    """Return the files of this process's plugins, for worker processes to load."""
    return tuple(_loaded)


def unload_plugins() -> None:
    """Take back all that plugins added."""
    for path in list(_loaded):
        _unload(path)


def _unload(path: Path) -> None:
    for registry, name in _loaded.pop(path).entries:
        registry.discard(name)
    sys.modules.pop(_module_name(path), None)


def _module_name(path: Path) -> str:
    return MODULE_PREFIX + path.stem


def _load(path: Path) -> Plugin:
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"--plugin {path}: no Python file there. Give the path of a .py file that registers something.")
    path = path.resolve()
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if path in _loaded:
        if _loaded[path].sha256 == sha256:
            return _loaded[path]
        _unload(path)
    twin = next((other for other in _loaded if other.stem == path.stem), None)
    if twin:
        raise ValueError(f"--plugin {path} beside {twin}: plugins are known by their names. Rename one of them.")
    try:
        with registering_from(path.name) as added:
            _run(path, content)
    except Exception as error:  # whatever somebody's own code raises
        sys.modules.pop(_module_name(path), None)
        line = _line_in(path, error)
        raise ValueError(f"--plugin {path}{line}: {type(error).__name__}: {describe_error(error)}") from error
    if not added:
        sys.modules.pop(_module_name(path), None)
        raise ValueError(f'--plugin {path}: it registers nothing. Write @TABLE.register("name") above what it adds (docs/extending.md).')
    _loaded[path] = Plugin(path, sha256, tuple(added))
    return _loaded[path]


def _run(path: Path, content: bytes) -> None:
    """Run a file as a module, from the very bytes that were hashed."""
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    exec(compile(content, str(path), "exec"), module.__dict__)


def _line_in(path: Path, error: BaseException) -> str:
    """Return `, line 7`: where in a plugin an error arose."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}"
    trace, line = error.__traceback__, 0
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
        trace = trace.tb_next
    return f", line {line}" if line else ""


def split_plugin_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every `--plugin FILE` and `--plugin=FILE` out of a command line.

    Returns:
        The files, and the other words.

    Raises:
        ValueError: the option without a file.
    """
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--plugin":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise ValueError(f"--plugin {value}: name a Python file, as --plugin my.py; once for each file.")
        files.append(value)
    return files, rest


def take_plugins(argv: Sequence[str]) -> list[str]:
    """Run the plugins that a command line names, and return its other words."""
    files, rest = split_plugin_words(argv)
    load_plugins(files)
    return rest


def describe_plugins(recorded: Iterable[Mapping[str, str]]) -> str:
    """Return plugins as a sentence names them: `my.py (sha256 1234abcd...)`."""
    return ", ".join(f"{one['name']} (sha256 {one['sha256'][:12]})" for one in recorded)


def valid_record(recorded: Any) -> list[dict[str, str]]:
    """Return what a checkpoint or a folder, which may be a stranger's, says of plugins; a line that is none is left out."""
    lines = recorded if isinstance(recorded, list) else []
    return [
        {"name": line["name"], "sha256": line["sha256"]}
        for line in lines
        if isinstance(line, dict) and all(isinstance(line.get(key), str) and len(line[key]) < 256 for key in ("name", "sha256"))
    ]


@contextmanager
def explain_missing(recorded: Any) -> Iterator[None]:
    """Say which plugin an unknown kind came from, where a run or a folder records it."""
    try:
        yield
    except UnknownKindError as error:
        known = valid_record(recorded)
        if not known:
            raise
        raise UnknownKindError(
            f"{error} It was trained with {describe_plugins(known)}: give --plugin FILE with that file; it is never run unasked."
        ) from error


def changed_plugins(recorded: Any) -> list[str]:
    """Return a line for each recorded plugin that is another now, or is not given."""
    now = {one["name"]: one["sha256"] for one in loaded_plugins()}
    notes = []
    for one in valid_record(recorded):
        if one["name"] not in now:
            notes.append(f"the run was trained with {describe_plugins([one])}, which is not given: --plugin {one['name']}.")
        elif now[one["name"]] != one["sha256"]:
            notes.append(f"{one['name']} was edited: its sha256 was {one['sha256'][:12]} and is {now[one['name']][:12]} now.")
    return notes
