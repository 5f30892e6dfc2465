"""Standard output and error: whatever becomes of whoever reads them, the program goes on, and its exit status is its own."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from condot.core import standard_streams

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from condot.core.standard_streams import guard_streams
import condot.core.standard_streams as streams
guard_streams()
streams.PATIENCE = 0.2
import logging, warnings
for number in range(2000):
    print("a line to whoever reads", number)
    if number % 100 == 0:
        print("an error", number, file=sys.stderr, flush=True)
        sys.stdout.flush()
warnings.warn("a warning")
logging.getLogger("x").error("a record")
os.write(int(sys.argv[1]), b"done")
print("the last words, flushed when Python ends")
sys.exit(7)
"""


def run(shell="", program=PROGRAM, **how):
    """Start the program; its exit status, and whether it came to its end."""
    read, write = os.pipe()
    words = [sys.executable, "-c", program.format(root=str(ROOT)), str(write)]
    if shell:
        words = ["bash", "-c", f'"$0" "$@" {shell}; exit ${{PIPESTATUS[0]}}', *words]
    how.setdefault("env", {**os.environ, "PYTHONUNBUFFERED": ""})
    done = subprocess.run(words, pass_fds=[write], timeout=60, **how)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        return done, file.read() == b"done"


@pytest.mark.parametrize(
    "shell", ["2>&1 | head -c 50", "| true", "2> >(true) | head -c 1", ">/dev/full 2>&1", ">/dev/full", ">&-", "2>&-", "<&- >&- 2>&-"]
)
def test_nothing_that_is_told_ends_the_program(shell):
    done, came = run(shell, capture_output=True)
    assert came and done.returncode == 7 and b"Traceback" not in done.stderr


def test_output_without_a_buffer_outlives_its_reader_too():
    for shell in ("2>&1 | head -c 50", ">/dev/full 2>&1"):
        done, came = run(shell, env={**os.environ, "PYTHONUNBUFFERED": "1"}, capture_output=True)
        assert came and done.returncode == 7


def test_without_the_guard_it_would_have_ended():
    bare = PROGRAM.replace("guard_streams()\n", "\n")
    for shell in ("2>&1 | head -c 50", ">/dev/full", "2>&-"):
        done, came = run(shell, program=bare, capture_output=True)
        assert not came or done.returncode != 7 or shell == "2>&-"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_nobody_reads_is_waited_for_once_and_then_left(blocking):
    read, write = os.pipe()
    os.set_blocking(write, blocking)
    _, came = run(stdout=write, stderr=write)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        taken = file.read()
    assert came and b"a line to whoever reads 0\n" in taken and len(taken) > 4096


def test_a_loss_is_told_once_on_the_other_stream():
    done, _ = run(">/dev/full", capture_output=True)
    assert done.stderr.count(b"standard output cannot be written (No space left on device)") == 1
    done, _ = run("2>/dev/full", capture_output=True)
    assert done.stdout.count(b"standard error cannot be written") == 1


COUNTED = """
import os, resource, sys
sys.path.insert(0, {root!r})
from condot.core.standard_streams import guard_streams
guard_streams()
print("1234567", flush=True)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
print("x" * 10, flush=True)
print("y" * 20, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print("room again", flush=True)
os.write(int(sys.argv[1]), b"done")
"""


def test_what_a_full_disk_lost_is_counted_where_it_is_missing(tmp_path):
    """11 and 21 bytes."""
    with open(tmp_path / "log", "wb") as log:
        done, came = run(program=COUNTED, stdout=log, stderr=subprocess.PIPE)
    assert (
        came
        and (tmp_path / "log").read_text() == "1234567\n\n[32 bytes of output are missing here: they could not be written]\nroom again\n"
    )
    assert done.stderr == b"standard output cannot be written (File too large): its text is lost, and the work goes on.\n"


WORDS = """
import os, sys
sys.path.insert(0, {root!r})
from condot.core.standard_streams import guard_streams
guard_streams()
print("caf\\u00e9 \\u2603 \\udc80")
sys.stdout.close()
print("still here", flush=True)
with open(os.devnull) as file:
    assert file.fileno() > 2
os.write(int(sys.argv[1]), b"done")
"""


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("ascii:strict", "caf\\xe9 \\u2603 \\udc80"), ("utf-8", "caf\u00e9 \u2603 \\udc80"), ("ascii:replace", "caf? ? ?")],
)
def test_what_a_terminal_cannot_show_is_escaped(encoding, text):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done, came = run(program=WORDS, env=env, capture_output=True)
    assert came and done.stdout.decode() == f"{text}\nstill here\n" and done.stderr == b""


def test_a_number_that_was_closed_is_given_to_no_other_file():
    _, came = run("<&- 2>&-", program=WORDS, capture_output=True)
    assert came


def test_a_pipe_of_which_little_is_free_takes_that(monkeypatch):
    """Nothing is torn and nothing is counted while the reader is slow but there."""
    monkeypatch.setattr(standard_streams, "PATIENCE", 5.0)
    read, write = os.pipe()
    stream = standard_streams.StandardStream(write)
    taken = bytearray()

    def drain():
        while part := os.read(read, 1000):
            taken.extend(part)

    thread = threading.Thread(target=drain)
    thread.start()
    body = os.urandom(300_000)
    assert stream.write(body) == len(body) and stream.lost == 0
    os.close(write)
    thread.join()
    os.close(read)
    assert bytes(taken) == body
