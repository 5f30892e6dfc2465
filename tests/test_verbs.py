"""The verbs `likelihood` and `restore`: closed forms through the same doors as a trained model, and what a user can get wrong."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_methods import gaussian_source

import sample
from pipeline.density import affordable, bits
from pipeline.generate import Sampler
from pipeline.restore import measurement, restore

STEP = 2 / 255


def run(capsys, *words):
    status = sample.main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(("path", "predict"), [("condot", "velocity"), ("cosine", "v"), ("vp", "noise"), ("condot", "data")])
@pytest.mark.parametrize("exact", [True, False])
def test_bits_of_gaussian_data(path, predict, exact):
    """For N(m, s^2) a dequantised value costs log2 of its density plus log2 of the step, on average over its bin."""
    images = (torch.arange(4 * 64) % 97).reshape(4, 1, 8, 8) * STEP - 0.3
    mean, std = 0.3, 0.4
    nats = ((images - mean) ** 2 + STEP**2 / 12) / (2 * std**2) + math.log(std * math.sqrt(2 * math.pi))
    expected = nats.mean().item() / math.log(2) - math.log2(STEP)
    found = bits(gaussian_source(path, predict), images.double(), torch.zeros(4, dtype=torch.int64), steps=60, seed=0, exact=exact)
    assert found.mean == pytest.approx(expected, abs=0.03 if path == "vp" or predict == "data" else 0.005)
    again = bits(gaussian_source(path, predict), images.double(), torch.zeros(4, dtype=torch.int64), steps=60, seed=1, exact=exact)
    assert 0 < abs(found.mean - again.mean) < 0.1, "each seed spreads the images over their bins anew"
    assert found.exact is exact and found.dimensions == 64 and affordable((1, 8, 8)) and not affordable((3, 8, 8))


def test_likelihood_of_held_out_digits(trained, digits, capsys):
    words = [
        "likelihood",
        "--pipeline",
        str(trained / "export"),
        "--reference",
        str(digits),
        "--num_images",
        "3",
        "--num_inference_steps",
        "3",
    ]
    status, out, _ = run(capsys, *words)
    assert status == 0 and "exact divergence" in out and "3 images of 64 values" in out and 2 < float(out.split()[0]) < 20
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
    made = restore(source, measure, y, Sampler("euler", 150), label=None, count=200, seed=1, method=method, noise_std=0.01)
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
    made = restore(source, measure, y, Sampler("euler", 200), label=None, count=300, seed=1, method="replacement", noise_std=0.0)
    assert (measure(made) - y).square().mean().sqrt() < 0.02
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
