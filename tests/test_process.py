"""The process starts itself again once, with the allocator's settings, and is the same process to everybody else."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from condot.core.process import ALLOCATOR_ENV, GPU_DEVICE_FILES

PROGRAM = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "elsewhere":
    import platform
    platform.libc_ver = lambda: ("musl", "1.2")
if sys.argv[2] == "gpu":
    import condot.core.process
    condot.core.process.GPU_DEVICE_FILES = ("/dev/null",)
from condot.core.process import ALLOCATOR_ENV, InterruptHandler, restart_with_allocator
stopper = InterruptHandler("nothing is lost")
with open("starts", "a") as file:
    file.write(f"{os.getpid()} {os.getppid()}\\n")
if __name__ == "__main__":
    restart_with_allocator()
seen = {name: os.environ.get(name) for name in ALLOCATOR_ENV}
found = {"seen": seen, "arguments": sys.argv[3:], "prefix": sys.prefix, "flags": sys.flags.optimize, "module": __spec__ is not None}
print(json.dumps(found), flush=True)
print(sys.stdin.readline().strip(), flush=True)
sys.exit(7)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or any(map(os.path.exists, GPU_DEVICE_FILES)), reason="GPUs and other systems keep the allocator they have"
)


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(how="here", words=("a b", "--c=d"), run=("-O", "program.py"), **environment):
        plain = {k: v for k, v in os.environ.items() if k not in (*ALLOCATOR_ENV, "CONDOT_ALLOCATOR")}
        return subprocess.Popen(
            [sys.executable, *run, str(ROOT), how, *words],
            cwd=tmp_path,
            env={**plain, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def result(process, line="a line\n"):
    out, err = process.communicate(line, timeout=60)
    assert process.returncode == 7 and err == ""
    first, second = out.splitlines()
    assert second == line.strip()
    return json.loads(first)


@pytest.mark.parametrize("run", [("-O", "program.py"), ("-O", "-m", "program")])
def test_it_starts_again_once_and_is_the_same_to_others(program, tmp_path, run):
    """Same process id, arguments, flags, virtual environment, standard input and exit status; the settings are there."""
    process = program(run=run)
    found = result(process)
    known = {"seen": ALLOCATOR_ENV, "arguments": ["a b", "--c=d"], "prefix": sys.prefix, "flags": 1, "module": "-m" in run}
    assert found == known
    assert (tmp_path / "starts").read_text() == f"{process.pid} {os.getpid()}\n" * 2


@pytest.mark.parametrize(
    ("how", "environment"),
    [
        ("here", {"CONDOT_ALLOCATOR": "system"}),
        ("here", {"MALLOC_TOP_PAD_": "0"}),
        ("here", {"GLIBC_TUNABLES": "glibc.malloc.check=0"}),
        ("elsewhere", {}),
        ("gpu", {}),
    ],
)
def test_it_stays_as_it_is(program, tmp_path, how, environment):
    """Where the user says so, has settings of their own, or the machine is another; nothing is added to those."""
    found = result(program(how, **environment))
    assert found["seen"] == {name: environment.get(name) for name in ALLOCATOR_ENV}
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_imported_it_does_nothing(program, tmp_path):
    """A test, a notebook or a worker that imports the program goes on as it is."""
    (tmp_path / "importer.py").write_text("import sys; import program")
    assert set(result(program(run=("importer.py",)))["seen"].values()) == {None}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_it(program, number):
    process = program()
    process.stdout.readline()  # it runs for the second time
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "\ninterrupted: nothing is lost.\n"


@pytest.mark.parametrize(("world", "status", "said"), [(None, 7, "late"), ("1", 5, ""), ("2", 5, "")])
def test_a_launched_process_ends_before_python_does(world, status, said):
    """Of one process, too: at the end of Python the group's library aborted 5 of 24 runs of torchrun that had nothing left to do."""
    code = (
        "import atexit, sys; from condot.core.process import exit_if_distributed; "
        "atexit.register(print, 'late'); exit_if_distributed(5); sys.exit(7)"
    )
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | ({"WORLD_SIZE": world} if world else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (status, said), done.stderr
