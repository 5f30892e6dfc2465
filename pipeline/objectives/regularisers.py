"""Terms that a recipe adds to the loss, each with a weight and options of its own; the table of them, and the recipe's section.

    @REGULARISERS.register("smooth")
    @dataclass(frozen=True, kw_only=True)
    class Smooth(Regulariser):
        power: float = 2.0  # of the difference between neighbours

        def __call__(self, network, batch, flow):
            out = network.last.prediction
            return out.diff(dim=-1).abs().pow(self.power).flatten(1).mean(1)

is used by `flow.regularisers: {smooth: {weight: 0.1, power: 1}}`, and logged as `loss/smooth`,
without its weight. None is built in: nothing that the house trains with was one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from condot.core.registry import Registry

from .step_objective import FlowTerms, StepBatch, StepLoss


class Evaluation(NamedTuple):
    """What a network was asked and what it said."""

    x: Tensor
    """(B, *S)."""
    t: Tensor
    """(B,)."""
    prediction: Any
    """(B, *S); of a joint objective a pair of them."""


class ObservedNetwork:
    """A network that remembers its last evaluation, so that a term on it costs no second pass.

    Args:
        predict: `(x, t, *condition)` -> the prediction.
        module: the network as it is wrapped for training, whose layers a term may hook.
    """

    def __init__(self, predict: Callable[..., Any], module: Any) -> None:
        self.predict, self.module = predict, module
        self.last: Evaluation | None = None

    def __call__(self, x: Tensor, t: Tensor, *condition: Any) -> Any:
        """Return the prediction; the gradient of a second call counts as the first's does."""
        prediction = self.predict(x, t, *condition)
        self.last = Evaluation(x, t, prediction)
        return prediction


@dataclass(frozen=True, kw_only=True)
class Regulariser:
    """A term of the loss; one of your own adds fields with defaults, and defines `__call__`."""

    differentiates_twice: ClassVar[bool] = False
    """Whether the term itself holds a derivative of the network: the fast attentions have no second one."""
    weight: float = 0.0  # factor on the term; 0 leaves it out

    def __call__(self, network: ObservedNetwork, batch: StepBatch, flow: FlowTerms) -> Tensor:
        """Return the term of each sample, (B,), or one for all, without its weight.

        Args:
            network: as the objective called it; `network.last` is its last evaluation.
            batch: as the objective saw it.
            flow: the recipe's mathematics.
        """
        raise NotImplementedError


REGULARISERS: Registry[type[Regulariser]] = Registry("regulariser")
"""Every regulariser that a recipe can give a weight."""
SECTION = "flow.regularisers."
"""What a recipe's keys of them begin with."""


@dataclass(frozen=True, kw_only=True)
class RegulariserSection:
    """The section `flow.regularisers`: a field for each line of the table, with the weight 0 until the recipe gives another."""


@functools.cache
def _section(entries: tuple[tuple[str, type[Regulariser]], ...]) -> type[RegulariserSection]:
    """Return the section's type for the table as it stands; one type for one table, so that sections can be compared."""
    fields = [(name, kind, field(default_factory=kind)) for name, kind in entries]
    return dataclasses.make_dataclass("RegulariserSection", fields, bases=(RegulariserSection,), frozen=True, kw_only=True)


def default_regularisers() -> RegulariserSection:
    """Return the section with every regulariser that is registered now, all left out."""
    return _section(tuple(REGULARISERS.items()))()


def active_regularisers(section: RegulariserSection) -> dict[str, Regulariser]:
    """Return the regularisers that have a weight, by name.

    Raises:
        ValueError: a weight that is negative or not finite.
    """
    found: dict[str, Regulariser] = {}
    for item in dataclasses.fields(section):
        one = getattr(section, item.name)
        if not 0 <= one.weight < math.inf:
            raise ValueError(f"flow.regularisers.{item.name}.weight={one.weight}: 0 (left out) or a positive, finite factor.")
        if one.weight:
            found[item.name] = one
    return found


def check_regulariser_names(keys: Iterable[str]) -> None:
    """Raise UnknownKindError for a recipe's key `flow.regularisers.NAME...` whose name no table has."""
    for key in keys:
        if key.startswith(SECTION):
            REGULARISERS.lookup(key.removeprefix(SECTION).partition(".")[0])


def drop_unused_regularisers(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe, or its section `flow`, without regularisers that have no weight.

    What a plugin registers and nobody uses is no part of a run.
    """
    flow = recipe.get("flow", recipe)
    if isinstance(flow, dict) and isinstance(flow.get("regularisers"), dict):
        used = {name: one for name, one in flow.pop("regularisers").items() if one["weight"]}
        flow |= {"regularisers": used} if used else {}
    return recipe


def add_regularisers(
    step_loss: StepLoss,
    name: str,
    regularisers: dict[str, Regulariser],
    network: ObservedNetwork,
    batch: StepBatch,
    flow: FlowTerms,
) -> StepLoss:
    """Return a loss with the weighted terms added, and each part by its name among the extras.

    Args:
        step_loss: of the objective.
        name: of the objective.
        regularisers: by name.
        network, batch, flow: as the objective had them.

    Raises:
        ValueError: a term that is neither (B,) nor a scalar.
    """
    loss, extras = step_loss.loss, {f"loss/{name}": step_loss.loss, **step_loss.extras}
    for which, regulariser in regularisers.items():
        term = regulariser(network, batch, flow)
        if term.shape not in ((), loss.shape):
            raise ValueError(
                f"regulariser {which!r} gave shape {tuple(term.shape)} for {len(loss)} samples: one number a sample, "
                f"({len(loss)},), or a scalar. Take the mean over the other dimensions."
            )
        loss = loss + regulariser.weight * term
        extras[f"loss/{which}"] = term
    return StepLoss(loss, extras)
