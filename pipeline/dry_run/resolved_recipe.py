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

from ..config.model import build_model_kwargs
from ..config.objective import RandomInputs, TrainingObjective
from ..config.schema import Config
from ..latent_space import LatentSpace
from ..launch.distributed import check_hardware, check_launcher, check_precision_sharding
from ..launch.launcher_env import find_conflicts, resolve_sharding
from ..tracking.trackers import check_installed as check_trackers
from ..training.resume_rules import run_facts
from . import estimate
from .error_collector import Mistakes, check_coupling, check_folder, check_start_weights, defaults_of, objective_of
from .estimate import NetworkSizes, ParallelDims

SD_AUTOENCODER: dict[str, Any] = {"channels": 4, "factor": 8, "image_channels": 3, "fingerprint": {"class": "AutoencoderKL"}}
"""Of an autoencoder that cannot be read: Stable Diffusion's."""
DEFAULT_TEXT_WIDTHS = 768, 768
"""Widths of a token and of the pooled vector, of text encoders that cannot be read."""
RANKS_PER_MACHINE = 8
"""Ranks of a machine, where no launcher says."""
Step = Callable[[Callable[..., Tensor], nn.Module], Tensor]
"""See models.memory."""


@dataclass(frozen=True, kw_only=True)
class DryRunHooks:
    """What `data/` and `models/` lend; `train.py` introduces them."""

    bytes_of: Callable[[str, str], int]
    survey: Callable[[Any, bool], Any]
    check_sides: Callable[[Any, int], None]
    share: Callable[..., Any]
    build_model: Callable[..., nn.Module]
    example_inputs: Callable[..., tuple[Any, ...]]
    count_params_and_macs: Callable[..., tuple[int, int]]
    fsdp_units: Callable[[nn.Module], list[list[tuple[int, ...]]]]
    estimate_memory: Callable[..., Any]
    measure_memory: Callable[..., int]
    inference_cost: Callable[..., tuple[int, int]]
    add_lora: Callable[..., int]
    init_from_published: Callable[..., Any]
    checks: tuple[Callable[[Config, LatentSpace, Any], None], ...] = ()
    """What else is refused at the start: of a recipe, its space, and the survey of its data."""


@dataclass(frozen=True)
class EncoderCost:
    """A frozen network that works in every step."""

    title: str
    weights: int
    macs: float
    """Multiply-adds an image."""
    bytes: int
    """At most, beside its weights, for a micro-batch."""


@dataclass
class ResolvedRecipe:
    """One recipe, looked at.

    Args:
        config: of the run.
        hooks: see there.
        mistakes: found so far.
    """

    config: Config
    hooks: DryRunHooks
    mistakes: Mistakes
    notes: list[str] = field(default_factory=list)
    """What was assumed."""

    @cached_property
    def survey(self) -> Any:
        """What it opens: see data.survey."""
        survey = self.hooks.survey(self.config.data, self.config.model.conditioning == "text")
        for text in survey.mistakes:
            self.mistakes.add(text)
        self.notes += survey.notes
        return survey

    @cached_property
    def space(self) -> LatentSpace:
        """What the network works on."""
        options, known = self.survey.options, self.survey.autoencoder
        if not options.autoencoder:
            return LatentSpace.from_pixels(options.channels, options.resolution)
        if known:
            space = LatentSpace.from_autoencoder(known, options.resolution)
        else:
            self.notes.append(f"data.autoencoder={options.autoencoder!r} is not known: counted with latents as Stable Diffusion's.")
            side = max(1, options.resolution // SD_AUTOENCODER["factor"])
            space = LatentSpace(height=side, width=side, autoencoder=options.autoencoder, **SD_AUTOENCODER)
        if self.survey.latents:
            space = space.with_statistics(self.survey.latents.encoding["statistics"])
        return self.mistakes.attempt(space.with_overrides, options.latent_scale, options.latent_shift) or space

    @cached_property
    def text(self) -> dict[str, int]:
        """What a network on text reads, as `DryRunHooks.example_inputs` takes it; empty for others."""
        if self.config.model.conditioning != "text":
            return {}
        options, widths = self.survey.options, self.survey.widths
        if not widths:
            if not options.text_encoder:
                self.mistakes.attempt(build_model_kwargs, self.config.model, self.space.shape, 0)
            self.notes.append(f"data.text_encoder is not known: counted with {DEFAULT_TEXT_WIDTHS[0]} channels a token.")
            widths = DEFAULT_TEXT_WIDTHS
        return {"tokens": self.survey.tokens or sum(options.max_tokens), "text_width": widths[0], "pooled_width": widths[1]}

    @property
    def sharding(self) -> str:
        """none, full or hybrid; where the recipe does not say, as launched."""
        return resolve_sharding(self.config)

    @property
    def precision(self) -> str:
        """Return the precision of the products, as launched where the recipe says none; what the start would measure counts as float32."""
        asked = self.config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
        return "no" if asked == "auto" else asked

    @cached_property
    def world(self) -> ParallelDims:
        """Return how many processes there are, and how they share the weights."""
        ranks = self.config.plan.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        if not self.config.plan.ranks:
            self.notes.append(f"{estimate.format_count(ranks, 'rank')}, as launched; --plan.ranks=64 reckons with 64.")
        local = min(int(os.environ.get("LOCAL_WORLD_SIZE", RANKS_PER_MACHINE)), ranks)
        if self.sharding == "hybrid" and ranks % local:
            self.mistakes.add(
                f"train.sharding=hybrid: {ranks} ranks are no whole number of machines of {local}. Use a multiple of it, or full."
            )
        return ParallelDims.from_sharding(self.sharding, ranks, local)

    @cached_property
    def micro_batch(self) -> int:
        """Images of a forward pass; at least one, where they cannot be shared out."""
        train, ranks = self.config.train, self.world.ranks
        share = partial(self.hooks.share, batch_size=train.batch_size, accumulation=train.gradient_accumulation_steps, ranks=ranks)
        known = self.mistakes.attempt(share)
        return known.micro_batch if known else max(1, train.batch_size // (ranks * train.gradient_accumulation_steps))

    @cached_property
    def model(self) -> dict[str, Any]:
        """The arguments of a network that can be built; empty where none can."""
        widths = (self.text["text_width"], self.text["pooled_width"]) if self.text else None
        values = build_model_kwargs(self.config.model, self.space.shape, len(self.survey.class_names), widths, self.config.flow.objective)
        build_model = partial(self.hooks.build_model, device="meta")
        network, values = self.mistakes.build_with_defaults(build_model, values, "model", defaults_of(type(self.config.model)))
        return values if network is not None else {}

    @cached_property
    def has_adapters(self) -> bool:
        """Whether low-rank additions are trained, and can be."""
        train = self.config.train
        if not train.lora_rank or not self.model:
            return False
        return self.mistakes.attempt(self.hooks.add_lora, self.build_base_network(), train.lora_rank, train.lora_alpha) is not None

    def build_base_network(self, **changes: Any) -> nn.Module:
        """The network on the meta device."""
        return self.hooks.build_model(**{**self.model, "device": "meta", **changes})

    def build_network(self, **changes: Any) -> nn.Module:
        """Build the network as it is trained, with its adapters; arguments of `DryRunHooks.build_model` in place of the recipe's."""
        network = self.build_base_network(**changes)
        if self.has_adapters:
            self.hooks.add_lora(network, self.config.train.lora_rank, self.config.train.lora_alpha)
        return network

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of a sample of the largest batch, (C, H, W), its sides as the network takes them."""
        unit = int(self.build_base_network().size_multiple)  # type: ignore[arg-type]
        height, width = (max(unit, side // self.space.factor // unit * unit) for side in self.survey.shape)
        return self.space.channels, height, width

    @cached_property
    def objective(self) -> TrainingObjective:
        """Return the objective of the recipe."""
        return objective_of(self.config, self.space.shape, bool(self.text), self.mistakes)

    @cached_property
    def sizes(self) -> NetworkSizes:
        """Return the sizes of the network that is trained."""
        network = self.build_network()
        weights = [(tuple(weight.shape), weight.requires_grad) for weight in network.parameters()]
        kept = sum(value.numel() for value in network.state_dict().values())
        return NetworkSizes(
            [shape for shape, _ in weights], [shape for shape, trained in weights if trained], self.hooks.fsdp_units(network), kept
        )

    @cached_property
    def encoders(self) -> list[EncoderCost]:
        """The frozen networks that work in every step."""
        found = []
        for title, network, call in self.survey.at_work():
            weights = estimate.count_numbers([tuple(weight.shape) for weight in network.parameters()])
            try:
                most, macs = self.hooks.inference_cost(network, partial(call, images=self.micro_batch))
            except RuntimeError as error:
                self.notes.append(f"the {title} could not be counted ({' '.join(str(error).split())[:200]}).")
                most, macs = 0, 0
            found.append(EncoderCost(title, weights, macs / self.micro_batch, most))
        for text in self.survey.mistakes:
            self.mistakes.add(text)
        return found

    def build_step(self, images: int, shape: tuple[int, ...]) -> Step:
        """The loss of so many samples, (C, H, W), for `DryRunHooks.estimate_memory`; the coupling takes little memory and is left out."""
        objective = replace(self.objective, flow=replace(self.objective.flow, coupling="independent"))

        def step(model: Callable[..., Tensor], network: nn.Module) -> Tensor:
            x, t, *condition = self.hooks.example_inputs(network, shape, batch=images, **self.text)
            probe = torch.randn_like(x).sign() if objective.objective.needs_probe else None
            draws = RandomInputs(torch.randn_like(x), t, t, probe)
            return objective.losses(model, x, draws, *condition, indices=torch.arange(images, device=x.device)).mean()

        return step

    def check_start(self) -> str:
        """What training would look at before its first step; how it would begin."""
        config, hooks = self.config, self.hooks
        if config.train.compile:
            self.notes.append("train.compile is left out of account: compiled blocks keep less for the backward pass.")
        self.check_launch()
        for check in hooks.checks:
            self.mistakes.attempt(check, config, self.space, self.survey)
        check_start_weights(config, self.mistakes)
        check_coupling(self.objective, self.micro_batch, self.mistakes)
        if self.model:
            self.mistakes.attempt(hooks.check_sides, self.survey.options, self.space.factor * int(self.build_base_network().size_multiple))  # type: ignore[arg-type]
        if self.model and config.init_from:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing is copied into a network without memory
                self.mistakes.attempt(hooks.init_from_published, config.init_from, self.build_base_network())
        facts = run_facts(config, self.survey.fingerprint)
        return check_folder(config, facts if self.survey.images else {k: v for k, v in facts.items() if k != "data"}, self.mistakes)

    def check_launch(self) -> None:
        """Whether launcher and recipe say the same; what this machine alone would refuse, the cluster's may have, and is only a note."""
        self.mistakes.attempt(check_launcher)
        for text in find_conflicts(self.config, os.environ):
            self.mistakes.add(f"{text}.")
        self.mistakes.attempt(check_precision_sharding, self.precision, self.sharding)
        here = Mistakes()
        here.attempt(check_hardware, self.precision)
        here.attempt(check_trackers, self.config.log.report_to)
        self.notes += [f"on this machine training would be refused: {text}" for text in here]
