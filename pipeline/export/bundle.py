"""Files that stand alone: a module and what it uses of its neighbours as the text of one, for diffusers loads a component from one file.

Definitions are copied as they are written, comments and docstrings included; what nothing reaches stays behind. Names alone decide
that, so that a local variable may keep a definition of the same name; none that is needed is left out. A function or class that a file
imports under another name is written under that one everywhere, so a second version may be built on a first of the same name.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import condot

PACKAGE = Path(str(condot.__file__)).parent
"""Of condot itself, where `condot.core` lies."""
ALLOWED_PACKAGES = {*sys.stdlib_module_names, "torch", "diffusers", "transformers"}
"""What such a file may import."""
HEADER = """# SPDX-License-Identifier: Apache-2.0
# Licence: Apache-2.0. Written by condot's export from {file} and what it uses there; it stands alone."""
"""Over every such file."""
FUTURE = "from __future__ import annotations"


@dataclass(eq=False)
class Definition:
    """A statement at a file's outermost level that binds names, with the comments above it and the docstring below it."""

    file: Path
    binds: tuple[str, ...]
    uses: set[str]
    """Names that are read in it, bound there or elsewhere."""
    text: str
    is_block: bool
    """A function or class, which stands between two empty lines."""


@dataclass
class SourceFile:
    """A Python file, taken apart."""

    path: Path
    docstring: str
    definitions: list[Definition] = field(default_factory=list)
    siblings: dict[str, Path] = field(default_factory=dict)
    """Names imported from other files of condot, and which."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Of those, names that the file gave itself, and what they are called where they are defined."""
    imports: dict[str, str] = field(default_factory=dict)
    """Names imported from elsewhere, and the statement that does."""
    future: bool = False


def bundle_module(path: Path) -> str:
    """Return the text of a module that gives what the file gives, and imports nothing of condot.

    Args:
        path: of a Python file; it imports from others by `from .file import names`, or `..folder.file`, at the outermost level;
            functions and classes also `as` something else.

    Returns:
        Licence, docstring, the imports still used, then of every file what is used of it, the lowest first. Whether annotations
        are evaluated is as in the file itself.

    Raises:
        ValueError: what cannot be carried: another form of relative import, a package beyond ALLOWED_PACKAGES, one name for two things,
            statements
            at the outermost level that bind no name.
    """
    sources: dict[Path, SourceFile] = {}
    order = list(_read_sources(path, sources))
    kept = _reachable(order[-1], sources)
    _apply_aliases(kept, sources)
    _check_names(kept)
    imports = sorted({sources[d.file].imports[name] for d in kept for name in d.uses & sources[d.file].imports.keys()})
    for statement in imports:
        _check_import(statement, path)
    parts = []
    for source in order:
        own = [d for d in source.definitions if d in kept]
        if own and len(order) > 1:
            parts.append(_section_comment(source, "" if source is order[-1] else source.docstring))
        parts += _formatted(own)
    root = order[-1]
    room = next((part for part in path.parts if part in ("pipeline", "models")), path.parent.name)
    head = f'{HEADER.format(file=f"{room}/{path.name}")}\n"""{root.docstring}"""'
    return "\n\n".join([head, *([FUTURE] if root.future else []), _import_block(imports)]) + "\n\n\n" + "\n\n\n".join(parts) + "\n"


def _read_sources(path: Path, sources: dict[Path, SourceFile]) -> Iterator[SourceFile]:
    """The file and those it imports from, each once, after all that it imports from."""
    text = path.read_text()
    tree = ast.parse(text)
    source = sources[path] = SourceFile(path, ast.get_docstring(tree, clean=False) or "")
    lines, start = text.splitlines(), 0
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        end = node.end_lineno or 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(node, source)
        elif not _is_text(node):
            if after is not None and _is_text(after):
                end = after.end_lineno or 0
            _add_definition(node, source, "\n".join(lines[start:end]).strip("\n"))
        start = max(start, end)
    for sibling in dict.fromkeys(source.siblings.values()):
        if sibling not in sources:
            yield from _read_sources(sibling, sources)
    yield source


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _add_import(node: ast.Import | ast.ImportFrom, source: SourceFile) -> None:
    """Write down what an import binds."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        source.future = True
        return
    for alias in node.names:
        bound = alias.asname or alias.name.split(".")[0]
        if isinstance(node, ast.Import):
            source.imports[bound] = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        elif not node.level and not (node.module or "").startswith("condot."):
            source.imports[bound] = f"from {node.module} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        elif node.module and alias.name != "*" and (sibling := _file_of(node, source.path)).is_file():
            source.siblings[bound] = sibling
            if bound != alias.name:
                source.aliases[bound] = alias.name
        else:
            raise ValueError(f"{source.path}:{node.lineno}: `{ast.unparse(node)}` cannot be carried. Write `from .file import name`.")


def _file_of(node: ast.ImportFrom, path: Path) -> Path:
    """Return the file that `from ..folder.file import name` or `from condot.core.file import name` names."""
    folder = path.parents[node.level - 1] if node.level else PACKAGE.parent
    return folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")


def _add_definition(node: ast.stmt, source: SourceFile, text: str) -> None:
    """Write down a definition."""
    is_block = isinstance(node, ast.FunctionDef | ast.ClassDef)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        binds = [node.name]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        binds = [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
    if not binds:
        raise ValueError(f"{source.path}:{node.lineno}: `{ast.unparse(node)[:60]}` binds no name, so it cannot be carried. Leave it out.")
    if binds != ["__all__"]:
        uses = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Load)}
        source.definitions.append(Definition(source.path, tuple(binds), uses - set(binds), text, is_block))


def _reachable(root: SourceFile, sources: dict[Path, SourceFile]) -> list[Definition]:
    """The file's own definitions, and all that any of them uses."""
    kept, waiting = [], list(root.definitions)
    while waiting:
        one = waiting.pop()
        if one not in kept:
            kept.append(one)
            waiting += [found for name in one.uses for found in _definitions_of(name, sources[one.file], sources)]
    return kept


def _definitions_of(name: str, source: SourceFile, sources: dict[Path, SourceFile]) -> list[Definition]:
    """Where a name that occurs in a file is defined; nowhere for those of other packages, of Python and of functions."""
    own = [d for d in source.definitions if name in d.binds]
    if own or name not in source.siblings:
        return own
    sibling, called = sources[source.siblings[name]], source.aliases.get(name, name)
    found = _definitions_of(called, sibling, sources)
    if not found:
        raise ValueError(f"{source.path}: {called} is not defined in {sibling.path.name}, from which it is imported.")
    if called != name and not found[0].is_block:
        raise ValueError(f"{source.path}: `{called} as {name}` cannot be carried. Rename functions and classes only.")
    return found


def _apply_aliases(kept: list[Definition], sources: dict[Path, SourceFile]) -> None:
    """Write definitions that a file imports under another name under that one, there and wherever they are called by their own.

    Raises:
        ValueError: two such names for one definition, or a function that has a variable of its old name.
    """
    final: dict[Definition, str] = {}
    for source in sources.values():
        for name in source.aliases:
            one = _definitions_of(name, source, sources)[0]
            if final.setdefault(one, name) != name:
                raise ValueError(f"{source.path}: {one.binds[0]} is called {name} here and {final[one]} elsewhere: call it one thing.")
    for one in kept:
        source, words = sources[one.file], {}
        for local in one.uses | set(one.binds):
            found = _definitions_of(local, source, sources)
            if found and final.get(found[0], local) != local:
                words[local] = final[found[0]]
        if words:
            one.text = _with_names_replaced(one.text, words, source)
    for one, name in final.items():
        one.binds = (name,)


def _with_names_replaced(text: str, words: dict[str, str], source: SourceFile) -> str:
    """Return the text of a definition with names that it reads, and its own, changed; attributes, strings and comments are left."""
    tree, lines = ast.parse(text), text.encode().splitlines(keepends=True)
    places = []
    for node in ast.walk(tree):
        inside = [leaf for leaf in ast.walk(node) if leaf is not node] if isinstance(node, ast.FunctionDef | ast.Lambda) else []
        for leaf in inside:
            taken = (
                leaf.arg if isinstance(leaf, ast.arg) else leaf.id if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store) else ""
            )
            if taken in words:
                raise ValueError(f"{source.path}: {taken} is a variable of a function too, so it cannot be carried. Rename it there.")
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in words:
            places.append((node.lineno, node.col_offset, node.id))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in words:
            places.append((node.lineno, 4 if isinstance(node, ast.FunctionDef) else 6, node.name))
    for row, column, name in sorted(places, reverse=True):
        line = lines[row - 1]
        lines[row - 1] = line[:column] + words[name].encode() + line[column + len(name.encode()) :]
    return b"".join(lines).decode()


def _check_names(kept: list[Definition]) -> None:
    """Raises ValueError where two files of one folder mean two things by a name."""
    places: dict[str, Path] = {}
    for one in kept:
        for name in one.binds:
            if places.setdefault(name, one.file) != one.file:
                raise ValueError(f"{name} is one thing in {places[name].name} and another in {one.file.name}: one file cannot hold both.")


def _check_import(statement: str, path: Path) -> None:
    """Raises ValueError for a package that who loads the file may not have."""
    package = statement.split()[1].split(".")[0]
    if package not in ALLOWED_PACKAGES:
        raise ValueError(f"{path}: `{statement}` cannot be carried: such a file imports torch, diffusers and transformers alone.")


def _import_block(statements: list[str]) -> str:
    """Python's own first, whole modules before names, the names of a module in one statement."""
    whole = [s for s in statements if s.startswith("import ")]
    names: dict[str, list[str]] = {}
    for statement in statements:
        if statement.startswith("from "):
            module, name = statement.removeprefix("from ").split(" import ")
            names.setdefault(module, []).append(name)
    lines = whole + [f"from {module} import {', '.join(sorted(each))}" for module, each in sorted(names.items())]
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    return "\n\n".join("\n".join(group) for group in (standard, [line for line in lines if line not in standard]) if group)


def _section_comment(source: SourceFile, docstring: str) -> str:
    """A file's name and docstring as a comment over what follows."""
    return "\n".join(f"# {line}".rstrip() for line in [f"--- {source.path.name}", *docstring.strip().splitlines()])


def _formatted(definitions: list[Definition]) -> Iterator[str]:
    """Texts that stand between two empty lines: a function or a class each, constants that follow one another together."""
    run: list[str] = []
    for one in definitions:
        if one.is_block:
            if run:
                yield "\n".join(run)
            run = []
            yield one.text
        else:
            run.append(one.text)
    if run:
        yield "\n".join(run)
