"""Exports of networks on captions: a stock pipeline where one shows the same text, else our own; each draws what the trainer draws."""

import json
import subprocess
import sys

import frozen
import pytest
import torch
from diffusers import DiffusionPipeline
from test_text_training import fit

from condot.cli import sample
from condot.cli.assembly.trained_model import TrainedModel
from condot.data.encode.command import main as encode
from condot.models.convert import custom_classes
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.export.runtime.scheduling_flow_ode_v1 import FlowODEScheduler
from condot.pipeline.flow import ODE_SOLVERS, guide, repeat_condition

CASES = {
    "sd3": ("mmdit", ("clip_projected", "clip_projected", "t5"), "attend", "StableDiffusion3Pipeline"),
    "sd3 without t5": ("mmdit", ("clip_projected", "clip_projected"), "attend", "CondotPipeline"),
    "sd3, narrow t5": ("mmdit", ("clip_projected", "clip_projected", "t5"), "attend", "CondotPipeline"),
    "mmdit, masked": ("mmdit", ("clip_projected", "clip_projected", "t5"), "mask", "CondotPipeline"),
    "mmdit, bert": ("mmdit", ("bert",), "mask", "CondotPipeline"),
    "pixart": ("cross_dit", ("t5",), "mask", "PixArtSigmaPipeline"),
    "pixart, bert": ("cross_dit", ("bert",), "mask", "PixArtSigmaPipeline"),
    "cross_dit, two": ("cross_dit", ("clip", "t5"), "mask", "CondotPipeline"),
    "cross_dit, attend": ("cross_dit", ("t5",), "attend", "CondotPipeline"),
    "unet": ("unet", ("clip",), "mask", "CondotPipeline"),
}
PROMPTS = ["a red square", "big blue circle on the green"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return frozen.shards(tmp_path_factory.mktemp("text") / "shards", (6, 5, 5))


def run_of(folder, shards, case, *more):
    """A trained run of a case, exported."""
    network, encoders, padding, _ = CASES[case]
    wide = 32 if case == "sd3" else 16  # as wide as both CLIPs together, as Stable Diffusion 3's T5 is
    names = [frozen.text(folder / f"encoder-{i}", kind, seed=i, width=wide if kind == "t5" else 16) for i, kind in enumerate(encoders)]
    parts = {"shards": shards, "names": names, "encoded": folder / "encoded"}
    how = ("--export=true", f"--data.text_padding={padding}", "--train.learning_rate=1e-2", "--train.max_steps=12")
    assert fit(parts, folder / "run", *how, *more, kind=network, cached=False) == 0
    return folder / "run"


def asked(pipe):
    """What a stock pipeline must be told so that it shows no more text, and draws no other size, than was trained."""
    if type(pipe).__name__ == "StableDiffusion3Pipeline":
        return {"max_sequence_length": 12}
    if type(pipe).__name__ == "PixArtSigmaPipeline":
        return {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 12}
    return {}


def drawn(pipe, noise, **more):
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 4, "latents": noise, "output_type": "latent", **asked(pipe)}
    return pipe(prompt=PROMPTS, **{**how, **more}).images


def nothing(source):
    """What guidance leads away from, of two images."""
    return repeat_condition(source.null, 2)


@pytest.mark.parametrize("case", CASES)
def test_every_text_model_draws_what_the_trainer_draws(tmp_path, shards, case):
    """Heun's method on the same schedule, guided by 3, with a negative prompt and without: equal to 1e-4; other words draw otherwise."""
    run = run_of(tmp_path, shards, case)
    index = json.loads((run / "export/model_index.json").read_text())
    code = CASES[case][3] == "CondotPipeline"
    assert index["_class_name"] == (["pipeline_condot_v2", "CondotPipeline"] if code else CASES[case][3])
    if code:
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(run / "export")
    pipe = DiffusionPipeline.from_pretrained(run / "export", trust_remote_code=code)
    pipe.scheduler = FlowODEScheduler.from_config(pipe.scheduler.config, solver="heun")
    source, noise = TrainedModel(run).build_model("cpu"), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for negative in ("", "small circle"):
        theirs = drawn(pipe, noise, guidance_scale=3.0, negative_prompt=negative)
        field = guide(source.field, source.encode_text(PROMPTS), repeat_condition(source.encode_text([negative]), 2), 3.0)
        with torch.no_grad():
            ours = ODE_SOLVERS["heun"](field, noise, 1 - pipe.scheduler.sigmas).x
        scale = max(1.0, ours.abs().max().item())
        assert (theirs - ours).abs().max() < 1e-4 * scale
    assert (drawn(pipe, noise.flip(0), guidance_scale=3.0) - theirs).abs().max() > 1e-2 * scale
    read = load_flow_model(run / "export", own_classes=custom_classes())
    point, t = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.8])
    with torch.no_grad():
        told, untold = (
            [one.field(point, t, how(one)) for one in (source, read)] for how in (lambda one: one.encode_text(PROMPTS), nothing)
        )
    torch.testing.assert_close(*told, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*untold, atol=1e-4, rtol=1e-4)
    assert (run / "export/samples.png").is_file()


STRANGER = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline="pipeline_condot_v2", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
made = pipe(prompt=["a red square"] * 2, solver="exponential", num_inference_steps=3, generator=torch.manual_seed(0), guidance_scale=2.0)
again = pipe(prompt="a red square", solver="exponential", num_inference_steps=3, generator=torch.manual_seed(0), num_images_per_prompt=2,
             guidance_scale=2.0)
assert [a.tobytes() == b.tobytes() for a, b in zip(made.images, again.images)] == [True, True]
own = [m for m in sys.modules if m.split(".")[0] in ("condot", "pipeline", "models", "data", "train")]
print(type(pipe).__name__, made.images[0].size, own)
"""


@pytest.mark.parametrize("case", ["sd3", "pixart", "mmdit, bert"])
def test_a_stranger_has_our_solvers_by_one_argument(tmp_path, shards, case):
    """In a process of its own, isolated from the checkout: stock folders and own ones alike."""
    run = run_of(tmp_path, shards, case, "--train.max_steps=2")
    words = [sys.executable, "-I", "-c", STRANGER, str(run / "export")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "CondotPipeline (16, 16) []"


def test_cached_captions_are_exported_with_their_encoders(tmp_path, shards):
    """Training never loads them; the export does."""
    name = frozen.text(tmp_path / "bert", "bert")
    recipe = frozen.recipe(
        tmp_path / "r.json", shards=[str(shards)], resolution=16, text_encoder=[str(name)], max_tokens=12, encoded=tmp_path / "encoded"
    )
    assert encode(["--config", str(recipe)]) == 0
    parts = {"shards": shards, "names": [name], "encoded": tmp_path / "encoded"}
    assert fit(parts, tmp_path / "run", "--export=true", "--train.max_steps=2", kind="cross_dit") == 0
    index = json.loads((tmp_path / "run/export/model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline" and index["text_encoder"] == ["transformers", "BertModel"]
    assert sample.main(["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "half"), "--variant", "fp16"]) == 0
    whole = DiffusionPipeline.from_pretrained(tmp_path / "half")
    assert whole.text_encoder.dtype == whole.transformer.dtype == torch.float32, "the variant is for who asks for it"
    half = DiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16", torch_dtype=torch.float16)
    assert half.text_encoder.dtype == half.transformer.dtype == torch.float16


def test_more_encoders_than_places_are_refused_at_the_start(tmp_path, shards, capsys):
    names = [frozen.text(tmp_path / str(i), "t5", seed=i) for i in range(4)]
    parts = {"shards": shards, "names": names, "encoded": tmp_path / "encoded"}
    assert fit(parts, tmp_path / "run", "--export=true", cached=False) == 2
    assert "4 text encoders" in capsys.readouterr().err and not list((tmp_path / "run").glob("checkpoint-*"))
