"""Images of other shapes than the usual: what a model trained on several shapes draws from its run, its export draws too; others refuse."""

import json

import frozen
import numpy as np
import pytest
import torch
from conftest import fit
from diffusers import DiffusionPipeline
from PIL import Image
from stocks import shake

from condot.cli import sample
from condot.data.encoders.text import read_text_encoder
from condot.data.loader.text_conditioner import TextConditioner
from condot.data.prepare.command import main as prepare
from condot.models import registry
from condot.models.convert import custom_classes, has_fixed_size, to_diffusers, unsupported_by_stock
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.export.load import flow_model_from_pipeline
from condot.pipeline.export.pipeline_class import choose_pipeline
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.export.scheduler_map import export_form
from condot.pipeline.flow import ODE_SOLVERS, guide, repeat_condition
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.sampling.flow_model import build_flow_model
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.sampler import Sampler
from condot.pipeline.sampling.solve import initial_point

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 2}
NETWORKS = {
    "dit": {"kind": "dit", **SMALL, "num_classes": 3},
    "dit, rope": {"kind": "dit", **SMALL, "num_classes": 3, "rope": True, "qk_norm": True},
    "dit, learned positions": {"kind": "dit", **SMALL, "num_classes": 3, "positions": "learned"},
    "dit, told sizes": {"kind": "dit", **SMALL, "num_classes": 3, "micro_conditions": True},
    "unet": {"kind": "unet", "block_channels": (32, 32), "layers_per_block": 1, "attention_levels": 1, "head_width": 32, "num_classes": 3},
    "cross_dit": {"kind": "cross_dit", **SMALL},
    "mmdit": {"kind": "mmdit", **SMALL},
    "mmdit, a grid": {"kind": "mmdit", **SMALL, "position_grid": 12},
    "text unet": {
        "kind": "unet",
        "condition": "text",
        "block_channels": (32, 32),
        "layers_per_block": 1,
        "attention_levels": 1,
        "head_width": 32,
    },
}
FLOW, SIDE = FlowConfig(), 16
STOCK = {"cross_dit": "PixArtSigmaPipeline"}


def built(case, folder, bucket_step=8):
    """The source of a network trained on several shapes, the pipeline of its export, and a condition for each."""
    torch.manual_seed(0)
    options = {"channels": 3, "resolution": SIDE, **NETWORKS[case]}
    text = options["kind"] in ("cross_dit", "mmdit") or "condition" in options
    words = TextConditioner([read_text_encoder(str(frozen.text(folder / "encoder", "t5", width=16)), 7, "mask")]) if text else None
    options |= {"text_width": 16, "pooled_width": 16} if text else {}
    network = shake(registry.build(**options)).eval()
    how = (text, bool(bucket_step))
    exported, why = to_diffusers(network, export_form(FLOW).factor, *how), unsupported_by_stock(network, *how)
    space, names = LatentSpace.from_pixels(3, SIDE), () if text else ("a", "b", "c")
    choice = choose_pipeline(exported, why, FLOW, space, names, None, words.networks if words else [], bucket_step)
    choice.pipeline.set_progress_bar_config(disable=True)
    read = words.read if words else None
    one = has_fixed_size(network, bool(bucket_step))
    return build_flow_model(network, FLOW, space.shape, len(names), lambda x: x, encode_text=read, one_size=one), choice


@pytest.mark.parametrize("case", NETWORKS)
def test_a_rectangle_is_the_same_from_run_and_export(case, tmp_path):
    """24 x 8 of a network whose usual image is 16 x 16, guided: the pipeline that loads, and the field that sample.py reads of a folder."""
    source, choice = built(case, tmp_path)
    pipe, text = choice.pipeline, source.encode_text is not None
    assert type(pipe).__name__ == STOCK.get(case, "CondotPipeline") and ("data.aspect_ratios" in choice.why_not_stock) == (
        not text and "dit," not in case
    )
    wide = source.with_image_size(24, 8)
    told = source.encode_text(["a red square", "blue"]) if text else torch.tensor([0, 2])
    null = repeat_condition(source.null, 2) if text else torch.full((2,), source.null)
    noise = initial_point(wide, 0, torch.arange(2), 0.0)
    assert noise.shape == (2, 3, 24, 8)
    pipe.scheduler = CondotPipeline.FlowODEScheduler.from_config(pipe.scheduler.config, solver="heun")
    with torch.no_grad():
        ours = ODE_SOLVERS["heun"](guide(source.field, told, null, 2.0), noise, torch.linspace(0, 1, 5, dtype=torch.float64)).x
    asked = {"prompt": ["a red square", "blue"], "negative_prompt": ""} if text else {"class_labels": [0, 2]}
    if case in STOCK:
        asked |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 7}
    how = {"height": 24, "width": 8, "latents": noise, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent", **asked}
    made = pipe(**how).images
    scale = max(1.0, ours.abs().max().item())
    assert made.shape == (2, 3, 24, 8) and (made - ours).abs().max() < 2e-4 * scale
    parts = {name: part for name, part in pipe.components.items() if name != "vae"}
    read = flow_model_from_pipeline(pipe if isinstance(pipe, CondotPipeline) else CondotPipeline(**parts), FLOW).with_image_size(24, 8)
    assert read.side_multiple == source.side_multiple and read.shape == wide.shape
    again = generate(read, read.encode_text(["a red square", "blue"]) if text else told, Sampler("heun", 4, 2.0), seed=0).images
    first = generate(wide, told, Sampler("heun", 4, 2.0), seed=0).images
    torch.testing.assert_close(again, first, atol=2e-4 * scale, rtol=0)
    square = generate(source, told, Sampler("heun", 4, 2.0), seed=0).images
    assert square.shape == (2, 3, 16, 16)


def test_a_network_of_one_size_refuses_others(tmp_path):
    """A DiT of squares is of the stock class, which would stretch its positions: refused from the run as from the folder."""
    source, choice = built("dit", tmp_path, bucket_step=0)
    assert type(choice.pipeline).__name__ == "DiTPipeline" and not choice.needs_remote_code
    ours = CondotPipeline.from_pipe(choice.pipeline)
    for draw in (
        lambda: source.with_image_size(24, 8),
        lambda: flow_model_from_pipeline(ours, FLOW).with_image_size(24, 8),
        lambda: ours([1], height=24, width=8),
    ):
        with pytest.raises(ValueError, match=r"positions.* of 16 x 16.*data.aspect_ratios"):
            draw()
    assert source.with_image_size(16, 16) is source and source.with_image_size(0, 0) is source


def test_sizes_are_multiples_and_within_the_positions(tmp_path):
    source, choice = built("mmdit, a grid", tmp_path)
    for height, width, said in ((9, 16, "multiples of 2"), (-2, 16, "positive"), (26, 16, "up to 24 pixels"), (16, 1, "multiples of 2")):
        with pytest.raises(ValueError, match=said):
            source.with_image_size(height, width)
        if height > 0:
            with pytest.raises(ValueError, match=said.replace("positive ", "")):
                choice.pipeline(prompt="a", height=height, width=width)
    unet, _ = built("unet", tmp_path / "unet")
    assert unet.side_multiple == 2 and unet.with_image_size(18, 0).shape == (3, 18, 16)


def test_a_side_that_pixart_refuses_takes_our_pipeline(tmp_path):
    assert type(built("cross_dit", tmp_path, bucket_step=4)[1].pipeline).__name__ == "CondotPipeline"


def test_a_run_on_buckets_from_end_to_end(tmp_path, capsys):
    """Trained on three shapes, exported with our class and the reason, drawn by the command from the run and from the folder."""
    (tmp_path / "images").mkdir()
    for i in range(24):
        Image.new("L", ((16, 8), (8, 16), (12, 12))[i % 3], 10 * i).save(tmp_path / "images" / f"{i}.png")
    assert prepare(["imagefolder", str(tmp_path / "images"), "--output", str(tmp_path / "shards")]) == 0
    buckets = ("--data.aspect_ratios", "0.5", "1", "2", "--data.bucket_step=2", "--train.batch_size=8", "--data.horizontal_flip=false")
    assert fit(tmp_path / "shards", tmp_path / "run", *buckets, "--export=true", "--train.max_steps=4") == 0
    assert "a CondotDiT in CondotPipeline, with code of its own" in capsys.readouterr().out
    folder = tmp_path / "run/export"
    assert "data.aspect_ratios" in (folder / "README.md").read_text().partition("Why no stock class does")[2].partition(".\n")[0]
    common = ["--num_images=2", "--num_inference_steps=2", "--height=6", "--width=12", "--seed=3"]
    for where, name in (("--run", tmp_path / "run"), ("--pipeline", folder)):
        assert sample.main([where, str(name), "--output", f"{tmp_path}/drawn{where}/", *common]) == 0
    one, two = (np.asarray(Image.open(tmp_path / f"drawn{where}/000001.png")).astype(int) for where in ("--run", "--pipeline"))
    assert one.shape == (6, 12) and abs(one - two).max() <= 1
    again = ["--run", str(tmp_path / "run"), "--output", f"{tmp_path}/drawn--run/", *common[:2], "--height=12", "--width=6", "--seed=3"]
    assert sample.main(again) != 0, "another shape is another folder's"
    assert sample.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "a.gif"), *common]) == 0
    assert sample.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "a.png"), *common[:2], "--height=7"]) != 0
    assert "multiples of 2 pixels" in capsys.readouterr().err
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert pipe(height=6, width=12, num_inference_steps=2, output_type="np").images.shape == (1, 6, 12, 1)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == ["pipeline_condot_v2", "CondotPipeline"]
    assert set(custom_classes()) >= {"CondotDiT"}
