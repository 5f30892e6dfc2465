"""Which pipeline class an export gets: a stock one exactly where it shows and decodes what was trained, and the call that does so."""

import frozen
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma
from stocks import PIXART, PLAIN, SD3, shake

from condot.data.encoders.text import TextEncoder
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.export.autoencoder import fold_latent_scaling
from condot.pipeline.export.load import flow_model_from_pipeline
from condot.pipeline.export.pipeline_class import choose_pipeline
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.latent_space import LatentSpace

CLIPS = ("clip_projected", "clip_projected")
CAPTIONS = ("", "big blue circle on the small green square and a red circle")
TEXT = {
    "pixart": (PixArtTransformer2DModel, {**PIXART, "caption_channels": 16, "sample_size": 16}),
    "sd3": (SD3Transformer2DModel, {**SD3, "joint_attention_dim": 32, "pooled_projection_dim": 24}),
}
BARE = {
    "unet": (UNet2DModel, PLAIN),
    "unet, classes": (UNet2DModel, {**PLAIN, "num_class_embeds": 1001}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoders, the T5 as wide as two of the CLIPs or as one; autoencoders."""
    folder = tmp_path_factory.mktemp("parts")
    kinds = {"clip": 16, "clip_projected": 16, "bert": 16, "t5": 16, "wide t5": 32}
    for seed, (kind, width) in enumerate(kinds.items()):
        frozen.text(folder / kind, kind.split()[-1], seed=seed, width=width)
    frozen.kl(folder / "kl")
    frozen.tiny(folder / "tiny")
    return folder


def network(kind, latents=False, side=0):
    torch.manual_seed(0)
    made, config = {**TEXT, **BARE}[kind]
    channels = {"in_channels": 4, "out_channels": 4} if latents else {}
    return shake(made(**{**config, **channels, **({"sample_size": side} if side else {})}))


def space_of(side, vae=""):
    made = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}.get(vae)
    if not made:
        return LatentSpace.from_pixels(3, side)
    how = {"factor": 4, "image_channels": 3, "scale": (0.7,), "autoencoder": "x", "fingerprint": {"class": made}}
    return LatentSpace(channels=4, height=side, width=side, **how)


def autoencoder(folders, kind):
    """As `autoencoder.fold_latent_scaling` gives it, with a scale of its own."""
    if not kind:
        return None
    found = {"kl": AutoencoderKL, "tiny": AutoencoderTiny}[kind].from_pretrained(folders / kind)
    return fold_latent_scaling(found.eval(), space_of(8, kind))


def spoken(folders, kinds, padding, tokens):
    found = [
        TextEncoder(str(folders / kind), max_tokens=min(count, 32), padding=padding) for kind, count in zip(kinds, tokens, strict=False)
    ]
    for one, count in zip(found, tokens, strict=False):
        one.max_tokens = count  # also more than these small ones read
    return found


def chosen(folders, kind, encoders=(), padding="mask", vae="", side=0, class_names=(), tokens=(7, 7, 7), **flow):
    model = network(kind, bool(vae), side)
    space, parts = space_of(model.config.sample_size, vae), spoken(folders, encoders, padding, tokens)
    return choose_pipeline(model, "", FlowConfig(**flow), space, class_names, autoencoder(folders, vae), parts)


SIGMA, THIRD, OURS = "PixArtSigmaPipeline", "StableDiffusion3Pipeline", "CondotPipeline"
WIDE = {"encoders": (*CLIPS, "wide t5"), "padding": "attend"}
CASES = {
    "t5": ("pixart", {"encoders": ("t5",)}, SIGMA, ""),
    "bert": ("pixart", {"encoders": ("bert",)}, SIGMA, ""),
    "clip: its last states are not what counts": ("pixart", {"encoders": ("clip",)}, OURS, "last states of one encoder"),
    "two": ("pixart", {"encoders": ("t5", "bert")}, OURS, "last states of one encoder"),
    "padding attended to": ("pixart", {"encoders": ("t5",), "padding": "attend"}, OURS, "padding masked"),
    "latents": ("pixart", {"encoders": ("t5",), "vae": "kl"}, SIGMA, ""),
    "another autoencoder": ("pixart", {"encoders": ("t5",), "vae": "tiny"}, OURS, "decode with an AutoencoderKL"),
    "a side of 12 pixels": ("pixart", {"encoders": ("t5",), "side": 12}, OURS, "multiples of 8 pixels"),
    "latents of a side of 12": ("pixart", {"encoders": ("t5",), "side": 12, "vae": "kl"}, SIGMA, ""),
    "another path": ("pixart", {"encoders": ("t5",), "path": "ve", "predict": "noise"}, SIGMA, "followed by no stock scheduler"),
    "three": ("sd3", WIDE, THIRD, ""),
    "three, latents": ("sd3", {**WIDE, "vae": "kl"}, THIRD, ""),
    "three, another autoencoder": ("sd3", {**WIDE, "vae": "tiny"}, OURS, "decode with an AutoencoderKL"),
    "three, masked": ("sd3", {**WIDE, "padding": "mask"}, OURS, "padding attended to"),
    "three, narrow": ("sd3", {**WIDE, "encoders": (*CLIPS, "t5")}, OURS, "CLIPs wider than the T5"),
    "three, one without projection": ("sd3", {**WIDE, "encoders": ("clip_projected", "clip", "wide t5")}, OURS, "two projected CLIPs"),
    "three, in another order": ("sd3", {**WIDE, "encoders": ("wide t5", *CLIPS)}, OURS, "two projected CLIPs and a T5"),
    "three, 513 tokens": ("sd3", {**WIDE, "tokens": (7, 7, 513)}, OURS, "512 tokens"),
    "three, 512 tokens": ("sd3", {**WIDE, "tokens": (7, 7, 512)}, THIRD, ""),
    "three, noise": ("sd3", {**WIDE, "predict": "noise"}, OURS, "velocities on the straight path"),
    "three, cosine": ("sd3", {**WIDE, "path": "cosine"}, OURS, "velocities on the straight path"),
    "no classes": ("unet", {}, "DDPMPipeline", ""),
    "no classes, latents": ("unet", {"vae": "kl"}, "DiTPipeline", ""),
    "no classes, another path": ("unet", {"path": "ve", "predict": "noise"}, "DiTPipeline", "followed by no stock scheduler"),
    "classes": ("unet, classes", {"class_names": ("a", "b")}, "DiTPipeline", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_stock_class_is_chosen_where_its_source_does_the_same(folders, case):
    """By reading diffusers' `encode_prompt` and `__call__`; what is of stock classes in all its parts needs no trust."""
    kind, how, wanted, why = CASES[case]
    found = chosen(folders, kind, **how)
    assert (
        type(found.pipeline).__name__ == wanted
        and why in found.why_not_stock
        and found.needs_remote_code == bool(why) == bool(found.why_not_stock)
    )


@pytest.mark.parametrize(("vae", "predict", "clipped"), [("", "noise", True), ("kl", "noise", False), ("", "v", False)])
def test_noise_in_pixels_alone_is_drawn_under_a_scheduler_that_clips(folders, vae, predict, clipped):
    """Latents have no range; DDIM and its kin, which clip unless told not to, are told when they are made from it."""
    scheduler = chosen(folders, "unet", vae=vae, path="ddpm", predict=predict).pipeline.scheduler
    assert bool(scheduler.config.get("thresholding")) == clipped
    assert DDIMScheduler.from_config(scheduler.config).config.clip_sample == clipped


DRAWN = {
    "pixart": ("pixart", {"encoders": ("t5",)}),
    "sd3": ("sd3", {**WIDE, "tokens": (7, 7, 9)}),
    "unet": ("unet", {}),
    "classes": ("unet, classes", {"class_names": ("a", "b")}),
}


@pytest.mark.parametrize("vae", ["", "kl"])
@pytest.mark.parametrize("case", DRAWN)
def test_the_call_on_the_card_draws_what_our_own_pipeline_draws(folders, case, vae, monkeypatch):
    """A caption longer than was trained is cut where it was, also where bs4 and ftfy could clean it; no size is added; decoded alike."""
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(pipeline_pixart_sigma, name, lambda: True)
    monkeypatch.setattr(PixArtSigmaPipeline, "_clean_caption", lambda self, text: "red")
    (kind, how), names = DRAWN[case], DRAWN[case][1].get("class_names", ())
    found, model = chosen(folders, kind, vae=vae, **how), network(kind, bool(vae))
    text = {name: part for name, part in found.pipeline.components.items() if name.startswith(("tokenizer", "text_encoder"))}
    place, scheduler = "transformer" if text else "unet", type(found.pipeline.scheduler).from_config(found.pipeline.scheduler.config)
    more = {"padding": how.get("padding", ""), "id2label": dict(enumerate(names)) or None, "vae": autoencoder(folders, vae)}
    drawn = []
    for pipe, call in zip(
        (found.pipeline, CondotPipeline(scheduler, **{place: model}, **text, **more)),
        found.example_calls(names, CAPTIONS, 2.0 if names or text else 1.0),
        strict=True,
    ):
        pipe.set_progress_bar_config(disable=True)
        asked, wanted = eval(f"dict({call})"), {"class_labels": [0]} if names else {"prompt": CAPTIONS[1]} if text else {}
        assert wanted.items() <= asked.items()
        quick = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
        drawn.append(torch.tensor(pipe(**{**asked, **quick}).images))
    side = model.config.sample_size * (4 if vae else 1)
    assert drawn[0].shape == drawn[1].shape == (1, side, side, 3)
    assert ((drawn[0] > 0) & (drawn[0] < 1)).double().mean() > 0.2, "not all is black or white"
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=0)


def test_a_field_takes_its_text_as_any_tuple(folders):
    """As `flow.condition` has it: by place, not by name."""
    pipe = chosen(folders, "pixart", ("clip",)).pipeline
    source, x, t = flow_model_from_pipeline(pipe), torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7])
    told = pipe.encode_prompt(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(source.field(x, t, tuple(told)), source.field(x, t, told))
