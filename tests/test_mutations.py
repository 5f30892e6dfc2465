"""The table of mutations fits the code: each can be planted, and names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from mutations import ROOT, Mutation, read_mutations


@pytest.fixture(scope="module")
def mutations() -> list[Mutation]:
    return read_mutations()


def test_names_are_unique_and_words(mutations):
    names = [m.name for m in mutations]
    assert len(names) > 150 and len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z0-9_]+(-[a-z0-9_]+)*", name)] == []


def test_each_text_stands_once_in_its_file_and_leaves_python(mutations):
    """Planting changes the program, not merely its text: the syntax trees differ."""
    trees: dict[str, str] = {}
    for m in mutations:
        text = (ROOT / m.file).read_text(encoding="utf-8")
        if m.file not in trees:
            trees[m.file] = ast.dump(ast.parse(text))
        assert ast.dump(ast.parse(m.planted(text))) != trees[m.file], m.name


def test_each_names_tests_that_are_there(mutations):
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    for m in mutations:
        assert m.tests, m.name
        for test in m.tests:
            file, _, name = test.partition("::")
            assert not name or re.search(rf"^def {re.escape(name.split('[')[0])}\(", texts[file], re.M), f"{m.name}: {test}"


@pytest.mark.parametrize("text", ["a = 1\n", "b + c\nb + c\n"])
def test_a_text_that_does_not_stand_there_once_is_an_error_with_its_remedy(text):
    m = Mutation(name="sum", file="x.py", before="b + c", after="b - c", tests=())
    with pytest.raises(ValueError, match=r"sum: 'b \+ c' stands [02] times in x.py.*mutations.toml"):
        m.planted(text)
    assert m.planted("a = b + c\n") == "a = b - c\n"
