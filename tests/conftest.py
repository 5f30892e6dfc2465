"""Shared by tests: digits packed once, a small recipe, and a run trained once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

sys.path.insert(0, str(ROOT))
from condot.cli import train  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: real data sets lie beside the checkout on the project's own machines only")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of float32 depend on the number of threads: one, here and in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in several small shards, a fifth of them held out."""
    from condot.data.prepare.command import main

    folder = tmp_path_factory.mktemp("digits") / "shards"
    assert main(["digits", "--output", str(folder), "--shard_size", "400kB"]) == 0
    return folder


UNET = ("--model.kind=unet", "--model.block_channels", "32", "--model.head_width=32", "--train.batch_size=4")
DIT = ("--model.width=32", "--model.depth=2", "--model.heads=2")


def arguments(shards: Path, output: Path, *more: str) -> list[str]:
    """A run of seconds on the digits: a small DiT, or the network that `more` names."""
    model = () if "--model.kind=unet" in more else DIT
    run = "--train.batch_size=16 --train.max_steps=12 --train.learning_rate=1e-3 --train.cpu_threads=1 --checkpoint.every=4"
    quiet = "--ema.halflife=100 --log.every=2 --log.sample_every=0 --log.report_to=none --export=false"
    data = [f"--data.shards={shards}", f"--output_dir={output}", "--data.resolution=8", "--data.channels=1", "--data.workers=1"]
    return [*data, *model, *run.split(), *quiet.split(), *more]


def fit(shards: Path, output: Path, *more: str) -> int:
    """Train in this process; returns the exit status."""
    return command(*arguments(shards, output, *more))


def command(*words: str) -> int:
    """`train.py` with these words, in this process, as if it were the first."""
    AcceleratorState._reset_state(True)
    return train.main(list(words))


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps with its export."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert fit(digits, folder, "--export=true", "--log.sample_every=12", "--log.sample_steps=2") == 0
    return folder


def launch(*words: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, as a user would."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
