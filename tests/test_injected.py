"""A few of the faults that `make faults` puts at every file operation: at every fifth of one save."""

import json
import shutil
import subprocess

import pytest
from conftest import SHARED, launch

C_FILE = SHARED / "prototypes" / "fault_injection" / "fault.c"
"""Counts every write, fsync, rename, unlink and open below a folder, and kills, tears or fails the n-th."""


def injected(tmp_path, what, stride):
    """What injected.py found: operations, trials, findings."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not C_FILE.is_file():
        pytest.skip(f"a C compiler and {C_FILE} are needed, which lies beside the checkout on the project's own machines")
    library, work = tmp_path / "fault.so", tmp_path / "work"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, C_FILE, "-ldl"], check=True)
    work.mkdir()
    done = launch("tests/injected.py", what, str(work), str(stride), timeout=3000, LD_PRELOAD=str(library))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fault_amid_a_save_leaves_a_checkpoint_and_the_next_save_is_as_ever(tmp_path):
    """Killed before and after an operation, torn in it, ENOSPC and EIO once, ENOSPC from then on."""
    found = injected(tmp_path, "save", 5)
    assert found["findings"] == [] and found["operations"] >= 20 and found["trials"] >= 24, found
