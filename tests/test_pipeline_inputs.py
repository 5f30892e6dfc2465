"""What our exported pipeline is asked for: drawn as diffusers' own pipelines do, or refused in one line before the network is asked."""

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from exact import ExactNetwork, quantiles

from condot.pipeline.export.identity_autoencoder import identity_autoencoder
from condot.pipeline.export.runtime.pipeline_condot_v2 import NO_CLASS, CondotPipeline


def pipe_of(**more):
    network = ExactNetwork(means=(-0.5, 0.0, 0.5, 0.1), std=0.1)
    pipe = CondotPipeline(
        FlowMatchEulerDiscreteScheduler(), transformer=network, **{"id2label": {0: "low", 1: "middle", 2: "high"}, **more}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return pipe_of()


def drawn(pipe, labels, **how):
    count = how.pop("count", None) or len(labels)
    how = {"num_inference_steps": 20, "output_type": "latent", "latents": quantiles(16 * count, 1, 4, 4), **how}
    return pipe(labels, **how).images.mean((1, 2, 3))


@pytest.mark.parametrize("labels", [
    [0, 2, NO_CLASS], ["low", 2, NO_CLASS], (0, "high", NO_CLASS), np.array([0, 2, NO_CLASS]), torch.tensor([0, 2, NO_CLASS]),
    [np.int64(0), np.int32(2), torch.tensor(NO_CLASS)],
], ids=str)  # fmt: skip
def test_labels_of_any_make_are_their_classes(pipe, labels):
    """The mean of each image is its class's."""
    torch.testing.assert_close(drawn(pipe, labels), torch.tensor([-0.5, 0.5, 0.1]), atol=0.1, rtol=0)


def test_one_label_and_whole_numbers_of_numpy(pipe):
    for one in (2, np.int64(2), torch.tensor(2), "high"):
        found = drawn(pipe, one, count=2, num_images_per_prompt=np.int64(2), num_inference_steps=np.int32(20), height=np.int64(4), width=4)
        torch.testing.assert_close(found, torch.tensor([0.5, 0.5]), atol=0.1, rtol=0)


def test_generators_are_those_of_diffusers(pipe):
    """One for all or one each, in a list or a tuple: what DiTPipeline draws of them."""
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=3, out_channels=3, sample_size=8, patch_size=2
    )
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    stock = DiTPipeline(network.eval(), identity_autoencoder(3, 8), scheduler)
    ours = CondotPipeline.from_pipe(stock)
    for one in (stock, ours):
        one.set_progress_bar_config(disable=True)

    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    for how in (lambda: seeds(1)[0], lambda: seeds(1, 2), lambda: tuple(seeds(3, 4))):
        given = how()
        theirs = stock(
            [1, 2], 1.0, generator=list(given) if isinstance(given, tuple) else given, num_inference_steps=2, output_type="np"
        ).images
        mine = ours([1, 2], generator=how(), num_inference_steps=2, output_type="np").images
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_pipeline_is_made_again_of_its_parts(pipe):
    """As diffusers says: type(pipe)(**pipe.components), and from_pipe; names and padding go along."""
    again = [type(pipe)(**pipe.components), CondotPipeline.from_pipe(pipe), type(pipe).from_pipe(pipe, id2label={0: "a", 1: "b", 2: "c"})]
    for one, name in zip(again, ("high", "high", "c"), strict=True):
        one.set_progress_bar_config(disable=True)
        assert torch.equal(drawn(one, [name]), drawn(pipe, [2])) and one.transformer is pipe.transformer
        with pytest.raises(ValueError, match="has classes 0 to 2"):
            one([3])
    with pytest.raises(ValueError, match="give the network that draws"):
        CondotPipeline(pipe.scheduler)
    assert pipe_of(padding="attend").components["padding"] == "attend"


def test_classes_that_nobody_named_are_as_many_as_the_network_knows():
    network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_embeds_ada_norm=7, sample_size=8)
    found = CondotPipeline(FlowMatchEulerDiscreteScheduler(), transformer=network)
    assert sorted(found.names) == list(range(7))
    assert DiffusionPipeline._get_signature_keys(CondotPipeline)[0] == ["scheduler"], "all else may be left out"


def test_callbacks_of_any_kind(pipe):
    """None may come back, and nothing may be asked for; an object says what it wants; what comes back is gone on with."""
    seen = []

    def told(pipe, number, timestep, tensors):
        seen.append(sorted(tensors))

    plain = drawn(pipe, [1])
    assert torch.equal(drawn(pipe, [1], callback_on_step_end=told), plain) and seen == [["latents"]] * 20
    assert torch.equal(drawn(pipe, [1], callback_on_step_end=told, callback_on_step_end_tensor_inputs=[]), plain) and seen[20:] == [[]] * 20

    class Zero:
        tensor_inputs = ["latents"]

        def __call__(self, pipe, number, timestep, tensors):
            return {"latents": 0 * tensors["latents"]}

    assert drawn(pipe, [1], callback_on_step_end=Zero()) == 0


G = torch.Generator
WRONG = {
    "too few generators": ({"class_labels": [0, 1, 2], "generator": [G(), G()]}, "2 generators of 3 images"),
    "too many generators": ({"class_labels": [0], "generator": [G(), G()]}, "2 generators of 1 images"),
    "one in a list": ({"class_labels": [0, 1], "generator": [G()]}, "1 generators of 2 images"),
    "a seed": ({"class_labels": [0], "generator": 5}, "generator=5"),
    "no images": ({"class_labels": [0], "num_images_per_prompt": 0}, "num_images_per_prompt=0: give a whole number, at least 1"),
    "half an image": ({"class_labels": [0], "num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5"),
    "half a label": ({"class_labels": [1.7]}, "class_labels=1.7"),
    "half labels": ({"class_labels": np.array([0.0, 1.0])}, "class_labels=0.0"),
    "no label": ({"class_labels": [None]}, "class_labels=None"),
    "true": ({"class_labels": [True]}, "class_labels=True"),
    "negative": ({"class_labels": [-1]}, "class_labels=-1"),
    "no labels": ({"class_labels": []}, "is empty"),
    "height 0": ({"class_labels": [0], "height": 0}, "height=0: give a whole number, at least 1"),
    "height -4": ({"class_labels": [0], "height": -4}, "height=-4"),
    "width 4.0": ({"class_labels": [0], "width": 4.0}, "width=4.0"),
    "steps": ({"class_labels": [0], "num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    "no steps": ({"class_labels": [0], "num_inference_steps": None}, "num_inference_steps=None"),
    "no scale": ({"class_labels": [0], "guidance_scale": None}, "guidance_scale=None"),
    "scale": ({"class_labels": [0], "guidance_scale": "3"}, "give numbers"),
    "infinite": ({"class_labels": [0], "guidance_scale": float("inf")}, "a finite number"),
    "interval": ({"class_labels": [0], "guidance_interval": None}, "guidance_interval=None"),
    "interval of one": ({"class_labels": [0], "guidance_interval": (0.5,)}, "two for the interval"),
    "rescale": ({"class_labels": [0], "guidance_rescale": 2.0}, "from 0"),
    "output": ({"class_labels": [0], "output_type": "jpg"}, "output_type='jpg' is unknown: choose one of pil, np, pt, latent"),
    "latents": ({"class_labels": [0], "latents": torch.zeros(1, 1, 4, 3)}, "latents of shape (1, 1, 4, 3)"),
    "latents of numpy": ({"class_labels": [0], "latents": np.zeros((1, 1, 4, 4))}, "latents of shape"),
    "whole latents": ({"class_labels": [0], "latents": torch.zeros(1, 1, 4, 4, dtype=torch.int64)}, "torch.int64"),
    "callback": ({"class_labels": [0], "callback_on_step_end": 3}, "callback_on_step_end=3"),
    "original": ({"class_labels": [0], "original_size": 64}, "original_size=64"),
    "crop": ({"class_labels": [0], "crop": (-1, 0)}, "crop=-1"),
    "guidance": ({"class_labels": [0], "guidance": "cfg++"}, "choose one of cfg, apg, cfg_zero_star"),
    "apg of cfg": ({"class_labels": [0], "guidance_scale": 3, "apg_eta": 0.5}, "give guidance='apg'"),
    "apg alone": ({"class_labels": [0], "guidance": "apg"}, "guidance_scale=1, which is none"),
    "momentum": ({"class_labels": [0], "guidance_scale": 3, "guidance": "apg", "apg_momentum": 1.0}, "between -1 and 1"),
    "zero of cfg": ({"class_labels": [0], "guidance_scale": 3, "zero_init_steps": 1}, "give guidance='cfg_zero_star'"),
    "all zero": ({"class_labels": [0], "guidance_scale": 3, "guidance": "cfg_zero_star", "zero_init_steps": 25}, "fewer than all"),
    "solver": ({"class_labels": [0], "solver": "dopri"}, "choose one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_drawn_is_said_before_any_work(pipe, case, monkeypatch):
    monkeypatch.setattr(CondotPipeline, "predict", None)
    given, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        pipe(**given)
    assert message in str(error.value) and "\n" not in str(error.value)
