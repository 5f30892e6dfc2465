"""Training in latents: encoded now or before, the run is the same; what it makes is decoded, exported, and sampled by stock diffusers."""

import json
from dataclasses import replace

import frozen
import numpy as np
import pytest
import torch
from conftest import fit
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image

from condot.cli import sample
from condot.cli.assembly import build_run
from condot.cli.assembly.trained_model import TrainedModel
from condot.core.data_config import DataConfig
from condot.data.encode import command
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.loader.buckets import Windows
from condot.data.loader.build import build as stream_of
from condot.data.loader.stream import Share, to_unit
from condot.models import registry
from condot.models.dit.model import DiT
from condot.pipeline.checkpoint.store import CheckpointManager, load_state, load_tensors
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.objective import TrainingObjective
from condot.pipeline.config.parse import config_from_mapping, config_to_mapping, parse
from condot.pipeline.config.schema import Config
from condot.pipeline.export.autoencoder import check_export, fold_latent_scaling
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.flow import Purpose, normal, uniform
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.sampling.options import ExportOptions


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, one_thread):
    """Images with one that is cut, an autoencoder, and both flips encoded one image at a time."""
    folder = tmp_path_factory.mktemp("latents")
    frozen.shards(folder / "images", broken=(6,))
    frozen.kl(folder / "vae")
    recipe = frozen.recipe(folder / "r.yaml", shards=folder / "images", autoencoder=folder / "vae", resolution=32, max_bad_share=0.2)
    words = ["--config", str(recipe), "--output", str(folder / "encoded"), "--batch_size=1", "--flips=both"]
    assert command.main(words) == 0
    return folder


def words(parts, *more):
    """A run in latents, whose arguments stand behind the fixture's."""
    return (
        "--data.channels=3", "--data.resolution=32", f"--data.autoencoder={parts / 'vae'}", "--data.horizontal_flip=true",
        "--data.max_bad_share=0.5", f"--data.encoded={parts / 'encoded'}", "--log.every=1", "--train.learning_rate=3e-3", *more,
    )  # fmt: skip


FIXED = ("--data.latent_scale=0.5", "--data.latent_shift=0.1")


# --- online and cached


def test_online_and_cached_have_the_same_curve(parts, tmp_path):
    """20 steps, flips and a substitute for the bad image among them. A moment rounded to float16 is off by 2^-11 of itself at most;
    a loss of order 1 then moves by some 2^-11, and by Adam's first steps, which follow signs, by a few times that: within 2^-8."""
    more = ("--train.max_steps=20", *FIXED)
    for encoding in ("online", "cached"):
        assert fit(parts / "images", tmp_path / encoding, *words(parts, *more, f"--data.encoding={encoding}")) == 0
    online, cached = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert max(abs(a - b) / a for a, b in zip(online, cached, strict=True)) < 2**-8 and online != cached
    assert online[-1] < 0.9 * online[0], "and it learns"


def test_one_field_switches_and_nothing_else_changes(parts, tmp_path, capsys):
    """No scale in the recipe: both take the measured one; online without a cache takes the autoencoder's own."""
    for encoding in ("cached", "online"):
        assert fit(parts / "images", tmp_path / encoding, *words(parts, f"--data.encoding={encoding}")) == 0
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "cached"), rel=2**-8)
    spaces = [load_state(CheckpointManager(tmp_path / name, 1).latest())["space"] for name in ("cached", "online")]
    assert spaces[0] == spaces[1] and len(spaces[0]["scale"]) == 4
    capsys.readouterr()
    assert fit(parts / "images", tmp_path / "online", *words(parts, "--data.encoded=", "--train.max_steps=14")) == 2
    assert "space.scale" in capsys.readouterr().err


def test_rounded_alike_they_are_bitwise_the_same(parts, tmp_path, monkeypatch):
    """Online with each image encoded alone and its moments rounded to float16, as in the cache: weights, averages and log."""
    more = ("--train.max_steps=8", *FIXED)
    assert fit(parts / "images", tmp_path / "cached", *words(parts, *more, "--data.encoding=cached")) == 0
    moments = Autoencoder.moments
    monkeypatch.setattr(
        Autoencoder, "moments", lambda self, x: torch.cat([moments(self, one[None].contiguous()) for one in x]).half().float()
    )
    assert fit(parts / "images", tmp_path / "online", *words(parts, *more)) == 0
    assert losses(tmp_path / "online") == losses(tmp_path / "cached")
    a, b = (load_tensors(tmp_path / name / "checkpoint-8") for name in ("online", "cached"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_cached_run_resumes_bitwise_and_builds_no_autoencoder(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(build_run, "Autoencoder", lambda *a, **k: pytest.fail("the autoencoder was built"))
    cached = words(parts, "--data.encoding=cached", "--checkpoint.every=4", "--train.max_steps=8")
    assert fit(parts / "images", tmp_path / "whole", *cached) == 0
    assert fit(parts / "images", tmp_path / "parts", *cached, "--train.max_steps=4") == 0
    assert fit(parts / "images", tmp_path / "parts", *cached) == 0
    a, b = (load_tensors(tmp_path / name / "checkpoint-8") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a) and losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_latents_of_several_shapes(parts, tmp_path, monkeypatch):
    """Each batch in its own shape, with noise of that shape; from the cache, which has one shape for each image, as online."""
    buckets = ("--data.aspect_ratios", "0.6667", "1", "1.5", "--data.bucket_step=8")
    recipe = ["--config", str(parts / "r.yaml"), "--output", str(tmp_path / "encoded"), "--flips=both", *buckets]
    assert command.main(recipe) == 0
    more = (*buckets, "--train.max_steps=16", "--train.batch_size=4", *FIXED, f"--data.encoded={tmp_path / 'encoded'}")
    shapes = set()
    draw = LatentSpace.sample_posterior
    monkeypatch.setattr(LatentSpace, "sample_posterior", lambda *a: shapes.add(tuple(a[1].shape[2:])) or draw(*a))
    for encoding in ("online", "cached"):
        assert fit(parts / "images", tmp_path / encoding, *words(parts, *more, f"--data.encoding={encoding}")) == 0
        assert shapes == {(10, 6), (8, 8), (6, 10)}
        shapes.clear()
    a, b = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert max(abs(x - y) / x for x, y in zip(a, b, strict=True)) < 2**-7
    bad = [(tmp_path / name / "bad_samples.jsonl").read_text().count("00006") for name in ("online", "cached")]
    assert bad[0] == bad[1] > 0, "the cut image is replaced, by one of its own bucket"


def test_whole_batches_have_the_share_of_their_bucket():
    """Shares 0.9, 0.099 and 0.001 over a hundred windows of 64 batches of 8: every batch of one bucket, the mean of each share right
    to five standard errors, and none of a bucket left out for good."""
    share = np.cumsum([0.9, 0.099])

    def bucket_of(positions):
        return np.searchsorted(share, (positions * 2654435761 % 2**32) / 2**32, side="right")

    windows = Windows(bucket_of, epoch=0, batch_size=8, seed=3, whole=True)
    windows.length = 64
    batches = [windows.batch(n) for n in range(6400)]
    assert all((bucket_of(positions) == bucket).all() and len(positions) == 8 for positions, bucket in batches)
    found = np.bincount([bucket for _, bucket in batches], minlength=3)
    for count, wanted in zip(found, np.bincount(bucket_of(np.arange(51200))) / 8, strict=True):
        assert count > 0 and abs(count - wanted) < 5 * 5  # each of a hundred windows is off by less than one: sqrt(100) / 2
    once = np.unique(np.concatenate([positions for positions, _ in batches]))
    assert len(once) > 0.97 * 51200
    again = Windows(bucket_of, epoch=0, batch_size=8, seed=3, whole=True)
    again.length = 64
    assert all((again.batch(n)[0] == batches[n][0]).all() for n in (6399, 70, 3)), "from any position at once"


def test_what_the_network_is_shown_is_the_draw(parts, tmp_path, monkeypatch):
    """Measured statistics: unit size in each channel, over a hundred draws of 16; new ones at every step."""
    seen = []
    draw = LatentSpace.sample_posterior
    monkeypatch.setattr(LatentSpace, "sample_posterior", lambda *a: seen.append(draw(*a)) or seen[-1])
    more = ("--train.max_steps=100", "--data.encoding=cached", "--checkpoint.every=1000")
    assert fit(parts / "images", tmp_path / "run", *words(parts, *more)) == 0
    z = torch.cat(seen[1:])  # the first is drawn to count what it costs
    assert z.shape == (1600, 4, 8, 8) and len(z[:, 0, 0, 0].unique()) > 1590
    assert float(z.mean((0, 2, 3)).abs().max()) < 0.05 and float((z.std((0, 2, 3)) - 1).abs().max()) < 0.05


@pytest.mark.parametrize("encoding", ["online", "cached"])
def test_what_reaches_the_loss_is_named_by_seed_step_and_place(parts, tmp_path, monkeypatch, encoding):
    """Another seed than the usual one, and each batch in two portions: images in their order, posteriors, noise, dropped classes and
    first weights, each looked up by hand; and sizes in pixels, whatever the images are read from."""
    seen, objective = [], TrainingObjective.__call__
    monkeypatch.setattr(
        TrainingObjective, "__call__", lambda self, model, *given, **place: seen.append(given) or objective(self, model, *given, **place)
    )
    more = (
        "--seed=5",
        "--train.max_steps=2",
        "--train.batch_size=8",
        "--train.gradient_accumulation_steps=2",
        "--train.learning_rate=1e-30",
    )
    told = ("--train.condition_dropout=0.5", "--model.micro_conditions=true", f"--data.encoding={encoding}")
    assert fit(parts / "images", tmp_path / "run", *words(parts, *FIXED, *more, *told)) == 0
    names = {"shards": (str(parts / "images"),), "autoencoder": str(parts / "vae")}
    stream = stream_of(DataConfig(**names, resolution=32, horizontal_flip=True, workers=0), seed=5, share=Share(batch_size=8))
    trained, vae, batch_indices = TrainedModel(tmp_path / "run"), Autoencoder(str(parts / "vae")), torch.arange(8)
    for step in range(2):
        batch, (first, second) = next(stream), seen[2 * step : 2 * step + 2]
        moments = vae.moments(to_unit(batch.images))
        z, labels, sizes = (torch.cat([first[i], second[i]]) for i in (0, 2, 3))
        torch.testing.assert_close(z, trained.space.sample_posterior(moments, 5, step, batch_indices), rtol=2**-9, atol=5e-3)
        assert torch.equal(torch.cat([first[1].noise, second[1].noise]), normal(5, Purpose.NOISE, step, batch_indices, (4, 8, 8)))
        lost = uniform(5, Purpose.CONDITION_DROP, step, batch_indices) < 0.5
        assert lost.any() and torch.equal(labels, torch.where(lost, 2, batch.labels))
        assert sizes.tolist() == [[*size, 32, 32] for size in batch.sizes.tolist()] and (batch.sizes[:, :2] != 32).any()
    begun = registry.build(seed=5, **build_model_kwargs(trained.config.model, (4, 8, 8), 2)).state_dict()
    tensors = load_tensors(tmp_path / "run/checkpoint-2")
    for name, value in begun.items():
        torch.testing.assert_close(tensors[f"model.{name}"], value, rtol=0, atol=1e-20)


def test_the_preview_tells_the_sizes_of_whole_images_in_pixels(parts, tmp_path, monkeypatch):
    """As `sample.py` does, not those of the latents."""
    told, forward = [], DiT.forward

    def spy(self, *given):
        told.extend([] if self.training else given[3].tolist())
        return forward(self, *given)

    monkeypatch.setattr(DiT, "forward", spy)
    more = ("--model.micro_conditions=true", "--train.max_steps=1", "--log.sample_every=1", "--log.sample_steps=1")
    assert fit(parts / "images", tmp_path / "run", *words(parts, *FIXED, *more)) == 0
    assert told and all(row == [32, 32, 0, 0, 32, 32] for row in told)


# --- the space


SPACE = LatentSpace(
    channels=2, height=3, width=5, factor=4, image_channels=3, deterministic=False, scale=(2.0, 0.5), shift=(0.25, -1.0), autoencoder="x"
)


def test_a_draw_is_a_function_of_seed_step_and_place():
    moments, batch_indices = 0.1 + torch.rand(6, 4, 3, 5), torch.arange(6)
    z = SPACE.sample_posterior(moments, 7, 3, batch_indices)
    noise = normal(7, Purpose.POSTERIOR, 3, batch_indices, (2, 3, 5))
    for c in range(2):
        wanted = (moments[:, c] + moments[:, 2 + c] * noise[:, c] - SPACE.shift[c]) * SPACE.scale[c]
        torch.testing.assert_close(z[:, c], wanted)
    assert torch.equal(SPACE.sample_posterior(moments[4:], 7, 3, batch_indices[4:]), z[4:]), "any rank"
    assert not torch.equal(SPACE.sample_posterior(moments, 7, 4, batch_indices), z) and not torch.equal(
        SPACE.sample_posterior(moments, 8, 3, batch_indices), z
    )
    assert not torch.equal(noise, normal(7, Purpose.NOISE, 3, batch_indices, (2, 3, 5)))
    torch.testing.assert_close((SPACE.to_autoencoder_latents(z) - moments[:, :2]) / moments[:, 2:], noise, atol=1e-4, rtol=1e-4)
    assert LatentSpace.from_checkpoint(json.loads(json.dumps(vars(SPACE)))) == SPACE and SPACE.pixels == (3, 12, 20)
    assert LatentSpace.from_pixels(3, 8).pixels == () and LatentSpace.from_pixels(3, 8).decoder(lambda: pytest.fail("loaded"))(z) is z


def test_scales_and_shifts_are_one_or_one_a_channel():
    assert SPACE.with_overrides((3.0,), ()).scale == (3.0,) and SPACE.with_overrides((), (1.0,)).shift == (1.0,)
    with pytest.raises(ValueError, match=r"data.latent_scale has 3 numbers for latents of 2 channels: give one, or one a channel"):
        SPACE.with_overrides((1.0, 2.0, 3.0), ())


def test_a_configuration_comes_back_from_its_mapping():
    """Lists of one word, of several, and none."""
    config = parse(Config, ["--data.shards", "a", "b", "--data.weights", "0.25", "0.75", "--data.latent_scale=0.5"])
    assert (config.data.shards, config.data.weights, config.data.latent_scale) == (("a", "b"), (0.25, 0.75), (0.5,))
    assert (
        config_from_mapping(Config, config_to_mapping(config)) == config
        and config_from_mapping(Config, config_to_mapping(Config())) == Config()
    )
    assert config_from_mapping(Config, {"data": {"shards": "a"}}).data.shards == ("a",)


# --- out of it


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """A finished run with measured statistics, a shift and scale for each channel, and its export."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = ("--data.encoding=cached", "--export=true", "--train.max_steps=4", "--log.sample_every=4", "--log.sample_steps=2")
    assert fit(parts / "images", folder, *words(parts, *more)) == 0
    return folder


def test_the_checkpoint_knows_its_space(parts, run):
    state = load_state(CheckpointManager(run, 1).latest())
    space, known = LatentSpace.from_checkpoint(state["space"]), Autoencoder(str(parts / "vae"))
    assert space.shape == (4, 8, 8) and space.fingerprint == known.fingerprint and len(space.scale) == 4 == len(set(space.shift))
    assert state["facts"]["space"]["fingerprint"] == known.fingerprint
    assert Image.open(run / "samples/step-0000004.png").size[0] > 2 * 32


@pytest.mark.parametrize("config", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}, {"shift_factor": 0.3}])
@pytest.mark.parametrize("scale", [((2.0, 0.5, 1.5, 1.0), (0.25, -1.0, 0.0, 3.0)), ((0.7,), (0.0,)), ((0.7,), (0.5,))])
def test_a_folded_autoencoder_decodes_what_the_network_draws(tmp_path, config, scale):
    """Exactly, up to float32: saved, loaded by stock diffusers, decoded as pipelines do; and encoding gives normalised moments.

    A shift that the autoencoder came with is not the recipe's: some pipelines would add it (StableDiffusion3Pipeline, our own), some not.
    """
    vae = Autoencoder(str(frozen.kl(tmp_path / "vae", **config)))
    space = LatentSpace(
        channels=4, height=8, width=8, factor=4, image_channels=3, deterministic=False, scale=scale[0], shift=scale[1],
        autoencoder="x", fingerprint=vae.fingerprint,
    )  # fmt: skip
    fold_latent_scaling(vae.model, space).save_pretrained(tmp_path / "folded")
    stock = AutoencoderKL.from_pretrained(tmp_path / "folded")
    z, x = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32) * 2 - 1
    assert not stock.config.shift_factor
    with torch.no_grad():
        torch.testing.assert_close(
            stock.decode(z / stock.config.scaling_factor).sample, vae.decode(space.to_autoencoder_latents(z)), atol=2e-5, rtol=1e-5
        )
        posterior = stock.encode(x).latent_dist
    mean, std = vae.moments(x).chunk(2, 1)
    torch.testing.assert_close(
        posterior.mean * stock.config.scaling_factor,
        (mean - space.to_autoencoder_latents(z * 0)) / (space.to_autoencoder_latents(z * 0 + 1) - space.to_autoencoder_latents(z * 0)),
        atol=2e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        posterior.std * stock.config.scaling_factor,
        std / (space.to_autoencoder_latents(z * 0 + 1) - space.to_autoencoder_latents(z * 0)),
        atol=2e-5,
        rtol=1e-4,
    )


def test_stock_diffusers_loads_and_samples_the_export(parts, run):
    pipe = DiTPipeline.from_pretrained(run / "export")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[1], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size == (32, 32)
    source, trained = load_flow_model(run / "export"), TrainedModel(run).build_model("cpu")
    assert source.pixels == trained.pixels == (3, 32, 32) and source.shape == trained.shape == (4, 8, 8)
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 1])
    with torch.no_grad():
        torch.testing.assert_close(source.field(x, t, labels), trained.field(x, t, labels), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(source.decode(x), trained.decode(x), atol=1e-4, rtol=1e-4)


def test_a_run_in_latents_is_sampled_and_exported_again(run, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    assert sample.main(["--run", str(run), "--num_inference_steps=2", "--num_images=4", "--output", out]) == 0
    assert Image.open(out).size == (2 * (2 * 33 + 1), 2 * (2 * 33 + 1))
    assert sample.main(["export", "--run", str(run), "--output", str(tmp_path / "export")]) == 0
    assert sample.main(["--pipeline", str(tmp_path / "export"), "--num_inference_steps=2", "--output", out]) == 0
    for verb in ("likelihood", "restore"):
        given = ["--reference=x"] if verb == "likelihood" else ["--task=colourise", "--input", out]
        assert sample.main([verb, "--run", str(run), *given]) == 2
        assert "the model works in latents of (4, 8, 8)" in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.encoding=cached", "--data.encoded=/nowhere"), "/nowhere/latents holds no finished latents. Run `condot encode"),
        (("--data.encoding=cached", "--data.resolution=64"), "resolution is 32 there and 64 here"),
        (("--data.encoding=cached", "--data.random_crop=true"), "latents are encoded once"),
        (("--data.encoding=cashed",), "choose `online` or `cached`"),
        (("--data.autoencoder=/nowhere",), "data.autoencoder='/nowhere' has no config.json"),
        (("--data.resolution=30",), "a multiple of 4"),
        (("--data.channels=1",), "reads 3 channel(s). Use 3"),
        (("--data.latent_scale", "1", "2"), "data.latent_scale has 2 numbers for latents of 4 channels"),
        (("--data.latent_scale=0",), "data.latent_scale=0.0: positive"),
        (
            ("--data.encoded=", "--data.aspect_ratios", "0.6667", "1", "1.5", "--data.bucket_step=4"),
            "40 x 28 pixels, and the network takes multiples of 8",
        ),
    ],
)
def test_mistakes_are_one_line_before_any_work(parts, tmp_path, capsys, more, message):
    assert fit(parts / "images", tmp_path / "run", *words(parts, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("run/checkpoint*"))


def test_a_cache_of_another_autoencoder_is_refused(parts, tmp_path, capsys):
    other = frozen.kl(tmp_path / "vae", seed=1)
    assert fit(parts / "images", tmp_path / "run", *words(parts, "--data.encoding=cached", f"--data.autoencoder={other}")) == 2
    assert "autoencoder weights are" in capsys.readouterr().err


def test_another_autoencoder_neither_decodes_nor_goes_into_an_export(run, tmp_path):
    """One that took the place of the first since: its latents are others."""
    trained = TrainedModel(run)
    trained.space = replace(trained.space, autoencoder=str(frozen.kl(tmp_path / "vae", seed=1)))
    for act in (
        lambda: trained.build_model("cpu").decode(torch.zeros(1, 4, 8, 8)),
        lambda: trained.export(tmp_path / "export", ExportOptions()),
    ):
        with pytest.raises(ValueError, match=r"is another autoencoder: .*weights are"):
            act()


def test_a_run_does_not_go_on_in_another_space(parts, run, capsys):
    assert fit(parts / "images", run, *words(parts, "--train.max_steps=4", "--data.latent_scale=0.5", "--data.encoding=cached")) == 2
    assert "space.scale is" in capsys.readouterr().err
    assert sample.main(["--run", str(run), "--num_inference_steps=1", "--output=/dev/null/x"]) == 2


def test_what_no_stock_pipeline_decodes_is_refused_at_the_start(parts, tmp_path, capsys):
    tiny = frozen.tiny(tmp_path / "vae")
    more = (f"--data.autoencoder={tiny}", "--data.encoded=", "--export=true", "--train.max_steps=1")
    assert fit(parts / "images", tmp_path / "run", *words(parts, *more, "--data.latent_shift=0.1")) == 2
    assert "Set data.latent_scale to one and data.latent_shift to 0, or --export=false" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="with pools, which stock diffusers does not load"):
        check_export(SPACE.__class__(**{**vars(SPACE), "fingerprint": {"class": "AutoencoderTiny with pools"}}))
    assert fit(parts / "images", tmp_path / "run", *words(parts, *more, "--data.latent_scale=0.9")) == 0
    pipe = DiTPipeline.from_pretrained(tmp_path / "run/export")
    assert type(pipe.vae).__name__ == "AutoencoderTiny" and pipe.vae.config.scaling_factor == 0.9
    z = torch.randn(1, 4, 8, 8)
    known = Autoencoder(str(tiny))
    torch.testing.assert_close(load_flow_model(tmp_path / "run/export").decode(z), known.decode(z / 0.9), atol=1e-5, rtol=1e-5)
