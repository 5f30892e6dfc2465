"""Whoever asks a run to end, and whichever process hears it: every rank saves once, says so, and is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_launch import ACCELERATE, LAUNCH, MEMBER, TORCHRUN, start

from condot.pipeline.training.status import read_status

TWO = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
ACCELERATED = (*LAUNCH, str(ACCELERATE / "cpu2.yaml"))
ALONE = (
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
)

# --- one process

PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from condot.core.process import InterruptHandler
from condot.core.standard_streams import guard_streams
guard_streams()
stopper = InterruptHandler("nothing is lost")
if sys.argv[2] == "late":
    stopper.defer()
print(os.getpid(), flush=True)
while not stopper.requested:
    time.sleep(0.01)
for number in range(100):
    print("a line to whoever reads", flush=True)
if len(sys.argv) > 3:
    open(sys.argv[3], "w").write(str(stopper.exit_status))
sys.exit(stopper.exit_status)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "program.py"), str(ROOT)]


def began(process):
    """Its line came: from now on it is told."""
    return int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_stops_at_once_while_nothing_can_be_lost_and_after_the_step_later(program, number):
    for when, message in (("early", "interrupted: nothing is lost."), ("late", "stopping after this step")):
        process = subprocess.Popen([*program, when], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        began(process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and message in err


def test_nohup_is_heard_unless_torchrun_started_it(program):
    """torchrun passes the hang-up on and kills after it: then the state is to be saved."""
    for variables, status in (({}, 128 + signal.SIGTERM), ({"TORCHELASTIC_RUN_ID": "one"}, 128 + signal.SIGHUP)):
        env = {**os.environ, **variables}
        ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
        process = subprocess.Popen([*program, "late"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, preexec_fn=ignored)
        began(process)
        process.send_signal(signal.SIGHUP)
        if not variables:
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == status


def through(program, launcher, *words, **environment):
    """A process that starts the program, prints what that prints, and waits."""
    env = {**os.environ, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", launcher, *program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


WAITS = "import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[2:]]); time.sleep(60)"
THREAD = """
import subprocess, sys, threading, time
thread = threading.Thread(target=lambda: subprocess.Popen([sys.executable, *sys.argv[2:]]))
thread.start(); thread.join(); time.sleep(60)
"""


def gone(number, seconds=20):
    """Whether a process ended in that time; it is nobody's child here, so its entry goes with it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{number}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_no_process_outlives_its_launcher(program, tmp_path):
    """Not even one that is killed, which forwards nothing; output nobody reads any more ends nothing."""
    launcher = through(program, WAITS, "late", str(tmp_path / "saved"), RANK="0")
    number = began(launcher)
    launcher.stdout.close()
    launcher.stderr.close()
    launcher.kill()
    launcher.wait()
    assert gone(number) and (tmp_path / "saved").read_text() == str(128 + signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_what_no_launcher_started_outlives_its_shell(program):
    launcher = through(program, WAITS, "late")
    number = began(launcher)
    launcher.kill()
    launcher.wait()
    try:
        assert not gone(number, seconds=1)
    finally:
        os.kill(number, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_a_launcher_whose_thread_ends_lives(program):
    """Linux means the thread that started a process when it says parent."""
    launcher = through(program, THREAD, "late", RANK="0")
    number = began(launcher)
    assert not gone(number, seconds=1)
    os.kill(number, signal.SIGTERM)
    assert gone(number)
    launcher.kill()


def test_a_launcher_that_ended_before_it_could_be_asked_for(program, tmp_path):
    """Linux tells nothing of a parent that died before the question: the parent has changed by then."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from condot.core import process
answers = iter([1, 2])
process.os.getppid = lambda: next(answers, 2)
stopper = process.InterruptHandler("nothing is lost")
print("lives on")
"""
    env = {**os.environ, "RANK": "0"}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    if sys.platform == "linux":
        assert ended.returncode == 128 + signal.SIGTERM and ended.stdout == "" and "(the launcher ended)" in ended.stderr


# --- several processes


def ready(folder, ranks, process):
    """The ranks' process ids, once all take steps."""
    deadline = time.monotonic() + 120
    while len(found := sorted(folder.glob("pid-*"))) < ranks or not all(path.read_text() for path in found):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.1)
    time.sleep(0.5)
    return [int(path.read_text().split()[0]) for path in found]


def saved(folder, ranks):
    """Each rank's step at its one save; the same on all."""
    steps = [(folder / f"saved-{rank}").read_text().split() for rank in range(ranks)]
    assert len({tuple(one) for one in steps}) == 1 and len(steps[0]) == 1 and int(steps[0][0]) < 9999
    return int(steps[0][0])


@pytest.mark.faults
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT", "SIGKILL"])
@pytest.mark.parametrize(("words", "ranks"), [(TWO, 2), (ACCELERATED, 2), (ALONE, 1)], ids=["torchrun", "accelerate", "alone"])
def test_a_signal_to_the_launcher_saves_on_every_rank_and_leaves_nobody(tmp_path, words, ranks, number):
    """Whether the launcher forwards it or dies of it."""
    launcher = start(*words, MEMBER, str(tmp_path), "--steps=9999")
    members = ready(tmp_path, ranks, launcher)
    launcher.send_signal(getattr(signal, number))
    assert all(gone(member, 40) for member in members)
    assert launcher.wait(timeout=60) != 0
    said = read_status(tmp_path)
    assert (said["state"], said["step"]) == ("stopped", saved(tmp_path, ranks))
    forwarded = words is not ALONE and number in ("SIGTERM", "SIGHUP", "SIGINT")
    assert said["signal"] == (number if forwarded else "SIGTERM") and len(list(tmp_path.glob("done-*"))) == ranks


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_on_all(tmp_path, rank, number):
    launcher = start(*TWO, MEMBER, str(tmp_path), "--steps=9999")
    members = ready(tmp_path, 2, launcher)
    os.kill(members[rank], number)
    assert all(gone(member, 40) for member in members) and launcher.wait(timeout=60) != 0
    assert read_status(tmp_path)["state"] == "stopped" and saved(tmp_path, 2)


@pytest.mark.faults
@pytest.mark.parametrize("to", ["launcher", "ranks"])
def test_a_second_signal_while_saving_changes_nothing(tmp_path, to):
    """SLURM warns by SIGUSR1 and ends by SIGTERM; Kubernetes and people are impatient."""
    launcher = start(*TWO, "--signals_to_handle=SIGTERM,SIGINT,SIGUSR1", MEMBER, str(tmp_path), "--steps=9999")
    members = ready(tmp_path, 2, launcher)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for one in [launcher.pid] if to == "launcher" else members:
            os.kill(one, number)
        time.sleep(0.4)
    assert all(gone(member, 40) for member in members) and launcher.wait(timeout=60) != 0
    assert read_status(tmp_path)["state"] == "stopped" and saved(tmp_path, 2)


@pytest.mark.faults
def test_a_killed_rank_ends_the_others(tmp_path):
    """Without --max_restarts: nobody stays, and the launcher names who was killed."""
    launcher = start(*TWO, MEMBER, str(tmp_path), "--steps=9999")
    members = ready(tmp_path, 2, launcher)
    os.kill(members[1], signal.SIGKILL)
    assert all(gone(member, 60) for member in members)
    assert "exitcode  : -9" in launcher.communicate(timeout=60)[1] and not list(tmp_path.glob("done-*"))
