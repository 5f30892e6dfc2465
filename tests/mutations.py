"""Plant known errors one at a time and see the tests that must catch each fail: `python tests/mutations.py [--only NAME] [--list]`.

`tests/mutations.toml` names, for each mutation, the file, the text before, the text after and the tests. A mutation is planted in a
temporary copy of the checkout, so nothing here is touched; its tests must pass in that copy as it is, and fail once it is planted.
Minutes for a few, an hour for all (`make mutations`); `tests/test_mutations.py` holds the table to the code in every run of the suite.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".toml")
WARM = ("numpy", "scipy", "torch", "diffusers", "transformers", "accelerate", "pytest")
"""Imported once, before each mutation is tried in a fork: they take most of the time of a short test."""
CAUGHT, SURVIVED = 1, 0
"""Exit statuses of pytest: tests failed, all passed. Any other is an error of the table, such as a test that is not there."""
TIMEOUT = 600.0
"""Seconds after which a mutation has made its tests hang, which counts as caught."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One error, and the tests that must catch it.

    Args:
        name: unique; what `--only` is compared with.
        file: relative to the checkout.
        before: a text that stands in the file exactly once.
        after: what replaces it.
        tests: relative to `tests/`, as pytest names them.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """Return the file's text with the error.

        Raises:
            ValueError: the text before does not stand there exactly once.
        """
        if (count := text.count(self.before)) != 1:
            raise ValueError(
                f"{self.name}: {self.before!r} stands {count} times in {self.file}, and must stand there once. "
                f"Write into {TABLE.name} what stands there now, with enough around it."
            )
        return text.replace(self.before, self.after)


def read_mutations(path: Path = TABLE) -> list[Mutation]:
    """Return the mutations of a table, in its order."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def copy_checkout(target: Path) -> None:
    """Copy what git tracks or would track, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split("\0"):
        source = ROOT / name
        if name and (source.is_file() or source.is_symlink()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def _run_pytest(checkout: Path, tests: Sequence[str], log: Path, first: bool) -> None:
    """In a fork: leave this checkout for the copy, run the tests there, exit as pytest does."""
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(checkout)
    sys.path[:] = [str(checkout), *(place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests"))]
    # no bytecode: a file that changes twice in a second to the same size would be read from its old one
    os.environ |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    import pytest

    options = ["-q", "--tb=short", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", *["-x"] * first]
    status = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(checkout: Path, tests: Iterable[str], timeout: float = TIMEOUT, first: bool = True) -> tuple[int | None, str]:
    """Return pytest's exit status, None after the timeout, and what it wrote; it stops at the first failure unless told otherwise."""
    log = checkout.parent / "pytest.log"
    process = multiprocessing.get_context("fork").Process(target=_run_pytest, args=(checkout, list(tests), log, first))
    process.start()
    process.join(timeout)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status, log.read_text(encoding="utf-8", errors="replace")


def failures(output: str) -> list[str]:
    """Return the tests that pytest's summary names, as the table names them."""
    return re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", output, re.M)


def try_mutation(checkout: Path, mutation: Mutation) -> tuple[bool, str]:
    """Plant one mutation, run its tests, take it back; whether it was caught, and a line that says how."""
    path = checkout / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutation.planted(text), encoding="utf-8")
    try:
        status, output = run_tests(checkout, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if status is None:
        return True, f"its tests hang for {TIMEOUT:g} seconds"
    if status == CAUGHT:
        return True, ", ".join(failures(output)) or "failed"
    if status == SURVIVED:
        return False, "SURVIVED: write a test that fails"
    return False, f"pytest ended with {status}: {' '.join(output.split())[-300:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where every mutation that was tried is caught, otherwise 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="mutations whose name or file contains this; may be repeated")
    parser.add_argument("--sample", metavar="N", type=int, help="as many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--list", action="store_true", help="print the names and what each changes, and run nothing")
    asked = parser.parse_args(arguments)
    mutations = [m for m in read_mutations() if not asked.only or any(part in m.name or part in m.file for part in asked.only)]
    if not mutations:
        parser.error(f"--only {' '.join(asked.only)}: no mutation is named so. --list names them all.")
    if asked.sample:
        mutations = random.Random(asked.seed).sample(mutations, min(asked.sample, len(mutations)))
    if asked.list:
        for m in mutations:
            print(f"{m.name}  {m.file}: {m.before!r} -> {m.after!r}")
        return 0
    for module in WARM:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="condot-mutations-") as folder:
        checkout = Path(folder).resolve() / "checkout"
        copy_checkout(checkout)
        if (ROOT.parent / "shared").is_dir():  # real data, without which some tests are skipped
            (checkout.parent / "shared").symlink_to(ROOT.parent / "shared")
        tests = sorted({test for m in mutations for test in m.tests})
        status, output = run_tests(checkout, tests, timeout=len(tests) * TIMEOUT, first=False)
        if status not in (SURVIVED, CAUGHT):
            print(output[-3000:], "\nNot all of these tests are there: mend the table.")
            return 1
        failing = failures(output)
        not_caught = 0
        for m in mutations:
            begun = time.perf_counter()
            if any(name.split("[")[0] == test or name == test for name in failing for test in m.tests):
                caught, how = False, "its tests fail without it: mend them first"
            else:
                caught, how = try_mutation(checkout, m)
            not_caught += not caught
            print(f"{'caught' if caught else 'NOT CAUGHT'}  {m.name}  {time.perf_counter() - begun:.0f} s  {how}", flush=True)
    print(f"{len(mutations) - not_caught} of {len(mutations)} caught")
    return int(not_caught > 0)


if __name__ == "__main__":
    sys.exit(main())
