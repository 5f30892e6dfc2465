"""A file that stands alone: what is used of its neighbours comes along, as it was written, and nothing else."""

import ast

import pytest

from condot.pipeline.export.bundle import HEADER, bundle_module

LOW = '''"""The lowest floor.

Second paragraph.
"""

import math
import os.path
from typing import Any, NamedTuple

# why it is two
TWO, THREE = 2, 3  # and three
"""Numbers."""
UNUSED = os.path.sep
"""Nobody asks."""

Pair = tuple[int, int]


class Unused(NamedTuple):
    """Left behind."""

    a: Any


# a comment above
# of two lines
@staticmethod
def double(x: Any) -> float:
    """Twice."""
    # inside
    return math.fsum([x] * TWO)  # kept


def lonely(x: Unused) -> None:
    """Left behind too."""
'''
MIDDLE = '''"""The middle floor."""

from __future__ import annotations

from .low import THREE, Pair, double

LATER = 1


class Base:
    """Of the root's class."""

    pair: Pair = (1, THREE)

    def twice(self, x: float) -> float:
        return double.__func__(x)


def unused() -> int:
    return LATER
'''
ROOT = '''"""The root.

Of two lines.
"""

from typing import Any

import torch
from torch import nn as layers

from .low import TWO
from .middle import Base

__all__ = ["Thing"]
NOTE: Any = "kept"


class Thing(Base):
    """What it is about."""

    size = TWO

    def four(self) -> Any:
        return torch.tensor(self.twice(float(self.size))), layers.Identity()


def helper() -> str:
    return NOTE
'''
ALONE = (
    HEADER.format(file="room/root.py")
    + '''
"""The root.

Of two lines.
"""

import math
from typing import Any

import torch
from torch import nn as layers


# --- low.py
# The lowest floor.
#
# Second paragraph.


# why it is two
TWO, THREE = 2, 3  # and three
"""Numbers."""
Pair = tuple[int, int]


# a comment above
# of two lines
@staticmethod
def double(x: Any) -> float:
    """Twice."""
    # inside
    return math.fsum([x] * TWO)  # kept


# --- middle.py
# The middle floor.


class Base:
    """Of the root's class."""

    pair: Pair = (1, THREE)

    def twice(self, x: float) -> float:
        return double.__func__(x)


# --- root.py


NOTE: Any = "kept"


class Thing(Base):
    """What it is about."""

    size = TWO

    def four(self) -> Any:
        return torch.tensor(self.twice(float(self.size))), layers.Identity()


def helper() -> str:
    return NOTE
'''
)


def room(folder, **files):
    """A folder of files; the path of its root."""
    (folder / "room").mkdir()
    for name, text in {"low": LOW, "middle": MIDDLE, "root": ROOT, **files}.items():
        (folder / "room" / f"{name}.py").write_text(text)
    return folder / "room/root.py"


def test_what_is_used_comes_along_as_it_was_written(tmp_path):
    text = bundle_module(room(tmp_path))
    assert text == ALONE
    names = {}
    exec(compile(text, "alone", "exec"), names)
    assert float(names["Thing"]().four()[0]) == 4.0 and names["Thing"].pair == (1, 3)


def test_annotations_are_evaluated_or_not_as_in_the_root(tmp_path):
    path = room(tmp_path, root=ROOT.replace('"""\n\nfrom typing', '"""\n\nfrom __future__ import annotations\n\nfrom typing', 1))
    text = bundle_module(path)
    assert text.count("from __future__ import annotations\n\nimport math") == 1
    assert ast.get_docstring(ast.parse(text)) == "The root.\n\nOf two lines."


def test_names_come_through_files_that_pass_them_on(tmp_path):
    """Imported from the middle, which has it from below."""
    text = bundle_module(room(tmp_path, root='"""R."""\n\nfrom .middle import double\n\nX = double\n'))
    assert "def double" in text and "class Base" not in text and "THREE = 2, 3" in text and "--- middle" not in text


def test_a_file_with_no_neighbours_is_itself(tmp_path):
    body = '"""R."""\n\nimport math\n\n\ndef f() -> float:\n    return math.pi\n'
    assert bundle_module(room(tmp_path, root=body)) == f"{HEADER.format(file='room/root.py')}\n{body}"


def test_circles_end(tmp_path):
    path = room(tmp_path, root='"""R."""\n\nfrom .one import f\n\nX = f\n', one="from .two import g\n\n\ndef f():\n    return g\n",
                two="from .one import f\n\n\ndef g():\n    return f\n")  # fmt: skip
    assert bundle_module(path).count("def ") == 2


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("from . import low\n\nX = low.TWO\n", r"`from \. import low` cannot be carried\. Write `from \.file import name`"),
        ("from .low import *\n\nX = TWO\n", r"import \*` cannot be carried"),
        ("from .low import TWO as FEW\n\nX = FEW\n", "TWO as FEW` cannot be carried. Rename functions and classes only"),
        ("from .low import FOUR as X\n\nY = X\n", r"FOUR is not defined in low\.py, from which it is imported"),
        (
            "from .low import double as a\nfrom .other import b\n\nX = a, b\n",
            r"double is called [ab] here and [ab] elsewhere: call it one thing",
        ),
        ("from .low import double as a\nfrom .other import shadow\n\nX = a, shadow\n", r"double is a variable of a function too"),
        ("from ..data import order\n\nX = order\n", r"`from \.\.data import order` cannot be carried"),
        ("from .flow.path import CondOT\n\nX = CondOT\n", r"`from \.flow\.path import CondOT` cannot be carried"),
        ("import numpy as np\n\nX = np.pi\n", r"`import numpy as np` cannot be carried: such a file imports torch, diffusers"),
        ("from condot.models import dit\n\nX = dit\n", r"condot\.models import dit` cannot be carried"),
        ("from .low import FOUR\n\nX = FOUR\n", r"FOUR is not defined in low\.py, from which it is imported"),
        ("from .middle import Base\n\nTWO = Base\n", r"TWO is one thing in (root|low)\.py and another in (root|low)\.py"),
        ("X = 1\nif X:\n    Y = 2\n", r"root\.py:2: `if X:.*` binds no name"),
        ("X = 1\nprint(X)\n", r"`print\(X\)` binds no name"),
    ],
)
def test_what_cannot_be_carried_is_refused(tmp_path, root, says):
    other = (
        "from .low import double as b\n"
        if "other import b" in root
        else "from .low import double\n\n\ndef shadow():\n    double = 2\n    return double\n"
    )
    with pytest.raises(ValueError, match=f"(?s){says}"):
        bundle_module(room(tmp_path, root=root, other=other))


FIRST = '''"""F."""


# é
class Thing:
    """A Thing."""

    def copy(self):
        return Thing()

    def say(self):
        return 1
'''
THIRD = '''"""T."""

from .first import Thing


class Keeper:
    Thing = Thing

    def make(self):
        é = "é", Thing()
        return é[1]
'''
SECOND = '''"""R."""

from .first import Thing as FirstThing
from .third import Keeper as K


class Thing(FirstThing):
    def say(self):
        return 1 + super().say()


class Keeper(K):
    Thing = Thing
'''


def test_a_second_version_stands_on_a_first_of_the_same_name(tmp_path):
    """It has the new name in the file that gave it, in its own and in a third that uses it; attributes keep theirs."""
    text, names = bundle_module(room(tmp_path, root=SECOND, first=FIRST, third=THIRD)), {}
    exec(compile(text, "alone", "exec"), names)
    keeper, first = names["Keeper"](), names["FirstThing"]
    assert names["Thing"]().say() == 2 and type(names["Thing"]().copy()) is first and issubclass(names["Thing"], first)
    assert type(keeper.make()) is first and keeper.Thing is names["Thing"] and names["K"].Thing is first
    assert "class FirstThing:" in text and '"""A Thing."""' in text and "--- third" in text


def test_what_is_imported_and_not_used_is_not_asked_for(tmp_path):
    """numpy in a neighbour's other half does not matter."""
    low = LOW.replace("import math\n", "import math\n\nimport numpy\n").replace("UNUSED = os.path.sep", "UNUSED = numpy.pi")
    text = bundle_module(room(tmp_path, low=low))
    assert "numpy" not in text and "os" not in text.split("# --- low")[0].replace("condot", "").split()
