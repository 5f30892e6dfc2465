"""The section `model` of a recipe as the arguments of a network.

The sections of the kinds stand beside their networks (`models/*/spec.py`), which register them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from condot.core.model_config import ModelConfig, default_model_config

__all__ = ["ModelConfig", "build_model_kwargs", "default_model_config"]


def build_model_kwargs(
    model: ModelConfig,
    shape: tuple[int, int, int],
    num_classes: int,
    text: tuple[int, int] | None = None,
    objective: str = "regression",
) -> dict[str, Any]:
    """Return the arguments of `models.registry.build`: a recipe's section `model`, and what the data say.

    Args:
        model: the section.
        shape: of a sample, (C, H, W), here square.
        num_classes: of the data.
        text: width of a token's state and of the pooled vector, where there is text.
        objective: flow.objective; a joint one asks for two outputs of each channel, velocity and score.

    Raises:
        ValueError: a network that takes text, and none.
    """
    section: Any = model  # of a dataclass derived from it
    options = {item.name: getattr(model, item.name) for item in fields(section)} | {"channels": shape[0], "resolution": shape[-1]}
    if objective == "joint":
        options["outputs"] = 2
    if model.conditioning == "class":
        return options | {"num_classes": num_classes}
    if text is None:
        raise ValueError(
            f"model.kind={model.kind} takes text, and data.text_encoder is empty: name a frozen text encoder, a folder or a Hub id."
        )
    return options | {"text_width": text[0], "pooled_width": text[1]}
