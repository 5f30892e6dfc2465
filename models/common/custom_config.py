"""The part of a configuration that is alike in all transformers that travel with their code."""

from __future__ import annotations

from typing import Any


def transformer_config(model: Any, heads: int) -> dict[str, Any]:
    """Return the arguments of a class that travels which say how large its transformer is, in diffusers' words."""
    return {
        "in_channels": model.channels, "out_channels": model.channels, "sample_size": model.resolution,
        "patch_size": model.patch_size, "num_attention_heads": heads,
        "attention_head_dim": model.enter.out_features // heads, "num_layers": len(model.blocks),
        "micro_conditions": model.micro_conditions,
    }  # fmt: skip
