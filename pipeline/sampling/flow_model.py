"""What images are drawn from: a field, and what it takes to start from noise and end in images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.flow import FlowConfig
from ..config.objective import build_predictor, build_prior
from ..flow import Condition, Path, Prediction, Prior, is_singular, map_condition, velocity_field
from ..flow.field import ConditionalField

MAX_DECODER_DIFFERENCE = 0.05
"""Of one latent, two decoders of one autoencoder may give images so far apart, of -1..1: rounding, in half precision too."""


class ClassifierGuide(NamedTuple):
    """A classifier that leads a model to labels; see classifier_guidance.py."""

    log_likelihood_of: Callable[[Condition], Callable[[Tensor, Tensor], Tensor]]
    """Of labels, (B,): log p(y | x_t) of (x, t), (B,)."""
    unconditional: bool
    """Whether the model itself takes no class."""
    digest: str = ""
    """Of what it has learned from."""


@dataclass(frozen=True)
class FlowModel:
    """A conditional velocity field and what it takes to start from noise and end in images."""

    field: ConditionalField
    """(x, t, condition) -> velocity, (B, *S)."""
    path: Path
    shape: tuple[int, ...]
    """Of one sample, (C, H, W)."""
    num_classes: int
    null: int | Condition
    """What stands for none: a label, or a text's condition of one sample."""
    device: torch.device
    decode: Callable[[Tensor], Tensor]
    """From the end of the path to images in -1..1, (B, C, H, W)."""
    predict: Prediction = "velocity"
    """What the network gives, which says where on the path the field is singular."""
    prior: Prior | None = None
    """Where the path starts, unless at N(0, I); then there is no score, and no SDE."""
    pixels: tuple[int, ...] = ()
    """Of an image, (C, H, W), where samples are latents of it; empty where samples are images."""
    encode_text: Callable[[Sequence[str]], Condition] | None = None
    """From captions to conditions, of a model that takes text."""
    weak: ConditionalField | None = None
    """A worse field of the same data, by which this one is guided instead of by its own without a condition; see flow/guidance.py."""
    bit_depth: int = 8
    """Of the images that it was trained on, and so of those that are written of it, a file each."""
    side_multiple: int = 1
    """Pixels of which an image's sides are multiples."""
    one_size: bool = False
    """Whether the model knows the positions of the usual image alone."""
    max_side: int = 0
    """Pixels a side up to which it knows positions; 0 for any."""
    classifier: ClassifierGuide | None = None
    """Leads it to its labels, beside whatever guides it."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of an image, (C, H, W)."""
        return self.pixels or self.shape

    def with_image_size(self, height: int, width: int) -> FlowModel:
        """Return the model of images of another size, pixels; 0 for the usual height or width.

        Raises:
            ValueError: sides that the network does not divide, or whose positions it does not know.
        """
        _, *usual = self.image_shape
        sides = [height or usual[0], width or usual[1]]
        if sides == usual:
            return self
        said, factor = f"--height {sides[0]} --width {sides[1]}", usual[0] // self.shape[1]
        if min(sides) < 1 or any(side % self.side_multiple for side in sides):
            raise ValueError(f"{said}: give positive multiples of {self.side_multiple} pixels; the usual image is {usual[0]} x {usual[1]}.")
        if self.one_size:
            raise ValueError(
                f"{said}: the model knows positions of {usual[0]} x {usual[1]} pixels alone. Leave the sizes out, or train with "
                f"data.aspect_ratios."
            )
        if self.max_side and max(sides) > self.max_side:
            raise ValueError(f"{said}: the model's positions go up to {self.max_side} pixels a side.")
        pixels = (self.pixels[0], *sides) if self.pixels else ()
        return replace(self, shape=(self.shape[0], *(side // factor for side in sides)), pixels=pixels)


def build_flow_model(
    network: nn.Module,
    flow: FlowConfig,
    shape: tuple[int, ...],
    num_classes: int,
    decode: Callable[[Tensor], Tensor],
    pixels: tuple[int, ...] = (),
    encode_text: Callable[[Sequence[str]], Condition] | None = None,
    null: Condition | None = None,
    bit_depth: int = 8,
    one_size: bool = False,
) -> FlowModel:
    """A network of ours as a model; its null is the class `num_classes`, or the text "" where it reads, unless one is given.

    A network that is told sizes is told those of whole images.
    """
    path = flow.build_path()
    field = velocity_field(build_predictor(network, flow), path, flow.predict)
    factor = pixels[1] // shape[1] if pixels else 1
    grid, side_multiple = getattr(getattr(network, "positions", None), "grid", 0), factor * int(getattr(network, "size_multiple", 1))

    def with_sizes(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size = [factor * side for side in x.shape[2:]]
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=x.device).expand(len(x), -1)
        velocity: Tensor = field(x, t, condition, sizes)
        return velocity

    return FlowModel(
        field=with_sizes if getattr(network, "micro_conditions", False) else field,
        path=path,
        shape=shape,
        num_classes=num_classes,
        null=(encode_text([""]) if encode_text else num_classes) if null is None else null,
        encode_text=encode_text,
        device=next(network.parameters()).device,
        decode=decode,
        predict=flow.predict,
        prior=build_prior(flow),
        pixels=pixels,
        bit_depth=bit_depth,
        side_multiple=side_multiple,
        one_size=one_size,
        max_side=grid * side_multiple,
    )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises ValueError for a class that the model does not have."""
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        known = f"has classes 0 to {num_classes - 1}" if num_classes else "has no classes"
        raise ValueError(f"class label {int(bad[0])} is out of range: the model {known}.")


def require_pixel_model(model: FlowModel, why: str, text: bool = False) -> None:
    """Raises ValueError for a model of latents, or, unless `text`, of text."""
    if model.encode_text and not text:
        raise ValueError(f"the model takes text, and {why} of a class or of none: sample it with --prompt, or use retrieve.")
    if model.pixels:
        raise ValueError(f"the model works in latents of {model.shape}, and {why}: give a model that was trained without data.autoencoder.")


def with_autoguidance(model: FlowModel, weak: FlowModel) -> FlowModel:
    """The model, guided by a weaker model of the same data (autoguidance).

    Raises:
        ValueError: a model of other samples, on another path or from another
            start, of other classes, text encoders or autoencoder, or whose
            velocity is not finite where this one's is.
    """
    for what, mine, its in (
        ("samples of shape", model.shape, weak.shape),
        ("images of shape", model.pixels, weak.pixels),
        ("the start", model.prior or "normal", weak.prior or "normal"),
        ("the number of classes", model.num_classes, weak.num_classes),
        ("text as a condition", model.encode_text is not None, weak.encode_text is not None),
    ):
        if mine != its:
            raise ValueError(f"the guide has {what} {its}, the model {mine}: a guide is a weaker model of the same data.")
    for t in (0.0, 1.0):
        if is_singular(weak.path, weak.predict, t) and not is_singular(model.path, model.predict, t):
            raise ValueError(
                f"the guide predicts {weak.predict}, the model {model.predict}, and at t={t:g} only the model has a finite velocity: "
                f"give a guide of the same flow.predict."
            )
    times = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    if not all(torch.allclose(mine, its, rtol=1e-4) for mine, its in zip(model.path(times), weak.path(times), strict=True)):
        raise ValueError("the guide follows another path than the model: it must be trained with the same flow.path.")
    if model.encode_text and not _equal(model.null, weak.null):
        raise ValueError("the guide reads with other text encoders than the model: it must be trained with the same data.text_encoders.")
    if model.pixels:
        latent = torch.linspace(-1, 1, math.prod(model.shape), device=model.device).reshape(1, *model.shape)
        with torch.no_grad():
            off = (model.decode(latent) - weak.decode(latent)).abs().max().item()
        if off > MAX_DECODER_DIFFERENCE:
            raise ValueError(f"the guide decodes a latent to another image (off by {off:.2g}): it must have the model's data.autoencoder.")

    def field(x: Tensor, t: Tensor, condition: Condition) -> Any:
        if isinstance(condition, Tensor):  # no class is another number to a model in a folder than to one in a run
            condition = torch.where(condition == model.null, weak.null, condition)
        return weak.field(x, t, condition)

    max_side = min(filter(None, (model.max_side, weak.max_side)), default=0)
    return replace(
        model,
        weak=field,
        side_multiple=math.lcm(model.side_multiple, weak.side_multiple),
        one_size=model.one_size or weak.one_size,
        max_side=max_side,
    )


def _equal(a: Condition, b: Condition) -> bool:
    """Whether two conditions are the same, up to rounding."""
    mine, its = _tensors(a), _tensors(b)
    return len(mine) == len(its) and all(x.shape == y.shape and torch.allclose(x, y, atol=1e-3) for x, y in zip(mine, its, strict=True))


def _tensors(condition: Condition) -> list[Tensor]:
    found: list[Tensor] = []
    map_condition(condition, lambda part: found.append(part.float().cpu()) or part)  # type: ignore[func-returns-value]
    return found
