"""MM-DiT as diffusers' SD3Transformer2DModel, and back; and the configuration of the class that travels.

Stock makes queries of the last block's text and throws them away; ours does
not make them, so these weights are left behind and written as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..common.custom_config import transformer_config
from ..common.layers import sincos_positions
from ..common.spec import CustomForm, HiddenOptions, StockForm
from ..common.weight_mapping import StockSource, WeightMap, check_stock_config, map_from_stock, map_layer, map_to_stock, scale_layer
from .model import MMDiT
from .modeling_mmdit_v1 import CondotMMDiT

POSITIONS = "pos_embed.pos_embed"


def mmdit_options(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of MMDiT for stock weights.

    Args:
        config: of the stock network.
        state: its weights, for the positions, which are stored among them.

    Raises:
        ValueError: a configuration that ours cannot hold.
    """
    c = {"qk_norm": None, "dual_attention_layers": (), "pos_embed_max_size": 96, **config}
    width, dual = c["num_attention_heads"] * c["attention_head_dim"], tuple(c["dual_attention_layers"])
    expected = {
        "qk_norm": "rms_norm" if c["qk_norm"] else None, "dual_attention_layers": tuple(range(len(dual))),
        "caption_projection_dim": width, "out_channels": c["in_channels"],
    }  # fmt: skip
    check_stock_config("SD3Transformer2DModel", {**c, "dual_attention_layers": dual}, expected)
    grid, tokens = c["pos_embed_max_size"] or 0, c["sample_size"] // c["patch_size"]
    stored = state.get(POSITIONS)
    line = fit_position_line(stored, grid) if grid and stored is not None and not stored.is_meta else None
    return {
        "channels": c["in_channels"], "resolution": c["sample_size"], "text_width": c["joint_attention_dim"],
        "pooled_width": c["pooled_projection_dim"], "patch_size": c["patch_size"], "width": width, "depth": c["num_layers"],
        "heads": c["num_attention_heads"], "qk_norm": bool(c["qk_norm"]), "dual_attention_blocks": len(dual), "position_grid": grid,
        "position_line": None if line is None or line == (0.0, tokens / grid) else line,
    }  # fmt: skip


def mmdit_weight_map(depth: int, qk_norm: bool, dual: int) -> WeightMap:
    """Which stock tensors hold the numbers of each of ours."""
    embed = "time_text_embed"
    table = {
        **map_layer("time.enter", f"{embed}.timestep_embedder.linear_1"), **map_layer("time.leave", f"{embed}.timestep_embedder.linear_2"),
        **map_layer("pooled.enter", f"{embed}.text_embedder.linear_1"), **map_layer("pooled.leave", f"{embed}.text_embedder.linear_2"),
        **map_layer("text", "context_embedder"), **map_layer("enter", "pos_embed.proj", transform="patch"),
        **map_layer("modulation", "norm_out.linear", transform="swapped"), **map_layer("leave", "proj_out"),
    }  # fmt: skip
    for i in range(depth):
        b, s, is_last = f"blocks.{i}", f"transformer_blocks.{i}", i == depth - 1
        table |= map_layer(f"{b}.image.modulation", f"{s}.norm1.linear")
        table |= map_layer(f"{b}.text.modulation", f"{s}.norm1_context.linear", transform="swapped" if is_last else None)
        table |= map_layer(f"{b}.image.heads.linear", *(f"{s}.attn.to_{x}" for x in "qkv"))
        table |= map_layer(f"{b}.text.heads.linear", *(f"{s}.attn.add_{x}_proj" for x in ("kv" if is_last else "qkv")))
        table |= map_layer(f"{b}.image.out", f"{s}.attn.to_out.0")
        norms = [(f"{b}.image.heads", f"{s}.attn.norm_", "qk"), (f"{b}.text.heads", f"{s}.attn.norm_added_", "k" if is_last else "qk")]
        if i < dual:
            table |= map_layer(f"{b}.own.linear", *(f"{s}.attn2.to_{x}" for x in "qkv")) | map_layer(f"{b}.own_out", f"{s}.attn2.to_out.0")
            norms.append((f"{b}.own", f"{s}.attn2.norm_", "qk"))
        if qk_norm:
            table |= {f"{ours}.{x}_norm.weight": StockSource((f"{stock}{x}.weight",)) for ours, stock, which in norms for x in which}
        for ours, stock in (("image", "ff"),) if is_last else (("image", "ff"), ("text", "ff_context")):
            table |= map_layer(f"{b}.{ours}.feed_forward.enter", f"{s}.{stock}.net.0.proj")
            table |= map_layer(f"{b}.{ours}.feed_forward.leave", f"{s}.{stock}.net.2")
        if not is_last:
            table |= map_layer(f"{b}.text.out", f"{s}.attn.to_add_out")
    return table


def mmdit_unused(depth: int) -> set[str]:
    """Stock tensors that nothing depends on."""
    last = f"transformer_blocks.{depth - 1}.attn"
    return {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias", f"{last}.norm_added_q.weight", POSITIONS}


def mmdit_from_stock(stock: SD3Transformer2DModel, factor: float) -> MMDiT:
    """An MMDiT that gives `factor` times the same output."""
    theirs = stock.state_dict()
    options = mmdit_options(stock.config, theirs)
    ours = MMDiT(**options)
    table = mmdit_weight_map(options["depth"], options["qk_norm"], options["dual_attention_blocks"])
    ours.load_state_dict(scale_layer(map_from_stock(table, theirs), "leave", factor))
    return ours


def mmdit_unsupported_by_stock(model: MMDiT, masked: bool) -> str:
    """Why the stock class cannot hold a model; nothing where it can."""
    if model.micro_conditions:
        return "model.micro_conditions=True: SD3Transformer2DModel has no place for sizes"
    return "captions with masked padding: SD3Transformer2DModel has no attention mask" if masked else ""


def mmdit_to_stock(model: MMDiT, factor: float, masked: bool = False) -> SD3Transformer2DModel:
    """A stock network that gives `factor` times the same output; a ValueError for what it cannot hold."""
    refused = mmdit_unsupported_by_stock(model, masked)
    if refused:
        raise ValueError(f"{refused}. Give --export=false and sample with `sample.py --run`.")
    first = model.blocks[0].image.heads  # type: ignore[union-attr]
    width, heads, qk_norm = model.enter.out_features, int(first.heads), first.k_norm is not None  # type: ignore[union-attr, arg-type]
    dual = sum(block.own is not None for block in model.blocks)
    stock = SD3Transformer2DModel(
        sample_size=model.resolution, patch_size=model.patch_size, in_channels=model.channels,
        out_channels=model.outputs * model.channels,
        num_layers=len(model.blocks), attention_head_dim=width // heads, num_attention_heads=heads,
        joint_attention_dim=model.text.in_features, caption_projection_dim=width, pooled_projection_dim=model.pooled.enter.in_features,
        pos_embed_max_size=model.positions.grid or None,
        dual_attention_layers=tuple(range(dual)), qk_norm="rms_norm" if qk_norm else None,
    )  # fmt: skip
    shapes = stock.state_dict()
    theirs = {name: torch.zeros_like(shapes[name]) for name in mmdit_unused(len(model.blocks)) & shapes.keys()}
    if model.positions.grid:
        theirs[POSITIONS] = model.positions.for_grid(model.positions.grid, model.positions.grid, shapes[POSITIONS])[None]
    table = mmdit_weight_map(len(model.blocks), qk_norm, dual)
    stock.load_state_dict({**theirs, **map_to_stock(table, scale_layer(model.state_dict(), "leave", factor), shapes)})
    return stock.eval()


def fit_position_line(table: Tensor, grid: int) -> tuple[float, float]:
    """First coordinate and way to the next of stored positions: published SD3 counts otherwise than diffusers' class would.

    Args:
        table: (1, grid * grid, D).

    Raises:
        ValueError: they are no sines and cosines of evenly spaced places.
    """
    table = table[0].double().cpu()
    width = table.shape[1]
    along = table[:grid, : width // 2]  # the first row: columns, as sines, then cosines
    angle = torch.atan2(along[:, 0], along[:, width // 4])
    turns = torch.remainder(angle.diff() + torch.pi, 2 * torch.pi) - torch.pi
    spacing = float(turns.mean()) if grid > 1 else 1.0
    best = (torch.inf, 0.0, spacing)
    for turn in range(-64, 65):
        first = float(angle[0]) + 2 * torch.pi * turn
        first, step = (float(_nearest_fraction(number)) for number in (first, spacing))
        error = (sincos_positions(width, 1, grid, start=(0, first), spacing=(step, step))[:, : width // 2] - along).abs().max()
        best = min(best, (float(error), first, step))
    _, first, step = best
    if (sincos_positions(width, grid, grid, start=(first, first), spacing=(step, step)) - table).abs().max() > 0.02:
        raise ValueError(
            f"{POSITIONS} holds no sines and cosines of evenly spaced places: MM-DiT has no learned positions. It cannot be held."
        )
    return first, step


def _nearest_fraction(number: float) -> Fraction | float:
    """The fraction that a number in half precision stands for, where one is near."""
    near = Fraction(number).limit_denominator(192)
    return near if abs(near - number) < 2e-4 else number


def _hidden_options(network: MMDiT, model: Mapping[str, Any], data: Mapping[str, int]) -> HiddenOptions:
    heads, grid = network.blocks[0].image.heads, network.positions.grid  # type: ignore[union-attr]
    have: dict[str, Any] = {"heads": heads.heads, "position_grid": grid}  # type: ignore[union-attr]
    want = dict(model)
    if grid:
        have["position_line"] = network.positions.line
        want.setdefault("position_line", (0.0, data["resolution"] // want["patch_size"] / max(want["position_grid"], 1)))
    return HiddenOptions(have, want)


def _custom_config(model: MMDiT) -> dict[str, Any]:
    heads = model.blocks[0].image.heads  # type: ignore[union-attr]
    return {
        **transformer_config(model, int(heads.heads)),  # type: ignore[union-attr, arg-type]
        "joint_attention_dim": model.text.in_features, "pooled_projection_dim": model.pooled.enter.in_features,
        "qk_norm": heads.k_norm is not None,  # type: ignore[union-attr]
        "dual_attention_blocks": sum(block.own is not None for block in model.blocks), "pos_embed_max_size": model.positions.grid,
        "position_line": list(model.positions.line) if model.positions.grid else None,
    }  # fmt: skip


MMDIT_STOCK = StockForm(
    classes={SD3Transformer2DModel: ("condot", "velocity")},
    to_stock=mmdit_to_stock,
    from_stock=lambda stock, factor, num_classes, pooled_width: mmdit_from_stock(stock, factor),
    unsupported=lambda model, masked, bucketed: mmdit_unsupported_by_stock(model, masked),
    options=lambda found: mmdit_options(found.config, found.state),
    hidden_options=_hidden_options,
)
MMDIT_CUSTOM = CustomForm(cls=CondotMMDiT, config=_custom_config)
