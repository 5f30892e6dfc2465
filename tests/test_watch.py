"""A run that hangs says where its ranks stood; status.json says how a run stands."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import ROOT
from test_launch import MEMBER, TORCHRUN, start
from torch.distributed import TCPStore

from condot.core.process import EXIT_HUNG
from condot.pipeline.launch.rendezvous import Rendezvous
from condot.pipeline.training import watchdog
from condot.pipeline.training.status import Status, read_status
from condot.pipeline.training.watchdog import RankPosition, Watchdog, _mark_silent, _read_positions, _slowest_ranks

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a thread's _exit becomes SystemExit

# --- status.json


def test_status_is_whole_at_every_moment(tmp_path):
    """Read again and again while it is written: always one of the two texts, never a part."""
    status, seen, over = Status(tmp_path), set(), threading.Event()

    def look():
        while not over.is_set():
            seen.add((tmp_path / "status.json").read_text())

    status.write("running", step=0, of=10, images=0)
    thread = threading.Thread(target=look)
    thread.start()
    for step in range(100):
        status.write("running", step=step, reason="x" * 5000 * (step % 2))
    over.set()
    thread.join()
    assert {json.loads(text)["state"] for text in seen} == {"running"} and {json.loads(text)["of"] for text in seen} == {10}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_status_keeps_what_was_said_before(tmp_path):
    status = Status(tmp_path)
    status.write("running", step=3, of=10, images=48)
    status.write("stopped", signal=signal.SIGUSR1, exit_status=128 + signal.SIGUSR1)
    said = read_status(tmp_path)
    assert time.strptime(said.pop("time"), "%Y-%m-%dT%H:%M:%S+00:00")
    assert said == {"state": "stopped", "step": 3, "of": 10, "images": 48, "signal": "SIGUSR1", "reason": "", "exit_status": 138}
    assert '"state": "stopped"' in (tmp_path / "status.json").read_text(), "what docs/cluster.md looks for with grep"


def test_only_a_hang_is_written_by_any_rank_and_outlasts_the_failures_that_it_causes(tmp_path):
    main, other = Status(tmp_path), Status(tmp_path, main=False)
    other.write("running", step=1)
    other.write("failed")
    assert read_status(tmp_path) is None
    main.write("running", step=5)
    other.write("hung", step=7, reason="rank 1", exit_status=EXIT_HUNG)
    main.write("failed", reason="connection closed by peer")
    other.write("hung", reason="of a machine that was cut off")
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == ("hung", "rank 1")
    main.write("running", step=5)  # started again
    main.write("failed", reason="another")
    assert read_status(tmp_path)["state"] == "failed"


def test_status_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, capsys):
    status = Status(tmp_path / "gone")
    status.write("running", step=1)
    status.write("running", step=2)
    assert capsys.readouterr().err.count("could not be written (No such file or directory); the run goes on") == 1
    (tmp_path / "status.json").write_text('{"state": "run')
    assert read_status(tmp_path) is None


# --- the watchdog


def position(rank, step=5, age=1.0, reports=3, when=0.0, silent=None, moves=1):
    return RankPosition(rank, f"host{rank}", step, "reading data", moves, age, reports, when, silent)


def test_a_rank_is_silent_by_its_own_count_whatever_its_clock_says():
    """Rank 1's clock is an hour ahead, rank 2's an hour behind; only rank 3 told nothing between two readings."""
    now = time.time()
    before = {rank: position(rank, reports=3, when=now + offset) for rank, offset in ((0, 0), (1, 3600), (2, -3600), (3, 3600))}
    after = {rank: position(rank, reports=3 if rank == 3 else 4, when=old.time) for rank, old in before.items()}
    silent = {one.rank: one.silent for one in _mark_silent(before, after, 7.0)}
    assert silent == {0: None, 1: None, 2: None, 3: 7.0}, "its clock is ahead: at least the time between the readings"
    (one,) = _mark_silent({3: position(3, when=now - 34)}, {3: position(3, when=now - 34)}, 7.0)
    assert str(one).startswith("rank 3 (host host3) has not been heard of for 34 s; it was in step 5, reading data")


def test_the_report_names_the_worst_ranks_and_stays_short():
    positions = [position(rank, step=18, age=30) for rank in range(5000)]
    positions[7] = position(7, step=17, age=31)
    positions[9] = position(9, step=18, age=3, silent=40.0)
    positions[4] = position(4, step=18, age=33)
    positions[30] = position(30, step=18, age=29, moves=0)
    lines, shown = _slowest_ranks([one for one in positions if one.rank != 11], 5000)
    assert shown[:5] == [11, 9, 7, 30, 4] and len(shown) == 8 and len(lines) == 9
    assert lines[0] == "rank 11 was never heard of" and lines[1].startswith("rank 9 (host host9) has not been heard of for 40 s")
    assert lines[2] == "rank 7 (host host7) has stood in step 17, reading data, for 31 s" and lines[-1] == "and 4992 more"
    lines, shown = _slowest_ranks([], 5000)
    assert shown == list(range(8)) and lines[-1] == "and 4992 more"


def test_places_of_all_ranks_are_read_from_the_store():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    for rank in (0, 2):
        store.set(f"watchdog/{rank}", json.dumps(vars(position(rank))))
    assert _read_positions(store, 3) == {0: position(0), 2: position(2)}
    store.set("watchdog/1", json.dumps(vars(position(1, step=9))))
    assert _read_positions(store, 3) == {0: position(0), 1: position(1, step=9), 2: position(2)}


def test_time_in_which_the_whole_process_was_stopped_does_not_count():
    """Ctrl-Z over lunch, a machine asleep: one long wait counts as two ordinary ones."""
    one = Watchdog(0)
    one.period = 10.0
    assert [one._seconds_idle(slept) for slept in (10, 10, 7200, 10)] == [10, 20, 40, 50]
    one.heartbeat(1, "reading data")
    assert one._seconds_idle(10) == 0 and one._seconds_idle(10) == 10


def test_a_watchdog_of_no_seconds_starts_no_thread_and_places_nest():
    before = threading.active_count()
    one = Watchdog(0)
    one.heartbeat(3, "reading data")
    with one.phase("saving"):
        assert one._position == (3, "saving")
    assert one._position == (3, "reading data") and threading.active_count() == before
    assert one._own_position().moves == 2, "since it came to this step"
    one.heartbeat(4, "reading data")
    assert one._own_position().moves == 0
    with pytest.raises(OSError), one.phase("saving"):
        raise OSError
    assert one._position == (4, "reading data")
    one.close()


def test_what_stands_still_ends(monkeypatch, tmp_path, capfd):
    """The process ends with its place, its stack and its status."""
    ends = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: (ends.set(), sys.exit(status)))
    one = Watchdog(0.5, Status(tmp_path))
    one.heartbeat(11, "reading data")
    assert ends.wait(10)
    err = capfd.readouterr().err
    assert "no progress for 0.5 s (guard.hang_seconds):\n  rank 0" in err and "has stood in step 11, reading data, for" in err
    assert "most recent call first" in err and "test_what_stands_still_ends" in err
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["step"], read_status(tmp_path)["exit_status"]) == ("hung", 11, 4)


@pytest.fixture
def together(monkeypatch):
    """A Watchdog for each living rank of a launch, in this process: from (world, alive) to the store, them, and what each ended with."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    ended, watchdogs = [], []
    monkeypatch.setattr(os, "_exit", lambda status: (ended.append(status), sys.exit(status)))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda file: None)

    def begin(world, alive):
        for rank in alive:
            monkeypatch.setattr(watchdog, "rendezvous_info", lambda rank=rank: Rendezvous("127.0.0.1", server.port, rank, world, 1, server))
            watchdogs.append(Watchdog(0.5))
        return server, watchdogs, ended

    yield begin
    for one in watchdogs:
        one.close()


def test_one_rank_asks_all_and_the_others_take_its_answer(together, capfd):
    """Three ranks hang at once, one of four was never there: one report, three ends."""
    _, watchdogs, ended = together(4, (0, 1, 3))
    watchdogs[1].heartbeat(16, "reading data")
    for one in (watchdogs[0], watchdogs[2]):
        one.heartbeat(17, "reducing gradients")
    for one in watchdogs:
        one._threads[0].join(timeout=20)
    err = capfd.readouterr().err
    assert ended == [EXIT_HUNG] * 3 and err.count("another rank reports on all") == 2
    report = err[err.index("  rank 2 was never heard of") :].splitlines()
    assert "rank 1" in report[1] and "step 16, reading data" in report[1] and "has not been heard of" not in report[1]
    assert all(f"rank {rank}" in line and "step 17" in line for rank, line in zip((0, 3), sorted(report[2:4]), strict=True))


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_store_that_does_not_answer_keeps_no_rank_from_ending(together, monkeypatch, capfd, how):
    """Its host ended, or the network is cut and a question waits for ever."""
    _, (one,), ended = together(2, (1,))
    one.heartbeat(9, "saving")

    def client(met):
        if how == "cut":
            time.sleep(600)
        raise RuntimeError("connection reset by peer\nand a stack of C++")

    monkeypatch.setattr(Rendezvous, "client", client)
    monkeypatch.setattr(watchdog, "_with_timeout", lambda seconds, act, within=watchdog._with_timeout: within(min(seconds, 1.0), act))
    one._threads[0].join(timeout=60)
    err = capfd.readouterr().err
    why = "connection reset by peer" if how == "gone" else "no answer in 1 s"
    assert ended == [EXIT_HUNG] and "has stood in step 9, saving" in err and f"the other ranks could not be asked ({why})" in err


def test_a_disk_that_does_not_answer_keeps_no_process_from_ending(together, monkeypatch):
    _, (one,), ended = together(1, (0,))
    monkeypatch.setattr(Watchdog, "_print_report", lambda *given: time.sleep(600))
    monkeypatch.setattr(watchdog, "_with_timeout", lambda seconds, act, within=watchdog._with_timeout: within(min(seconds, 2.0), act))
    one._threads[0].join(timeout=60)
    assert ended == [EXIT_HUNG]


def test_a_rank_that_moved_while_all_were_asked_goes_on_and_the_next_hang_is_asked_after_anew(together, capfd):
    server, (one,), ended = together(1, (0,))
    one._ask_all_ranks, ask_all_ranks = lambda: (ask_all_ranks(), one.heartbeat(2, "reading data"))[0], one._ask_all_ranks
    while not server.check(["condot/1/watchdog/report"]):
        time.sleep(0.01)
    one._ask_all_ranks = ask_all_ranks
    one._threads[0].join(timeout=60)
    err = capfd.readouterr().err
    assert ended == [EXIT_HUNG] and err.count("no progress") == 1 and "in step 2, reading data" in err and "another rank" not in err


# --- on several processes


def alone(folder, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, MEMBER, str(folder), *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.faults
def test_a_process_alone_that_hangs_ends_with_4(tmp_path):
    ended = alone(tmp_path, "--fault=sleep:0:3", "--hang=2", "--steps=9")
    assert ended.returncode == EXIT_HUNG and "in step 3, reading data" in ended.stderr and "time.sleep" not in ended.stderr
    assert 'tests/member.py", line' in ended.stderr and read_status(tmp_path)["state"] == "hung"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("freeze:1:12", r"rank 1 \(host .*\) has not been heard of for \d+ s; it was in step \d+, "),
        ("freeze:0:12", r"rank 0 \(host .*\) has not been heard of for \d+ s; it was in step \d+, "),
        ("sleep:1:12", r"rank 1 \(host .*\) has stood in step 12, reading data, for \d+ s"),
        ("sleep:0:12", r"rank 0 \(host .*\) has stood in step 12, reading data, for \d+ s"),
    ],
)
def test_a_rank_that_hangs_is_named_first(tmp_path, fault, names):
    """Stopped, as by a debugger or a failing machine, or asleep in its own code; rank 0 or another."""
    import re

    launched = start(*TORCHRUN, "--standalone", "--nproc_per_node=2", MEMBER, str(tmp_path), f"--fault={fault}", "--hang=4", "--steps=99")
    _, err = launched.communicate(timeout=240)
    assert launched.returncode == 1
    report = err[err.index("no progress for 4 s (guard.hang_seconds):\n") :].splitlines()
    named = [line for line in err.splitlines() if re.search(names, line)]
    assert named and (named[0] in report[:3] or "another rank reports" in err)
    assert read_status(tmp_path)["state"] == "hung" and re.match(names, read_status(tmp_path)["reason"])
    assert "exitcode  : 4" in err and not list(tmp_path.glob("done-*"))
    for path in tmp_path.glob("pid-*"):
        assert not Path(f"/proc/{path.read_text().split()[0]}").exists()
