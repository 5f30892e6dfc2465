"""The verbs `likelihood` and `restore`: closed forms through the same doors as a trained model, and what a user can get wrong."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_methods import gaussian_source

from condot.cli import likelihood, retrieve, sample
from condot.data.loader.read_samples import read_images
from condot.data.storage.shard_reader import Shards
from condot.pipeline.flow import num_samples
from condot.pipeline.sampling.generate import Samples
from condot.pipeline.sampling.likelihood import compute_bits_per_dimension, is_exact_affordable
from condot.pipeline.sampling.options import ModelOptions, SamplingOptions
from condot.pipeline.sampling.restore import RestorationMethod, measurement, restore
from condot.pipeline.sampling.sampler import Sampler

STEP = 2 / 255


def run(capsys, *words):
    status = sample.main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(("path", "predict"), [("condot", "velocity"), ("cosine", "v"), ("vp", "noise"), ("condot", "data")])
@pytest.mark.parametrize("exact", [True, False])
def test_bits_of_gaussian_data(path, predict, exact):
    """For N(m, s^2) a dequantised value costs log2 of its density plus log2 of the step, on average over its bin."""
    images = (torch.arange(16 * 16) % 97).reshape(16, 1, 4, 4) * STEP - 0.3
    mean, std = 0.3, 0.4
    nats = ((images - mean) ** 2 + STEP**2 / 12) / (2 * std**2) + math.log(std * math.sqrt(2 * math.pi))
    expected = nats.mean().item() / math.log(2) - math.log2(STEP)
    found = compute_bits_per_dimension(
        gaussian_source(path, predict), images.double(), torch.zeros(16, dtype=torch.int64), seed=0, exact=exact
    )
    assert found.mean == pytest.approx(expected, abs=0.005)
    again = compute_bits_per_dimension(
        gaussian_source(path, predict), images.double(), torch.zeros(16, dtype=torch.int64), seed=1, exact=exact
    )
    assert 0 < abs(found.mean - again.mean) < 0.1, "each seed spreads the images over their bins anew"
    assert found.exact is exact and found.dimensions == 16 and is_exact_affordable((1, 8, 8)) and not is_exact_affordable((3, 8, 8))


def test_likelihood_of_held_out_digits(trained, digits, capsys):
    words = [
        "likelihood",
        "--pipeline",
        str(trained / "export"),
        "--reference",
        str(digits),
        "--num_images",
        "3",
        "--tolerance",
        "1e-3",
    ]
    status, out, _ = run(capsys, *words)
    assert (
        status == 0
        and " (solver) bits" in out
        and "exact divergence" in out
        and "3 images of 64 values" in out
        and 2 < float(out.split()[0]) < 20
    )
    assert "Hutchinson" in run(capsys, *words, "--estimate", "true")[1]
    assert "--reference is missing" in run(capsys, *words[:3])[2]


@pytest.mark.parametrize("method", ["replacement", "reconstruction"])
@pytest.mark.parametrize("task", ["inpaint", "colourise", "super_resolution"])
def test_what_is_measured_comes_back(task, method):
    """Gaussian data of three channels: samples agree with the measurement up to its noise, and the rest is the data's."""
    source = gaussian_source("condot", "velocity")
    source = type(source)(**{**source.__dict__, "shape": (3, 8, 8)})
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    measure = measurement(task, (3, 8, 8), mask, 2)
    assert task != "inpaint" or measure(torch.ones(1, 1, 8, 8))[0, 0].equal((~mask).float()), "white is filled in, black is kept"
    torch.manual_seed(0)
    y = measure(0.3 + 0.4 * torch.randn(1, 3, 8, 8))[0]
    made, evaluations = restore(source, measure, y, Sampler("euler", 150), RestorationMethod(method=method), count=200, seed=1)
    assert evaluations == 150
    assert (measure(made) - y).square().mean().sqrt() < 0.05
    if task == "inpaint":
        assert abs(made[..., 4:].mean() - 0.3) < 0.05 and abs(made[..., 4:].std() - 0.4) < 0.08, (
            "the hidden half is independent of the other"
        )


@pytest.mark.parametrize(("path", "predict"), [("ve", "noise"), ("vp", "noise"), ("ddpm", "v")])
def test_replacement_on_paths_of_other_scales(path, predict):
    """Where beta_0 is 50, or a little noise is left at the end: what is measured comes back, and the hidden half is the data's."""
    source = gaussian_source(path, predict)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    measure = measurement("inpaint", (1, 8, 8), mask, 2)
    y = measure(torch.full((1, 1, 8, 8), 0.6))[0]
    sampler = Sampler("euler", 200, clip="off")
    made, evaluations = restore(source, measure, y, sampler, RestorationMethod(method="replacement"), count=300, seed=1)
    assert evaluations == 200 + (path != "vp"), "what is left of the noise is taken off in one more"
    assert (measure(made) - y).abs().max() < 1e-6
    assert abs(made[..., 4:].mean() - 0.3) < 0.05 and abs(made[..., 4:].std() - 0.4) < 0.05


def test_restoring_a_digit(trained, tmp_path, capsys):
    Image.fromarray((np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)).save(tmp_path / "photo.png")
    Image.fromarray(np.tri(8, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    words = ["restore", "--pipeline", str(trained / "export"), "--input", str(tmp_path / "photo.png"), "--num_inference_steps", "4"]
    output = ["--output", str(tmp_path / "out.png")]
    assert run(capsys, *words, *output, "--mask", str(tmp_path / "mask.png"), "--class_label", "3")[0] == 0
    assert Image.open(tmp_path / "out.png").size == (8 * (5 * 9 + 1), 8 * 10)
    status, out, _ = run(capsys, *words, *output, "--task", "super_resolution", "--method", "replacement")
    assert status == 0 and "differ from it by 0.0000" in out
    assert "cannot restore" in run(capsys, *words, *output, "--task", "super_resolution", "--solver", "langevin")[2]
    assert "--mask '' is no file" in run(capsys, *words, *output)[2]
    assert "it takes one of three" in run(capsys, *words, *output, "--task", "colourise")[2]
    assert "--factor 3 does not divide" in run(capsys, *words, *output, "--task", "super_resolution", "--factor", "3")[2]
    assert "class label 12 is out of range" in run(capsys, *words, *output, "--mask", str(tmp_path / "mask.png"), "--class_label", "12")[2]


# --- from the command line to the room that does it


OTHER = {
    "num_inference_steps": 7, "guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "guidance_rescale": 0.5, "solver": "exponential",
    "sigma_t": "constant", "sigma_scale": 0.5, "grid": "rho", "grid_shift": 2.0, "grid_rho": 5.0, "given_times": (0.0, 0.5, 1.0),
    "tolerance": 1e-3, "corrections": 3, "langevin_step": 0.1, "snr": 0.2, "clip": "on", "sigma_t_values": (1.0, 0.5, 0.0),
    "drift": "plain", "churn": 20.0, "churn_min": 0.1, "churn_max": 9.0, "churn_noise": 1.01,
    "guidance": "apg", "apg_eta": 0.5, "apg_norm_threshold": 2.0, "apg_momentum": -0.5, "zero_init_steps": 2,
    "classifier_guidance_scale": 2.0,
}  # fmt: skip
"""A value for each option of sampling that is not its default."""
WITH = {
    **{"drift": {"solver": "euler_maruyama"}, "churn": {"solver": "heun"}, "zero_init_steps": {"guidance": "cfg_zero_star"}},
    **{name: {"guidance": "apg"} for name in ("apg_eta", "apg_norm_threshold", "apg_momentum")},
}
"""The options without which one is refused."""


def test_every_option_of_sampling_reaches_the_sampler():
    """Under its own name; steps are `num_inference_steps` to users. What else a model has is asked of other rooms."""
    elsewhere = {f.name for f in fields(ModelOptions)} | {"guide_pipeline", "guide_run", "guide_ema", "classifier_reference"}
    assert OTHER.keys() == {f.name for f in fields(SamplingOptions)} - elsewhere | {"num_inference_steps"}
    assert SamplingOptions().sampler() == Sampler()
    for name, value in OTHER.items():
        field = {"num_inference_steps": "steps", "sigma_t_values": "sigma_t"}.get(name, name)
        more = WITH.get(name, {})
        assert (
            SamplingOptions(**{name: value}, **more).sampler() == replace(Sampler(), **{field: value}, **more) != replace(Sampler(), **more)
        )


def test_settings_of_a_folder_name_what_is_new_only_where_it_is_used():
    """A folder of images begun before churn was known goes on; with churn it is another folder."""
    assert not {"churn", "drift", "churn_max"} & Sampler().settings().keys() and Sampler().settings()["corrections"] == 1
    assert Sampler("heun", churn=3.0).settings()["churn"] == 3.0 and Sampler("annealed_langevin").settings()["corrections"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"drift": "plain"}, "simulated by euler_maruyama alone"),
        ({"churn": 3.0}, "a matter of heun and euler"),
        ({"churn": -1.0, "solver": "heun"}, r"--churn -1\.0: a number at least 0"),
        ({"sigma_t_values": (1.0,)}, "two or more"),
        ({"sigma_t_values": (1.0, -2.0)}, "--sigma_t_values 1.0 -2.0: a number at least 0"),
    ],
)
def test_options_that_go_ill_together_are_refused_before_a_model_is_loaded(words, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**words).sampler()


@pytest.fixture
def asked(monkeypatch):
    """What `generate` is asked for; it gives gray images."""
    found = []

    def gray(source, condition, sampler, **more):
        found.append((condition.tolist(), sampler, more))
        return Samples(torch.zeros(num_samples(condition), *source.shape), 1)

    monkeypatch.setattr("condot.pipeline.sampling.images.generate", gray)
    return found


def test_images_are_asked_for_as_the_command_says(trained, tmp_path, capsys, asked):
    """Labels in turn until there are so many; all classes once where none is named."""
    words = ["--run", str(trained), "--output", str(tmp_path / "a.png"), "--guidance_scale", "2"]
    labels = ["--class_labels", "3", "1", "4", "--num_images", "7", "--seed", "9", "--batch_size", "5"]
    assert run(capsys, *words, *labels)[0] == run(capsys, *words)[0] == 0
    assert asked == [
        ([3, 1, 4, 3, 1, 4, 3], Sampler(guidance_scale=2.0), {"seed": 9, "batch_size": 5, "null": None, "on_step": None}),
        (list(range(10)), Sampler(guidance_scale=2.0), {"seed": 0, "batch_size": 256, "null": None, "on_step": None}),
    ]


def test_likelihood_is_asked_of_the_images_that_the_command_names(trained, digits, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(likelihood, "compute_bits_per_dimension", lambda source, *given, **more: seen.append((*given, more)) or "bits")
    words = ["likelihood", "--run", str(trained), "--reference", str(digits), "--num_images", "7"]
    more = ["--split", "train", "--seed", "3", "--batch_size", "4", "--num_inference_steps", "5", "--estimate", "true"]
    more += ["--solver", "rk4", "--tolerance", "1e-4"]
    assert run(capsys, *words)[0] == run(capsys, *words, *more, "--unconditional", "true")[0] == 0
    for (images, _, _), split in zip(seen, ("val", "train"), strict=True):
        assert torch.equal(images, read_images(Shards(str(digits), split), 1, 8, range(7))[0])
    assert torch.equal(seen[0][1], read_images(Shards(str(digits), "val"), 1, 8, range(7))[1]) and seen[1][1].tolist() == [10] * 7
    assert seen[0][2] == {**{"solver": "dormand_prince", "tolerance": 1e-5, "steps": 50, "seed": 0, "exact": True, "batch_size": 256}}
    assert seen[1][2] == {**{"solver": "rk4", "tolerance": 1e-4, "steps": 5, "seed": 3, "exact": False, "batch_size": 4}}


@pytest.mark.parametrize(("label", "known"), [("7", 7), ("0", 0), ("-1", None)])
def test_restoring_is_asked_for_as_the_command_says(trained, tmp_path, capsys, monkeypatch, label, known):
    """Class 0 is a class; the input as measured is the image itself, without the pixels that white hides."""
    seen = []
    gray = Samples(torch.zeros(2, 1, 8, 8), 9)
    monkeypatch.setattr("condot.pipeline.sampling.restore.restore", lambda source, *given, **more: seen.append((*given, more)) or gray)
    pixels, mask = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, np.tri(8, dtype=np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ["--input", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    words = ["restore", "--run", str(trained), *files, "--output", str(tmp_path / "out.png"), "--class_label", label, "--num_images", "2"]
    how = ["--noise_std", "0.1", "--data_std", "0.4", "--iterations", "3", "--batch_size", "5"]
    status, out, _ = run(capsys, *words, "--seed", "4", *how, "--num_inference_steps", "9")
    assert status == 0 and "2 samples by euler, 9 evaluations each, with 5 backward passes in each" in out
    ((measure, y, sampler, remedy, more),) = seen
    assert more == {"label": known, "prompt": "", "negative_prompt": "", "count": 2, "seed": 4, "batch_size": 5}
    assert remedy == RestorationMethod(noise_std=0.1, data_std=0.4, iterations=3) and sampler == Sampler("euler", 9)
    image = torch.from_numpy(pixels).float()[None] / 127.5 - 1
    torch.testing.assert_close(y, image * torch.from_numpy(mask == 0))
    assert torch.equal(measure(image[None])[0], y)


def test_retrieval_looks_samples_up_among_real_images(tmp_path, monkeypatch):
    """On a line: 0.6 and 0.7 are nearest to 1, the second image; the other way round each would be found."""
    real, made = (torch.tensor(places).view(3, 1, 1, 1) for places in ((0.0, 1.0, -1.0), (0.6, 0.7, -1.0)))
    monkeypatch.setattr(retrieve, "sample_captions", lambda options: (real, made, ["none", "one", "less"], {}))
    assert sample.main(["retrieve", "--output", str(tmp_path / "r.png")]) == 0
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["top1"] == pytest.approx(2 / 3) and figures["captions"] == ["none", "one", "less"]


def test_the_picture_of_retrieval_has_samples_below_their_images(tmp_path, monkeypatch):
    """Twelve of each, ten a row: the last two of both begin rows of their own, with white behind them."""
    real = (torch.arange(12) / 20 - 1).view(12, 1, 1, 1)
    made = real + 0.9
    monkeypatch.setattr(retrieve, "sample_captions", lambda options: (real, made, ["a"] * 12, {}))
    assert sample.main(["retrieve", "--output", str(tmp_path / "r.png")]) == 0
    cells = np.asarray(Image.open(tmp_path / "r.png"))[64::128, 64::128]  # 64 pixels a cell, and as many between two
    above, below = (((half.flatten() + 1) * 127.5).round().numpy() for half in (real, made))
    last = [np.pad(levels[10:], (0, 8), constant_values=255) for levels in (above, below)]
    assert np.array_equal(cells, [above[:10], below[:10], *last])
