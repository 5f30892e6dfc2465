"""docs/mathematics.md and the code name each other rightly: sections that are cited exist, and so do functions and tests.

A file is looked for by its name alone, anywhere in its room, so that it may move to another folder.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "mathematics.md"
ROOMS = ("pipeline", "models", "data", "condot", "tests")
CITED = re.compile(r"mathematics\.md,?\s+sections?\s+((?:\d+(?:,\s*|\s+and\s+)?)+)")
NAMED = re.compile(r"`([\w/]+\.py)`\s+`(\w+)`")


def cited(text: str) -> list[str]:
    """Return the numbers of the sections of mathematics.md that a text cites, of those with none an empty string."""
    found = [number for match in CITED.finditer(text) for number in re.findall(r"\d+", match[1])]
    return found + [""] * (text.count("mathematics.md") - len(CITED.findall(text)))


@cache
def sources() -> dict[str, list[Path]]:
    """Return the Python files of all rooms by their name, this one aside."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        if path != Path(__file__).resolve():
            found.setdefault(path.name, []).append(path)
    return found


@cache
def names(path: Path) -> frozenset[str]:
    """Return what a file defines at its top: functions, classes and constants."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return frozenset(defined | {target.id for target in assigned if isinstance(target, ast.Name)})


CITATIONS = {
    str(path.relative_to(ROOT)): numbers for paths in sources().values() for path in paths if (numbers := cited(path.read_text("utf-8")))
}


def test_citations_are_read():
    assert cited("docs/mathematics.md section 7; x") == ["7"]
    assert cited("mathematics.md sections 3\nand 5. Also mathematics.md, section 10, and mathematics.md itself.") == ["3", "5", "10", ""]
    assert len(CITATIONS) > 15


@pytest.mark.parametrize("path", CITATIONS)
def test_cited_sections_exist(path):
    sections = re.findall(r"^## (\d+)\. ", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == [str(number) for number in range(len(sections))]
    unknown = set(CITATIONS[path]) - set(sections)
    assert not unknown, f"{path} cites sections {unknown} of docs/mathematics.md, which has {sections}"


def test_named_functions_and_tests_exist():
    named = NAMED.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(named) > 150
    missing = [pair for pair in named if not any(pair[1] in names(path) for path in sources().get(Path(pair[0]).name, ()))]
    assert not missing, f"docs/mathematics.md names what is not there: {missing}"


def test_all_of_the_mathematics_is_named():
    """Each file of flow/ that computes something stands in the document."""
    plumbing = {"__init__.py", "condition.py", "registry.py"}
    named = {Path(path).name for path, _ in NAMED.findall(DOCUMENT.read_text(encoding="utf-8"))}
    here = {path.name for path in (ROOT / "pipeline").rglob("flow/**/*.py")}
    assert here and here - plumbing <= named, f"not in docs/mathematics.md: {sorted(here - plumbing - named)}"


def test_links_into_the_document_lead_somewhere():
    """An anchor is its heading as GitHub makes it: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    pages = {page: page.read_text(encoding="utf-8") for page in [*DOCUMENT.parent.glob("*.md"), *ROOT.glob("*.md")]}
    links = [(page.name, link) for page, text in pages.items() for link in re.findall(r"mathematics\.md#([\w-]+)", text)]
    links += [(DOCUMENT.name, link) for link in re.findall(r"\]\(#([\w-]+)\)", pages[DOCUMENT])]
    assert len(links) > 10
    assert not (lost := [link for link in links if link[1] not in anchors]), f"links to no heading: {lost}"
