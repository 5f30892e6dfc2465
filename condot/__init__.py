"""condot trains image generators from scratch and ships them.

`condot.train`, `load`, `sample`, `evaluate` and `export` are what Python calls (docs/python.md);
`condot.pipeline`, `condot.models` and `condot.data` are the rooms, `condot.core` what they share,
`condot.cli` the commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Config, EvaluationResult, LoadedModel, TrainingResult, evaluate, export, load, sample, train

__all__ = ["Config", "EvaluationResult", "LoadedModel", "TrainingResult", "evaluate", "export", "load", "sample", "train"]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used: `import condot` itself must not wait for torch."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'condot' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
