"""Training on captions, end to end, with tiny encoders: cached is online, resumed is uninterrupted, on any number of ranks."""

import json
import shutil
from dataclasses import replace

import frozen
import pytest
import torch
from accelerate.state import AcceleratorState
from forked import launch_ranks
from shardmaker import make, png

from condot.cli import retrieve, sample, train
from condot.cli.assembly.build_run import PREVIEW_CAPTIONS
from condot.core.data_config import DataConfig
from condot.data.encode.command import main as encode
from condot.data.encoders.text import TextEncoder, read_text_encoder
from condot.data.loader.build import build
from condot.data.loader.read_samples import read_images
from condot.data.loader.stream import Share
from condot.data.loader.text_conditioner import TextConditioner
from condot.data.storage.shard_reader import Shards
from condot.pipeline.checkpoint.store import load_tensors
from condot.pipeline.launch import precision
from condot.pipeline.sampling.options import RetrieveOptions

NETWORKS = {
    "mmdit": ("--model.kind=mmdit", "--model.patch_size=4", "--model.width=32", "--model.depth=2", "--model.heads=2"),
    "cross_dit": ("--model.kind=cross_dit", "--model.patch_size=4", "--model.width=32", "--model.depth=2", "--model.heads=2"),
    "unet": ("--model.kind=unet", "--model.condition=text", "--model.block_channels", "32", "32", "--model.head_width=16"),
}


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread):
    """Every curve here is compared with another."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Shards with captions, two encoders, and the captions encoded by both."""
    folder = tmp_path_factory.mktemp("text")
    shards = frozen.shards(folder / "shards", (6, 5, 5))
    names = [frozen.text(folder / kind, kind) for kind in ("clip_projected", "t5")]  # pooled to 12, of 16
    recipe = frozen.recipe(
        folder / "recipe.json",
        shards=[str(shards)],
        resolution=16,
        text_encoder=[str(n) for n in names],
        max_tokens=12,
        encoded=folder / "encoded",
    )
    assert encode(["--config", str(recipe)]) == 0
    return {"shards": shards, "names": names, "encoded": folder / "encoded"}


def words(parts, output, *more, kind="mmdit", cached=True):
    data = [
        f"--data.shards={parts['shards']}",
        "--data.resolution=16",
        "--data.max_tokens=12",
        "--data.workers=1",
        f"--output_dir={output}",
    ]
    text = [
        "--data.text_encoder",
        *map(str, parts["names"]),
        f"--data.encoded={parts['encoded']}",
        f"--data.encoding={'cached' if cached else 'online'}",
    ]
    steps = "--train.batch_size=8 --train.max_steps=6 --train.learning_rate=3e-3 --train.cpu_threads=1"
    quiet = "--ema.halflife=100 --log.every=1 --log.sample_every=0 --log.report_to=none --export=false"
    dropped = "--checkpoint.every=3 --train.condition_dropout=0.3 --train.encoder_dropout=0.3"
    return [*data, *text, *steps.split(), *quiet.split(), *dropped.split(), *NETWORKS[kind], *more]


def fit(*arguments, **named):
    AcceleratorState._reset_state(True)
    return train.main(words(*arguments, **named))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]


def state(folder):
    return load_tensors(folder / "checkpoint-6")


@pytest.mark.parametrize("kind", NETWORKS)
def test_cached_captions_train_as_captions_encoded_now(parts, tmp_path, kind, monkeypatch):
    """To the rounding of float16, in which they are kept; and from the cache no encoder is built."""
    assert fit(parts, tmp_path / "now", kind=kind, cached=False) == 0
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "__init__", None)
        assert fit(parts, tmp_path / "before", kind=kind) == 0
    now, before = (torch.tensor(losses(tmp_path / run), dtype=torch.float64) for run in ("now", "before"))
    assert len(now) == 6 and (now - before).abs().max() < 1e-3 * now.max()
    assert now[-1] < now[0]


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(parts, tmp_path):
    assert fit(parts, tmp_path / "whole") == 0
    assert fit(parts, tmp_path / "cut", "--train.max_steps=3") == 0
    assert fit(parts, tmp_path / "cut") == 0
    one, two = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.faults
def test_two_processes_have_the_curve_of_one(parts, tmp_path):
    """Captions, and what of them is dropped, hang on the place in the global batch alone."""
    assert fit(parts, tmp_path / "one") == 0
    run = launch_ranks(2, "train", *words(parts, tmp_path / "two"))
    assert run.returncode == 0, run.stderr[-2000:]
    one, two = (torch.tensor(losses(tmp_path / name), dtype=torch.float64) for name in ("one", "two"))
    assert ((one - two) / one).abs().max() < 1e-5


def test_the_network_is_shown_its_own_captions(parts, tmp_path, monkeypatch):
    """What reaches the network is what the encoders give of each sample's caption: looked up by hand, nothing dropped."""
    shown = []
    told = TextConditioner.build_condition

    def spy(self, batch, whole, each):
        shown.append((batch.captions, told(self, batch, whole, each)))
        return shown[-1][1]

    monkeypatch.setattr(TextConditioner, "build_condition", spy)
    assert (
        fit(parts, tmp_path / "run", "--train.condition_dropout=0", "--train.encoder_dropout=0", "--train.max_steps=2", cached=False) == 0
    )
    captions, text = shown[-1]
    encoders = [TextEncoder(str(name), max_tokens=12) for name in parts["names"]]
    for row, caption in enumerate(captions):
        clip, t5 = (encoder.encode([caption]) for encoder in encoders)
        length = clip.states.shape[1]
        assert torch.allclose(text.states[row, :length], clip.states[0], atol=1e-6) and torch.allclose(
            text.pooled[row], clip.pooled[0], atol=1e-6
        )
        found = text.states[row][text.mask[row]]
        assert torch.allclose(found, torch.cat([clip.states[0], t5.states[0]]), atol=1e-6)


def test_a_run_is_sampled_by_prompt(parts, tmp_path, capsys):
    """Other captions give other images, the same ones the same; a negative prompt acts; and mistakes are one line."""
    run = tmp_path / "run"
    assert fit(parts, run, "--train.max_steps=40", "--log.sample_every=40", "--log.sample_steps=2", "--train.learning_rate=1e-2") == 0
    assert (run / "samples" / "step-0000040.png").is_file()
    ask = ["--run", str(run), "--num_inference_steps", "2", "--guidance_scale", "3"]

    def made(name, *more):
        output = tmp_path / f"{name}.png"
        assert sample.main([*ask, "--output", str(output), *more]) == 0
        return output.read_bytes()

    first = made("a", "--prompt", "a red square")
    assert made("b", "--prompt", "a red square") == first
    assert made("c", "--prompt", "big blue circle") != first
    assert made("d", "--prompt", "a red square", "--negative_prompt", "big blue circle") != first
    for more, message in (
        ([], "--prompt is missing"),
        (["--class_labels", "1"], "--class_labels 1 of a model that takes text"),
        (["--class_labels", "1", "--prompt", "a red square"], "--class_labels and --prompt beside one another"),
    ):
        capsys.readouterr()
        assert sample.main([*ask, *more]) == 2 and message in capsys.readouterr().err
    shards = ["--reference", str(parts["shards"]), "--split", "train"]
    picture = ["--input", str(tmp_path / "a.png"), "--task", "colourise"]
    assert sample.main(["likelihood", "--run", str(run), *shards]) == 2
    err = capsys.readouterr().err
    assert "the model takes text, and" in err and "Traceback" not in err
    restore = ["restore", "--run", str(run), *picture, "--num_inference_steps", "3", "--num_images", "2"]
    pictures = []
    for more in ([], ["--prompt", "a red square"], ["--prompt", "a red square", "--guidance_scale", "3", "--negative_prompt", "big"]):
        assert sample.main([*restore, "--output", str(tmp_path / "r.png"), *more]) == 0
        pictures.append((tmp_path / "r.png").read_bytes())
    assert len(set(pictures)) == 3, "the caption and what it is led away from act"


def test_the_preview_shows_the_first_captions_of_the_order(parts, tmp_path, monkeypatch):
    """Of the run's seed, and nothing of them is dropped; beside them no caption."""
    shown = []
    monkeypatch.setattr("condot.cli.assembly.build_run.preview", lambda run, text: shown.append(text))
    more = ("--seed=3", "--train.max_steps=1", "--log.sample_every=1", "--train.condition_dropout=0.9", "--train.encoder_dropout=0.9")
    assert fit(parts, tmp_path / "run", *more) == 0
    options = DataConfig(shards=(str(parts["shards"]),), resolution=16, workers=0)
    batch = next(build(options, seed=3, share=Share(batch_size=PREVIEW_CAPTIONS), captions=True))
    read = TextConditioner(tuple(read_text_encoder(str(name), 12) for name in parts["names"])).read
    for got, captions in zip(shown[0], (batch.captions, [""]), strict=True):
        wanted = read(captions)
        assert torch.equal(got.mask.sum(1), wanted.mask.sum(1))
        torch.testing.assert_close(got.states[got.mask], wanted.states[wanted.mask], rtol=2**-10, atol=1e-3)
        torch.testing.assert_close(got.pooled, wanted.pooled, rtol=2**-10, atol=1e-3)


def test_precision_is_measured_on_a_micro_batch_of_text(parts, tmp_path, monkeypatch):
    """As wide as the encoders, of images as many as one pass on one rank has."""
    seen = []
    monkeypatch.setattr(precision, "pick_faster_precision", lambda network, inputs: seen.append((network, inputs)) or "no")
    more = ("--train.mixed_precision=auto", "--train.gradient_accumulation_steps=4", "--train.max_steps=1")
    assert fit(parts, tmp_path / "run", *more) == 0
    ((network, inputs),) = seen
    x, t, text = inputs
    assert network(*inputs).shape == x.shape == (2, 3, 16, 16) and t.shape == (2,)
    assert (text.states.shape[2], text.pooled.shape) == (16, (2, 12))


def test_a_run_goes_on_with_its_own_encoders_only(parts, tmp_path, capsys):
    """Another T5 of the same shape fits the network, and is refused by name of the fact."""
    run, other = tmp_path / "run", frozen.text(tmp_path / "t5", "t5", seed=1)
    assert fit(parts, run, "--train.max_steps=1", cached=False) == 0
    assert fit(parts, run, "--data.text_encoder", str(parts["names"][0]), str(other), cached=False) == 2
    assert "checkpoint-1 is of another run: text is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.text_encoder", ""), "data.text_encoder"),
        (("--data.caption=json.name", "--data.encoding=online"), "data.caption=json.name: none of the first 6 samples"),
        (("--flow.coupling=optimal_transport", "--flow.coupling_group=4"), "every caption is one"),
        (("--export=true", "--flow.prior=uniform"), "prior"),
        (("--data.max_tokens=11",), "max_tokens"),
        (("--model.patch_size=3",), "patch_size=3"),
    ],
)
def test_mistakes_are_one_line_before_any_work(parts, tmp_path, capsys, more, message):
    assert fit(parts, tmp_path / "run", *more) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_captions_that_are_too_long_are_cut_and_counted(parts, tmp_path, capsys):
    """Captions have one to five words and two ends each: the ends alone fill two tokens, so two of CLIP's cut every one but the empty."""
    assert fit(parts, tmp_path / "run", "--data.max_tokens=2", "--train.max_steps=1", cached=False) == 0
    said = capsys.readouterr()
    assert "captions were longer than data.max_tokens=2 2, and cut" in said.out + said.err
    assert fit(parts, tmp_path / "whole", "--train.max_steps=1", cached=False) == 0
    said = capsys.readouterr()
    assert "and cut" not in said.out + said.err


def test_retrieval_pairs_each_caption_with_its_own_image(parts, tmp_path, capsys):
    """The pictures are numbered through, and a number tells its caption; real images in place of samples are all found."""
    run = tmp_path / "run"
    assert fit(parts, run, "--train.max_steps=1") == 0
    asked = RetrieveOptions(run=str(run), reference=str(parts["shards"]), candidates=12, num_inference_steps=1)
    real, made, captions, _ = retrieve.sample_captions(asked)
    whole, _ = read_images(Shards(str(parts["shards"]), "train"), 3, 16)
    numbers = [int((whole - image).abs().flatten(1).sum(1).argmin()) for image in real]
    assert len(set(numbers)) == 12 and made.shape == real.shape
    for caption, number in zip(captions, numbers, strict=True):
        words_ = " ".join(frozen.WORDS[4 + (number * k) % 12] for k in range(1, 2 + number % 5))
        assert caption == ("" if number == 2 else words_)
    verb = ["retrieve", "--run", str(run), "--reference", str(parts["shards"])]
    assert sample.main([*verb, "--candidates", "12", "--num_inference_steps", "1"]) == 0
    figures = json.loads((run / "retrieval.json").read_text())
    assert figures["candidates"] == 12 and figures["chance"] == 1 / 12 and figures["captions"] == captions
    capsys.readouterr()
    for more, message in (
        (["--candidates", "99"], "--candidates 99: 2 or more, of the 16 images"),
        (["--candidates", "2", "--caption", "json.name"], "data.caption=json.name: none of the first 6 samples"),
        (["--candidates", "2", "--split", "val"], "split 'val' has no shard"),
    ):
        assert sample.main([*verb, *more]) == 2 and message in capsys.readouterr().err


def test_retrieval_draws_captions_of_the_named_field_and_noise_by_the_seed(parts, tmp_path, monkeypatch):
    """From other shards than the run's: a level of gray tells the number of an image, and so its title."""
    run = tmp_path / "run"
    content = [{"__key__": f"{n:02d}", "png": png(n), "txt": "plain", "json": {"title": f"gray {n}"}} for n in range(16)]
    shards = make(tmp_path / "shards", [content[:9], content[9:]])
    assert fit(parts, run, "--train.max_steps=1") == 0
    seeds, generate = [], retrieve.generate
    monkeypatch.setattr(retrieve, "generate", lambda *given, seed, **more: seeds.append(seed) or generate(*given, seed=seed, **more))
    asked = RetrieveOptions(run=str(run), reference=str(shards), candidates=8, num_inference_steps=1, caption="json.title")
    first, again, other = (retrieve.sample_captions(replace(asked, seed=seed)) for seed in (0, 0, 7))
    for real, _, captions, _ in (first, other):
        assert captions == [f"gray {level}" for level in ((real[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()]
    first, again, other = first[2], again[2], other[2]
    assert first == again != other and seeds == [0, 0, 7]


def test_a_run_is_sampled_with_its_own_encoders_only(parts, tmp_path):
    facts = tuple(read_text_encoder(str(name), 12) for name in parts["names"])
    own = [one.fingerprint for one in facts]
    TextConditioner(facts).check(own)
    with pytest.raises(ValueError, match="another encoder than number 1 of the run"):
        TextConditioner(facts).check([own[0], read_text_encoder(str(frozen.text(tmp_path / "t5", "t5", seed=1)), 12).fingerprint])


def test_a_run_whose_encoder_was_replaced_is_not_sampled(parts, tmp_path, capsys):
    """The folder has the same name, and other weights."""
    own = {**parts, "names": [shutil.copytree(name, tmp_path / name.name) for name in parts["names"]]}
    assert fit(own, tmp_path / "run", "--train.max_steps=1", cached=False) == 0
    frozen.text(own["names"][1], "t5", seed=1)
    ask = ["--run", str(tmp_path / "run"), "--prompt", "a red square", "--num_inference_steps", "1", "--output", str(tmp_path / "a.png")]
    assert sample.main(ask) == 2
    assert "is another encoder than number 1 of the run" in capsys.readouterr().err and not (tmp_path / "a.png").exists()
