"""The U-Nets as diffusers' UNet2DModel and UNet2DConditionModel, and back.

Ours holds the stock network itself; only the table of classes differs, as the
stock pipeline calls the null class 1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from ..common.conditioning import FREQUENCY_CHANNELS, MICRO_CONDITIONS
from ..common.spec import FROM_DATA, HiddenOptions, StockForm
from ..common.weight_mapping import STOCK_NULL, pad_class_table, scale_layer
from .model import LAYOUTS, UNet

CLASS_TABLE = "net.class_embedding.weight"


def unet_options(config: Mapping[str, Any], text: bool, num_classes: int | None = None, pooled_width: int = 1) -> dict[str, Any]:
    """The arguments of UNet for stock weights.

    Args:
        config: of the stock network, complete.
        text: whether it is a UNet2DConditionModel.
        num_classes: None for as many as the table has beside the null row.
        pooled_width: which stock weights without sizes do not know.

    Raises:
        ValueError: a configuration that ours cannot hold.
    """
    channels = tuple(config["block_out_channels"])
    where = tuple(i for i, kind in enumerate(config["down_block_types"]) if "Attn" in kind)
    heads = config["attention_head_dim"]
    if text:
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        widths = {c // n for c, n in zip(channels, heads, strict=True)} if set(heads) != {1} else {0}
        heads = widths.pop() if len(widths) == 1 else -1
    layout = next((name for name, facts in reversed(LAYOUTS.items()) if all(config.get(k) == v for k, v in facts.items())), "plain")
    rows = config["num_class_embeds"] or 1
    options = {
        "channels": config["in_channels"], "resolution": config["sample_size"], "condition": "text" if text else "class",
        "block_channels": channels, "layers_per_block": config["layers_per_block"], "attention_at": where, "attention_levels": len(where),
        "head_width": heads or 0, "layout": layout,
    }  # fmt: skip
    if not text:
        options["num_classes"] = rows - 1 if num_classes is None else num_classes
    else:
        sizes = config["addition_embed_type"] == "text_time"
        pooled = config["projection_class_embeddings_input_dim"] - MICRO_CONDITIONS * FREQUENCY_CHANNELS if sizes else pooled_width
        options |= {"text_width": config["cross_attention_dim"], "pooled_width": pooled, "micro_conditions": sizes}
    _check_equal_config(options, config)
    return options


def _check_equal_config(options: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError naming every field in which the network of these options is not the stock one."""
    who = "UNet2DConditionModel" if options["condition"] == "text" else "UNet2DModel"
    if options["head_width"] < 0 or not isinstance(options["layers_per_block"], int) or not isinstance(options["resolution"], int):
        raise ValueError(
            f"this {who} has attention_head_dim={config['attention_head_dim']}, layers_per_block={config['layers_per_block']}, "
            f"sample_size={config['sample_size']}: ours has heads of one width, as many layers at each level, square images. "
            f"It cannot be held."
        )
    with torch.device("meta"):
        ours = UNet(**options).net.config
    free = {"sample_size", "num_class_embeds", *(k for k in config if k.startswith("_"))}
    other = [
        f"{k}={config[k]!r} (ours {ours[k]!r})" for k in config if k not in free and k in ours and not _equal_values(config[k], ours[k])
    ]
    if other:
        raise ValueError(f"this {who} has {', '.join(other)}: model.kind=unet has no such form. It cannot be held.")


def _equal_values(a: Any, b: Any) -> bool:
    """Lists are tuples, none is 0, and one number for all levels is that number for each."""
    a, b = (tuple(v) if isinstance(v, (list, tuple)) else v or 0 for v in (a, b))
    if isinstance(a, tuple) != isinstance(b, tuple):
        many, one = (a, b) if isinstance(a, tuple) else (b, a)
        return set(many) == {one}
    return bool(a == b)


def unet_state(state: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Our tensors from the stock ones; of a table of 1001 classes or fewer the first ones, and the last row for none."""
    ours = {f"net.{name}": value for name, value in state.items()}
    if CLASS_TABLE in ours and num_classes < len(ours[CLASS_TABLE]) - 1:
        ours[CLASS_TABLE] = torch.cat([ours[CLASS_TABLE][:num_classes], ours[CLASS_TABLE][-1:]])
    return ours


def unet_from_stock(
    stock: UNet2DModel | UNet2DConditionModel, factor: float, num_classes: int | None = None, pooled_width: int = 1
) -> UNet:
    """A UNet that gives `factor` times the same output."""
    ours = UNet(**unet_options(stock.config, isinstance(stock, UNet2DConditionModel), num_classes, pooled_width))
    ours.load_state_dict(scale_layer(unet_state(stock.state_dict(), ours.num_classes), "net.conv_out", factor))
    return ours


def unet_to_stock(model: UNet, factor: float) -> UNet2DModel | UNet2DConditionModel:
    """A stock network that gives `factor` times the same output; without classes a plain one, as DDPMPipeline takes it."""
    state = scale_layer(model.net.state_dict(), "conv_out", factor)
    config = dict(model.net.config)
    if model.num_classes:
        config["num_class_embeds"] = STOCK_NULL + 1
        state["class_embedding.weight"] = pad_class_table(state["class_embedding.weight"])
    stock = type(model.net).from_config(config)
    stock.load_state_dict(state)
    return stock.eval()


def _plain_options(config: Mapping[str, Any], text: bool) -> dict[str, Any]:
    """Return the options of a UNet that its weights decide, said in the plainest way."""
    facts = unet_options(config, text)
    facts.pop("num_classes", None)
    levels, where = len(facts["block_channels"]), facts["attention_at"]
    coarsest = where == tuple(range(levels - len(where), levels))
    facts["attention_at" if coarsest else "attention_levels"] = None
    if facts["layout"] == "plain":
        facts["layout"] = None
    if not facts.get("micro_conditions"):
        facts |= {"pooled_width": None, "micro_conditions": None}
    return {key: value for key, value in facts.items() if value is not None}


def _hidden_options(network: UNet, model: Mapping[str, Any], data: Mapping[str, int]) -> HiddenOptions:
    have = _plain_options(network.net.config, network.conditioning == "text")
    compared = {**have, **model}.keys() - {*FROM_DATA, "kind", "micro_conditions"}
    return HiddenOptions({key: have.get(key) for key in {**have, **model} if key in compared}, dict(model))


UNET_STOCK = StockForm(
    classes={UNet2DModel: ("ddpm", "noise"), UNet2DConditionModel: ("ddpm_scaled_linear", "noise")},
    to_stock=lambda model, factor, masked: unet_to_stock(model, factor),
    from_stock=unet_from_stock,
    unsupported=lambda model, masked, bucketed: "",
    options=lambda found: _plain_options(found.config, found.kind == UNet2DConditionModel.__name__),
    hidden_options=_hidden_options,
)
