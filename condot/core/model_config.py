"""The section `model` of a recipe: what the sections of all kinds of networks share, and the table of them.

A kind's own section stands beside its network in `models/`, which `pipeline/` does not import: the
registration of a network fills the table, and the parser reads it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .option_ranges import check_numbers
from .registry import Registry

Conditioning = Literal["class", "text"]


class ModelConfig:
    """A section `model`; that of one kind is a frozen dataclass derived from this class.

    Its field `kind` is a Literal of the kind's name, which is the default too; the comment behind
    each field is its help. Numbers with a range (`core.option_ranges`) are held to it.
    """

    kinds: ClassVar[Registry[type[ModelConfig]]] = Registry("model.kind")
    """The sections by kind."""
    conditioning: ClassVar[Conditioning] = "class"
    """What the network is conditioned on; a property where a field of the section decides."""

    kind: str
    micro_conditions: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, "model.")


def default_model_config() -> ModelConfig:
    """Return the section of a recipe that names no kind.

    Raises:
        ValueError: nothing has introduced the networks yet.
    """
    if "dit" not in ModelConfig.kinds:
        raise ValueError("no network is registered, so the section `model` has no kinds: import condot.models.registry first.")
    return ModelConfig.kinds["dit"]()
