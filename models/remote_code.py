"""Networks that no stock class holds in the classes that travel with their weights, and back.

Ours is a part of them as it is; only its output layer takes the factor that makes it predict what stock schedulers expect.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import nn

from .common.kernels import use_fast_gelu
from .common.spec import CustomForm
from .common.weight_mapping import scale_layer
from .registry import NETWORKS, find_spec


def custom_classes() -> dict[str, type[nn.Module]]:
    """Return the classes that an exported folder brings along, by their names in its configuration."""
    return {spec.custom.cls.__name__: spec.custom.cls for spec in NETWORKS.values() if spec.custom}


def custom_form(model: nn.Module) -> CustomForm:
    """Return how a network travels with its code.

    Raises:
        ValueError: a network of another class, or of two outputs.
    """
    if getattr(model, "outputs", 1) != 1:
        raise ValueError(
            f"a {type(model).__name__} with {model.outputs} outputs has no class to travel in. "
            f"Give --export=false and sample with `sample.py --run`."
        )
    spec = find_spec(model)
    if spec is None or spec.custom is None:
        have = ", ".join(one.network.__name__ for one in NETWORKS.values() if one.custom)
        raise ValueError(f"{type(model).__name__} has no class to travel in: {have} have.")
    return spec.custom


def to_custom(model: nn.Module, factor: float) -> nn.Module:
    """Return a network that travels with its code and gives `factor` times the same output.

    It has values of its own, on meta where the model is.

    Raises:
        ValueError: as of `custom_form`.
    """
    form = custom_form(model)
    with torch.device("meta"):
        exported = form.cls(**form.config(model))
    state = scale_layer(model.state_dict(), form.output_layer, factor)
    values = {name: value.detach().clone() for name, value in state.items()}
    exported.network.load_state_dict(values, assign=True)  # type: ignore[union-attr]
    return exported.requires_grad_(False).eval()


def from_custom(exported: nn.Module, factor: float) -> nn.Module:
    """Return the bare network inside, which gives `factor` times the same output; with values of its own."""
    ours: nn.Module = copy.deepcopy(exported.network)  # type: ignore[assignment]
    ours.load_state_dict(scale_layer(ours.state_dict(), custom_form(ours).output_layer, factor))
    return use_fast_gelu(ours).eval()


def custom_code_file(exported: nn.Module) -> Path | None:
    """Return the file that a network needs beside its weights, not yet standing alone; None for a stock class."""
    cls = custom_classes().get(type(exported).__name__)
    return None if cls is None else Path(str(sys.modules[cls.__module__].__file__))
