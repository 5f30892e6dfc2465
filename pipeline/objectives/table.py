"""Every objective that a recipe can name as `flow.objective`."""

from __future__ import annotations

from condot.core.registry import Registry

from .implicit import ExplicitScoreMatching, SlicedScoreMatching
from .regression import Joint, Regression
from .step_objective import StepObjective

OBJECTIVES: Registry[type[StepObjective]] = Registry(
    "objective",
    {
        "regression": Regression,
        "joint": Joint,
        "explicit": ExplicitScoreMatching,
        "sliced": SlicedScoreMatching,
    },
)
"""One of your own is trained with the network's one output, which `flow.predict` names, and sampled like regression."""
