"""Checkpoints of the original DiT and SiT, as their own code writes them, in our DiT.

Their tensors are alike; which of the two a file holds, that is, how time was embedded, only its training arguments say.

Source: facebookresearch/DiT and willisma/SiT, models.py of each.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.conditioning import TimeEmbeddingKind
from ..common.layers import sincos_positions
from ..common.presets import SIZES
from ..common.spec import CheckpointForm, PublishedWeights
from ..common.weight_mapping import scale_layer
from .convert import check_class_count, to_our_shape
from .model import DiT


def dit_from_original(
    state: Mapping[str, Tensor],
    *,
    clock: TimeEmbeddingKind = "original",
    heads: int | None = None,
    num_classes: int | None = None,
    factor: float = 1.0,
) -> DiT:
    """Return our DiT with the weights of a checkpoint of the original DiT or SiT.

    Args:
        state: names to tensors, as their published files hold them.
        clock: `original` for DiT, `sit` for SiT: it is not in the weights.
        heads: None goes by the width, as the published sizes have it.
        num_classes: the first so many are kept; None for all.
        factor: ours gives so many times the output. A predicted variance is dropped.

    Raises:
        ValueError: tensors missing, unexpected or misshapen, all listed; positions that are not the fixed ones.

    Source: facebookresearch/DiT and willisma/SiT, models.py of each.
    """
    _check_original(state)
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    rows = math.isqrt(state["pos_embed"].shape[1])
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    known = {sizes["width"]: sizes["heads"] for sizes in SIZES.values()}
    if heads is None and width not in known:
        raise ValueError(f"heads=None: a width of {width} is none of the published {sorted(known)}. Give heads.")
    if not torch.allclose(state["pos_embed"][0].float(), sincos_positions(width, rows, rows), atol=1e-4):
        raise ValueError("pos_embed: these positions are not the fixed ones of the original. Only checkpoints that kept them come in.")
    table = len(state["y_embedder.embedding_table.weight"]) - 1
    check_class_count(table if num_classes is None else num_classes, table)
    ours = DiT(
        channels=channels, resolution=rows * patch_size, num_classes=table if num_classes is None else num_classes,
        patch_size=patch_size, width=width, depth=depth, heads=heads or known[width], clock=clock,
    )  # fmt: skip
    found = {
        name: to_our_shape(name, state[source], ours.num_classes, channels, patch_size).float()
        for name, source in _original_names(depth).items()
    }
    wrong = [f"{name} {tuple(value.shape)}" for name, value in found.items() if value.shape != ours.state_dict()[name].shape]
    if wrong:
        raise ValueError(
            f"tensors of another shape than a DiT of width {width} has: {', '.join(wrong)}. Is it a DiT's or SiT's checkpoint?"
        )
    ours.load_state_dict(scale_layer(found, "leave", factor))
    return ours.eval()


def _check_original(state: Mapping[str, Tensor]) -> None:
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    wanted = {*_original_names(max(depth, 1)).values(), "pos_embed"}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unexpected:
        raise ValueError(f"not a checkpoint of DiT or SiT: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}.")
    enter, table = state["x_embedder.proj.weight"].shape, state["pos_embed"].shape
    if len(enter) != 4 or len(table) != 3 or table[2] != enter[0] or math.isqrt(table[1]) ** 2 != table[1]:
        raise ValueError(f"x_embedder.proj.weight {tuple(enter)} and pos_embed {tuple(table)} are not (D, C, p, p) and (1, N * N, D).")


def _original_names(depth: int) -> dict[str, str]:
    """For each of our tensors the original's."""
    names = {"classes.weight": "y_embedder.embedding_table.weight"}
    for part in ("weight", "bias"):
        names[f"time.enter.{part}"] = f"t_embedder.mlp.0.{part}"
        names[f"time.leave.{part}"] = f"t_embedder.mlp.2.{part}"
        names[f"enter.{part}"] = f"x_embedder.proj.{part}"
        names[f"modulation.{part}"] = f"final_layer.adaLN_modulation.1.{part}"
        names[f"leave.{part}"] = f"final_layer.linear.{part}"
        for i in range(depth):
            names[f"blocks.{i}.modulation.{part}"] = f"blocks.{i}.adaLN_modulation.1.{part}"
            names[f"blocks.{i}.attention.qkv.{part}"] = f"blocks.{i}.attn.qkv.{part}"
            names[f"blocks.{i}.attention.out.{part}"] = f"blocks.{i}.attn.proj.{part}"
            names[f"blocks.{i}.feed_forward.enter.{part}"] = f"blocks.{i}.mlp.fc1.{part}"
            names[f"blocks.{i}.feed_forward.leave.{part}"] = f"blocks.{i}.mlp.fc2.{part}"
    return names


def _origin(arguments: Any) -> str:
    """Return whose training arguments these are: SiT's name a path, and both name their model, `SiT-XL/2` or `DiT-XL/2`."""
    said = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    model = str(said.get("model", ""))
    return "sit" if "path_type" in said or model.startswith("SiT") else "original" if model.startswith("DiT") else ""


def _options(found: PublishedWeights) -> dict[str, Any]:
    """Return sizes of an original checkpoint, as far as they can be read off."""
    state = found.state
    if state["x_embedder.proj.weight"].ndim != 4 or state["pos_embed"].ndim != 3:
        raise ValueError(
            f"init_from={found.name!r} is no checkpoint of DiT or SiT: it lacks their shapes. "
            f"For weights of diffusers give the folder with their config.json."
        )
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    heads = {sizes["width"]: sizes["heads"] for sizes in SIZES.values()}
    return {
        "channels": channels, "resolution": math.isqrt(state["pos_embed"].shape[1]) * patch_size, "patch_size": patch_size,
        "width": width, "depth": sum(key.endswith(".attn.qkv.weight") for key in state), "heads": heads.get(width),
        "clock": _origin(found.arguments) or None,
    }  # fmt: skip


def _load(found: PublishedWeights, model: Mapping[str, Any], network: DiT) -> tuple[DiT, bool]:
    """Return a DiT with the weights, of the network's own heads and clock where the file says none; and whether it had variances."""
    heads = model.get("heads") or int(network.blocks[0].attention.heads)  # type: ignore[union-attr, arg-type]
    ours = dit_from_original(found.state, clock=network.clock, heads=heads)
    return ours, len(found.state["final_layer.linear.weight"]) == 2 * ours.channels * ours.patch_size**2


DIT_ORIGINAL = CheckpointForm(
    title="DiT or SiT",
    tensors=("x_embedder.proj.weight", "pos_embed"),
    origin=_origin,
    options=_options,
    load=_load,
    flows={"sit": ("condot", "velocity"), "original": ("ddpm", "noise")},
    unknown="model.clock=original for DiT's or sit for SiT's (the file does not say whose it is)",
    assumed=lambda network: (
        f"the file does not say whether it is DiT's or SiT's: it is read as model.clock={network.clock}, as the recipe has it"
    ),
)
"""A published DiT or SiT by its authors."""
