"""Training on data of several shapes, sources and stages, with damage in them: each a run of seconds."""

import json

import frozen
import pytest
import torch
from conftest import ROOT, arguments, fit
from forked import launch_ranks
from shardmaker import jpeg, make, samples

from condot.core.data_config import DataConfig
from condot.core.data_options import read_options
from condot.data.encode import command
from condot.data.encoders.autoencoder import read_autoencoder
from condot.data.encoders.text import TextEncoder, read_text_encoders
from condot.data.loader.build import build, open_encoded_latents, open_encoded_text, open_shards
from condot.data.loader.stream import Share
from condot.pipeline.checkpoint.store import CheckpointManager, load_tensors

SIZES = [(8, 8), (16, 8), (8, 16), (12, 10)]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in lines(run)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """JPEG photographs of four shapes, in uneven shards, with captions."""
    shards, number = [], 0
    for count in (30, 7, 27):
        shard = []
        for _ in range(count):
            size = SIZES[number % 4]
            shard.append({"__key__": f"{number:04d}", "jpg": jpeg(number, size), "cls": number % 3, "txt": f"caption {number % 5}"})
            number += 1
        shards.append(shard)
    return make(tmp_path_factory.mktemp("shapes") / "shards", shards)


BUCKETS = ("--data.channels=3", "--data.aspect_ratios", "0.5", "1", "2", "--data.bucket_step=2", "--train.batch_size=8")


def test_batches_of_several_shapes_train_and_resume_bitwise(shapes, tmp_path):
    assert fit(shapes, tmp_path / "whole", *BUCKETS) == 0
    assert fit(shapes, tmp_path / "parts", *BUCKETS, "--train.max_steps=4") == 0
    assert fit(shapes, tmp_path / "parts", *BUCKETS) == 0
    whole, parts = (load_tensors(CheckpointManager(tmp_path / name, 1).latest()) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.faults
def test_two_processes_have_the_curve_of_one_with_shapes_and_sources(shapes, tmp_path):
    """Buckets, two sources by weight, accumulation: one process, and two ranks."""
    other = make(tmp_path / "other", [[{"__key__": f"o{i}", "jpg": jpeg(100 + i, (16, 8)), "cls": i % 3} for i in range(20)]])
    more = [*BUCKETS, "--data.shards", str(shapes), str(other), "--data.weights", "0.6", "0.4", "--train.gradient_accumulation_steps=2"]
    assert fit(shapes, tmp_path / "one", *more) == 0
    words = arguments(shapes, tmp_path / "two", *more)
    done = launch_ranks(2, "train", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_what_a_resumed_run_must_agree_on(shapes, tmp_path, capsys):
    assert fit(shapes, tmp_path / "run", *BUCKETS, "--train.max_steps=4") == 0
    for word, message in (
        ("--train.batch_size=16", "data.batch_size is 8 there and 16 here"),
        ("--data.random_crop=true", "data.random_crop is False there and True here"),
        ("--data.bucket_step=4", "data.bucket_step is 2 there and 4 here"),
    ):
        assert fit(shapes, tmp_path / "run", *BUCKETS, word) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.bucket_step=3",), "data.bucket_step=3 makes batches of 9 x 9 pixels, and the network takes multiples of 2"),
        (("--data.aspect_ratios", "1", "9"), "no image is nearest to"),
        (("--data.weights", "0.5"), "data.weights=(0.5,) sum to 0.5"),
        (("--data.shards", "/nowhere/{a,b}"), "/nowhere/a"),
        (("--data.max_bad_share=2",), "data.max_bad_share=2.0: a share below 1"),
    ],
)
def test_mistakes_are_one_line_at_the_start(shapes, tmp_path, capsys, words, message):
    assert fit(shapes, tmp_path / "run", *BUCKETS, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "run" / "metrics.jsonl").exists()


# --- stages


def test_three_stages_continue_one_another(shapes, tmp_path):
    """The recipes of configs/stages, shrunk: each starts from the weights of the one before, at twice the side."""
    stages = tmp_path / "stages"
    for number, side in enumerate((256, 512, 1024)):
        more = ["--config", str(ROOT / f"configs/stages/{side}.yaml"), "--data.autoencoder=", "--data.encoding=online", "--data.encoded="]
        more += [f"--data.resolution={8 << number}", "--data.bucket_step=4", "--data.aspect_ratios", "0.5", "1", "2"]
        more += ["--train.max_steps=4", "--train.mixed_precision=no", "--train.batch_size=8", "--data.channels=3"]
        if number:
            more.append(f"--checkpoint.start_from={stages / str(side // 2)}")
        assert fit(shapes, stages / str(side), *more) == 0
    # what a stage starts from is the stage before: no step done, the weights are those
    again = [
        f"--checkpoint.start_from={stages / '256'}",
        "--train.max_steps=1",
        "--train.learning_rate=1e-30",
        "--ema.halflife=1e30",
        "--ema.ramp=1e30",
    ]
    assert fit(shapes, tmp_path / "again", "--data.channels=3", *again) == 0
    first, second = (load_tensors(CheckpointManager(folder, 1).latest()) for folder in (stages / "256", tmp_path / "again"))
    for name in first:
        if name.startswith("model."):
            assert torch.equal(first[name], second[name])
        elif name.startswith("ema."):
            torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(first[k], first[k.replace("model.", "ema.")]) for k in first if k.startswith("model."))


def test_a_stage_that_cannot_start(shapes, tmp_path, capsys):
    for word, message in (("nowhere", "holds no whole checkpoint"), ("run", "is of another network")):
        assert fit(shapes, tmp_path / "run", "--data.channels=3", "--train.max_steps=1") == 0
        more = ["--model.width=64", f"--checkpoint.start_from={tmp_path / word}"]
        assert fit(shapes, tmp_path / f"next-{word}", "--data.channels=3", *more) == 2
        assert message in capsys.readouterr().err


# --- damage


def test_bad_samples_are_counted_listed_and_too_many_stop_training(tmp_path, capsys):
    """2 of 60 images cut: listed with shard and key; at a share of 5 % training ends, at 0.5 % it stops, with the list."""
    content = list(samples([60]))
    for number in (7, 41):
        content[0][number]["png"] = content[0][number]["png"][:-20]
    folder = make(tmp_path / "shards", content)
    assert fit(folder, tmp_path / "well", "--data.max_bad_share=0.05") == 0
    listed = [json.loads(line) for line in (tmp_path / "well/bad_samples.jsonl").read_text().splitlines()]
    assert {line["key"] for line in listed} == {"000007", "000041"} and len({line["position"] for line in listed}) >= 6
    assert all(line["shard"].endswith("train-000000.tar") and line["error"] for line in listed)
    assert lines(tmp_path / "well")[-1]["bad_samples"] == len(listed)
    capsys.readouterr()
    assert fit(folder, tmp_path / "ill", "--data.max_bad_share=0.005") == 5
    error = capsys.readouterr().err
    assert "are more than data.max_bad_share=0.005 allows" in error and "000041" in error and "train-000000.tar" in error
    assert fit(folder, tmp_path / "whole", "--data.max_bad_share=0.05", "--train.max_steps=12") == 0
    assert fit(folder, tmp_path / "parts", "--data.max_bad_share=0.05", "--train.max_steps=6") == 0
    with open(tmp_path / "parts/bad_samples.jsonl", "a") as file:  # as after a kill: of steps that are done again, and a torn line
        file.write(json.dumps(listed[0] | {"position": 150}) + "\n" + '{"position": 1')
    assert fit(folder, tmp_path / "parts", "--data.max_bad_share=0.05", "--train.max_steps=12") == 0
    assert (tmp_path / "parts/bad_samples.jsonl").read_text() == (tmp_path / "whole/bad_samples.jsonl").read_text()


@pytest.mark.faults
def test_two_ranks_list_what_one_does(tmp_path):
    content = list(samples([60]))
    for number in (7, 41):
        content[0][number]["png"] = content[0][number]["png"][:-20]
    folder = make(tmp_path / "shards", content)
    assert fit(folder, tmp_path / "one", "--data.max_bad_share=0.05") == 0
    words = arguments(folder, tmp_path / "two", "--data.max_bad_share=0.05")
    done = launch_ranks(2, "train", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two/bad_samples.jsonl").read_text() == (tmp_path / "one/bad_samples.jsonl").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_ranks_that_see_different_shards_do_not_begin(shapes, tmp_path, capsys, monkeypatch):
    """As while a folder is being copied from machine to machine."""
    monkeypatch.setattr("condot.pipeline.launch.distributed.gather_object", lambda mine: [*mine, "0" * 64])
    assert fit(shapes, tmp_path / "run", "--data.channels=3") == 2
    assert "on rank 0 and 000000000000 on rank 1: every rank must see the same finished folder" in capsys.readouterr().err


# --- what comes beside an image


def test_latents_captions_and_encoded_captions_come_together(tmp_path):
    """All three of a sample, from three folders of shards: each is that sample's own, substitutes included."""
    frozen.shards(tmp_path / "images", broken=(6,))
    frozen.kl(tmp_path / "vae")
    frozen.text(tmp_path / "words", "bert")
    recipe = frozen.recipe(
        tmp_path / "r.yaml", shards=tmp_path / "images", autoencoder=tmp_path / "vae", text_encoder=tmp_path / "words",
        resolution=32, max_bad_share=0.2, max_tokens=8, encoding="cached", encoded=tmp_path / "encoded",
    )  # fmt: skip
    assert command.main(["--config", str(recipe)]) == 0
    options: DataConfig = read_options(recipe)[0]
    images = open_shards(options)
    latents = open_encoded_latents(options, images, read_autoencoder(options.autoencoder))
    text = open_encoded_text(options, images, read_text_encoders(options))
    stream = build(options, seed=1, share=Share(batch_size=6), captions=True, images=images, latents=latents, text=text)
    encoder, faults = TextEncoder(options.text_encoder[0], max_tokens=8), 0
    for _ in range(5):
        batch = next(stream)
        faults += len(batch.faults)
        ((cached, there, vectors),) = batch.text
        assert cached.shape == (6, 8, encoder.width) and there.shape == (6, 8) and batch.images.dtype == torch.float16
        for i, (shard, number) in enumerate(batch.samples.tolist()):
            caption = images.read(shard, number).files.get("txt", b"").decode().strip()
            assert batch.captions[i] == caption
            states, mask, pooled = encoder.encode([caption])
            count = int(mask.sum())
            assert int(there[i].sum()) == count and not cached[i, count:].any()
            torch.testing.assert_close(cached[i, :count].float(), states[0, :count], rtol=2**-10, atol=1e-3)
            torch.testing.assert_close(vectors[i].float(), pooled[0], rtol=2**-10, atol=1e-3)
    assert faults, "the cut image came, and was replaced"
