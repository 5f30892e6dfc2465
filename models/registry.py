"""The networks: a table of specs, and how one of them is built.

A network is called as `forward(x, t, condition, sizes)`: `x` is (B, C, H, W), `t` (B,) from 0
(noise) to 1 (data). The condition is labels, (B,) whole numbers where `num_classes` stands for no
class, or `TextStates`. Nothing here knows a loss, a path or a data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from condot.core.registry import Registry

from .common import init
from .common.kernels import use_fast_gelu
from .common.spec import NetworkSpec
from .cross_dit.spec import CROSS_DIT
from .dit.spec import DIT
from .mmdit.spec import MMDIT
from .unet.spec import UNET


class NetworkRegistry(Registry[NetworkSpec]):
    """The table of networks; the section of each joins the parser's table (`ModelConfig.kinds`)."""

    def add(self, name: str, entry: NetworkSpec) -> None:
        """Add a network.

        Raises:
            ValueError: a name that is taken or not the section's own, or a section that does not fit the constructor.
        """
        if entry.kind != name:
            raise ValueError(f"network {name!r}: the section {entry.config.__name__} says kind={entry.kind!r}. Give both one name.")
        entry.check()
        super().add(name, entry)
        if name not in entry.config.kinds:
            entry.config.kinds.add(name, entry.config)

    def discard(self, name: str) -> None:
        """Take a network out, and its section."""
        if name in self:
            self[name].config.kinds.discard(name)
        super().discard(name)


NETWORKS = NetworkRegistry("network", {spec.kind: spec for spec in (DIT, CROSS_DIT, MMDIT, UNET)})


def find_spec(network: nn.Module, specs: Mapping[str, NetworkSpec] = NETWORKS) -> NetworkSpec | None:
    """Return the spec of a network, sharded or not; None of one that is not registered."""
    by_class = {spec.network: spec for spec in specs.values()}
    return next((by_class[cls] for cls in type(network).__mro__ if cls in by_class), None)


def spec_of(network: nn.Module) -> NetworkSpec:
    """Return the spec of a network.

    Raises:
        ValueError: it is not registered.
    """
    found = find_spec(network)
    if found is None:
        known = ", ".join(spec.network.__name__ for spec in NETWORKS.values())
        raise ValueError(
            f"{type(network).__name__} is no network that is registered: {known} are. Add its NetworkSpec to models.registry.NETWORKS."
        )
    return found


def build(kind: str, *, seed: int | None = None, device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    """Construct a network by name.

    Args:
        kind: a name in NETWORKS.
        seed: of the first weights; None draws one from torch's own generator.
        device: where to; `meta` for a network without values, to be sharded,
            given memory by `to_empty` and values by `initialise`.
        options: of its constructor; for kinds with presets, what differs from `preset` and `style`.

    Raises:
        ValueError: an unknown kind, or sizes that do not fit one another.
    """
    if kind not in NETWORKS:
        raise ValueError(f"model.kind={kind!r} is unknown: choose one of {', '.join(NETWORKS)}.")
    spec = NETWORKS[kind]
    with torch.device("meta"):
        network = use_fast_gelu(spec.network(**spec.resolve_options(options)))
    if torch.device(device).type == "meta":
        return network
    network = network.to_empty(device=device)
    initialise(network, seed)
    return network


def initialise(network: nn.Module, seed: int | None = None) -> None:
    """Give every parameter of a registered network its first value; see `common.init.initialise`."""
    init.initialise(network, spec_of(network).init_rule, seed)
