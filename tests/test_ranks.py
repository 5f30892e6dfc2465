"""One curve: 1, 2 and 4 processes, accumulation, DDP and FSDP2; resumed in pieces bitwise, and on other numbers of ranks."""

import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from conftest import UNET, arguments, launch

from condot.pipeline.checkpoint.store import load_tensors

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("one_thread")]
LONG = ("--train.max_steps=100", "--log.every=1", "--checkpoint.every=50", "--ema.halflife", "100", "1000", "--ema.power", "0.05", "0.1")
WAYS = {
    "two": (2, ()),
    "four": (4, ()),
    "two, in 4 passes": (2, ("--train.gradient_accumulation_steps=4",)),
    "full on 1": (1, ("--train.sharding=full",)),
    "full on 2": (2, ("--train.sharding=full",)),
    "full on 4": (4, ("--train.sharding=full", "--train.gradient_accumulation_steps=4")),
    "hybrid on 4": (4, ("--train.sharding=hybrid",)),
}


def train(ranks, *words):
    """A launch of so many processes; with hybrid sharding on two machines, which are launchers of half as many each."""
    if "--train.sharding=hybrid" not in words:
        launched = [launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "train.py", *words)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}", f"--nproc_per_node={ranks // 2}"]
        with ThreadPoolExecutor() as pool:
            starts = [partial(launch, "-m", "torch.distributed.run", *meet, f"--node_rank={i}", "train.py", *words) for i in range(2)]
            launched = [job.result() for job in [pool.submit(start) for start in starts]]
    for done in launched:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def curve(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digest(folder):
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in load_tensors(folder).items()}


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(1, *arguments(digits, folder, *LONG))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_that_of_one_process(digits, alone, tmp_path, way):
    ranks, more = WAYS[way]
    train(ranks, *arguments(digits, tmp_path / "run", *LONG, *more))
    one, other = curve(alone), curve(tmp_path / "run")
    assert len(other) == 100 and max(abs(a - b) / a for a, b in zip(one, other, strict=True)) < 1e-5
    first, second = load_tensors(alone / "checkpoint-100"), load_tensors(tmp_path / "run/checkpoint-100")
    assert first.keys() == second.keys()
    for name in first:
        if name.startswith("ema"):
            assert (first[name] - second[name]).abs().max() < 2e-3, name


@pytest.mark.parametrize(("ranks", "more"), [(1, ()), (2, ()), (4, ()), (2, ("--train.sharding=full",)), (4, ("--train.sharding=full",))])
def test_a_run_in_pieces_is_bitwise_the_whole_one(digits, tmp_path, ranks, more):
    words = ("--train.max_steps=12", "--log.every=1", "--checkpoint.every=5", "--ema.power", "0.1", *more)
    train(ranks, *arguments(digits, tmp_path / "whole", *words))
    train(ranks, *arguments(digits, tmp_path / "parts", *words, "--train.max_steps=7"))
    train(ranks, *arguments(digits, tmp_path / "parts", *words))
    assert digest(tmp_path / "parts/checkpoint-12") == digest(tmp_path / "whole/checkpoint-12")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_unet_in_shares_has_the_curve_of_a_whole_one(digits, tmp_path):
    words = (*UNET, "--log.every=1")
    train(1, *arguments(digits, tmp_path / "one", *words))
    train(2, *arguments(digits, tmp_path / "two", *words, "--train.sharding=full"))
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)


def test_ranks_and_sharding_may_change_at_every_resume(digits, tmp_path):
    """1 -> 2 in shares -> 4 whole -> 2 in shares -> 1: the curve of one process throughout."""
    words = ("--log.every=1", "--checkpoint.every=100", "--ema.halflife", "100", "500", "--ema.power", "0.1")
    stops = [(1, "none"), (2, "full"), (4, "none"), (2, "full"), (1, "none")]
    train(1, *arguments(digits, tmp_path / "one", *words, "--train.max_steps=30"))
    for i, (ranks, sharding) in enumerate(stops, 1):
        train(ranks, *arguments(digits, tmp_path / "many", *words, f"--train.sharding={sharding}", f"--train.max_steps={6 * i}"))
    one, many = curve(tmp_path / "one"), curve(tmp_path / "many")
    assert len(many) == 30 and max(abs(a - b) / a for a, b in zip(one, many, strict=True)) < 1e-5


def test_samples_of_a_run_in_shares_are_those_of_a_whole_one(digits, tmp_path):
    from PIL import Image

    words = ("--log.sample_every=12", "--log.sample_steps=3")
    train(1, *arguments(digits, tmp_path / "one", *words))
    train(2, *arguments(digits, tmp_path / "two", *words, "--train.sharding=full", "--export=true"))
    images = [Image.open(tmp_path / name / "samples/step-0000012.png") for name in ("one", "two")]
    a, b = (list(image.convert("L").getdata()) for image in images)
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
    assert (tmp_path / "two/export/model_index.json").is_file()
