"""What an objective is given and what it returns; a new one is a class below StepObjective.

Everything random is a function of (seed, purpose, step, place in the global batch), so that a
resumed run and another number of ranks see the same numbers: an objective that wants more of them
asks its StepBatch, and keeps no generator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..flow import (
    Condition,
    JointObjective,
    LinearPath,
    Objective,
    Path,
    Prediction,
    Prior,
    Purpose,
    ScoreMatching,
    normal,
    uniform,
)

LossFunction = Objective | JointObjective | ScoreMatching
"""A loss as mathematics: a function (network, data, noise, t, *condition, probe) -> (B,)."""
Network = Callable[..., Any]
"""`network(x, t, *condition)` -> the prediction, (B, *S); x (B, *S), t (B,)."""


class StepLoss(NamedTuple):
    """What a step is trained for, of one micro-batch."""

    loss: Tensor
    """(B,), of each sample; its mean is what the gradient is of."""
    extras: Mapping[str, Tensor] = {}
    """More to be logged, each (B,) or a scalar, by the name in metrics.jsonl; the same names at every step."""


@dataclass(frozen=True)
class FlowTerms:
    """The mathematics that a recipe's section `flow` names, whatever the objective."""

    path: Path
    """The Gaussian path."""
    predict: Prediction = "velocity"
    """What the network outputs."""
    weighting: Any = "none"
    """How errors count over time: a name, or a function of time."""
    min_snr_gamma: float = 5.0
    sigma_data: float = 0.5
    prior: Prior | None = None
    """Where the path starts, unless at N(0, I)."""

    @property
    def training_path(self) -> Path | LinearPath:
        """The path between prior and data."""
        return self.path if self.prior is None else LinearPath(self.prior)


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch as an objective sees it."""

    data: Tensor
    """z, (B, *S)."""
    noise: Tensor
    """eps, (B, *S), from the prior, coupled to the data as the recipe says."""
    t: Tensor
    """(B,), 0 (noise) to 1 (data)."""
    condition: tuple[Condition, ...] = ()
    """What else the network takes, each (B, ...), null where it is dropped."""
    probe: Tensor | None = None
    """(B, *S), signs, for objectives that set `needs_probe`."""
    seed: int = 0
    step: int = 0
    """Optimiser steps done."""
    indices: Tensor | None = field(default=None)
    """(B,), places in the global batch."""

    def normal(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return standard normal numbers, (B, *shape), of one's own: others for each name; of the data's shape by default."""
        shape = tuple(self.data.shape[1:]) if shape is None else shape
        return normal(self.seed, _purpose(name), self.step, self._places(), shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return uniform numbers in (0, 1), (B, *shape), of one's own: others for each name."""
        return uniform(self.seed, _purpose(name), self.step, self._places(), shape)

    def _places(self) -> Tensor:
        assert self.indices is not None, "a batch without places has no random numbers"
        return self.indices


def _purpose(name: str) -> Purpose:
    """Return a purpose of draws for a name, apart from the house's own, which are small numbers."""
    return (1 << 32) + zlib.crc32(name.encode())  # type: ignore[return-value]


class StepObjective:
    """What a network is trained for. One of your own sets the attributes, and defines `__call__`.

    It is a dataclass whose fields are its options in a recipe, all with defaults.
    """

    differentiates_twice: ClassVar[bool] = False
    """Whether the loss itself holds a derivative of the network: the fast attentions have no second one."""
    needs_probe: ClassVar[bool] = False
    """Whether it reads `StepBatch.probe`."""

    def check(self, flow: FlowTerms, shape: tuple[int, ...]) -> None:
        """Raise ValueError for a flow, or a shape S of samples, that cannot be trained on; all can by default."""

    def loss_function(self, flow: FlowTerms) -> LossFunction | None:
        """Return the loss as mathematics, to be examined at the ends of the path; None, the default, is not examined."""
        return None

    def __call__(self, network: Network, batch: StepBatch, flow: FlowTerms) -> StepLoss:
        """Return the loss of each sample."""
        raise NotImplementedError
