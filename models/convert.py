"""Weights of ours as diffusers' stock classes, or where none holds them as classes of our own, and back: one way in for every kind.

Where a stock network is to predict a multiple of what ours predicts (noise minus
data for data minus noise), the output layer takes the factor. Both embed 1000 (1 - t).
The stock pipeline calls the null class 1000, so the table of classes is padded
to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from .common.weight_mapping import STOCK_NULL
from .cross_dit.convert import cross_dit_from_stock, cross_dit_to_stock, cross_dit_unsupported_by_stock
from .cross_dit.model import CrossDiT
from .dit.convert import dit_from_stock, dit_to_stock, dit_unsupported_by_stock
from .dit.model import DiT
from .mmdit.convert import mmdit_from_stock, mmdit_to_stock, mmdit_unsupported_by_stock
from .mmdit.model import MMDiT
from .remote_code import CUSTOM_CLASSES, custom_code_file, from_custom, to_custom
from .unet.convert import unet_from_stock, unet_to_stock
from .unet.model import UNet

__all__ = [
    "CUSTOM_CLASSES",
    "STOCK_NULL",
    "check_num_classes",
    "custom_code_file",
    "dit_from_stock",
    "from_diffusers",
    "from_stock",
    "has_fixed_size",
    "to_diffusers",
    "to_stock",
]


def unsupported_by_stock(model: nn.Module, masked: bool = False, bucketed: bool = False) -> str:
    """Why no stock class can hold a model, as `model.rope: diffusers' DiTTransformer2DModel has no such option`; nothing where one can.

    Args:
        model: any.
        masked: whether it was trained on captions with padding that it does not look at.
        bucketed: whether it was trained on images of several shapes.
    """
    if isinstance(model, DiT):
        stretched = "data.aspect_ratios: diffusers' DiTTransformer2DModel stretches its positions over another shape, and training did not"
        return dit_unsupported_by_stock(model) or (stretched if bucketed else "")
    if isinstance(model, MMDiT):
        return mmdit_unsupported_by_stock(model, masked)
    if isinstance(model, CrossDiT):
        return cross_dit_unsupported_by_stock(model)
    return "" if isinstance(model, UNet) else f"{type(model).__name__} has no stock class: DiT, MMDiT, CrossDiT and UNet have"


def has_fixed_size(model: nn.Module, bucketed: bool) -> bool:
    """Return whether a model draws images of the size it was trained on alone: a DiT whose stock class would stretch its positions.

    Args:
        model: any.
        bucketed: as in `unsupported_by_stock`.
    """
    return isinstance(model, DiT) and not unsupported_by_stock(model, bucketed=bucketed)


def to_diffusers(model: nn.Module, factor: float, masked: bool = False, bucketed: bool = False) -> nn.Module:
    """The network to export, which gives `factor` times the same output: stock where one holds it, or else ours with its code.

    Args:
        model: a DiT, MMDiT, CrossDiT or UNet; on meta for one without values.
        factor: on the output layer.
        masked, bucketed: as in `unsupported_by_stock`, which says why.

    Raises:
        ValueError: another class, or for a stock class more classes than its pipeline can tell from none.
    """
    return to_custom(model, factor) if unsupported_by_stock(model, masked, bucketed) else to_stock(model, factor, masked)


def from_diffusers(exported: nn.Module, factor: float, *, num_classes: int | None = None, pooled_width: int = 1) -> nn.Module:
    """What `to_diffusers` was given, of what it gave; without code from the folder where CUSTOM_CLASSES's class of that name has read it.

    Args:
        exported: a stock network, or one of CUSTOM_CLASSES.
        factor: that `to_diffusers` was given; it is undone.
        num_classes, pooled_width: as in `from_stock`; ours know them.

    Raises:
        ValueError: another class, or a configuration that ours cannot hold.
    """
    if isinstance(exported, tuple(CUSTOM_CLASSES.values())):
        return from_custom(exported, 1 / factor)
    return from_stock(exported, 1 / factor, num_classes=num_classes, pooled_width=pooled_width)


def to_stock(model: nn.Module, factor: float, masked: bool = False) -> nn.Module:
    """A stock network that gives `factor` times the same output.

    Args:
        model: a DiT, MMDiT, CrossDiT or UNet.
        factor: on the output layer.
        masked: as in `unsupported_by_stock`.

    Raises:
        ValueError: another class, options that no stock class has, or more
            classes than the stock pipeline can tell from none.
    """
    check_num_classes(getattr(model, "num_classes", 0))
    if isinstance(model, DiT):
        return dit_to_stock(model, factor)
    if isinstance(model, MMDiT):
        return mmdit_to_stock(model, factor, masked)
    if isinstance(model, CrossDiT):
        return cross_dit_to_stock(model, factor)
    if isinstance(model, UNet):
        return unet_to_stock(model, factor)
    raise ValueError(f"{unsupported_by_stock(model)}.")


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


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError for more classes than the stock pipeline can tell from none."""
    if num_classes > STOCK_NULL:
        raise ValueError(
            f"{num_classes} classes: the stock pipeline takes label {STOCK_NULL} for none, so it holds at most {STOCK_NULL}. "
            f"Give --export=false and sample with `sample.py --run`."
        )
