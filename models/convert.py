"""Weights of ours as diffusers' stock classes, and back.

Where a stock network is to predict a multiple of what ours predicts (noise minus
data for data minus noise), the output layer takes the factor. Both embed 1000 (1 - t).
The stock pipeline calls the null class 1000, so the table of classes is padded
to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from .convert_dit import STOCK_NULL, dit_from_stock, dit_to_stock, padded, scaled
from .dit import DiT
from .unet import UNet

__all__ = ["STOCK_NULL", "check_classes", "dit_from_stock", "to_stock"]


def to_stock(model: nn.Module, factor: float) -> DiTTransformer2DModel | UNet2DModel:
    """A stock network that gives `factor` times the same output.

    Args:
        model: a DiT or UNet.
        factor: on the output layer.

    Raises:
        ValueError: another class, or more classes than the stock pipeline can tell from none.
    """
    if not isinstance(model, (DiT, UNet)):
        raise ValueError(f"{type(model).__name__} has no stock class: DiT and UNet have.")
    check_classes(model.num_classes)
    return dit_to_stock(model, factor) if isinstance(model, DiT) else _unet_to_stock(model, factor)


def check_classes(num_classes: int) -> None:
    """Raises ValueError for more classes than the stock pipeline can tell from none."""
    if num_classes > STOCK_NULL:
        raise ValueError(
            f"{num_classes} classes: the stock pipeline takes label {STOCK_NULL} for none, so it holds at most {STOCK_NULL}. "
            f"Give --export=false and sample with `sample.py --run`."
        )


def _unet_to_stock(model: UNet, factor: float) -> UNet2DModel:
    stock = UNet2DModel.from_config({**model.net.config, "num_class_embeds": STOCK_NULL + 1})
    state = scaled(model.net.state_dict(), "conv_out", factor)
    state["class_embedding.weight"] = padded(state["class_embedding.weight"])
    stock.load_state_dict(state)
    return stock.eval()
