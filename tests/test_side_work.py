"""Telling and looking end no run: piped into `head`, its log on a full disk, its preview failing, it is the run that nothing befell."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sharded_preview
import torch
from conftest import ROOT, arguments, fit
from ranks import together
from test_tracking import Alone
from test_training import digest

from condot.pipeline.tracking.run_log import RunLog
from condot.pipeline.training import preview
from condot.pipeline.training.best_effort import BestEffort, BestEffortError, is_out_of_memory
from condot.pipeline.training.run import Interrupted, Run
from condot.pipeline.training.status import read_status

pytestmark = pytest.mark.usefixtures("one_thread")
PREVIEWS = ("--log.sample_every=4", "--log.sample_steps=2")


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """A run of 12 steps that draws, and that nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert fit(digits, folder, *PREVIEWS) == 0
    return folder


def same(run, undisturbed):
    """It came to its end: saved, with the same weights, averages and moments, and the same losses."""
    assert read_status(run)["state"] == "finished" and read_status(run)["step"] == 12
    assert digest(run / "checkpoint-12") == digest(undisturbed / "checkpoint-12")
    curves = [[json.loads(line)["loss"] for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (run, undisturbed)]
    assert curves[0] == curves[1]
    return True


# --- what is told


UNHEARD = {
    "head": '{ printf "%2500s" ""; exec "$0" "$@"; } 2>&1 | head -c 2500 >/dev/null; exit ${PIPESTATUS[0]}',
    "full": '"$0" "$@" >/dev/full 2>&1',
}
"""Shells that start a command of which nobody hears anything: a reader that has had its 2,500 bytes, a log on a full disk."""


def unheard(how, *words):
    """The exit status of a command of the checkout, so started."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.run(["bash", "-c", UNHEARD[how], sys.executable, *words], cwd=ROOT, env=env, timeout=600).returncode


@pytest.mark.parametrize("how", UNHEARD)
def test_a_run_that_nobody_hears_is_the_run(digits, undisturbed, tmp_path, how):
    assert unheard(how, "train.py", *arguments(digits, tmp_path / "run", *PREVIEWS)) == 0
    assert same(tmp_path / "run", undisturbed)


def test_what_packs_and_what_draws_folders_does_its_work_unheard(undisturbed, tmp_path):
    assert unheard("head", "-m", "data.prepare", "digits", "--output", str(tmp_path / "shards")) == 0
    assert (tmp_path / "shards/manifest.json").is_file()
    draw = ("--run", str(undisturbed), "--num_images=3", "--num_inference_steps=1", "--output", f"{tmp_path}/images/")
    assert unheard("full", "sample.py", *draw) == 0 and len(list((tmp_path / "images").glob("*.png"))) == 3


def test_a_mistake_that_nobody_hears_keeps_its_status():
    assert unheard("full", "train.py", "--no_such_option=1") == 2


def test_tensorboard_on_a_full_disk_ends_nothing(digits, undisturbed, tmp_path, monkeypatch, capsys):
    """Its own thread dies of it, and whoever calls it waits for ever: not the run."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    from condot.pipeline.tracking import trackers

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr("condot.pipeline.tracking.run_log.finish_trackers", lambda given: trackers.finish_trackers(given, 0.5))
    monkeypatch.setattr(trackers, "STUCK_TRACKERS", [])
    assert fit(digits, tmp_path / "run", *PREVIEWS, "--log.report_to=tensorboard") == 0 and same(tmp_path / "run", undisturbed)


def test_nothing_of_a_log_raises(tmp_path, monkeypatch, capsys):
    """Whatever a bar, a tracker or the writer of lines raises, once for each of its kinds."""
    log = RunLog(tmp_path, main=True, start=0, stop=9, accelerator=Alone())

    def broken(*given, **more):
        raise RuntimeError("broken")

    for holder, name in ((log.bar, "update"), (log.bar, "write"), (log.bar, "close"), (log.lines, "append"), (log.lines, "filter")):
        monkeypatch.setattr(holder, name, broken)
    for step in range(3):
        log.advance()
        log.write(step, 16, {"loss": 1.0})
        log.say("a line")
        assert log.rewind(step) == []
    log.close()
    assert capsys.readouterr().err.count("RuntimeError: broken") == 5, "advance, write, say, back, close"


# --- what is looked at


def short_of_memory(most):
    """A generator that lacks memory for more than so many images at once; and what it was asked for."""
    plain, asked = preview.generate, []

    def generate(*given, batch_size, **more):
        asked.append(batch_size)
        if batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return plain(*given, batch_size=batch_size, **more)

    return generate, asked


def test_a_run_whose_preview_always_fails_is_the_run(digits, undisturbed, tmp_path, monkeypatch, capsys):
    """At the default, where a step that is saved is drawn too: each is committed before, and the failure is told once."""
    saved, generate = [], preview.generate
    monkeypatch.setattr(preview, "generate", short_of_memory(0)[0])
    wait_for_checkpoint = Run.wait_for_checkpoint
    monkeypatch.setattr(Run, "wait_for_checkpoint", lambda run: (wait_for_checkpoint(run), saved.append(run.last_saved_step))[0])
    assert fit(digits, tmp_path / "run", *PREVIEWS) == 0 and generate is not preview.generate
    out = "".join(capsys.readouterr())
    assert out.count("the preview failed, and training goes on (OutOfMemoryError: CUDA out") == 1 and "3 times: the preview" in out
    assert {4, 8, 12} <= set(saved) and not (tmp_path / "run/samples").exists() and same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(28, "No space left on device"), ImportError("no module"), KeyError("x")])
def test_whatever_a_preview_raises_ends_nothing(digits, undisturbed, tmp_path, monkeypatch, error):
    """Where a step is committed before its preview, a process that is killed there goes on from it."""
    seen = []

    def look(run, text=None):
        seen.append((run.step, run.last_saved_step))
        raise error

    monkeypatch.setattr("condot.cli.assembly.build_run.preview", look)
    assert fit(digits, tmp_path / "run", *PREVIEWS) == 0 and same(tmp_path / "run", undisturbed)
    assert seen == [(4, 4), (8, 8), (12, 12)]


def test_a_preview_that_lacks_memory_is_drawn_few_at_a_time(digits, undisturbed, tmp_path, monkeypatch):
    """A micro-batch at once at first, then half as many until they fit; the picture is the same."""
    generate, asked = short_of_memory(3)
    monkeypatch.setattr(preview, "generate", generate)
    assert fit(digits, tmp_path / "run", *PREVIEWS) == 0 and same(tmp_path / "run", undisturbed)
    assert asked == [16, 8, 4, 2] * 3
    pictures = [[path.read_bytes() for path in sorted((one / "samples").iterdir())] for one in (tmp_path / "run", undisturbed)]
    assert len(pictures[0]) == 3 and pictures[0] == pictures[1]


def drawing(*answers, check_interrupt=lambda failure: failure):
    """What `preview.draw` makes of a function that gives or raises these, one after the other."""
    train = SimpleNamespace(batch_size=16, gradient_accumulation_steps=2)
    two, ema = SimpleNamespace(num_processes=2), SimpleNamespace(model=torch.nn.Identity())
    run = SimpleNamespace(
        config=SimpleNamespace(train=train), accelerator=two, ema=ema, check_interrupt=lambda failure=0: check_interrupt(failure)
    )
    left, asked = list(answers), []

    def make(most):
        asked.append(most)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return lambda: preview.draw_within_memory(run, make), asked


MEMORY, PICTURE = MemoryError("no memory"), torch.zeros(3)


def test_ranks_that_draw_together_give_up_or_halve_together():
    """The rank that did well hears of the others' trouble, and does what they do."""
    draw, asked = drawing(MEMORY, PICTURE)
    assert draw() is PICTURE and asked == [4, 2]
    heard = iter([preview.OUT_OF_MEMORY, 0])
    draw, asked = drawing(PICTURE, PICTURE, check_interrupt=lambda failure: next(heard))
    assert draw() is PICTURE and asked == [4, 2]
    draw, asked = drawing(preview.PeerFailure(preview.OUT_OF_MEMORY), PICTURE)
    assert draw() is PICTURE and asked == [4, 2]
    for failure in (RuntimeError("a bug"), preview.PeerFailure(preview.FAILED)):
        draw, asked = drawing(failure, PICTURE)
        with pytest.raises(BestEffortError, match=r"RuntimeError: a bug|on another rank"):
            draw()
        assert asked == [4]
    draw, asked = drawing(MEMORY, MEMORY, MEMORY)
    with pytest.raises(BestEffortError, match="MemoryError: no memory"):
        draw()
    assert asked == [4, 2, 1]
    draw, asked = drawing(Interrupted(), PICTURE)
    with pytest.raises(Interrupted):
        draw()


@pytest.mark.faults
def test_a_rank_that_breaks_off_in_the_middle_of_a_pass_leaves_no_other_waiting():
    together(2, sharded_preview.breaks_off)


def test_lack_of_memory_is_known_by_what_torch_and_python_raise():
    lacks = [
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("CUDA error: out of memory"),
    ]
    assert all(map(is_out_of_memory, lacks))
    assert not any(
        map(is_out_of_memory, [RuntimeError("shape mismatch"), OSError(12, "Cannot allocate memory"), ValueError("out of memory")])
    )
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert is_out_of_memory(found.value)


def test_best_effort_reports_each_cause_once():
    said = []
    best_effort = BestEffort(said.append)
    assert best_effort("a", lambda: 3) == 3
    for error in (ValueError("x"), ValueError("x"), ValueError("y"), BestEffortError("in words")):

        def act(error=error):
            raise error

        assert best_effort("a", act) is None
    assert len(said) == 3 and "(ValueError: x)" in said[0] and "(in words)" in said[2]
    with pytest.raises(Interrupted):
        best_effort("a", lambda: (_ for _ in ()).throw(Interrupted()), reraise=(Interrupted,))
    assert sum(best_effort.failures.values()) == 4
