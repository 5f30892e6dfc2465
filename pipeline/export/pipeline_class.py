"""Which pipeline class holds an exported model: a stock one wherever that draws exactly what was trained, else our own.

Our own travels with every folder, for its solvers; here is chosen what loads by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DiTPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)

from ..config.flow import FlowConfig
from ..latent_space import LatentSpace
from .identity_autoencoder import MAX_IDENTITY_CHANNELS, identity_autoencoder
from .runtime.pipeline_condot_v1 import NO_CLASS
from .runtime.pipeline_condot_v2 import CondotPipeline
from .scheduler_map import build_scheduler, export_form

PROJECTED_CLIP = "clip_text_model with projection"
"""What `data.text_encoders` calls a CLIP of this kind."""
PIXART_SIDE_MULTIPLE = 8
"""PixArtSigmaPipeline refuses other sides than multiples of so many pixels, in pixels too."""
SD3_MAX_TOKENS = 512
"""StableDiffusion3Pipeline refuses a larger `max_sequence_length`."""


NO_EXACT_IDENTITY = f", and there is no exact one of pixels with more than {MAX_IDENTITY_CHANNELS} channels"
"""Why a model of many bands takes our own pipeline, which needs none."""


ONLY_SQUARES = "data.aspect_ratios: stock pipelines on classes draw squares alone"
"""Why a model of several shapes takes our own pipeline."""


class ExportedTextEncoder(Protocol):
    """A frozen text encoder: see data.text_encoders.TextEncoder."""

    tokenizer: Any
    model: Any
    max_tokens: int

    @property
    def kind(self) -> str: ...
    @property
    def facts(self) -> Any: ...


class PipelineChoice(NamedTuple):
    """A pipeline, put together, and why this class."""

    pipeline: Any
    why_not_stock: str
    needs_remote_code: bool
    """Whether it loads with code of ours only."""

    @property
    def reason(self) -> str:
        """What was chosen, in words."""
        return (
            f"with code of its own (trust_remote_code=True): {self.why_not_stock}"
            if self.needs_remote_code
            else "which stock diffusers holds exactly"
        )

    @property
    def schedulers(self) -> str:
        """Say which schedulers may take the place of the exported one, for the card."""
        ours = "is tried on a normal law that is known in closed form, before any image, and refused where it cannot be right"
        if isinstance(self.pipeline, CondotPipeline):
            return f"Any scheduler may take this one's place, by `from_config(pipe.scheduler.config)`: it {ours}."
        kind, config = type(self.pipeline).__name__, self.pipeline.scheduler.config
        right = ["DPMSolverMultistep", "DPMSolverSinglestep"]
        if not isinstance(self.pipeline, DDPMPipeline):  # which hands a generator to schedulers that take none
            right += ["DEISMultistep"] if config.get("use_flow_sigmas") else ["DEISMultistep", "UniPCMultistep"]
        right = ["the scheduler in this repository"] if "path" in config else right if config.use_flow_sigmas else [*right, "DDIM", "DDPM"]
        scaling = " Euler, Heun, LMS, KDPM2 and EDM schedulers scale what the network sees, and this pipeline steps on that: wrong images,"
        wrong = f"{scaling} without an error." if isinstance(self.pipeline, (DiTPipeline, DDPMPipeline)) else ""
        return (
            f"`{kind}` is right with {', '.join(right)}, by `from_config(pipe.scheduler.config)`.{wrong} In `CondotPipeline` each {ours}."
        )

    def example_calls(self, class_names: Sequence[str], captions: Sequence[str], guidance: float, bands: bool = False) -> tuple[str, str]:
        """Arguments that draw an image: of this pipeline, and of our own; `bands`: as numbers, since no PIL image holds it."""
        theirs, ours = self._calls(class_names, captions, guidance)
        return (f'{theirs}, output_type="np"', f'{ours}, output_type="np"') if bands else (theirs, ours)

    def _calls(self, class_names: Sequence[str], captions: Sequence[str], guidance: float) -> tuple[str, str]:
        common = f"guidance_scale={guidance:g}, num_inference_steps=25"
        if isinstance(self.pipeline, DDPMPipeline):
            return "num_inference_steps=25", "num_inference_steps=25"
        if getattr(self.pipeline, "text_encoder", None) is None:
            return (f"class_labels=[{0 if class_names else NO_CLASS}], {common}",) * 2
        ours = f"prompt={next(filter(None, captions), 'a picture')!r}, {common}"
        if isinstance(self.pipeline, PixArtSigmaPipeline):
            limit = self.pipeline.tokenizer.model_max_length  # its own is 300, more than some encoders read; it cleans where it can
            return f"{ours}, use_resolution_binning=False, clean_caption=False, max_sequence_length={limit}", ours
        if isinstance(self.pipeline, StableDiffusion3Pipeline):
            return f"{ours}, max_sequence_length={self.pipeline.tokenizer_3.model_max_length}", ours
        return ours, ours


def check_joint_export(space: LatentSpace, conditioning: str, why_not_stock: str) -> None:
    """Raises ValueError for a network of velocity and score that no pipeline here draws with: those of classes leave the second half out.

    Args:
        space: what the network works on.
        takes: class or text.
        why_not_stock: no stock class holds it; "" if one does.
    """
    if why_not_stock or conditioning == "text" or (not space.is_latent and space.channels > MAX_IDENTITY_CHANNELS):
        raise ValueError(
            f"flow.objective=joint is exported of networks on classes that a stock class holds and DiTPipeline draws with, and here: "
            f"{why_not_stock or 'text, or too many channels'}. Give --export=false and sample with `sample.py --run`."
        )


def choose_pipeline(
    network: Any,
    why_not_stock: str,
    flow: FlowConfig,
    space: LatentSpace,
    class_names: Sequence[str],
    vae: Any,
    text_encoders: Sequence[ExportedTextEncoder],
    bucket_step: int = 0,
) -> PipelineChoice:
    """Put a pipeline together.

    Args:
        network: as `models.convert.to_diffusers` gives it.
        why_not_stock: it is not of a stock class; "" if it is.
        flow: of the recipe.
        space: what the network works on.
        class_names: of a network on classes.
        vae: as `autoencoder.fold_latent_scaling` gives it; None for pixels.
        text_encoders: the text encoders of a network on text.
        bucket_step: pixels of which the sides of all images are multiples, of a network that was trained on several shapes; 0 of squares.
    """
    form, scheduler = export_form(flow), build_scheduler(flow, pixels=vae is None)
    own = bool(why_not_stock) or not form.stock
    if not why_not_stock and not form.stock:
        why_not_stock = f"{flow.predict} on the path {flow.path} is followed by no stock scheduler"
    too_wide = vae is None and space.channels > MAX_IDENTITY_CHANNELS
    kl = not too_wide and (vae is None or isinstance(vae, AutoencoderKL))
    decoder = vae if vae is not None or too_wide else identity_autoencoder(space.channels, space.height)
    place = "unet" if hasattr(network, "conv_in") else "transformer"
    if text_encoders:
        parts = _text_parts(text_encoders)
        stock = next((one for cls, one in TEXT_PIPELINES.items() if isinstance(network, cls)), None)
        reason = f"no stock pipeline draws with a {type(network).__name__} and these text encoders"
        if stock:
            reason = stock.unfit(text_encoders, flow, space, bucket_step)
        if stock and kl and not reason:
            if stock.needs_shift:
                decoder.register_to_config(shift_factor=decoder.config.get("shift_factor") or 0.0)
            return PipelineChoice(stock.cls(transformer=network, vae=decoder, scheduler=scheduler, **parts), why_not_stock, own)
        padding = text_encoders[0].facts.padding
        pipeline = CondotPipeline(scheduler, vae=vae, padding=padding, **{place: network}, **parts)
        return PipelineChoice(
            pipeline,
            why_not_stock or reason or f"stock text pipelines decode with an AutoencoderKL{NO_EXACT_IDENTITY if too_wide else ''}",
            True,
        )
    names = dict(enumerate(class_names))
    if bucket_step or too_wide or getattr(network.config, "micro_conditions", False):
        reason = ONLY_SQUARES if bucket_step else f"DiTPipeline decodes with an AutoencoderKL{NO_EXACT_IDENTITY}"
        return PipelineChoice(CondotPipeline(scheduler, vae=vae, id2label=names, **{place: network}), why_not_stock or reason, True)
    if isinstance(network, UNet2DModel) and network.class_embedding is None and vae is None and form.stock and flow.objective != "joint":
        return PipelineChoice(DDPMPipeline(unet=network, scheduler=scheduler), why_not_stock, False)
    return PipelineChoice(DiTPipeline(transformer=with_class_embedding(network), vae=decoder, scheduler=scheduler), why_not_stock, own)


def _text_parts(text_encoders: Sequence[ExportedTextEncoder]) -> dict[str, Any]:
    """Tokenizers, which remember where captions were cut, and encoders, by the names of their places."""
    found = {}
    for end, one in zip(("", "_2", "_3"), text_encoders, strict=False):
        one.tokenizer.model_max_length = one.max_tokens
        found[f"tokenizer{end}"], found[f"text_encoder{end}"] = one.tokenizer, one.model
    return found


def _unfit_pixart(encoders: Sequence[ExportedTextEncoder], flow: FlowConfig, space: LatentSpace, bucket_step: int) -> str:
    if len(encoders) > 1 or encoders[0].kind == "clip" or encoders[0].facts.padding != "mask":
        return "PixArtSigmaPipeline shows the last states of one encoder, padding masked"
    if space.height * space.factor % PIXART_SIDE_MULTIPLE or bucket_step % PIXART_SIDE_MULTIPLE:
        return f"PixArtSigmaPipeline draws multiples of {PIXART_SIDE_MULTIPLE} pixels"
    return ""


def _unfit_sd3(encoders: Sequence[ExportedTextEncoder], flow: FlowConfig, space: LatentSpace, bucket_step: int) -> str:
    kinds = [str(one.facts.fingerprint["class"]) for one in encoders]
    if kinds != [*[PROJECTED_CLIP] * 2, "t5"] or encoders[0].facts.padding != "attend":
        return "StableDiffusion3Pipeline shows two projected CLIPs and a T5, padding attended to"
    if encoders[2].facts.width < encoders[0].facts.width + encoders[1].facts.width:
        return "StableDiffusion3Pipeline cuts what CLIPs wider than the T5 say"
    if encoders[2].max_tokens > SD3_MAX_TOKENS:
        return f"StableDiffusion3Pipeline shows {SD3_MAX_TOKENS} tokens of the T5 at most"
    if flow.path != "condot" or flow.predict != "velocity":
        return "StableDiffusion3Pipeline follows velocities on the straight path"
    return ""


class TextPipeline(NamedTuple):
    """A stock pipeline on text."""

    cls: type[Any]
    unfit: Callable[[Sequence[ExportedTextEncoder], FlowConfig, LatentSpace, int], str]
    """Why it would not show its network the same text, given `bucket_step`; "" if it would."""
    needs_shift: bool = False
    """It adds the autoencoder's `shift_factor`, which therefore is a number."""


TEXT_PIPELINES: dict[type[Any], TextPipeline] = {
    PixArtTransformer2DModel: TextPipeline(PixArtSigmaPipeline, _unfit_pixart),
    SD3Transformer2DModel: TextPipeline(StableDiffusion3Pipeline, _unfit_sd3, needs_shift=True),
}
"""By the stock network that it draws with; other networks on text take our own pipeline."""


def with_class_embedding(network: Any) -> Any:
    """The network, with a place for the class that DiTPipeline always passes: a U-Net without classes gets a table of zeros."""
    if not isinstance(network, UNet2DModel) or network.class_embedding is not None:
        return network
    facts = {key: value for key, value in network.config.items() if not key.startswith("_")}  # `_use_default_values` would undo the table
    wider = UNet2DModel(**{**facts, "num_class_embeds": NO_CLASS + 1})
    table = torch.zeros_like(wider.class_embedding.weight)
    wider.load_state_dict({**network.state_dict(), "class_embedding.weight": table})
    return wider.eval()
