"""Trackers that raise, hang or are gone: training is the run without them, and what they missed is counted."""

import importlib.metadata
import sys
import threading
import types

import pytest
from accelerate import PartialState
from conftest import fit
from test_tracking import Alone

from condot.pipeline.tracking import trackers
from condot.pipeline.tracking.jsonl import read_lines
from condot.pipeline.tracking.run_log import loss_curve
from condot.pipeline.tracking.trackers import BackgroundTracker, attach_trackers, check_installed, finish_trackers, flatten_settings

# --- between the run and a server


class Server:
    """A package's tracker, that answers as it is told."""

    def __init__(self, start=None, log=None):
        self.got, self._start, self._log, self.ended = [], start, log, False

    def start(self):
        if self._start:
            self._start()

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        if self._log:
            self._log(step)
        self.got.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def held():
    """Holds whoever waits for it until the test ends."""
    event = threading.Event()
    yield event
    event.set()
    trackers.STUCK_TRACKERS.clear()


def told(server, lines, patience=5.0):
    """A tracker before that server, and what is said of it after so many lines and the end."""
    tracker = BackgroundTracker("wandb", lambda: server)
    tracker.start()
    tracker.store_init_configuration({"a": 1})
    for step in range(1, lines + 1):
        tracker.log({"loss": 1 / step}, step=step)
    return tracker, finish_trackers([tracker], patience)


def test_a_tracker_gets_every_line_in_order_and_ends():
    server = Server()
    tracker, said = told(server, 300)
    assert server.got == [(step, {"loss": 1 / step}) for step in range(1, 301)] and server.ended and server.settings == {"a": 1}
    assert said == [] and tracker.lost == 0 and not trackers.STUCK_TRACKERS


def test_a_tracker_that_raises_is_said_once_and_counted_and_tried_again():
    def sometimes(step):
        if 3 <= step <= 6:
            raise ConnectionError("refused")

    _, said = told(server := Server(log=sometimes), 9)
    assert [step for step, _ in server.got] == [1, 2, 7, 8, 9] and server.ended
    assert len(said) == 2 and "ConnectionError: refused" in said[0] and "missed 4 of 9" in said[1]


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1)])
def test_a_tracker_that_does_not_start_is_left_out(error):
    def refuse():
        raise error

    _, said = told(server := Server(start=refuse), 5)
    assert server.got == [] and not server.ended
    assert len(said) == 2 and "did not start" in said[0] and "missed 5 of 5" in said[1]


@pytest.mark.parametrize("where", ["start", "log"])
def test_a_tracker_that_hangs_holds_up_nothing(where, held, monkeypatch):
    """Every call returns while the server never answers; what waits is bounded, what is lost is counted, the process can leave."""
    monkeypatch.setattr(trackers, "MAX_QUEUED", 4)
    monkeypatch.setattr(trackers, "SLOW_CALL_SECONDS", -1.0)
    entered = threading.Event()

    def hang(*step):
        entered.set()
        held.wait()

    tracker = BackgroundTracker("wandb", lambda: Server(**{where: hang}))
    tracker.start()
    tracker.log({"loss": 1.0}, step=1)
    entered.wait()
    for step in range(2, 11):
        tracker.log({"loss": 1.0}, step=step)
    assert len(tracker._calls) == 4
    said = finish_trackers([tracker], timeout=0.01)
    assert tracker.lost == 10 and trackers.STUCK_TRACKERS == ["wandb"]
    assert [sum(word in text for text in said) for word in ("not answered", "lines behind", "did not end", "missed 10 of 10")] == [1] * 4
    left = []
    monkeypatch.setattr(trackers.os, "_exit", left.append)
    with pytest.raises(SystemExit):
        trackers.exit_process(7)
    assert left == [7]
    tracker._thread.join = lambda patience: pytest.fail("waited for a second time")
    tracker.finish()


def test_one_tracker_that_hangs_does_not_keep_another_from_its_lines(held):
    well, bad = BackgroundTracker("tensorboard", lambda: server), BackgroundTracker("wandb", lambda: Server(log=lambda step: held.wait()))
    server = Server()
    for step in range(3):
        for tracker in (bad, well):
            tracker.start() if step == 0 else tracker.log({"loss": 1.0}, step=step)
    said = finish_trackers([bad, well], timeout=0.3)
    assert [step for step, _ in server.got] == [1, 2] and server.ended and all("wandb" in text for text in said)


def test_a_process_leaves_as_usual_where_nothing_is_stuck(monkeypatch):
    monkeypatch.setattr(trackers.os, "_exit", lambda status: pytest.fail("at once"))
    with pytest.raises(SystemExit) as end:
        trackers.exit_process(3)
    assert end.value.code == 3


def test_settings_are_flat_and_of_the_types_that_trackers_hold():
    found = flatten_settings(
        {"seed": 0, "train": {"lr": 1e-4, "sharding": None, "compile": False}, "data": {"shards": ["a", "b"], "weights": []}}
    )
    assert found == {
        "seed": 0,
        "train.lr": 1e-4,
        "train.sharding": "none",
        "train.compile": False,
        "data.shards": "a b",
        "data.weights": "",
    }


# --- packages


class FakeWandb(types.ModuleType):
    """What Accelerate's tracker uses of wandb."""

    def __init__(self, log=lambda values: None):
        super().__init__("wandb")
        self.inits, self.lines, self.axes = [], [], []
        self.Settings = lambda **more: types.SimpleNamespace(**{"console": "auto", **more})
        self.answer = log

    def init(self, **given):
        self.inits.append(given)
        return types.SimpleNamespace(log=self._log, finish=lambda: None, define_metric=lambda *a, **k: self.axes.append((a, k)))

    def _log(self, values, step=None):
        self.answer(values)
        self.lines.append((step, values))


@pytest.fixture
def wandb(monkeypatch):
    PartialState(cpu=True)
    fake, version = FakeWandb(), importlib.metadata.version
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "wandb" else version(name))
    return fake


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, wandb):
    """The same id, and the step as the axis; a fresh run in the same folder is another."""
    for start in (0, 2, 0):
        accelerator = Alone()
        attach_trackers(accelerator, ["wandb", "none", "wandb"], "condot", tmp_path, {"seed": 1}, start)
        accelerator.log({"loss": 0.5}, step=start + 1)
        assert finish_trackers(accelerator.trackers) == [] and len(accelerator.trackers) == 1
    ids = [given["id"] for given in wandb.inits]
    assert ids[0] == ids[1] != ids[2] and all(given["resume"] == "allow" and given["name"] == tmp_path.name for given in wandb.inits)
    assert wandb.inits[0]["project"] == "condot" and wandb.inits[0]["config"] == {"seed": 1} and wandb.inits[0]["settings"].console == "off"
    assert wandb.lines[1] == (None, {"loss": 0.5, "step": 3}) and wandb.axes[0] == (("*",), {"step_metric": "step"})


def test_a_missing_package_is_refused_at_start(tmp_path, digits, monkeypatch, capsys):
    version = importlib.metadata.version

    def absent(name):
        if name == "trackio":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    check_installed(["none"])
    with pytest.raises(ValueError, match="pip install trackio"):
        check_installed(["tensorboard", "trackio"])
    assert fit(digits, tmp_path / "run", "--log.report_to", "tensorboard", "trackio") == 2
    assert "pip install trackio" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_whose_tracker_hangs_is_the_run_without_one(tmp_path, digits, trained, wandb, held, monkeypatch, capsys):
    monkeypatch.setattr("condot.pipeline.tracking.run_log.finish_trackers", lambda given: finish_trackers(given, 0.05))
    wandb.answer = lambda values: held.wait()
    assert fit(digits, tmp_path / "run", "--log.report_to=wandb") == 0
    assert loss_curve(tmp_path / "run") == loss_curve(trained) and len(loss_curve(trained)) == 6
    assert "log.report_to=wandb missed 6 of 6 lines" in capsys.readouterr().out


def test_tensorboard_holds_the_metrics_and_no_step_twice(tmp_path, digits):
    """Read back by TensorBoard itself; the run is told to stop and goes on from a checkpoint before its last line."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("--log.report_to=tensorboard", "--checkpoint.every=3", "--log.every=1", "--log.peak_tflops=0.5")
    assert fit(digits, tmp_path / "run", *more, "--train.max_steps=8") == 0
    for folder in (tmp_path / "run").glob("checkpoint-8"):
        (folder / "manifest.json").unlink()
    assert fit(digits, tmp_path / "run", *more, "--train.max_steps=9") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    for name in ("loss", "grad_norm", "lr", "images", "mfu", "data_wait", "memory_gb", "bad_samples"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert [line["step"] for line in lines] == list(range(1, 10))
    said = next((tmp_path / "run/tensorboard").glob("*/hparams.yml")).read_text()
    assert "train.learning_rate: 0.001" in said
