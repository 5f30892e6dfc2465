"""Weights of ours as diffusers' stock classes, and back: one way in for every kind.

Where a stock network is to predict a multiple of what ours predicts (noise minus
data for data minus noise), the output layer takes the factor. Both embed 1000 (1 - t).
The stock pipeline calls the null class 1000, so the table of classes is padded
to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from .convert_cross_dit import cross_dit_from_stock, cross_dit_to_stock
from .convert_mmdit import mmdit_from_stock, mmdit_to_stock
from .convert_unet import unet_from_stock, unet_to_stock
from .cross_dit import CrossDiT
from .dit import DiT
from .layout import STOCK_NULL, padded, scaled
from .mmdit import MMDiT
from .unet import UNet


def to_stock(model: nn.Module, factor: float) -> nn.Module:
    """A stock network that gives `factor` times the same output.

    Args:
        model: a DiT, MMDiT, CrossDiT or UNet.
        factor: on the output layer.

    Raises:
        ValueError: another class, options that no stock class has, or more
            classes than the stock pipeline can tell from none.
    """
    check_classes(getattr(model, "num_classes", 0))
    if isinstance(model, DiT):
        return _dit_to_stock(model, factor)
    if isinstance(model, MMDiT):
        return mmdit_to_stock(model, factor)
    if isinstance(model, CrossDiT):
        return cross_dit_to_stock(model, factor)
    if isinstance(model, UNet):
        return unet_to_stock(model, factor)
    raise ValueError(f"{type(model).__name__} has no stock class: DiT, MMDiT, CrossDiT and UNet have.")


def from_stock(stock: nn.Module, factor: float, *, num_classes: int | None = None, pooled_width: int = 1) -> nn.Module:
    """A network of ours that gives `factor` times the same output.

    Args:
        stock: a DiTTransformer2DModel, SD3Transformer2DModel, PixArtTransformer2DModel, UNet2DModel or UNet2DConditionModel.
        factor: on the output layer.
        num_classes: of the classes; None for what its table holds.
        pooled_width: for text networks that do not use pooled text.

    Raises:
        ValueError: another class, or a configuration that ours cannot hold.
    """
    if isinstance(stock, DiTTransformer2DModel):
        return dit_from_stock(stock, STOCK_NULL if num_classes is None else num_classes, factor)
    if isinstance(stock, SD3Transformer2DModel):
        return mmdit_from_stock(stock, factor)
    if isinstance(stock, PixArtTransformer2DModel):
        return cross_dit_from_stock(stock, factor, pooled_width)
    if isinstance(stock, (UNet2DModel, UNet2DConditionModel)):
        return unet_from_stock(stock, factor, num_classes, pooled_width)
    raise ValueError(
        f"{type(stock).__name__} is no class that ours can hold: DiTTransformer2DModel, SD3Transformer2DModel, "
        f"PixArtTransformer2DModel, UNet2DModel and UNet2DConditionModel are."
    )


def check_classes(num_classes: int) -> None:
    """Raises ValueError for more classes than the stock pipeline can tell from none."""
    if num_classes > STOCK_NULL:
        raise ValueError(
            f"{num_classes} classes: the stock pipeline takes label {STOCK_NULL} for none, so it holds at most {STOCK_NULL}. "
            f"Give --export=false and sample with `sample.py --run`."
        )


def dit_from_stock(stock: DiTTransformer2DModel, num_classes: int, factor: float) -> DiT:
    """The reverse of `to_stock` for a DiT; exact, so there and back gives the same weights.

    Raises:
        ValueError: a stock configuration that our DiT cannot hold, or
            embeddings of time and class that differ between blocks.
    """
    c = stock.config
    width = c.num_attention_heads * c.attention_head_dim
    if c.activation_fn != "gelu-approximate" or not c.attention_bias or (c.out_channels or c.in_channels) != c.in_channels:
        raise ValueError(
            f"this DiT has activation {c.activation_fn}, attention_bias "
            f"{c.attention_bias}, out_channels {c.out_channels}: ours has the published ones."
        )
    ours = DiT(
        channels=c.in_channels, resolution=c.sample_size, num_classes=num_classes,
        patch_size=c.patch_size, width=width, depth=c.num_layers, heads=c.num_attention_heads,
    )  # fmt: skip
    theirs = stock.state_dict()
    state: dict[str, Tensor] = {}
    for name, sources in _dit_names(c.num_layers).items():
        parts = [theirs[source] for source in sources]
        joined = name.rpartition(".")[0].endswith("qkv")
        if not joined and any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise ValueError(f"{sources[0]} differs from block to block: ours has one embedding of time and class for all blocks.")
        state[name] = torch.cat(parts) if joined else parts[0]
    state["enter.weight"] = state["enter.weight"].flatten(1)
    table = state["classes.weight"]
    state["classes.weight"] = torch.cat([table[:num_classes], table[STOCK_NULL:]])
    ours.load_state_dict(scaled(state, "leave", factor))
    return ours


def _dit_names(depth: int) -> dict[str, list[str]]:
    """For each of our tensors the stock tensors that hold the same numbers: joined in order for qkv, copies of one another otherwise."""
    names: dict[str, list[str]] = {}
    for part in ("weight", "bias"):
        embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(depth)]
        names[f"time.enter.{part}"] = [f"{e}.timestep_embedder.linear_1.{part}" for e in embedders]
        names[f"time.leave.{part}"] = [f"{e}.timestep_embedder.linear_2.{part}" for e in embedders]
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
    names["classes.weight"] = [f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(depth)]
    return names


def _dit_to_stock(model: DiT, factor: float) -> DiTTransformer2DModel:
    width, heads = model.enter.out_features, model.blocks[0].attention.heads  # type: ignore[union-attr]
    stock = DiTTransformer2DModel(
        num_attention_heads=heads,  # type: ignore[arg-type]
        attention_head_dim=width // heads,  # type: ignore[operator]
        in_channels=model.channels,
        out_channels=model.channels,
        num_layers=len(model.blocks),
        sample_size=model.resolution,
        patch_size=model.patch_size,
        num_embeds_ada_norm=STOCK_NULL,
        norm_eps=1e-6,
    )
    ours = scaled(model.state_dict(), "leave", factor)
    ours["enter.weight"] = ours["enter.weight"].view(width, model.channels, model.patch_size, model.patch_size)
    ours["classes.weight"] = padded(ours["classes.weight"])
    state: dict[str, Tensor] = {}
    for name, targets in _dit_names(len(model.blocks)).items():
        parts = ours[name].chunk(3) if name.rpartition(".")[0].endswith("qkv") else [ours[name]] * len(targets)
        state |= dict(zip(targets, parts, strict=True))
    stock.load_state_dict(state)
    return stock.eval()
