"""Our schedulers inside stock pipelines, five of them with small random networks: each draws what our own solver draws."""

import functools
import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from condot.pipeline.export.bundle import bundle_module
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.export.runtime import scheduling_flow_sde_v1 as file
from condot.pipeline.export.runtime.scheduling_flow_ode_v2 import FlowODEScheduler
from condot.pipeline.export.runtime.scheduling_flow_sde_v2 import FlowSDEScheduler
from condot.pipeline.flow import ODE_SOLVERS, SDE_SOLVERS, CondOT, diffusion_coefficient

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def autoencoder(channels):
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=channels, block_out_channels=(8,), norm_num_groups=2,
        layers_per_block=1, shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def dit():
    network = DiTTransformer2DModel(**SMALL, in_channels=3, out_channels=3, sample_size=8, num_embeds_ada_norm=1000, patch_size=2)
    pipe = DiTPipeline(network, autoencoder(3), DPMSolverMultistepScheduler(**DPM))
    return pipe, {"class_labels": [1, 2], "guidance_scale": 1.0, "output_type": "np"}


def texts(length=4, width=16):
    draw = torch.Generator().manual_seed(8)
    return torch.randn(2, length, width, generator=draw), torch.ones(2, length, dtype=torch.long)


def pixart():
    network = PixArtTransformer2DModel(
        **SMALL, in_channels=4, out_channels=4, sample_size=8, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False
    )
    embeds, mask = texts()
    pipe = PixArtSigmaPipeline(None, None, autoencoder(4), network, DPMSolverMultistepScheduler(**DPM))
    more = {"use_resolution_binning": False, "negative_prompt": None, "guidance_scale": 1.0}
    return pipe, {"prompt_embeds": embeds, "prompt_attention_mask": mask, "height": 8, "width": 8, "output_type": "latent", **more}


def sd3():
    network = SD3Transformer2DModel(
        **SMALL, sample_size=8, patch_size=2, in_channels=4, out_channels=4, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(network, stock, autoencoder(4), None, None, None, None, None, None)
    how = {"prompt_embeds": texts()[0], "pooled_prompt_embeds": texts(1)[0][:, 0], "guidance_scale": 1.0}
    return pipe, {**how, "height": 8, "width": 8, "output_type": "latent"}


def flux():
    network = FluxTransformer2DModel(
        **SMALL, in_channels=16, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4)
    )
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(stock, autoencoder(4), None, None, None, None, network)
    how = {"prompt_embeds": texts()[0], "pooled_prompt_embeds": texts(1)[0][:, 0]}
    return pipe, {**how, "height": 8, "width": 8, "output_type": "latent"}


def sana():
    network = SanaTransformer2DModel(
        **SMALL, in_channels=4, out_channels=4, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=8, patch_size=1,
    )  # fmt: skip
    embeds, mask = texts()
    pipe = SanaPipeline(None, None, None, network, DPMSolverMultistepScheduler(**DPM))
    more = {"use_resolution_binning": False, "negative_prompt": None, "guidance_scale": 1.0}
    return pipe, {"prompt_embeds": embeds, "prompt_attention_mask": mask, "height": 256, "width": 256, "output_type": "latent", **more}


PIPELINES = {"DiT": dit, "PixArt": pixart, "SD3": sd3, "Flux": flux, "Sana": sana}


class Recorded:
    """A pipeline's network, and what it was shown: the points, and all else that it was told, for another to ask it the same."""

    def __init__(self, pipe):
        self.network, self.points, self.told, self.ends = pipe.transformer.eval(), [], {}, []
        self.ask = pipe.transformer.forward
        pipe.transformer.forward = self.forward
        pipe.set_progress_bar_config(disable=True)
        step = pipe.scheduler.step

        @functools.wraps(step)
        def kept(*args, **more):
            self.ends.append(step(*args, **more))
            return self.ends[-1]

        pipe.scheduler.step = kept

    def forward(self, *args, **kwargs):
        self.told = {**kwargs, "hidden_states": args[0] if args else kwargs["hidden_states"]}
        self.points.append(self.told["hidden_states"])
        return self.ask(**self.told)

    @property
    def end(self):
        last = self.ends[-1]
        return last[0] if isinstance(last, tuple) else last.prev_sample

    def field(self, x, t):
        """Velocity, data - noise, from what predicts noise - data at a timestep, which Flux is told in ones, all others in thousands."""
        unit = 1 if isinstance(self.network, FluxTransformer2DModel) else getattr(self.network.config, "timestep_scale", 1.0) * 1000
        out = self.ask(**{**self.told, "hidden_states": x, "timestep": unit * (1 - t)})
        return -(out[0] if isinstance(out, tuple) else out.sample)


@pytest.mark.parametrize("solver", [name for name in ("euler", "heun", "multistep", "rk4", "dpmpp_2m") if name in ODE_SOLVERS])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_a_stock_pipeline_draws_what_our_solver_draws(name, solver):
    """One line puts ours in; the shift stays the model's own; the points are our solver's at the scheduler's sigmas."""
    torch.manual_seed(0)
    pipe, how = PIPELINES[name]()
    stock = pipe.scheduler
    pipe.scheduler = FlowODEScheduler.from_config(stock.config, solver=solver)
    recorded = Recorded(pipe)
    pipe(**how, num_inference_steps=4, generator=torch.Generator().manual_seed(1))
    sigmas = pipe.scheduler.sigmas
    assert len(recorded.points) == 4 * pipe.scheduler.order and len(sigmas) == 5
    if not stock.config.get("use_dynamic_shifting"):
        plain = 1 - torch.arange(5, dtype=torch.float64) / 4
        torch.testing.assert_close(sigmas, 3 * plain / (1 + 2 * plain))
    ours = ODE_SOLVERS[solver](recorded.field, recorded.points[0], 1 - sigmas).x
    torch.testing.assert_close(recorded.end, ours, rtol=1e-4, atol=1e-4)
    assert (ours - recorded.points[0]).abs().max() > 0.1


@pytest.mark.parametrize("solver", [name for name in ("exponential", "dpmpp_2m_sde") if name in SDE_SOLVERS])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_a_stock_pipeline_draws_our_sde(name, solver, monkeypatch):
    """The same noise through our solver; PixArt and Sana pass their generator on, the others leave it to the scheduler's."""
    torch.manual_seed(0)
    pipe, how = PIPELINES[name]()
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, sigma_t="noise", solver=solver)
    pipe.scheduler.generator = torch.Generator().manual_seed(9)
    recorded, noise, seeds = Recorded(pipe), [], []
    draw = file.randn_tensor

    def drawn(*args, generator, **more):
        seeds.append(generator)
        noise.append(draw(*args, generator=generator, **more))
        return noise[-1]

    monkeypatch.setattr(file, "randn_tensor", drawn)
    generator = torch.Generator().manual_seed(1)
    pipe(**how, num_inference_steps=4, generator=generator)
    assert len(noise) == 3 and set(seeds) == {generator if name in ("PixArt", "Sana") else pipe.scheduler.generator}
    times, sigma = 1 - pipe.scheduler.sigmas, diffusion_coefficient("noise")
    ours = SDE_SOLVERS[solver](recorded.field, recorded.points[0], times, CondOT(), sigma, lambda k: noise[k]).x
    torch.testing.assert_close(recorded.end, ours, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_image_to_image_begins_in_the_middle():
    """SD3's pipeline for images, at half strength: steps of Heun's from sigma = 0.5 on, noise put in by ours."""
    torch.manual_seed(0)
    pipe, how = sd3()
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(
        pipe.transformer, FlowODEScheduler("heun"), pipe.vae, None, None, None, None, None, None
    )
    recorded = Recorded(pipe)
    image = torch.rand(2, 4, 8, 8)
    pipe(**{**how, "image": image}, strength=0.5, num_inference_steps=4, generator=torch.Generator().manual_seed(1))
    assert len(recorded.points) == 4
    ours = ODE_SOLVERS["heun"](recorded.field, recorded.points[0], torch.tensor([0.5, 0.75, 1.0])).x
    torch.testing.assert_close(recorded.end, ours, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_in_one_batch_keeps_both_halves_alike():
    """DiTPipeline steps 2 B points and drops half: the noise of the halves differs, yet the first half is one trajectory."""
    torch.manual_seed(0)
    pipe, how = dit()
    pipe.transformer.eval()
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config)
    images = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        pipe.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(1)
        images.append(torch.tensor(pipe(**{**how, "guidance_scale": 2.0}, num_inference_steps=3, generator=draw).images))
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def written(folder, kind, **config):
    """A pipeline folder as the export writes it, with a scheduler of this module and its file."""
    torch.manual_seed(0)
    pipe, _ = dit()
    pipe.scheduler = kind(prediction_type="sample", **config)
    pipe.save_pretrained(folder)
    code, index = Path(inspect.getfile(kind)), json.loads((folder / "model_index.json").read_text())
    (folder / "scheduler" / code.name).write_text(bundle_module(code))
    index["scheduler"] = [code.stem, kind.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "config.yaml").write_text("flow: {path: vp, predict: data}\n")
    return folder


@pytest.mark.parametrize("name", ["ode", "sde"])
def test_folders_of_both_versions_load_beside_each_other(name, tmp_path):
    """By diffusers, each with its own code in one process, and by `sample.py --pipeline`; each draws what its class here draws."""
    first, second = (importlib.import_module(f"condot.pipeline.export.runtime.scheduling_flow_{name}_v{k}") for k in (1, 2))
    kinds = [getattr(module, f"Flow{name.upper()}Scheduler") for module in (first, second)]
    pipes = []
    for k, kind in enumerate(kinds):
        folder = written(tmp_path / str(k), kind, path="vp", shift=2.0)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        loaded = type(pipe.scheduler)
        assert loaded.__name__ == kind.__name__ and loaded is not kind and loaded.solvers == kind.solvers
        assert load_flow_model(folder).predict == "data"
        here = DiTPipeline(pipe.transformer, pipe.vae, kind.from_config(pipe.scheduler.config))
        images = []
        for one in (pipe, here):
            one.set_progress_bar_config(disable=True)
            torch.manual_seed(5)
            images.append(torch.tensor(one([1, 2], 1.0, num_inference_steps=3, output_type="np", generator=torch.manual_seed(4)).images))
        assert torch.equal(*images)
        pipes.append(loaded)
    assert pipes[0] is not pipes[1] and pipes[0].solvers != pipes[1].solvers


def test_both_second_versions_stand_in_one_file(tmp_path):
    """As pipeline_condot's file holds them: with their first versions under other names, and each the class that it is here."""
    (tmp_path / "root.py").write_text(
        '"""R."""\n\nfrom .scheduling_flow_ode_v2 import FlowODEScheduler\nfrom .scheduling_flow_sde_v2 import FlowSDEScheduler\n\n'
        "BOTH = FlowODEScheduler, FlowSDEScheduler\n"
    )
    for part in Path(inspect.getfile(FlowODEScheduler)).parent.glob("scheduling_flow*.py"):
        (tmp_path / part.name).write_text(part.read_text())
    text, names = bundle_module(tmp_path / "root.py"), {"__name__": "alone"}
    sys.modules["alone"] = types.ModuleType("alone")
    exec(compile(text, "alone", "exec"), names)
    for kind, here in zip(names["BOTH"], (FlowODEScheduler, FlowSDEScheduler), strict=True):
        assert kind.__name__ == here.__name__ and kind.__mro__[2].__name__ == f"{here.__name__}V1" and kind.solvers == here.solvers
        assert kind.from_config(kind().config).config.solver == here.solvers[0]
    assert text.count("class FlowODEScheduler(") == text.count("class FlowODESchedulerV1(") == text.count("class FlowSDESchedulerV1(") == 1
