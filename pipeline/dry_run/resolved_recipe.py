"""What a recipe comes to before anything is trained: its data, its network, its processes.

What is mistaken is noted, and a default stands in its place, so that the rest
can still be known. Each property is found out once, when it is first wanted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import model_options
from ..config.schema import Config
from ..latent_space import Space
from ..launch.distributed import check_hardware, check_launcher, check_layout
from ..launch.launcher_env import contradictions, sharding
from ..objectives.training_objective import Draws, Method
from ..tracking.trackers import check as check_trackers
from ..training.resume_rules import facts_of
from . import estimate
from .error_collector import Mistakes, check_begin, check_coupling, check_folder, defaults_of, method_of
from .estimate import Sizes, World

SD: dict[str, Any] = {"channels": 4, "factor": 8, "image_channels": 3, "fingerprint": {"class": "AutoencoderKL"}}
"""Of an autoencoder that cannot be read: Stable Diffusion's."""
TEXT = 768, 768
"""Widths of a token and of the pooled vector, of text encoders that cannot be read."""
MACHINE = 8
"""Ranks of a machine, where no launcher says."""
Step = Callable[[Callable[..., Tensor], nn.Module], Tensor]
"""See models.memory."""


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """What `data/` and `models/` lend; `train.py` introduces them."""

    options: Callable[..., Any]
    bytes_of: Callable[[str, str], int]
    survey: Callable[[Any, bool], Any]
    check_sides: Callable[[Any, int], None]
    share: Callable[..., Any]
    build: Callable[..., nn.Module]
    example: Callable[..., tuple[Any, ...]]
    cost: Callable[..., tuple[int, int]]
    units: Callable[[nn.Module], list[list[tuple[int, ...]]]]
    foretell: Callable[..., Any]
    measured: Callable[..., int]
    at_work: Callable[..., tuple[int, int]]
    add_lora: Callable[..., int]
    load_published: Callable[..., Any]
    checks: tuple[Callable[[Config, Space, Any], None], ...] = ()
    """What else is refused at the start: of a recipe, its space, and the survey of its data."""


@dataclass(frozen=True)
class Encoder:
    """A frozen network that works in every step."""

    title: str
    weights: int
    products: float
    """Multiply-adds an image."""
    bytes: int
    """At most, beside its weights, for a micro-batch."""


@dataclass
class Case:
    """One recipe, looked at.

    Args:
        config: of the run.
        rooms: see there.
        mistakes: found so far.
    """

    config: Config
    rooms: Rooms
    mistakes: Mistakes
    notes: list[str] = field(default_factory=list)
    """What was assumed."""

    @cached_property
    def options(self) -> Any:
        """The section `data`."""
        return self.mistakes.mended(self.rooms.options, vars(self.config.data), "data", defaults_of(type(self.config.data)))[0]

    @cached_property
    def seen(self) -> Any:
        """What it opens: see data.survey."""
        options = self.options or self.rooms.options()
        seen = self.rooms.survey(options, self.config.model.takes == "text")
        for text in seen.mistakes:
            self.mistakes.add(text)
        self.notes += seen.notes
        return seen

    @cached_property
    def space(self) -> Space:
        """What the network works on."""
        options, known = self.seen.options, self.seen.autoencoder
        if not options.autoencoder:
            return Space.of_pixels(options.channels, options.resolution)
        if known:
            space = Space.of_latents(known, options.resolution)
        else:
            self.notes.append(f"data.autoencoder={options.autoencoder!r} is not known: counted with latents as Stable Diffusion's.")
            side = max(1, options.resolution // SD["factor"])
            space = Space(height=side, width=side, autoencoder=options.autoencoder, **SD)
        if self.seen.latents:
            space = space.measured(self.seen.latents.encoding["statistics"])
        return self.mistakes.tried(space.given, options.latent_scale, options.latent_shift) or space

    @cached_property
    def text(self) -> dict[str, int]:
        """What a network on text reads, as `Rooms.example` takes it; empty for others."""
        if self.config.model.takes != "text":
            return {}
        options, widths = self.seen.options, self.seen.widths
        if not widths:
            if not options.text_encoder:
                self.mistakes.tried(model_options, self.config.model, self.space.shape, 0)
            self.notes.append(f"data.text_encoder is not known: counted with {TEXT[0]} channels a token.")
            widths = TEXT
        return {"tokens": self.seen.tokens or sum(options.max_tokens), "text_width": widths[0], "pooled_width": widths[1]}

    @property
    def sharding(self) -> str:
        """none, full or hybrid; where the recipe does not say, as launched."""
        return sharding(self.config)

    @property
    def precision(self) -> str:
        """Of the products; where the recipe does not say, as launched. What would be measured at the start is counted as float32."""
        asked = self.config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
        return "no" if asked == "auto" else asked

    @cached_property
    def world(self) -> World:
        """The processes."""
        ranks = self.config.plan.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        if not self.config.plan.ranks:
            self.notes.append(f"{estimate.count(ranks, 'rank')}, as launched; --plan.ranks=64 reckons with 64.")
        local = min(int(os.environ.get("LOCAL_WORLD_SIZE", MACHINE)), ranks)
        if self.sharding == "hybrid" and ranks % local:
            self.mistakes.add(
                f"train.sharding=hybrid: {ranks} ranks are no whole number of machines of {local}. Use a multiple of it, or full."
            )
        return World.of(self.sharding, ranks, local)

    @cached_property
    def micro_batch(self) -> int:
        """Images of a forward pass; at least one, where they cannot be shared out."""
        train, ranks = self.config.train, self.world.ranks
        share = partial(self.rooms.share, batch_size=train.batch_size, accumulation=train.gradient_accumulation_steps, ranks=ranks)
        known = self.mistakes.tried(share)
        return known.micro_batch if known else max(1, train.batch_size // (ranks * train.gradient_accumulation_steps))

    @cached_property
    def model(self) -> dict[str, Any]:
        """The arguments of a network that can be built; empty where none can."""
        widths = (self.text["text_width"], self.text["pooled_width"]) if self.text else None
        values = model_options(self.config.model, self.space.shape, len(self.seen.class_names), widths, self.config.flow.objective)
        build = partial(self.rooms.build, device="meta")
        network, values = self.mistakes.mended(build, values, "model", defaults_of(type(self.config.model)))
        return values if network is not None else {}

    @cached_property
    def adapted(self) -> bool:
        """Whether low-rank additions are trained, and can be."""
        train = self.config.train
        if not train.lora_rank or not self.model:
            return False
        return self.mistakes.tried(self.rooms.add_lora, self.bare(), train.lora_rank, train.lora_alpha) is not None

    def bare(self, **changes: Any) -> nn.Module:
        """The network on the meta device."""
        return self.rooms.build(**{**self.model, "device": "meta", **changes})

    def network(self, **changes: Any) -> nn.Module:
        """As it is trained: with its adapters; arguments of `Rooms.build` in place of the recipe's."""
        network = self.bare(**changes)
        if self.adapted:
            self.rooms.add_lora(network, self.config.train.lora_rank, self.config.train.lora_alpha)
        return network

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample of the largest batch, (C, H, W), its sides as the network takes them."""
        unit = int(self.bare().multiple)  # type: ignore[arg-type]
        height, width = (max(unit, side // self.space.factor // unit * unit) for side in self.seen.shape)
        return self.space.channels, height, width

    @cached_property
    def method(self) -> Method:
        """The loss."""
        return method_of(self.config, self.space.shape, bool(self.text), self.mistakes)

    @cached_property
    def sizes(self) -> Sizes:
        """Of the network that is trained."""
        network = self.network()
        weights = [(tuple(weight.shape), weight.requires_grad) for weight in network.parameters()]
        kept = sum(value.numel() for value in network.state_dict().values())
        return Sizes([shape for shape, _ in weights], [shape for shape, trained in weights if trained], self.rooms.units(network), kept)

    @cached_property
    def encoders(self) -> list[Encoder]:
        """The frozen networks that work in every step."""
        found = []
        for title, network, call in self.seen.at_work():
            weights = estimate.numbers([tuple(weight.shape) for weight in network.parameters()])
            try:
                most, products = self.rooms.at_work(network, partial(call, images=self.micro_batch))
            except RuntimeError as error:
                self.notes.append(f"the {title} could not be counted ({' '.join(str(error).split())[:200]}).")
                most, products = 0, 0
            found.append(Encoder(title, weights, products / self.micro_batch, most))
        for text in self.seen.mistakes:
            self.mistakes.add(text)
        return found

    def step(self, images: int, shape: tuple[int, ...]) -> Step:
        """The loss of so many samples, (C, H, W), for `Rooms.foretell`; a coupling, which takes no memory to speak of, is left out."""
        method = replace(self.method, flow=replace(self.method.flow, coupling="independent"))

        def step(model: Callable[..., Tensor], network: nn.Module) -> Tensor:
            x, t, *condition = self.rooms.example(network, shape, batch=images, **self.text)
            probe = torch.randn_like(x).sign() if method.flow.objective == "sliced" else None
            return method.losses(model, x, Draws(torch.randn_like(x), t, t, probe), *condition).mean()

        return step

    def begin(self) -> str:
        """What training would look at before its first step; how it would begin."""
        config, rooms = self.config, self.rooms
        if config.train.compile:
            self.notes.append("train.compile is left out of account: compiled blocks keep less for the backward pass.")
        self.check_launch()
        for check in rooms.checks:
            self.mistakes.tried(check, config, self.space, self.seen)
        check_begin(config, self.mistakes)
        check_coupling(self.method, self.micro_batch, self.mistakes)
        if self.model:
            self.mistakes.tried(rooms.check_sides, self.seen.options, self.space.factor * int(self.bare().multiple))  # type: ignore[arg-type]
        if self.model and config.init_from:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing is copied into a network without memory
                self.mistakes.tried(rooms.load_published, config.init_from, self.bare())
        facts = facts_of(config, self.seen.fingerprint)
        return check_folder(config, facts if self.seen.images else {k: v for k, v in facts.items() if k != "data"}, self.mistakes)

    def check_launch(self) -> None:
        """Whether launcher and recipe say the same; what this machine alone would refuse, the cluster's may have, and is only a note."""
        self.mistakes.tried(check_launcher)
        for text in contradictions(self.config, os.environ):
            self.mistakes.add(f"{text}.")
        self.mistakes.tried(check_layout, self.precision, self.sharding)
        here = Mistakes()
        here.tried(check_hardware, self.precision)
        here.tried(check_trackers, self.config.log.report_to)
        self.notes += [f"on this machine training would be refused: {text}" for text in here]
