"""Weights of ours as diffusers' stock classes, and back: one way in for every kind.

Where a stock network is to predict a multiple of what ours predicts (noise minus
data for data minus noise), the output layer takes the factor. Both embed 1000 (1 - t).
The stock pipeline calls the null class 1000, so the table of classes is padded
to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from .convert_cross_dit import cross_dit_from_stock, cross_dit_to_stock
from .convert_dit import dit_from_stock, dit_to_stock
from .convert_mmdit import mmdit_from_stock, mmdit_to_stock
from .convert_unet import unet_from_stock, unet_to_stock
from .cross_dit import CrossDiT
from .dit import DiT
from .layout import STOCK_NULL
from .mmdit import MMDiT
from .unet import UNet

__all__ = ["STOCK_NULL", "check_classes", "dit_from_stock", "from_stock", "to_stock"]


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
        return dit_to_stock(model, factor)
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
        return dit_from_stock(stock, stock.config.num_embeds_ada_norm if num_classes is None else num_classes, factor)
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
