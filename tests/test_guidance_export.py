"""Guidance in exported pipelines: each kind against diffusers' own guiders, and against `flow.guide` and sample.py on the same network."""

import oracles
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from exact import ExactNetwork, quantiles
from stocks import shake

from condot.models import registry
from condot.models.convert import to_diffusers
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.export.load import flow_model_from_pipeline
from condot.pipeline.export.runtime.guidance_v2 import Guidance, Guide, cfg_zero_star_scale
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.export.scheduler_map import PREDICTION_TYPES, build_scheduler, export_form
from condot.pipeline.sampling.flow_model import build_flow_model
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.sampler import Sampler
from condot.pipeline.sampling.solve import initial_point

MEANS = (-0.6, 0.6, 0.0)


def pair(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2)]


def data_of(kind, x, out, a, b):
    """The data prediction that an output stands for, by x = a z + b eps."""
    return {"flow_prediction": x - b * out, "epsilon": (x - b * out) / a, "sample": out, "v_prediction": a * x - b * out}[kind]


def output_of(kind, x, z, a, b):
    """And back."""
    return {"flow_prediction": (x - z) / b, "epsilon": (x - a * z) / b, "sample": z, "v_prediction": (a * x - z) / b}[kind]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_plain_guidance_is_diffusers(rescale):
    good, lesser = pair()
    wanted = ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=rescale).forward(good, lesser).pred
    torch.testing.assert_close(Guide(Guidance(5.0, rescale=rescale)).sharpen(good, lesser, good, None), wanted)


def test_what_is_guided_to_nothing_stays_finite():
    """good = 2, lesser = 2.5 at w = 5: zero everywhere, whose deviation is 0; and a constant prediction has none."""
    good = pair()[0]
    for rescale in (0.0, 0.7, 1.0):
        guide = Guide(Guidance(5.0, rescale=rescale))
        assert not guide.sharpen(good, 1.25 * good, good, None).abs().max() > 1e-12
        flat = torch.ones(2, 1, 3, 3)
        assert torch.equal(guide.sharpen(flat, 0 * flat, flat, None), 5 * flat)
    assert not cfg_zero_star_scale(good, 0 * good).any()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("norm_threshold", [0.0, 2.5])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_apg_is_the_papers_as_diffusers_has_it(eta, norm_threshold, momentum):
    """Its `use_original_formulation`, on data predictions: three evaluations, so that the momentum counts."""
    names = {"adaptive_projected_guidance_rescale": norm_threshold, "adaptive_projected_guidance_momentum": momentum or None}
    theirs = AdaptiveProjectedGuidance(guidance_scale=4.0, eta=eta, use_original_formulation=True, **names)
    if momentum:
        theirs.momentum_buffer = MomentumBuffer(momentum)
    ours, p, q = Guide(Guidance(5.0, kind="apg", eta=eta, norm_threshold=norm_threshold, momentum=momentum)), 0.7, -0.3
    for seed in range(3):
        (good, lesser), x = pair(seed), pair(seed + 10)[0]
        data = theirs.forward(p * x + q * good, p * x + q * lesser).pred
        torch.testing.assert_close(ours.sharpen(good, lesser, x, (p, q)), (data - p * x) / q)


def test_apg_with_nothing_taken_off_is_plain_guidance():
    good, lesser = pair()
    found = Guide(Guidance(5.0, kind="apg", eta=1.0)).sharpen(good, lesser, good, (1.0, -0.4))
    torch.testing.assert_close(found, torch.lerp(lesser, good, 5.0))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_cfg_zero_star_is_diffusers(rescale):
    good, lesser = pair()
    theirs = ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0, guidance_rescale=rescale)
    theirs.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))
    found = Guide(Guidance(5.0, rescale=rescale, kind="cfg_zero_star")).sharpen(good, lesser, good, None)
    torch.testing.assert_close(found, theirs.forward(good, lesser).pred, atol=1e-6, rtol=1e-6)


def pipe_of(path, predict):
    flow = FlowConfig(path=path, predict=predict)
    network = ExactNetwork(path, PREDICTION_TYPES[export_form(flow).predict], means=MEANS, std=0.3)
    pipe = CondotPipeline(build_scheduler(flow, pixels=False), transformer=network, id2label={0: "a", 1: "b"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


KINDS = {
    "cfg": {},
    "rescaled": {"guidance_rescale": 0.7},
    "apg": {"guidance": "apg", "apg_eta": 0.2, "apg_norm_threshold": 2.0, "apg_momentum": -0.5},
    "apg, rescaled": {"guidance": "apg", "guidance_rescale": 0.7},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "predict"), [("condot", "velocity"), ("condot", "noise"), ("condot", "data"), ("vp", "noise"), ("vp", "v")]
)
def test_a_step_is_guided_on_the_data_prediction_and_rescaled_on_the_networks(path, predict, kind):
    """Every step of a call at w = 5, made again from the path's own numbers (oracles.py) without the pipeline's."""
    pipe, seen, how, before = pipe_of(path, predict), [], KINDS[kind], 0.0
    step = pipe.scheduler.step

    def kept(out, k, x, **more):
        seen.append((float(k), x.double(), out.double()))
        return step(out, k, x, **more)

    pipe.scheduler.step = kept
    made = pipe([0, 1], latents=quantiles(32, 1, 4, 4), guidance_scale=5.0, num_inference_steps=6, output_type="latent", **how).images
    assert made.isfinite().all() and len(seen) == 6
    for k, x, out in seen:
        a, b, *_ = getattr(oracles, path)(min(max(1 - k / 1000, 1e-9), 1 - 1e-9))
        net = [pipe.transformer(x, torch.tensor([k]), torch.tensor(labels), return_dict=False)[0] for labels in ([0, 1], [2, 2])]
        kind_of = pipe.transformer.config.predict
        good, lesser = (data_of(kind_of, x, one, a, b) for one in net)
        push = good - lesser
        if "apg" in kind:
            before = push = push + how.get("apg_momentum", 0.0) * before
            length = push.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            push = push * (how.get("apg_norm_threshold", 1e9) / length).clamp(max=1)
            along = (push * good).sum((1, 2, 3), keepdim=True) / good.square().sum((1, 2, 3), keepdim=True) * good
            push = push + (how.get("apg_eta", 0.0) - 1) * along
        wanted = output_of(kind_of, x, good + 4 * push, a, b)
        if "guidance_rescale" in how:
            spread = net[0].flatten(1).std(1) / wanted.flatten(1).std(1)
            wanted = wanted * (0.3 + 0.7 * spread.reshape(-1, 1, 1, 1))
        torch.testing.assert_close(out, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["rescaled", "apg, rescaled", "cfg_zero_star"])
@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
def test_run_folder_and_pipeline_agree(predict, kind):
    """At w = 5, rescaled by 0.7: `generate` of the network, `generate` of the exported folder's parts, and the pipeline itself."""
    if kind == "cfg_zero_star" and predict != "velocity":
        pytest.skip("refused: it is made for velocities")
    if "guidance" not in Sampler.__dataclass_fields__:
        pytest.skip("flow.guide acts on the velocity here, not yet on the network's prediction")
    how = {**KINDS, "cfg_zero_star": {"guidance": "cfg_zero_star", "zero_init_steps": 1}}[kind]
    torch.manual_seed(0)
    flow = FlowConfig(predict=predict)
    network = registry.build(kind="dit", channels=1, resolution=8, num_classes=3, width=32, depth=2, heads=2, patch_size=2)
    shaken = shake(network).eval()
    exported = to_diffusers(shaken, export_form(flow).factor)
    pipe = CondotPipeline(build_scheduler(flow), transformer=exported, id2label={0: "a", 1: "b", 2: "c"})
    pipe.set_progress_bar_config(disable=True)
    labels, run = torch.tensor([0, 2]), build_flow_model(shaken, flow, (1, 8, 8), 3, lambda x: x)
    sampler = Sampler("euler", 6, 5.0, **how)
    drawn = [generate(source, labels, sampler, seed=0).images for source in (run, flow_model_from_pipeline(pipe, flow))]
    noise = initial_point(run, 0, torch.arange(2), 0.0)  # the scheduler makes it as loud as where it begins
    how = {"solver": "euler", "num_inference_steps": 6, "guidance_scale": 5.0, "latents": noise, "output_type": "latent", **how}
    drawn.append(pipe([0, 2], **how).images)
    scale = drawn[0].abs().max().clamp(min=1)
    assert max((one - drawn[0]).abs().max() for one in drawn[1:]) < 2e-4 * scale
    plain = generate(run, labels, Sampler("euler", 6, 5.0), seed=0).images
    assert (plain - drawn[0]).abs().max() > 1e-2


@pytest.mark.parametrize("solver", [None, "euler", "multistep"])
def test_nothing_moves_in_the_first_steps(solver):
    """Zero velocity: what comes is drawn from the same noise at the later time, as if it were there."""
    pipe, seen = pipe_of("condot", "velocity"), []
    how = {"guidance": "cfg_zero_star", "guidance_scale": 3.0, "zero_init_steps": 2, "solver": solver}

    def told(pipe, number, timestep, tensors):
        seen.append(tensors["latents"])

    noise = quantiles(16, 1, 4, 4)
    pipe([0], latents=noise, num_inference_steps=8, callback_on_step_end=told, **how)
    still = [torch.allclose(x, noise, atol=1e-6) for x in seen]
    assert still == [True, True, *[False] * 6]


def test_cfg_zero_star_is_for_velocities():
    with pytest.raises(ValueError, match="made for velocities, and the network predicts epsilon"):
        pipe_of("vp", "noise")([0], guidance_scale=3.0, guidance="cfg_zero_star")
