"""CondotPipeline: its images are those of our own solvers and encoders, whatever it is told; and what it cannot be told it refuses."""

from itertools import combinations, product

import frozen
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from condot.data.encoders.text import read_text_encoder
from condot.data.loader.text_conditioner import TextConditioner
from condot.pipeline.export.load import _load_pipeline, flow_model_from_pipeline
from condot.pipeline.export.pipeline_class import _text_parts
from condot.pipeline.export.runtime import inputs_v2
from condot.pipeline.export.runtime.captions_v1 import Captions, joined
from condot.pipeline.export.runtime.guidance_v2 import Guidance
from condot.pipeline.export.runtime.pipeline_condot_v1 import NO_CLASS
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.export.runtime.scheduling_flow_ode_v1 import FlowODEScheduler
from condot.pipeline.export.runtime.scheduling_flow_sde_v1 import FlowSDEScheduler
from condot.pipeline.flow import ODE_SOLVERS, guide


@pytest.fixture
def pipe(trained):
    import json

    made = _load_pipeline(trained / "export", json.loads((trained / "export/model_index.json").read_text()), {})
    made.set_progress_bar_config(disable=True)
    with torch.no_grad():  # after twelve steps of training a class says next to nothing
        for name, value in made.transformer.named_parameters():
            value.mul_(50 if "embedding_table" in name else 1)
    return made


def noise(seed=0, count=3):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", FlowODEScheduler.solvers)
@pytest.mark.parametrize("guidance", [
    {}, {"guidance_scale": 3.0, "guidance_interval": (0.15, 0.75), "guidance_rescale": 0.5},
    {"guidance_scale": 3.0, "guidance_interval": (0.2, 1.0)},  # begins on the grid, where 1 - 800 / 1000 is less than 0.2
])  # fmt: skip
def test_it_draws_what_our_solvers_draw(pipe, solver, guidance):
    """The same network, noise and times through flow/: to float32 rounding."""
    source, labels = flow_model_from_pipeline(pipe), torch.tensor([3, 1, 4])
    made = pipe([3, 1, 4], num_inference_steps=5, solver=solver, latents=noise(), output_type="latent", **guidance).images
    more = {"interval": guidance.get("guidance_interval", (0.0, 1.0)), "rescale": guidance.get("guidance_rescale", 0.0)}
    field = guide(source.field, labels, torch.full((3,), NO_CLASS), guidance.get("guidance_scale", 1.0), **more)
    with torch.no_grad():
        ours = ODE_SOLVERS[solver](field, noise(), torch.linspace(0, 1, 6, dtype=torch.float64)).x
    assert (made - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)
    other = pipe([3, 1, 5], num_inference_steps=5, solver=solver, latents=noise(), output_type="latent", **guidance).images
    assert torch.equal(made[:2], other[:2]) and (made[2] - other[2]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [5, 10, 25, 50])
def test_an_interval_holds_at_its_ends(steps):
    """Counted in whole numbers: evaluation k of n is at time k / n."""
    scheduler = FlowODEScheduler("euler")
    scheduler.set_timesteps(steps)
    for (first, last), (k, timestep) in product(combinations(range(11), 2), enumerate(scheduler.timesteps)):
        held = Guidance(3.0, (first / 10, last / 10)).holds(1 - float(timestep) / 1000)
        assert held == (first * steps <= 10 * k <= last * steps), (first, last, k)


def test_its_noise_is_the_generators(pipe):
    """Seeded, the SDE is repeated; another seed is another image; without noise it is Euler's method; one generator an image."""

    def drawn(seed, **how):
        generator = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        return pipe([1, 1], num_inference_steps=4, generator=generator, output_type="pt", **how).images

    sde = drawn(0, solver="exponential", sigma_t="noise")
    assert torch.equal(sde, drawn(0, solver="exponential")) and not torch.equal(sde, drawn(5, solver="exponential"))
    torch.testing.assert_close(drawn(0, solver="exponential", sigma_t="zero"), drawn(0, solver="euler"), atol=1e-5, rtol=0)
    torch.testing.assert_close(sde[1], drawn(1, solver="exponential")[0], atol=1e-5, rtol=0)  # both of seed 1, in other company
    assert (sde[0] - sde[1]).abs().max() > 0.1
    assert isinstance(pipe.sampler(None, "constant", 2.0), FlowSDEScheduler) and pipe.sampler(None, None, None) is pipe.scheduler


def test_outputs_names_and_callbacks(pipe):
    kinds = {kind: pipe(["4", 2], num_inference_steps=2, latents=noise(count=2), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert kinds["pil"][0].size == (8, 8) and kinds["np"].shape == (2, 8, 8, 1) and kinds["pt"].shape == (2, 1, 8, 8)
    assert abs(kinds["np"] - kinds["pt"].permute(0, 2, 3, 1).numpy()).max() == 0
    by_number = pipe([4, 2], num_inference_steps=2, latents=noise(count=2), output_type="pt", return_dict=False)[0]
    assert torch.equal(by_number, kinds["pt"])
    seen = []

    def told(pipeline, number, timestep, kept):
        seen.append((number, float(timestep), pipeline.guidance_scale, pipeline.num_timesteps))
        pipeline._interrupt = number == 1
        return {"latents": kept["latents"] * 0}

    made = pipe([1], num_inference_steps=4, guidance_scale=2.0, solver="euler", callback_on_step_end=told, output_type="latent").images
    assert [number for number, *_ in seen] == [0, 1] and seen[0][2:] == (2.0, 4) and not made.any()
    assert len(pipe(3, num_inference_steps=1, num_images_per_prompt=4).images) == 4


WRONG = {
    "neither": ({}, "this model takes class_labels"),
    "both": ({"class_labels": [1], "prompt": "a"}, "this model takes class_labels, and no prompt"),
    "negative": ({"class_labels": [1], "negative_prompt": "a"}, "takes no text"),
    "label": ({"class_labels": [10]}, "has classes 0 to 9"),
    "name": ({"class_labels": ["ten"]}, "has classes 0 to 9"),
    "steps": ({"class_labels": [1], "num_inference_steps": 0}, "num_inference_steps=0"),
    "scale": ({"class_labels": [1], "guidance_scale": float("nan")}, "guidance_scale=nan"),
    "interval": ({"class_labels": [1], "guidance_interval": (0.7, 0.2)}, "first < last"),
    "size": ({"class_labels": [1], "height": 9}, "height=9"),
    "solver": ({"class_labels": [1], "solver": "dopri"}, "choose one of dpmpp_2m, multistep"),
    "noise": ({"class_labels": [1], "solver": "heun", "sigma_t": "noise"}, "alone take sigma_t"),
    "latents": ({"class_labels": [1], "latents": torch.zeros(1, 3, 8, 8)}, "latents of shape"),
    "kept": ({"class_labels": [1], "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_say_what_to_do_before_any_work(pipe, case, monkeypatch):
    monkeypatch.setattr(CondotPipeline, "predict", None)
    more, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pipe(**more)


def test_a_scheduler_of_another_kind_of_model_is_refused(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert len(pipe([1], num_inference_steps=2).images) == 1, "a flow scheduler serves a flow"
    pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="from_config"):
        pipe([1], num_inference_steps=2)


def test_no_guidance_of_a_model_without_conditions(pipe):
    bare = CondotPipeline(pipe.scheduler, transformer=pipe.transformer, vae=pipe.vae)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="neither classes nor text"):
        bare(guidance_scale=2.0)
    alone = bare(num_inference_steps=2, latents=noise(count=1), output_type="pt").images
    null = pipe([NO_CLASS], num_inference_steps=2, latents=noise(count=1), output_type="pt").images
    assert torch.equal(alone, null)


ENCODERS = {
    "bert": ("bert",), "t5": ("t5",), "clip": ("clip",), "clip, t5": ("clip_projected", "t5"),
    "two clips, t5": ("clip_projected", "clip_projected", "t5"), "two clips": ("clip", "clip_projected"), "no pad": ("bare",),
}  # fmt: skip


@pytest.mark.parametrize("padding", ["mask", "attend"])
@pytest.mark.parametrize("case", ENCODERS)
def test_captions_are_what_training_showed(tmp_path, pipe, case, padding):
    """One encoder or several, also for no caption and for too long ones: as text_conditioner.py gives them."""
    if padding == "attend" and case == "no pad":
        pytest.skip("refused by the encoder: there is nothing to pad with")
    names = [frozen.text(tmp_path / str(i), kind, seed=i) for i, kind in enumerate(ENCODERS[case])]
    words = TextConditioner([read_text_encoder(str(name), 7, padding) for name in names])
    captions = ["a red square", "", "big blue circle on the small green square and a circle", "red"]
    ours = words.read(captions)
    pipe.register_to_config(padding=padding)
    pipe.register_modules(**_text_parts(words.networks))
    theirs = pipe.encode_prompt(captions)
    length = theirs.mask.shape[1]
    for found, wanted in zip(theirs[:2], ours[:2], strict=True):
        if len(names) == 1:  # ours are longer by masked tokens
            torch.testing.assert_close(found.float(), wanted[:, :length].float(), atol=1e-6, rtol=0)
            assert not wanted[:, length:].any()
    for row in range(4):
        torch.testing.assert_close(theirs.states[row][theirs.mask[row]], ours.states[row][ours.mask[row]], atol=1e-6, rtol=0)
        assert theirs.mask[row].sum() == ours.mask[row].sum()
    torch.testing.assert_close(theirs.pooled, ours.pooled, atol=1e-6, rtol=0)


def test_a_token_that_one_of_neighbouring_clips_has_is_there(pipe):
    """Their captions may be cut into different numbers of tokens: what either has counts, zeros stand beside the other's."""
    parts = [Captions(torch.ones(1, count, 2), torch.ones(1, count, dtype=torch.bool), torch.ones(1, 1)) for count in (2, 3)]
    for order in (parts, parts[::-1]):
        found = joined(order, [True, True])
        assert found.mask.tolist() == [[True] * 3] and found.states.shape == (1, 3, 4) and found.states.sum() == 10


def test_latents_are_undone_as_stable_diffusion_3_undoes_them(tmp_path, pipe):
    """An autoencoder that comes with a shift: z = (latent - shift) scale, of diffusers' own training; a stranger may put one in."""
    vae = AutoencoderKL.from_pretrained(frozen.kl(tmp_path / "vae", shift_factor=0.3)).eval()
    latent = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pipe.vae = vae
    with torch.no_grad():
        torch.testing.assert_close(pipe.decode((latent - 0.3) * 0.5), vae.decode(latent).sample, atol=1e-5, rtol=1e-5)


def test_sizes_are_told_in_pixels_of_whole_images(tmp_path, pipe, monkeypatch):
    """Of latents of 8 at a quarter of the size: 32 x 32, uncropped, by the pipeline and by the field that is read from a folder."""
    pipe.vae, told = AutoencoderKL.from_pretrained(frozen.kl(tmp_path / "vae", channels=1)).eval(), []
    monkeypatch.setattr(CondotPipeline, "outputs", lambda self, x, t, condition, sizes=None: (told.append(sizes), x)[1])
    pipe([1], num_inference_steps=1, output_type="latent")
    flow_model_from_pipeline(pipe).field(noise(), torch.full((3,), 0.5), torch.tensor([1, 2, 3]))
    monkeypatch.setattr(inputs_v2, "ONE_SIZE", ())
    pipe([1], num_inference_steps=1, output_type="latent", height=48, original_size=(100, 90), crop=(1, 2))
    flow_model_from_pipeline(pipe).field(torch.zeros(1, 1, 8, 4), torch.full((1,), 0.5), torch.tensor([1]))
    assert [sizes.tolist() for sizes in told[:2]] == [[[32, 32, 0, 0, 32, 32]], [[32, 32, 0, 0, 32, 32]] * 3]
    assert [sizes.tolist() for sizes in told[2:]] == [[[100, 90, 1, 2, 48, 32]], [[32, 16, 0, 0, 32, 16]]]
