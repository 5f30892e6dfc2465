"""Weights of our DiT as diffusers' DiTTransformer2DModel, back, and from checkpoints of the original DiT and SiT.

All lay out patches and heads alike; diffusers keeps queries, keys and values apart and gives each block an embedding of time and class of
its own. It numbers the null class 1000, so the table of classes is padded to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from ..common.conditioning import Clock
from ..common.layers import FeedForward, sincos_positions
from ..common.weight_mapping import STOCK_NULL, pad_class_table, scale_layer
from .model import DiT
from .presets import SIZES


def dit_to_stock(model: DiT, factor: float) -> DiTTransformer2DModel:
    """A stock network that gives `factor` times the same output.

    Raises:
        ValueError: options that the stock class does not have.
    """
    refused = dit_unsupported_by_stock(model)
    if refused:
        raise ValueError(f"{refused}. Train without, or give --export=false and sample with `sample.py --run`.")
    width = model.enter.out_features
    stock = DiTTransformer2DModel(
        num_attention_heads=width // model.head_width,
        attention_head_dim=model.head_width,
        in_channels=model.channels,
        out_channels=model.outputs * model.channels,
        num_layers=len(model.blocks),
        sample_size=model.resolution,
        patch_size=model.patch_size,
        num_embeds_ada_norm=STOCK_NULL,
        norm_eps=1e-6,
    )
    ours = scale_layer(model.state_dict(), "leave", factor)
    state: dict[str, Tensor] = {}
    for name, targets in _stock_names(len(model.blocks), model.own_conditions).items():
        value = ours[name]
        if name == "enter.weight":
            value = value.view(width, model.channels, model.patch_size, model.patch_size)
        elif name.endswith("classes.weight"):
            value = pad_class_table(value)
        state |= dict(zip(targets, value.chunk(3) if _is_qkv(name) else [value] * len(targets), strict=True))
    stock.load_state_dict(state)
    return stock.eval()


def dit_from_stock(stock: DiTTransformer2DModel, num_classes: int, factor: float) -> DiT:
    """Our DiT that gives `factor` times the output of a stock one; to stock and back gives the same weights.

    Where the stock one also predicts a variance (out_channels twice
    in_channels), ours keeps the first half of its output, the prediction, and
    drops the variance. Where its blocks embed time and class differently, so
    do ours (`own_conditions`). Its `norm_eps`, of the norm before the
    feed-forward net alone, is 1e-5 in configurations of published weights,
    which were trained with 1e-6: ours has that.

    Args:
        stock: any.
        num_classes: the first so many of its classes are kept, and its null class, the last.
        factor: on the output layer.

    Raises:
        ValueError: a stock configuration that our DiT cannot hold.
    """
    c = stock.config
    out = c.out_channels or c.in_channels
    if (
        c.activation_fn != "gelu-approximate"
        or not c.attention_bias
        or c.norm_elementwise_affine
        or out not in (c.in_channels, 2 * c.in_channels)
    ):
        raise ValueError(
            f"this DiT has activation_fn={c.activation_fn}, attention_bias={c.attention_bias}, norm_elementwise_affine="
            f"{c.norm_elementwise_affine}, {c.in_channels} channels in and {out} out: ours has gelu-approximate, biases in its attention, "
            f"norms without weights, as many channels out as in, or twice. Start from a published DiT."
        )
    check_class_count(num_classes, c.num_embeds_ada_norm)
    theirs = stock.state_dict()
    shared = _stock_names(c.num_layers, False)
    own = any(
        not torch.equal(theirs[source], theirs[sources[0]]) for name, sources in shared.items() if not _is_qkv(name) for source in sources
    )
    ours = DiT(
        channels=c.in_channels, resolution=c.sample_size, num_classes=num_classes, patch_size=c.patch_size, depth=c.num_layers,
        width=c.num_attention_heads * c.attention_head_dim, heads=c.num_attention_heads, own_conditions=own,
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, sources in _stock_names(c.num_layers, own).items():
        value = torch.cat([theirs[source] for source in sources]) if _is_qkv(name) else theirs[sources[0]]
        state[name] = _to_our_shape(name, value, num_classes, c.in_channels, c.patch_size)
    ours.load_state_dict(scale_layer(state, "leave", factor))
    return ours.eval()


def dit_from_original(
    state: Mapping[str, Tensor], *, clock: Clock = "original", heads: int | None = None, num_classes: int | None = None, factor: float = 1.0
) -> DiT:
    """Our DiT with the weights of a checkpoint of the original DiT or SiT.

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
        name: _to_our_shape(name, state[source], ours.num_classes, channels, patch_size).float()
        for name, source in _original_names(depth).items()
    }
    wrong = [f"{name} {tuple(value.shape)}" for name, value in found.items() if value.shape != ours.state_dict()[name].shape]
    if wrong:
        raise ValueError(
            f"tensors of another shape than a DiT of width {width} has: {', '.join(wrong)}. Is it a DiT's or SiT's checkpoint?"
        )
    ours.load_state_dict(scale_layer(found, "leave", factor))
    return ours.eval()


def check_class_count(num_classes: int, rows: int) -> None:
    """Raises ValueError for more classes than the weights have."""
    if not 0 <= num_classes <= rows:
        raise ValueError(f"num_classes={num_classes}: these weights know {rows} classes. Use at most {rows}.")


def _is_qkv(name: str) -> bool:
    return name.rpartition(".")[0].endswith("qkv")


def _to_our_shape(name: str, value: Tensor, num_classes: int, channels: int, patch_size: int) -> Tensor:
    """A published tensor in our shape: patches flat, the chosen classes and null, the prediction without its variance."""
    if name == "enter.weight":
        return value.flatten(1)
    if name.endswith("classes.weight"):
        return torch.cat([value[:num_classes], value[-1:]])
    if name.startswith("leave.") and len(value) == 2 * channels * patch_size**2:  # rows, columns, channels: of 2 C the first C
        return value.unflatten(0, (patch_size**2, -1))[:, :channels].flatten(0, 1)
    return value


def dit_unsupported_by_stock(model: DiT) -> str:
    """Why the stock class cannot hold a model; nothing where it can."""
    block = model.blocks[0]
    options = {
        "qk_norm": block.attention.query_norm is not None,  # type: ignore[union-attr]
        "rope": model.rope,
        "swiglu": not isinstance(block.feed_forward, FeedForward),
        "rms_norm": model.rms_norm,
        "registers": model.registers is not None,
        "positions": not model.fixed_positions,
        "shared_modulation": model.shared_modulation is not None,
        "clock": model.clock != "diffusers",
        "micro_conditions": model.micro_conditions,
    }
    more = [f"model.{name}" for name, given in options.items() if given]
    return f"{', '.join(more)}: diffusers' DiTTransformer2DModel has no such option" if more else ""


def _check_original(state: Mapping[str, Tensor]) -> None:
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    wanted = {*_original_names(max(depth, 1)).values(), "pos_embed"}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unexpected:
        raise ValueError(f"not a checkpoint of DiT or SiT: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}.")
    enter, table = state["x_embedder.proj.weight"].shape, state["pos_embed"].shape
    if len(enter) != 4 or len(table) != 3 or table[2] != enter[0] or math.isqrt(table[1]) ** 2 != table[1]:
        raise ValueError(f"x_embedder.proj.weight {tuple(enter)} and pos_embed {tuple(table)} are not (D, C, p, p) and (1, N * N, D).")


def _stock_names(depth: int, own: bool) -> dict[str, list[str]]:
    """For each of our tensors the stock tensors that hold the same numbers: joined in order for qkv, copies of one another otherwise."""
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(depth)]
    names: dict[str, list[str]] = {}
    for ours, theirs in [(f"conditions.{i}.", [e]) for i, e in enumerate(embedders)] if own else [("", embedders)]:
        for part in ("weight", "bias"):
            names[f"{ours}time.enter.{part}"] = [f"{e}.timestep_embedder.linear_1.{part}" for e in theirs]
            names[f"{ours}time.leave.{part}"] = [f"{e}.timestep_embedder.linear_2.{part}" for e in theirs]
        names[f"{ours}classes.weight"] = [f"{e}.class_embedder.embedding_table.weight" for e in theirs]
    for part in ("weight", "bias"):
        names[f"enter.{part}"] = [f"pos_embed.proj.{part}"]
        names[f"modulation.{part}"] = [f"proj_out_1.{part}"]
        names[f"leave.{part}"] = [f"proj_out_2.{part}"]
        for i in range(depth):
            stock = f"transformer_blocks.{i}"
            names[f"blocks.{i}.modulation.{part}"] = [f"{stock}.norm1.linear.{part}"]
            names[f"blocks.{i}.attention.qkv.{part}"] = [f"{stock}.attn1.to_{which}.{part}" for which in "qkv"]
            names[f"blocks.{i}.attention.out.{part}"] = [f"{stock}.attn1.to_out.0.{part}"]
            names[f"blocks.{i}.feed_forward.enter.{part}"] = [f"{stock}.ff.net.0.proj.{part}"]
            names[f"blocks.{i}.feed_forward.leave.{part}"] = [f"{stock}.ff.net.2.{part}"]
    return names


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
