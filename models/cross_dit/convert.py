"""The cross-attention DiT as diffusers' PixArtTransformer2DModel, and back; and the configuration of the class that travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import PixArtTransformer2DModel

from ..common.custom_config import transformer_config
from ..common.spec import CustomForm, HiddenOptions, PublishedWeights, StockForm
from ..common.weight_mapping import (
    StockSource,
    WeightMap,
    check_stock_config,
    drop_variances,
    map_from_stock,
    map_layer,
    map_to_stock,
    scale_layer,
)
from .model import CrossDiT
from .modeling_cross_dit_v1 import CondotCrossDiT


def cross_dit_options(config: Mapping[str, Any], pooled_width: int = 1) -> dict[str, Any]:
    """The arguments of CrossDiT for stock weights.

    Args:
        config: of the stock network.
        pooled_width: which stock weights do not know, as they do not use it.

    Raises:
        ValueError: a configuration that ours cannot hold.
    """
    width, channels, side = config["num_attention_heads"] * config["attention_head_dim"], config["in_channels"], config["sample_size"]
    more = config.get("use_additional_conditions")
    given = {**config, "use_additional_conditions": side == 128 if more is None else more}
    given["out_channels"] = channels if config.get("out_channels") in (None, 2 * channels) else config["out_channels"]
    published = {
        "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "attention_type": "default", "cross_attention_dim": width, "use_additional_conditions": False,
        "out_channels": channels, "upcast_attention": False, "dropout": 0.0,
    }  # fmt: skip
    check_stock_config("PixArtTransformer2DModel", given, published)
    if config.get("caption_channels") is None:
        raise ValueError("this PixArtTransformer2DModel has caption_channels=None: ours projects the text. It cannot be held.")
    scale = config.get("interpolation_scale")
    return {
        "channels": channels, "resolution": side, "text_width": config["caption_channels"], "pooled_width": pooled_width,
        "patch_size": config["patch_size"], "width": width, "depth": config["num_layers"], "heads": config["num_attention_heads"],
        "interpolation_scale": None if scale == max(side // 64, 1) else scale,
    }  # fmt: skip


def cross_dit_weight_map(depth: int) -> WeightMap:
    """Which stock tensors hold the numbers of each of ours."""
    time = "adaln_single.emb.timestep_embedder"
    table = {
        **map_layer("time.enter", f"{time}.linear_1"), **map_layer("time.leave", f"{time}.linear_2"),
        **map_layer("modulation", "adaln_single.linear"), **map_layer("enter", "pos_embed.proj", transform="patch"),
        **map_layer("text.enter", "caption_projection.linear_1"), **map_layer("text.leave", "caption_projection.linear_2"),
        **map_layer("leave", "proj_out"), "table": StockSource(("scale_shift_table",)),
    }  # fmt: skip
    for i in range(depth):
        b, s = f"blocks.{i}", f"transformer_blocks.{i}"
        table |= {f"{b}.table": StockSource((f"{s}.scale_shift_table",))}
        table |= map_layer(f"{b}.attention.qkv", *(f"{s}.attn1.to_{x}" for x in "qkv")) | map_layer(
            f"{b}.attention.out", f"{s}.attn1.to_out.0"
        )
        table |= map_layer(f"{b}.cross.q", f"{s}.attn2.to_q") | map_layer(f"{b}.cross.kv", f"{s}.attn2.to_k", f"{s}.attn2.to_v")
        table |= map_layer(f"{b}.cross.out", f"{s}.attn2.to_out.0")
        table |= map_layer(f"{b}.feed_forward.enter", f"{s}.ff.net.0.proj") | map_layer(f"{b}.feed_forward.leave", f"{s}.ff.net.2")
    return table


def cross_dit_from_stock(stock: PixArtTransformer2DModel, factor: float, pooled_width: int = 1) -> CrossDiT:
    """A CrossDiT that gives `factor` times the same output; of one that also learned variances, the means."""
    ours = CrossDiT(**cross_dit_options(stock.config, pooled_width))
    state, _ = drop_variances(map_from_stock(cross_dit_weight_map(len(ours.blocks)), stock.state_dict()), ours.channels, ours.patch_size)
    ours.load_state_dict(scale_layer(state, "leave", factor))
    return ours


def cross_dit_unsupported_by_stock(model: CrossDiT) -> str:
    """Why the stock class cannot hold a model; nothing where it can."""
    more = [f"model.{field}=True" for field in ("micro_conditions", "qk_norm") if getattr(model, field)]
    return f"{', '.join(more)}: PixArtTransformer2DModel has no place for it" if more else ""


def cross_dit_to_stock(model: CrossDiT, factor: float) -> PixArtTransformer2DModel:
    """A stock network that gives `factor` times the same output; a ValueError for what it cannot hold."""
    refused = cross_dit_unsupported_by_stock(model)
    if refused:
        raise ValueError(f"{refused}. Give --export=false and sample with `sample.py --run`.")
    width, heads = model.enter.out_features, int(model.blocks[0].cross.heads)  # type: ignore[union-attr, arg-type]
    stock = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=model.channels,
        out_channels=model.outputs * model.channels,
        num_layers=len(model.blocks), cross_attention_dim=width, sample_size=model.resolution, patch_size=model.patch_size,
        interpolation_scale=model.interpolation_scale,
        use_additional_conditions=False, caption_channels=model.text.enter.in_features,
    )  # fmt: skip
    stock.load_state_dict(
        map_to_stock(cross_dit_weight_map(len(model.blocks)), scale_layer(model.state_dict(), "leave", factor), stock.state_dict())
    )
    return stock.eval()


def _published_options(found: PublishedWeights) -> dict[str, Any]:
    options = cross_dit_options(found.config)
    del options["pooled_width"]  # which stock weights do not know
    return options


def _hidden_options(network: CrossDiT, model: Mapping[str, Any], data: Mapping[str, int]) -> HiddenOptions:
    have: dict[str, Any] = {"heads": network.blocks[0].cross.heads}  # type: ignore[union-attr]
    want = dict(model)
    if network.resolution == data["resolution"]:  # at another one the scale may differ too
        have["interpolation_scale"] = network.interpolation_scale
        want.setdefault("interpolation_scale", max(data["resolution"] // 64, 1))
    return HiddenOptions(have, want)


def _custom_config(model: CrossDiT) -> dict[str, Any]:
    return {
        **transformer_config(model, int(model.blocks[0].cross.heads)),  # type: ignore[union-attr, arg-type]
        "caption_channels": model.text.enter.in_features, "pooled_projection_dim": model.pooled_width, "qk_norm": model.qk_norm,
        "interpolation_scale": model.interpolation_scale,
    }  # fmt: skip


CROSS_DIT_STOCK = StockForm(
    classes={PixArtTransformer2DModel: ("ddpm", "noise")},
    to_stock=lambda model, factor, masked: cross_dit_to_stock(model, factor),
    from_stock=lambda stock, factor, num_classes, pooled_width: cross_dit_from_stock(stock, factor, pooled_width),
    unsupported=lambda model, masked, bucketed: cross_dit_unsupported_by_stock(model),
    options=_published_options,
    hidden_options=_hidden_options,
    legacy_norm="ada_norm_single",
    predicts_variances=True,
)
CROSS_DIT_CUSTOM = CustomForm(cls=CondotCrossDiT, config=_custom_config)
