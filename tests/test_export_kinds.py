"""Exports of every kind of network on classes or on nothing: what class holds it, and that it draws what the trainer draws."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import UNET, fit
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from condot.cli import sample
from condot.cli.assembly.trained_model import TrainedModel
from condot.data.prepare.command import main as prepare
from condot.models.convert import custom_classes
from condot.pipeline.config.schema import EmaConfig
from condot.pipeline.ema.weight_selection import parse_weight_selection
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.export.runtime.scheduling_flow_ode_v1 import FlowODEScheduler
from condot.pipeline.flow import convert, guide, scale_initial_noise, widen

MORE = ("--export=true", "--train.learning_rate=1e-2")
KINDS = {
    "modern": ("DiTPipeline", ("--model.style=modern", "--model.registers=2")),
    "learned positions, noise": ("DiTPipeline", ("--model.positions=learned", "--flow.predict=noise", "--flow.path=cosine")),
    "sizes": ("CondotPipeline", ("--model.micro_conditions=true",)),
    "ddpm unet": ("DiTPipeline", (*UNET, "--flow.path=ddpm", "--flow.predict=noise", "--flow.time=discrete")),
    "ddpm dit": ("DiTPipeline", ("--flow.path=ddpm", "--flow.predict=v", "--flow.time=discrete")),
}


def asked_for(index):
    name = index["_class_name"]
    return name[1] if isinstance(name, list) else name


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_model_draws_what_the_trainer_draws(digits, tmp_path, kind):
    """Data-and-noise steps on the same schedule, guided by 2: equal to 1e-4 of the largest value; another class is another image."""
    wanted, more = KINDS[kind]
    assert fit(digits, tmp_path / "run", *MORE, *more) == 0
    folder = tmp_path / "run/export"
    index = json.loads((folder / "model_index.json").read_text())
    assert asked_for(index) == wanted
    code = index["transformer"][0] not in ("diffusers",) or wanted == "CondotPipeline"
    if code:
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_condot_v2", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowODEScheduler.from_config(pipe.scheduler.config, solver="euler", clip_sample=False)
    noise, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), [0, 3, 9]
    theirs = pipe(labels, num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="latent").images
    source, y = TrainedModel(tmp_path / "run").build_model("cpu"), torch.tensor(labels)
    field = guide(source.field, y, torch.full_like(y, source.null), 2.0)
    times = (1 - pipe.scheduler.sigmas).tolist()
    x = scale_initial_noise(source.path, noise.double(), times[0])
    with torch.no_grad():
        for t, after in pairwise(times):
            now, then = torch.full((3,), t, dtype=torch.float64), torch.full((3,), after, dtype=torch.float64)
            c, v = source.path(widen(now, x)), field(x.float(), now).double()
            z, eps = (convert(v, "velocity", form, x, c) for form in ("data", "noise"))
            end = source.path(widen(then, x))
            x = z if after == 1 else end.a * z + end.b * eps
    assert (theirs - x).abs().max() < 1e-4 * max(1.0, theirs.abs().max().item())
    other = pipe([1, 3, 9], num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="latent").images
    torch.testing.assert_close(other[1:], theirs[1:], rtol=1e-4, atol=1e-4)
    assert not torch.equal(other[0], theirs[0])
    read, t = load_flow_model(folder, own_classes=custom_classes()), torch.tensor([0.05, 0.5, 0.9])
    x = scale_initial_noise(source.path, noise, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(read.field(x, t, y), source.field(x, t, y), atol=1e-4, rtol=1e-4)
    if kind == "sizes":
        small = pipe(labels, num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="latent", original_size=(4, 4)).images
        assert not torch.equal(small, theirs)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "images").mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 12 * i).save(folder / "images" / f"{i}.png")
    assert prepare(["imagefolder", str(folder / "images"), "--output", str(folder / "shards")]) == 0
    return folder / "shards"


def test_an_unconditional_unet_is_a_ddpm_pipeline(unlabelled, tmp_path, capsys):
    """Stock code alone, and it draws what our solver draws from the pipeline's own noise."""
    assert fit(unlabelled, tmp_path / "run", *MORE, *UNET, "--flow.path=ddpm", "--flow.predict=noise", "--flow.time=discrete") == 0
    assert "UNet2DModel in DDPMPipeline, which stock diffusers holds exactly" in capsys.readouterr().out
    folder = tmp_path / "run/export"
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "DDPMPipeline" and pipe.scheduler.config.thresholding and "vae" not in pipe.components
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=2, num_inference_steps=2, generator=torch.manual_seed(0)).images[0].size == (8, 8)
    own = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_condot_v2", trust_remote_code=True)
    own.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "output_type": "np"}
    ours = own(num_images_per_prompt=2, generator=torch.manual_seed(0), **how).images
    theirs = pipe(batch_size=2, generator=torch.manual_seed(0), **how).images
    assert abs(ours - theirs).max() < 1e-5
    with pytest.raises(ValueError, match="neither classes nor text"):
        own(guidance_scale=2.0)
    source, read = TrainedModel(tmp_path / "run").build_model("cpu"), load_flow_model(folder)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        a, b = (one.field(x, t, torch.full((2,), one.null)) for one in (source, read))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert sample.main(["--pipeline", str(folder), "--output", str(tmp_path / "a.png"), "--num_inference_steps", "2"]) == 0


def test_a_variant_lies_beside_the_full_weights(trained, tmp_path):
    """Half the bytes; loaded in half precision it draws nearly the same, and bfloat16 is a variant too."""
    for variant, dtype, near in (("fp16", torch.float16, 0.02), ("bf16", torch.bfloat16, 0.1)):
        folder = tmp_path / variant
        assert sample.main(["export", "--run", str(trained), "--output", str(folder), "--variant", variant]) == 0
        half, full = (folder / f"transformer/diffusion_pytorch_model{end}.safetensors" for end in (f".{variant}", ""))
        assert {value.dtype for value in load_file(half).values()} == {dtype} and half.stat().st_size < 0.6 * full.stat().st_size
        drawn = []
        for more in ({"variant": variant, "torch_dtype": dtype}, {}):
            pipe = DiffusionPipeline.from_pretrained(folder, **more)
            pipe.set_progress_bar_config(disable=True)
            pipe.vae = DiffusionPipeline.from_pretrained(folder).vae.to(dtype=more.get("torch_dtype", torch.float32))
            loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_condot_v2", trust_remote_code=True, **more)
            loaded.set_progress_bar_config(disable=True)
            noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            drawn.append(loaded([1, 2], num_inference_steps=3, latents=noise, output_type="pt").images)
        assert (drawn[0] - drawn[1]).abs().max() < near


def test_which_average_is_said(trained, tmp_path, capsys):
    """A half-life in images, the decay a step that it comes to, or the weights as trained; others are refused with what there is."""
    weights = {}
    for ema in ("", "100", "0.895", "raw"):
        folder = tmp_path / (ema or "own")
        assert sample.main(["export", "--run", str(trained), "--output", str(folder), *(["--ema", ema] if ema else [])]) == 0
        weights[ema] = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")["pos_embed.proj.weight"]
    assert torch.equal(weights[""], weights["100"]) and torch.equal(weights[""], weights["0.895"])  # 0.5 ** (16 / 100)
    assert not torch.equal(weights[""], weights["raw"])
    capsys.readouterr()
    assert sample.main(["export", "--run", str(trained), "--output", str(tmp_path / "x"), "--ema", "0.9999"]) == 2
    assert "The run kept half-life 100 images (decay 0.895025 a step)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="give a half-life in images"):
        parse_weight_selection("best", EmaConfig(), 16)


CHECK = """
import sys, json, pathlib, torch
from diffusers import DiffusionPipeline

def files(folder):
    found = {str(p.relative_to(folder)): p for p in pathlib.Path(folder).rglob("*") if p.is_file()}
    read = lambda p: {k: v for k, v in json.loads(p.read_text()).items() if k != "_name_or_path"} if p.suffix == ".json" else p.read_bytes()
    return {name: read(path) for name, path in found.items()}

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.save_pretrained(sys.argv[2])
DiffusionPipeline.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[3])
assert files(sys.argv[2]) == files(sys.argv[3])
pipe.set_progress_bar_config(disable=True)
plain = pipe(class_labels=[1], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
pipe.transformer.compile(backend="aot_eager")
assert abs(pipe(class_labels=[1], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images - plain).max() < 1e-5
print("same")
"""


def test_saved_again_it_is_the_same_and_it_compiles(trained, tmp_path):
    """By a stranger: load, save, load, save gives the same files; torch.compile takes the network."""
    words = [sys.executable, "-I", "-c", CHECK, str(trained / "export"), str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr
    for name in ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (trained / "export" / name).read_bytes()
