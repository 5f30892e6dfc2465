"""Weights of our DiT as diffusers' DiTTransformer2DModel, and back; and the configuration of the class that travels.

Both lay out patches and heads alike; diffusers keeps queries, keys and values apart and gives each block an embedding of time and class of
its own. It numbers the null class 1000, so the table of classes is padded to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from ..common.custom_config import transformer_config
from ..common.layers import FeedForward, SwiGLU
from ..common.spec import CustomForm, HiddenOptions, PublishedWeights, StockForm
from ..common.weight_mapping import STOCK_NULL, pad_class_table, scale_layer
from .model import DiT
from .modeling_dit_v1 import CondotDiT


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
        state[name] = to_our_shape(name, value, num_classes, c.in_channels, c.patch_size)
    ours.load_state_dict(scale_layer(state, "leave", factor))
    return ours.eval()


def dit_options(found: PublishedWeights) -> dict[str, Any]:
    """Return the arguments of DiT that stock weights decide."""
    config = found.config
    return {
        "channels": config["in_channels"], "resolution": config["sample_size"], "patch_size": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"], "depth": config["num_layers"],
        "heads": config["num_attention_heads"], "clock": "diffusers", "own_conditions": True if _is_untied(found.state) else None,
    }  # fmt: skip


def _is_untied(state: Mapping[str, Tensor]) -> bool:
    """Return whether the blocks of a stock DiT embed time and class differently."""
    first = "transformer_blocks.0."
    parts = [key.removeprefix(first) for key in state if key.startswith(f"{first}norm1.emb.")]
    depth = sum(key.endswith(".attn1.to_q.weight") for key in state)
    return any(not torch.equal(state[f"transformer_blocks.{i}.{part}"], state[first + part]) for part in parts for i in range(1, depth))


def dit_hidden_options(network: DiT, model: Mapping[str, Any], data: Mapping[str, int]) -> HiddenOptions:
    """Return the options of a DiT that no tensor's shape shows, as it has them and as weights ask for them."""
    have: dict[str, Any] = {"heads": network.enter.out_features // network.head_width, "clock": network.clock, "rope": network.rope}
    have |= {"rms_norm": network.rms_norm, "positions": "sincos" if network.fixed_positions else "none"}
    want = {"rope": False, "rms_norm": False, "positions": "sincos", "heads": have["heads"], **model}
    embedding = want.setdefault("clock", network.clock if network.clock in ("sit", "original") else "original or sit")
    if (embedding, network.clock) == ("diffusers", "original"):
        want["clock"] = network.clock  # stock copies of the original do not tell how time was embedded
    return HiddenOptions(have, want)


def check_class_count(num_classes: int, rows: int) -> None:
    """Raises ValueError for more classes than the weights have."""
    if not 0 <= num_classes <= rows:
        raise ValueError(f"num_classes={num_classes}: these weights know {rows} classes. Use at most {rows}.")


def _is_qkv(name: str) -> bool:
    return name.rpartition(".")[0].endswith("qkv")


def to_our_shape(name: str, value: Tensor, num_classes: int, channels: int, patch_size: int) -> Tensor:
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


def _unsupported(model: DiT, masked: bool, bucketed: bool) -> str:
    stretched = "data.aspect_ratios: diffusers' DiTTransformer2DModel stretches its positions over another shape, and training did not"
    return dit_unsupported_by_stock(model) or (stretched if bucketed else "")


def _from_stock(stock: DiTTransformer2DModel, factor: float, num_classes: int | None, pooled_width: int) -> DiT:
    return dit_from_stock(stock, stock.config.num_embeds_ada_norm if num_classes is None else num_classes, factor)


def _custom_config(model: DiT) -> dict[str, Any]:
    block: Any = model.blocks[0]
    return {
        **transformer_config(model, block.attention.heads), "num_classes": model.num_classes,
        "qk_norm": block.attention.query_norm is not None,
        "rope": model.rope, "swiglu": isinstance(block.feed_forward, SwiGLU), "rms_norm": model.rms_norm,
        "registers": 0 if model.registers is None else len(model.registers),
        "positions": "learned" if model.positions is not None else "sincos" if model.fixed_positions else "none",
        "shared_modulation": model.shared_modulation is not None, "clock": model.clock, "own_conditions": model.own_conditions,
    }  # fmt: skip


DIT_STOCK = StockForm(
    classes={DiTTransformer2DModel: ("ddpm", "noise")},
    to_stock=lambda model, factor, masked: dit_to_stock(model, factor),
    from_stock=_from_stock,
    unsupported=_unsupported,
    options=dit_options,
    hidden_options=dit_hidden_options,
    legacy_norm="ada_norm_zero",
    predicts_variances=True,
    fixed_size=True,
)
DIT_CUSTOM = CustomForm(cls=CondotDiT, config=_custom_config)
