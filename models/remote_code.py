"""Networks that no stock class holds in the classes that travel with their weights, and back.

Ours is a part of them as it is; only its output layer takes the factor that makes it predict what stock schedulers expect.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from .common.kernels import use_fast_gelu
from .common.layers import SwiGLU
from .common.weight_mapping import scale_layer
from .cross_dit.model import CrossDiT
from .cross_dit.modeling_cross_dit_v1 import CondotCrossDiT
from .dit.model import DiT
from .dit.modeling_dit_v1 import CondotDiT
from .mmdit.model import MMDiT
from .mmdit.modeling_mmdit_v1 import CondotMMDiT

CUSTOM_CLASSES: dict[str, type[ModelMixin]] = {kind.__name__: kind for kind in (CondotDiT, CondotMMDiT, CondotCrossDiT)}
"""Classes that an exported folder brings along, by their names in its configuration. Whoever changes what one of them computes, or how
its weights are called, gives its file and its folder's entry a new version: two exports of one process share the file's name."""


def custom_config(model: nn.Module) -> dict[str, Any]:
    """The configuration of the class that holds a network.

    Raises:
        ValueError: a network of another class, or of two outputs.
    """
    if getattr(model, "outputs", 1) != 1:
        raise ValueError(
            f"a {type(model).__name__} with {model.outputs} outputs has no class to travel in. "
            f"Give --export=false and sample with `sample.py --run`."
        )
    if isinstance(model, DiT):
        return _dit_config(model)
    if isinstance(model, MMDiT):
        return _mmdit_config(model)
    if isinstance(model, CrossDiT):
        return _cross_dit_config(model)
    raise ValueError(f"{type(model).__name__} has no class to travel in: DiT, MMDiT and CrossDiT have.")


def to_custom(model: nn.Module, factor: float) -> ModelMixin:
    """A network that travels with its code and gives `factor` times the same output; with values of its own, on meta where the model is.

    Raises:
        ValueError: a network of another class than DiT, MMDiT and CrossDiT.
    """
    options = custom_config(model)
    kind = CondotDiT if isinstance(model, DiT) else CondotMMDiT if isinstance(model, MMDiT) else CondotCrossDiT
    with torch.device("meta"):
        exported = kind(**options)
    state = scale_layer(model.state_dict(), "leave", factor)
    exported.network.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
    return exported.requires_grad_(False).eval()


def from_custom(exported: nn.Module, factor: float) -> nn.Module:
    """The bare network inside, which gives `factor` times the same output; with values of its own."""
    ours: nn.Module = copy.deepcopy(exported.network)  # type: ignore[assignment]
    ours.load_state_dict(scale_layer(ours.state_dict(), "leave", factor))
    return use_fast_gelu(ours).eval()


def custom_code_file(exported: nn.Module) -> Path | None:
    """The file that a network needs beside its weights: not yet standing alone, its stem the module's name; None for a stock class."""
    kind = CUSTOM_CLASSES.get(type(exported).__name__)
    return None if kind is None else Path(str(sys.modules[kind.__module__].__file__))


def _common_config(model: Any, heads: int) -> dict[str, Any]:
    return {
        "in_channels": model.channels, "out_channels": model.channels, "sample_size": model.resolution, "patch_size": model.patch_size,
        "num_attention_heads": heads, "attention_head_dim": model.enter.out_features // heads, "num_layers": len(model.blocks),
        "micro_conditions": model.micro_conditions,
    }  # fmt: skip


def _dit_config(model: DiT) -> dict[str, Any]:
    block: Any = model.blocks[0]
    return {
        **_common_config(model, block.attention.heads), "num_classes": model.num_classes, "qk_norm": block.attention.query_norm is not None,
        "rope": model.rope, "swiglu": isinstance(block.feed_forward, SwiGLU), "rms_norm": model.rms_norm,
        "registers": 0 if model.registers is None else len(model.registers),
        "positions": "learned" if model.positions is not None else "sincos" if model.fixed_positions else "none",
        "shared_modulation": model.shared_modulation is not None, "clock": model.clock, "own_conditions": model.own_conditions,
    }  # fmt: skip


def _mmdit_config(model: MMDiT) -> dict[str, Any]:
    heads = model.blocks[0].image.heads  # type: ignore[union-attr]
    return {
        **_common_config(model, int(heads.heads)),  # type: ignore[union-attr, arg-type]
        "joint_attention_dim": model.text.in_features, "pooled_projection_dim": model.pooled.enter.in_features,
        "qk_norm": heads.k_norm is not None,  # type: ignore[union-attr]
        "dual_attention_blocks": sum(block.own is not None for block in model.blocks), "pos_embed_max_size": model.positions.grid,
        "position_line": list(model.positions.line) if model.positions.grid else None,
    }  # fmt: skip


def _cross_dit_config(model: CrossDiT) -> dict[str, Any]:
    return {
        **_common_config(model, int(model.blocks[0].cross.heads)),  # type: ignore[union-attr, arg-type]
        "caption_channels": model.text.enter.in_features, "pooled_projection_dim": model.pooled_width, "qk_norm": model.qk_norm,
        "interpolation_scale": model.interpolation_scale,
    }  # fmt: skip
