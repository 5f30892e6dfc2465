"""The averages of the weights, on a clock of images, in the same shares as the model.

Counted in images and not in steps, they do not depend on the batch size. A
half-life forgets evenly; at first it grows with the images seen, so that the
random start is forgotten. A power average widens with the run, and begins at
its start: see `posthoc`.
Source: Karras et al., Analyzing and Improving the Training Dynamics of
Diffusion Models; Tarvainen and Valpola, Mean teachers are better role models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..config.schema import EmaConfig
from .posthoc import power_decay, width_to_exponent

RAW = "raw"
"""The label of weights as they are trained."""


@dataclass(frozen=True)
class HalfLifeProfile:
    """An exponential average."""

    halflife: float
    """Images after which a weight counts half; 0 keeps nothing."""
    ramp: float
    """It is at most this share of the images seen so far."""

    @property
    def label(self) -> str:
        return f"halflife={_format_number(self.halflife)}" if self.halflife else RAW

    def decay(self, images: int, batch: int) -> float:
        """What is kept of the average in one update.

        Args:
            images: seen so far, this batch included.
            batch: images of this step.

        Returns:
            A factor in [0, 1).
        """
        halflife = min(self.halflife, self.ramp * images)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0


@dataclass(frozen=True)
class PowerProfile:
    """An average by a power of the image clock, of a relative width."""

    width: float

    def __post_init__(self) -> None:
        width_to_exponent(self.width)  # refuses a width that has none before any work

    @property
    def label(self) -> str:
        return f"width={_format_number(self.width)}"

    @cached_property
    def exponent(self) -> float:
        return width_to_exponent(self.width)

    def decay(self, images: int, batch: int) -> float:
        """Return what is kept of the average in one update; arguments as of a half-life's."""
        return power_decay(self.exponent, images, batch)


def ema_profiles(config: EmaConfig) -> tuple[HalfLifeProfile | PowerProfile, ...]:
    """The averages that a recipe asks for: first that which is sampled and exported, last the power averages."""
    halflives = config.halflife if config.enabled else (0.0,)
    return (*(HalfLifeProfile(halflife, config.ramp) for halflife in halflives), *map(PowerProfile, config.power))


class WeightAverages:
    """Averages of a network's weights: the first is a model to sample from, each further one its trained weights alone.

    No update needs another rank: what is averaged is this rank's share. They
    are float32 as the weights are; in bfloat16 they would not move.

    Args:
        network: the network that is trained, perhaps sharded, not wrapped for several processes.
        model: a copy of it, sharded alike; it becomes the first average.
        config: which averages.
    """

    def __init__(self, network: nn.Module, model: nn.Module, config: EmaConfig) -> None:
        self.profiles = ema_profiles(config)
        self.model = model.eval().requires_grad_(False)
        _reshard(network)
        trained = {name: p for name, p in network.named_parameters(remove_duplicate=False) if p.requires_grad}
        for name, parameter in trained.items():
            assert parameter.dtype in (torch.float32, torch.float64), f"{name} is {parameter.dtype}: averages need master weights"
        self._trained = frozenset(trained)
        self._extra = {profile.label: {name: p.detach().clone() for name, p in trained.items()} for profile in self.profiles[1:]}

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the averages, such as `halflife=2000000` and `width=0.05`, the first one's first."""
        return tuple(profile.label for profile in self.profiles)

    @torch.no_grad()
    def update(self, network: nn.Module, images: int, batch: int) -> None:
        """Move every average towards the weights.

        Args:
            network: as at the start.
            images: seen so far, this batch included: the last update's, and `batch`.
            batch: images of this step.
        """
        _reshard(network)
        _reshard(self.model)
        first, *others = self.profiles
        weights = _local_tensors(network.parameters())
        torch._foreach_lerp_(_local_tensors(self.model.parameters()), weights, 1 - first.decay(images, batch))
        for mine, theirs in zip(self.model.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
        if others:
            named = dict(network.named_parameters(remove_duplicate=False))
            weights = _local_tensors(named[name] for name in self._extra[others[0].label])
        for profile in others:
            torch._foreach_lerp_(_local_tensors(self._extra[profile.label].values()), weights, 1 - profile.decay(images, batch))

    def tensors(self) -> dict[str, Tensor]:
        """All averages by name: `ema.X` of the first, with its buffers, `ema[halflife=5000].X` and `ema[width=0.05].X` of the others."""
        return {f"ema.{name}": value for name, value in self.model.state_dict().items()} | self._named(self.labels[1:])

    def power(self) -> dict[str, Tensor]:
        """The power averages alone, named as in `tensors`."""
        return self._named([profile.label for profile in self.profiles if isinstance(profile, PowerProfile)])

    @property
    def widths(self) -> tuple[float, ...]:
        """Return the widths of the power averages."""
        return tuple(profile.width for profile in self.profiles if isinstance(profile, PowerProfile))

    def _named(self, labels: Iterable[str]) -> dict[str, Tensor]:
        return {f"ema[{label}].{name}": value for label in labels for name, value in self._extra[label].items()}

    def locate_in_checkpoint(self, kept: Sequence[str], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return where a checkpoint holds each average: by its own label, whatever its place in the recipe was then and is now.

        One that was not kept begins from the checkpoint's first.

        Args:
            kept: labels of the checkpoint's averages, its first one first.
            where: names the checkpoint.

        Returns:
            Tensors to fill, by the checkpoint's names; and the averages to be copied afterwards by `begin`, each with its source.

        Raises:
            ValueError: a power average that was not kept: it counts from the first image, and cannot begin later.
        """
        self._check_powers(kept, where)
        first = kept[0] if kept else self.labels[0]
        state = self.model.state_dict()
        tensors = {f"ema.{name}": value for name, value in state.items() if name not in self._trained}
        own = {self.labels[0]: {name: state[name] for name in self._trained}} | self._extra
        taken: dict[str, str] = {}
        copied: dict[str, str] = {}
        for label in self.labels:
            source = label if label in kept else first
            if source in taken:
                copied[label] = taken[source]
                continue
            taken[source] = label
            prefix = "ema." if source == first else f"ema[{source}]."
            tensors |= {f"{prefix}{name}": value for name, value in own[label].items()}
        return tensors, copied

    def _check_powers(self, kept: Sequence[str], where: str) -> None:
        for profile in self.profiles[1:]:
            if isinstance(profile, PowerProfile) and profile.label not in kept:
                held = [label.removeprefix("width=") for label in kept if label.startswith("width=")]
                give = f"give --ema.power {' '.join(held)}" if held else "leave ema.power out"
                raise ValueError(
                    f"ema.power={_format_number(profile.width)}: {where} was trained without it, and a power average counts from a run's "
                    f"first image: {give}, or begin another run."
                )

    @torch.no_grad()
    def copy_averages(self, copied: Mapping[str, str] | None = None) -> None:
        """Start averages from others: those named from those named, or all further ones from the first."""
        _reshard(self.model)
        own = {self.labels[0]: dict(self.model.named_parameters(remove_duplicate=False))} | self._extra
        for label, source in (dict.fromkeys(self.labels[1:], self.labels[0]) if copied is None else copied).items():
            for name in self._trained:
                own[label][name].copy_(own[source][name])

    @torch.no_grad()
    def copy_raw(self, network: nn.Module, kept: Sequence[str]) -> None:
        """Take the weights themselves where they are sampled and exported, and the checkpoint kept an average in that place."""
        if self.labels[0] == RAW and RAW not in kept:
            for mine, theirs in zip(_local_tensors(self.model.parameters()), _local_tensors(network.parameters()), strict=True):
                mine.copy_(theirs)


def _reshard(module: nn.Module) -> None:
    """Have every parameter in shares again: a forward pass without a backward one leaves some of FSDP2's whole."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def _local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _format_number(value: float) -> str:
    """All digits of it and no more, so that labels of different numbers differ."""
    return repr(float(value)).removesuffix(".0")
