"""The calls of a notebook: what they return, that they leave the process as they found it, and what they refuse."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import DIT, ROOT, arguments

import condot
from condot import api
from condot.cli import evaluate as evaluate_command
from condot.cli import host
from condot.core.process import SIGNALS
from condot.keyword_options import build_config, fill_options
from condot.pipeline.config.parse import parse
from condot.pipeline.config.schema import ALIASES, Config, TrainConfig
from condot.pipeline.evaluation.metrics import EvaluationResult
from condot.pipeline.sampling.image_grid import tensor_to_pil
from condot.pipeline.sampling.options import ImagesOptions, SamplingOptions
from condot.pipeline.training import loop


@pytest.fixture(autouse=True)
def no_other_state():
    """Other tests leave Accelerate's state behind."""
    AcceleratorState._reset_state(True)


def recipe(shards, output, *more):
    """The run of `conftest.arguments`, as a mapping of dotted keys."""
    words = [word.removeprefix("--").partition("=") for word in arguments(shards, output, *more)]
    found = {key: value for key, _, value in words}
    return found | {"data.shards": [str(shards)]}


# --- configurations


def test_a_configuration_is_the_same_by_every_way(tmp_path):
    """A file, a mapping of sections, dotted keys, diffusers' names and a Config come to what the command line comes to."""
    (tmp_path / "r.yaml").write_text("seed: 3\ndata: {shards: [a, b], caption: {txt: 0.5, json.x: 0.5}}\ntrain: {max_steps: 7}\n")
    words = ["--config", str(tmp_path / "r.yaml"), "--learning_rate=1e-3", "--model.depth=2"]
    expected = parse(Config, words, ALIASES)
    sections = {"seed": 3, "data": {"shards": ("a", "b"), "caption": {"txt": 0.5, "json.x": 0.5}}, "train": {"max_steps": 7}}
    more = {"learning_rate": 1e-3, "model": {"depth": 2}}
    assert build_config(tmp_path / "r.yaml", more) == build_config(str(tmp_path / "r.yaml"), more) == expected
    assert build_config(sections, more) == build_config(parse(Config, words[:2], ALIASES), more) == expected
    assert build_config(sections, {"train.learning_rate": 1e-3, "model.depth": 2}) == expected
    assert build_config(Config(train=TrainConfig(max_steps=9, lr_warmup_steps=0)), {}).train.max_steps == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.max_step": 3}, "unknown key 'train.max_step': did you mean 'train.max_steps'"),
        ({"learning_rat": 3}, "did you mean 'train.learning_rate'|did you mean 'learning_rate'"),
        ({"train": {"max_steps": "many"}}, "max.steps"),
        ({"train.max_steps": -1}, "train.max_steps"),
        ({"dry_run": True}, "condot train --config RECIPE --dry_run"),
    ],
)
def test_what_is_mistyped_is_a_value_error(given, message):
    with pytest.raises(ValueError, match=message):
        condot.train({}, given)
    with pytest.raises(ValueError, match="no such recipe"):
        condot.train("nowhere.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scal": 2.0}, r"condot.sample\(guidance_scal=...\) is no option of it: did you mean 'guidance_scale'"),
        ({"output": "a.png"}, "is no option of it"),
        ({"solver": "heum"}, "choose one of euler"),
        ({"guidance_scale": "2"}, "it takes a value of type float, and this is str"),
        ({"num_images": True}, "it takes a value of type int, and this is bool"),
        ({"guidance_interval": (0.1,)}, "it takes 2 values"),
        ({"num_inference_steps": 0}, "a solver takes at least one step"),
        ({"output_type": "np"}, "choose one of 'pil', 'pt'"),
        ({"guide_run": "x"}, "beside --guidance_scale 1"),
    ],
)
def test_an_option_that_is_none_is_refused_before_a_model_is_read(given, message):
    with pytest.raises(ValueError, match=message):
        condot.sample("nowhere", **given)


def test_keywords_fill_the_options_of_the_command():
    given = {"class_labels": np.array([3, 1]), "prompt": "a cat", "guidance_scale": 2, "given_times": [0, 0.5, 1]}
    assert fill_options(ImagesOptions, "f", given) == ImagesOptions(
        class_labels=(3, 1), prompt=("a cat",), guidance_scale=2.0, given_times=(0.0, 0.5, 1.0)
    )
    assert fill_options(SamplingOptions, "f", {}) == SamplingOptions()


# --- models


def test_samples_are_those_of_the_command(trained, tmp_path):
    """Image i is a function of (seed, i): a grid of the command holds the very pictures that the call returns."""
    from condot.cli import sample

    how = {"class_labels": [3, 7], "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 5}
    pictures = condot.sample(trained / "export", **how)
    tensor = condot.sample(condot.load(trained / "export"), output_type="pt", **how)
    assert [list(one.getdata()) for one in pictures] == [list(tensor_to_pil(one).getdata()) for one in tensor]
    words = ["--pipeline", str(trained / "export"), "--class_labels", "3", "7", "--num_inference_steps", "3"]
    assert sample.main([*words, "--guidance_scale", "2", "--seed", "5", "--output", str(tmp_path / "many/")]) == 0
    from PIL import Image

    for number, picture in enumerate(pictures):
        theirs = np.asarray(Image.open(tmp_path / "many" / f"{number:06d}.png")).astype(int)
        assert np.abs(theirs - np.asarray(picture)).max() <= 1


def test_a_run_a_checkpoint_and_an_export_are_one_model(trained):
    how = {"class_labels": 1, "num_inference_steps": 3, "output_type": "pt"}
    exported = condot.sample(trained / "export", **how)
    assert exported.shape == (1, 1, 8, 8)
    for folder in (trained, trained / "checkpoint-12"):
        torch.testing.assert_close(condot.sample(folder, **how), exported, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        condot.load(trained / "nowhere")
    with pytest.raises(ValueError, match="of a model that takes no text"):
        condot.sample(trained, prompt="a cat")


def test_evaluate_and_export_are_the_commands(trained, digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *given: seen.append(given) or "figures")
    assert condot.evaluate(trained, digits, num_images=20, num_inference_steps=2) == "figures"
    made, labels, train, held_out, features = seen[0]
    assert made.shape == (20, 1, 8, 8) and labels.tolist() == [*range(10)] * 2 and features is None
    assert len(train[0]) > len(held_out[0]) > 300
    with pytest.raises(ValueError, match="no option of it"):
        condot.evaluate(trained, digits, min_accuracy=0.5)
    assert condot.export(trained, tmp_path / "raw", ema="raw") == tmp_path / "raw"
    assert "raw" in (tmp_path / "raw" / "README.md").read_text()


# --- training


def test_training_from_python_is_the_command_and_returns_the_run(trained, digits, tmp_path):
    """The same losses to the bit as the command's, at once and in two calls; what is stopped goes on."""
    run = condot.train(recipe(digits, tmp_path / "run"), {"train.max_steps": 6}, train={"cpu_threads": 1})
    assert (run.step, run.exit_status, run.finished, run.export) == (6, 0, True, None)
    assert run.checkpoint == tmp_path / "run" / "checkpoint-6"
    run = condot.train(recipe(digits, tmp_path / "run"), export=True)
    assert run.step == 12 and run.export == tmp_path / "run" / "export"
    theirs = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    mine = run.metrics()
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == [2, 4, 6, 8, 10, 12]
    assert [line["loss"] for line in mine] == [line["loss"] for line in theirs]
    assert condot.load(run).class_names == tuple(map(str, range(10)))


def test_a_call_leaves_the_process_as_it_found_it(digits, tmp_path):
    """Signals, generators, threads, and the caller's own Accelerator, of another precision than the run."""
    before = Accelerator(cpu=True, mixed_precision="bf16")
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    condot.train(recipe(digits, tmp_path / "run"), {"train.max_steps": 2, "train.cpu_threads": 2})
    assert handlers == {number: signal.getsignal(number) for number in SIGNALS}
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted
    assert torch.get_num_threads() == 1 and before.mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_training_saves_and_returns(digits, tmp_path, monkeypatch, number):
    """Ctrl-C of a cell: the step ends, the state is saved, the call returns, and the next call goes on from there."""
    step = loop.train_step

    def interrupted(run):
        if run.step == 3:
            os.kill(os.getpid(), number)
        return step(run)

    monkeypatch.setattr(loop, "train_step", interrupted)
    run = condot.train(recipe(digits, tmp_path / "run"))
    assert (run.step, run.exit_status, run.finished) == (4, 128 + number, False)
    assert json.loads((run.folder / "status.json").read_text())["state"] == "stopped"
    monkeypatch.setattr(loop, "train_step", step)
    assert condot.train(recipe(digits, tmp_path / "run")).finished


def test_a_second_ctrl_c_ends_the_call_as_python_would(monkeypatch):
    clock, before = [100.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(host.time, "monotonic", lambda: clock[0])
    with host.guest_host() as guest:
        guest.interrupt.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert guest.interrupt.requested, "the second came at once: one key pressed twice"
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and not guest.owns_process


def test_another_thread_trains_without_signals():
    found = []

    def listen():
        with host.guest_host() as guest:
            guest.interrupt.defer()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_an_error_of_the_data_is_raised_and_nothing_is_left_locked(digits, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match=r"no manifest|nowhere"):
        condot.train(recipe(tmp_path / "nowhere", tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert condot.train(recipe(digits, tmp_path / "run"), {"train.max_steps": 2}).finished


def test_import_condot_waits_for_nothing_slow_and_names_what_it_has():
    program = "import sys, condot; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules], dir(condot))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] ") and all(f"'{name}'" in out for name in condot.__all__)
    with pytest.raises(AttributeError, match=r"has no attribute .trian.; it has .*train"):
        condot.trian  # noqa: B018
    assert condot.train is api.train and set(condot.__all__) == set(api.__all__)


def test_the_page_for_notebooks_runs_as_it_is_written(digits, tmp_path, monkeypatch, capsys):
    """The code blocks of docs/python.md, one after the other, on a smaller run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(digits)
    small = {"train.max_steps": 4, "train.batch_size": 16, **{word.removeprefix("--").partition("=")[0]: 2 for word in DIT[1:2]}}
    train = condot.train
    shrunk = {**small, "model.width": 32, "data.workers": 1, "train.cpu_threads": 1}
    monkeypatch.setattr(condot, "train", lambda config, **more: train(config, shrunk, **more), raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    figures = EvaluationResult(
        {"samples": 25, "accuracy": 0.5, "accuracy_of_held_out": 1.0, "diversity": 1.2, "diversity_of_real": 2.0, "nearest": 2.1,
         "nearest_of_held_out": 3.0, "frechet": 1.0, "frechet_of_train": 1.0, "feature_width": 4, "few": False}
    )  # fmt: skip
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *given: figures)  # a classifier would learn for half a minute
    names = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["run"].finished and (tmp_path / "three.png").exists()
