"""The exported folder: a stranger's stock diffusers loads it, and it draws what the trainer draws."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import UNET, fit
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from condot.cli import sample
from condot.cli.assembly.trained_model import TrainedModel
from condot.pipeline.checkpoint.store import load_tensors
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.export.identity_autoencoder import identity_autoencoder
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.export.pipeline_class import with_class_embedding
from condot.pipeline.export.runtime.scheduling_flow_ode_v1 import FlowODEScheduler
from condot.pipeline.export.scheduler_map import build_scheduler, export_form
from condot.pipeline.flow import convert, euler, guide, scale_initial_noise, velocity_field, widen
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.image_grid import make_grid
from condot.pipeline.sampling.sampler import Sampler

STRANGER = """
import sys
from diffusers import DDPMScheduler, DiffusionPipeline
import torch
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipe(class_labels=[1, 2], num_inference_steps=4, guidance_scale=3.0, generator=torch.manual_seed(0)).images
images[0].save(sys.argv[2])
assert pipe.get_label_ids(["7"]) == [7]
own = [m for m in sys.modules if m.split(".")[0] in ("condot", "pipeline", "models", "data", "train")]
print(type(pipe).__name__, images[0].size, images[0].mode, own)
"""


def test_a_stranger_loads_it_with_stock_diffusers(trained, tmp_path):
    """In a process of its own, isolated from the checkout, with no code of ours."""
    shutil.copytree(trained / "export", tmp_path / "moved")
    words = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "moved"), str(tmp_path / "one.png")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "DiTPipeline (8, 8) L []"
    assert [p.name for p in (tmp_path / "moved").rglob("*.py")] == ["pipeline_condot_v2.py"], "which nothing loads unless asked to"
    assert not list((tmp_path / "moved").rglob("*.bin"))


def drawn(pipe, **options):
    """What a pipeline draws before its autoencoder and its clamp have their say: (B, C, H, W)."""
    decode, latents = pipe.vae.decode, []
    pipe.vae.decode = lambda z, **more: (latents.append(z), decode(z, **more))[1]
    pipe.set_progress_bar_config(disable=True)
    pipe(**options, output_type="np")
    return latents[0][: len(options["class_labels"])]


def assert_equal_draws(ours, theirs):
    """To 1e-4 of the largest value: a barely trained network is divided by a small alpha near the noise: values of thousands."""
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, theirs.abs().max().item())


def pipeline_run(folder, labels, steps, guidance, seed):
    """The stock pipeline, first order, and the noise it starts from."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "solver_order": 1, "thresholding": False})
    generator = torch.Generator().manual_seed(seed)
    images = drawn(pipe, class_labels=labels, num_inference_steps=steps, guidance_scale=guidance, generator=generator)
    shape = (len(labels), pipe.transformer.config.in_channels, *[pipe.transformer.config.sample_size] * 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return images, noise, pipe.scheduler.sigmas


def ours_on_stock_schedule(trained, labels, noise, sigmas, guidance):
    """Our network and Euler steps on the pipeline's sigmas; the pipeline tells its network the time in whole thousandths."""
    source, labels = trained.build_model("cpu"), torch.tensor(labels)

    def rounded(x, t, y):
        return trained.network(x, 1 - torch.floor(1000 * (1 - t.double()) + 1e-6).float() / 1000, y)

    field = guide(velocity_field(rounded, source.path, source.predict), labels, torch.full_like(labels, source.null), guidance)
    with torch.no_grad():
        return euler(field, noise, 1 - sigmas.double()).x


KINDS = {
    "velocity": (),
    "noise": ("--flow.predict=noise",),
    "data": ("--flow.predict=data",),
    "unet": UNET,
}


@pytest.mark.parametrize("kind", KINDS)
def test_our_sampler_and_the_pipeline_draw_the_same(digits, tmp_path, kind):
    """The trained network through our sampler, and the exported one through the stock pipeline: equal to 1e-4; another seed is not."""
    assert fit(digits, tmp_path / "run", "--export=true", "--train.learning_rate=1e-2", *KINDS[kind]) == 0
    labels = [0, 3, 9]
    theirs, noise, sigmas = pipeline_run(tmp_path / "run/export", labels, 7, 2.5, 5)
    trained = TrainedModel(tmp_path / "run")
    assert_equal_draws(ours_on_stock_schedule(trained, labels, noise, sigmas, 2.5), theirs)
    assert (ours_on_stock_schedule(trained, labels, noise.flip(0), sigmas, 2.5) - theirs).abs().max() > 0.1 * theirs.abs().max()
    mine, folder = trained.build_model("cpu"), load_flow_model(tmp_path / "run/export")
    t, y = torch.tensor([0.01, 0.5, 0.9]), torch.tensor(labels)
    with torch.no_grad():
        torch.testing.assert_close(folder.field(noise, t, y), mine.field(noise, t, y), atol=1e-4, rtol=1e-4)


TABLE_KINDS = {
    "cosine velocity": ("--flow.path=cosine",),
    "cosine noise": ("--flow.path=cosine", "--flow.predict=noise", "--flow.weighting=min_snr", "--flow.time=logit_normal"),
    "ddpm noise": ("--flow.path=ddpm", "--flow.predict=noise", "--flow.time=discrete"),
    "ddpm v": ("--flow.path=ddpm_cosine", "--flow.predict=v", "--flow.time=discrete"),
    "vp data, unet": ("--flow.path=vp", "--flow.predict=data", *UNET),
}


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_paths_of_unit_variance_run_under_ddim(digits, tmp_path, kind):
    """The stock pipeline's DDIM steps, down to timestep 0, written out with our path and network: x' = alpha' z + beta' eps."""
    assert fit(digits, tmp_path / "run", "--export=true", "--train.learning_rate=1e-2", *TABLE_KINDS[kind]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run/export")
    # from 800 on: at 999 a network that predicts noise is divided by alpha = 0.002, which makes much of float32's rounding
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", clip_sample=False, thresholding=False, set_alpha_to_one=True
    )
    theirs = drawn(pipe, class_labels=[0, 3, 9], num_inference_steps=5, guidance_scale=1.0, generator=torch.manual_seed(2))
    trained = TrainedModel(tmp_path / "run")
    source, labels = trained.build_model("cpu"), torch.tensor([0, 3, 9])
    x = torch.randn(3, 1, 8, 8, generator=torch.manual_seed(2)).double()
    alphas = pipe.scheduler.alphas_cumprod.double().sqrt()
    steps = [800, 600, 400, 200, 0]
    torch.testing.assert_close(alphas, source.path(1 - torch.arange(1000) / 1000).a.double(), rtol=1e-3, atol=0)
    with torch.no_grad():
        for k, after in zip(steps, [*steps[1:], None], strict=True):
            t = torch.full((3,), 1 - k / 1000, dtype=torch.float64)
            a = alphas[k].expand(3, 1, 1, 1)
            c = source.path(t[:, None, None, None])._replace(a=a, b=(1 - a**2).clamp(min=0).sqrt())
            out = trained.network(x.float(), t.float(), labels).double()
            z, eps = (convert(out, source.predict, form, x, c) for form in ("data", "noise"))
            x = z if after is None else alphas[after] * z + (1 - alphas[after] ** 2).sqrt() * eps
    assert_equal_draws(x, theirs)
    folder = load_flow_model(tmp_path / "run/export")
    t = torch.tensor([0.05, 0.5, 0.9])
    with torch.no_grad():
        point = torch.randn(3, 1, 8, 8)
        torch.testing.assert_close(folder.field(point, t, labels), source.field(point, t, labels), atol=1e-3, rtol=1e-4)


def test_the_exported_network_is_ours_to_rounding(trained):
    mine, theirs = TrainedModel(trained).build_model("cpu"), load_flow_model(trained / "export")
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 0.2, 0.9, 1.0])
    with torch.no_grad():
        a = mine.field(x, t, torch.tensor([0, 4, 9, mine.null]))
        b = theirs.field(x, t, torch.tensor([0, 4, 9, theirs.null]))
        wrong = theirs.field(x, t, torch.tensor([1, 5, 8, 0]))
    assert (a - b).abs().max() <= 2e-6 * a.abs().max() < (a - wrong).abs().max()


def test_the_folder_says_what_it_is(trained):
    folder = trained / "export"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["id2label"] == {str(i): str(i) for i in range(10)} and index["_class_name"] == "DiTPipeline"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["width"] == 32 and config["train"]["batch_size"] == 16
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers" and "DiffusionPipeline.from_pretrained" in card and "192 images seen" in card
    assert Image.open(folder / "samples.png").size[0] > 100
    assert not list(trained.glob(".export*"))


def test_exporting_again_gives_the_same_files(trained, tmp_path):
    """What `evaluate` may have left between the two is taken away: its figures would be told by the second card."""
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json"))
    assert sample.main(["export", "--run", str(run), "--output", str(tmp_path / "again")]) == 0
    first, again = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (run / "export", tmp_path / "again"))
    assert first == again


def test_another_checkpoint_is_exported_where_one_is_named(trained, tmp_path):
    """Of a run of 12 steps of 16 images the one after 8: its average, and as many images."""
    words = ["export", "--run", str(trained), "--checkpoint", str(trained / "checkpoint-8"), "--output", str(tmp_path / "out")]
    assert sample.main(words) == 0
    assert "128 images seen" in (tmp_path / "out/README.md").read_text()
    averaged = {k.removeprefix("ema."): v for k, v in load_tensors(trained / "checkpoint-8").items() if k.startswith("ema.")}
    last = TrainedModel(trained)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        newest = last.build_model("cpu").field(x, t, labels)
        last.network.load_state_dict(averaged)
        wanted, found = last.build_model("cpu").field(x, t, labels), load_flow_model(tmp_path / "out").field(x, t, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (newest - wanted).abs().max() > 1e-3


def test_an_export_that_fails_leaves_the_older_one(trained, tmp_path, monkeypatch):
    assert sample.main(["export", "--run", str(trained), "--output", str(tmp_path / "out")]) == 0
    before = (tmp_path / "out/model_index.json").read_bytes()
    monkeypatch.setattr(
        "condot.pipeline.export.write.render_readme", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert sample.main(["export", "--run", str(trained), "--output", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out/model_index.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("x")
    assert (
        sample.main(["export", "--run", str(trained), "--output", str(tmp_path / "thesis")]) == 2
        and (tmp_path / "thesis/chapter.txt").exists()
    )


def test_what_no_stock_pipeline_starts_from_is_refused():
    with pytest.raises(ValueError, match="stock pipelines start from normal noise"):
        export_form(FlowConfig(prior="uniform"))


OWN_KINDS = {
    "condot score": ("--flow.predict=score",),
    "vp velocity": ("--flow.path=vp",),
    "sub_vp noise": ("--flow.path=sub_vp", "--flow.predict=noise"),
    "ve noise": ("--flow.path=ve", "--flow.predict=noise"),
    "edm": ("--flow.path=edm", "--flow.predict=data", "--flow.weighting=edm", "--flow.time=log_normal_sigma"),
    "cosine, scaled": ("--flow.path=cosine", "--flow.predict=data", "--flow.precondition=true"),
}


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_every_other_recipe_takes_a_scheduler_of_its_own_along(digits, tmp_path, kind):
    """Refused without trust; with it, guided, it draws what our network gives in data-and-noise steps on its timesteps."""
    assert fit(digits, tmp_path / "run", "--export=true", "--train.learning_rate=1e-2", *OWN_KINDS[kind]) == 0
    folder = tmp_path / "run/export"
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "FlowODEScheduler" and not isinstance(pipe.scheduler, FlowODEScheduler), (
        "it comes from the folder"
    )
    default = pipe.scheduler.config
    euler = {**default, "clip_sample": False, "solver": "euler"}  # as is written out below
    pipe.scheduler = type(pipe.scheduler).from_config(euler)
    theirs = drawn(pipe, class_labels=[0, 3, 9], num_inference_steps=6, guidance_scale=2.0, generator=torch.manual_seed(2))
    trained = TrainedModel(tmp_path / "run")
    source, labels = trained.build_model("cpu"), torch.tensor([0, 3, 9])
    field = guide(source.field, labels, torch.full_like(labels, source.null), 2.0)
    times = (1 - pipe.scheduler.timesteps.double() / 1000).tolist()
    x = scale_initial_noise(source.path, torch.randn(3, 1, 8, 8, generator=torch.manual_seed(2)), times[0])
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], None], strict=True):
            now = torch.full((3,), t)
            c, v = source.path(widen(now, x)), field(x, now)
            z, eps = (convert(v, "velocity", form, x, c) for form in ("data", "noise"))
            end = None if after is None else source.path(widen(torch.full((3,), after), x))
            x = z if end is None else end.a * z + end.b * eps
    assert_equal_draws(x, theirs)
    ours = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_condot_v2", trust_remote_code=True)
    found = []
    for scheduler in (
        ours.FlowODEScheduler.from_config(default, solver="dpmpp_2m"),
        ours.FlowSDEScheduler.from_config(default, sigma_t="zero", solver="dpmpp_2m_sde"),
    ):
        pipe.scheduler = scheduler
        found.append(drawn(pipe, class_labels=[0, 3, 9], num_inference_steps=6, guidance_scale=2.0, generator=torch.manual_seed(2)))
    assert_equal_draws(*found)
    reopened, point = load_flow_model(folder), torch.randn(3, 1, 8, 8)
    t = torch.tensor([0.05, 0.5, 0.9])
    with torch.no_grad():
        torch.testing.assert_close(reopened.field(point, t, labels), source.field(point, t, labels), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_the_table_of_a_ddpm_path_is_diffusers_own(name):
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2" if name == "cosine" else name)
    path = "ddpm" if name == "linear" else f"ddpm_{name}"
    ours = build_scheduler(FlowConfig(path=path, predict="noise"))
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_identity_autoencoder_is_one(channels):
    vae = identity_autoencoder(channels, 8)
    x = torch.rand(2, channels, 8, 8) * 3 - 1.5
    with torch.no_grad():
        assert (vae.decode(x).sample - x).abs().max() < 1e-5
        assert (vae.encode(x).latent_dist.mode() - x).abs().max() < 1e-5


# --- sampling


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama", "exponential"])
def test_an_image_is_a_function_of_seed_and_index(trained, solver):
    source, labels = load_flow_model(trained / "export"), torch.arange(7)
    sampler = Sampler(solver, 5, 2.0)
    whole = generate(source, labels, sampler, seed=3).images
    parts = generate(source, labels, sampler, seed=3, batch_size=3).images
    tail = generate(source, labels[4:], sampler, seed=3, first=4).images
    torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)
    torch.testing.assert_close(whole[4:], tail, atol=2e-5, rtol=0)
    assert (whole - generate(source, labels, sampler, seed=4).images).abs().max() > 0.1


def test_zero_diffusion_is_eulers_method(trained):
    source, labels = load_flow_model(trained / "export"), torch.arange(3)
    ode, zero, sde = (
        generate(source, labels, Sampler(*how), seed=0).images
        for how in (("euler", 6), ("euler_maruyama", 6, 1.0, "zero"), ("euler_maruyama", 6))
    )
    torch.testing.assert_close(ode, zero, atol=1e-5, rtol=0)
    assert (ode - sde).abs().max() > 0.1


def test_a_grid_puts_images_where_they_belong():
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 2)
    sheet = make_grid(images, 3, scale=2)
    assert sheet.shape == (1, 14, 20) and sheet[0, 2, 2] == -1 and sheet[0, 8, 8] == 1 and sheet[0, 8, 2] == 0.5 and sheet[0, 0, 0] == 1


def run(capsys, *words):
    status = sample.main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_draws_a_grid(trained, tmp_path, capsys):
    output = tmp_path / "new" / "grid.png"
    words = [
        "--pipeline",
        str(trained / "export"),
        "--class_labels",
        "0",
        "1",
        "2",
        "--num_images",
        "6",
        "--num_inference_steps",
        "3",
        "--solver",
        "heun",
    ]
    status, out, _ = run(capsys, *words, "--output", str(output), "--seed", "1")
    assert status == 0 and out.startswith(f"{output}: 6 images") and "6 evaluations each" in out
    assert Image.open(output).size == (8 * (3 * 9 + 1), 8 * (2 * 9 + 1))
    status, out, _ = run(
        capsys, "--run", str(trained), "--num_inference_steps", "2", "--solver", "euler_maruyama", "--output", str(tmp_path / "b.png")
    )
    assert status == 0 and "10 images" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class_labels", "10"], "class label 10 is out of range: the model has classes 0 to 9"),
        (["--class_labels", "-1"], "--class_labels -1: a whole number at least 0"),
        (["--num_inference_steps", "0"], "--num_inference_steps 0: a solver takes at least one step"),
        (["--solver", "rk45"], "solver=rk45: solver 'rk45' is unknown"),
        (["--solver", "euler_maruyama", "--sigma_t", "forward", "--num_inference_steps", "2"], "sigma_t=inf at t=0"),
        (["--sigma_scale", "-1"], "--sigma_scale -1.0: a number at least 0"),
        (["--guidance_scale", "inf"], "--guidance_scale inf: a finite number"),
        (["--run", "x"], "give one of them"),
        (["--prompt", "a cat"], "--prompt 'a cat' of a model that takes no text"),
        (["--negative_prompt", "a dog"], "--negative_prompt 'a dog' beside no --prompt"),
        (["--num_images", "-3"], "--num_images -3"),
        (["--num_image", "3"], "did you mean 'num_images'"),
        (["--output", "/proc/nowhere/a.png"], "/proc/nowhere"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, capsys, words, message):
    status, _, error = run(
        capsys, "--pipeline", str(trained / "export"), "--num_inference_steps", "1", "--output", str(tmp_path / "a.png"), *words
    )
    assert (
        status == 2
        and message in error.splitlines()[-1]
        and error.splitlines()[-1].startswith("error: ")
        and not (tmp_path / "a.png").exists()
    )


def test_folders_that_are_none(trained, tmp_path, capsys):
    assert "is no pipeline folder" in run(capsys, "--pipeline", str(tmp_path))[2]
    assert "holds no whole checkpoint" in run(capsys, "--run", str(tmp_path))[2]
    assert "verb 'draw' is unknown" in run(capsys, "draw")[2]
    shutil.copytree(trained / "export", tmp_path / "cut")
    weights = next((tmp_path / "cut/transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, error = run(capsys, "--pipeline", str(tmp_path / "cut"))
    assert status == 2 and f"is not as it was exported: transformer/{weights.name} changed" in error.splitlines()[-1]
    (tmp_path / "cut/SHA256SUMS").unlink()
    status, _, error = run(capsys, "--pipeline", str(tmp_path / "cut"))
    assert status == 2 and "cannot be loaded" in error.splitlines()[-1]
    weights.unlink()
    status, _, error = run(capsys, "--pipeline", str(tmp_path / "cut"))
    assert status == 2 and "cannot be loaded" in error.splitlines()[-1]


def test_a_model_without_classes(digits, tmp_path, capsys):
    """An unlabelled folder trains an unconditional model; guidance and labels are refused."""
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8), 12 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    from condot.data.prepare.command import main

    assert main(["imagefolder", str(tmp_path / "images"), "--output", str(tmp_path / "shards")]) == 0
    assert fit(tmp_path / "shards", tmp_path / "run", "--export=true") == 0
    folder = str(tmp_path / "run/export")
    status, out, _ = run(
        capsys, "--pipeline", folder, "--output", str(tmp_path / "a.png"), "--num_inference_steps", "2", "--num_images", "5"
    )
    assert status == 0 and "5 images" in out
    assert "model without classes" in run(capsys, "--pipeline", folder, "--guidance_scale", "2")[2]
    assert "model without classes" in run(capsys, "--pipeline", folder, "--class_labels", "0")[2]


def test_evaluate_writes_what_it_measured(trained, digits, tmp_path, capsys):
    words = [
        "evaluate",
        "--pipeline",
        str(trained / "export"),
        "--reference",
        str(digits),
        "--num_images",
        "60",
        "--num_inference_steps",
        "2",
    ]
    status, out, _ = run(capsys, *words, "--output", str(tmp_path / "e.json"))
    figures = json.loads((tmp_path / "e.json").read_text())
    assert status == 0 and figures["samples"] == 60 and figures["accuracy_of_held_out"] > 0.97 and "nearest training image" in out
    assert run(capsys, *words, "--output", str(tmp_path / "e.json"), "--min_accuracy", "0.99")[0] == 1
    assert "--reference is missing" in run(capsys, *words[:3])[2]


@torch.no_grad()
def test_a_unet_without_classes_does_not_mind_the_class_that_the_pipeline_passes():
    """Its table of zeros adds nothing: the outputs are those of the network without one, to the bit."""
    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), attention_head_dim=32,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)).eval()  # fmt: skip
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999])
    passed = with_class_embedding(network)(x, t, class_labels=torch.tensor([1000, 0, 7])).sample
    assert torch.equal(passed, network(x, t).sample)
    assert with_class_embedding(with_class_embedding(network)).class_embedding.weight.shape[0] == 1001
