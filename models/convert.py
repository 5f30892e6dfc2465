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
from .cross_dit.convert import cross_dit_from_stock, cross_dit_to_stock, cross_dit_unheld
from .cross_dit.model import CrossDiT
from .dit.convert import dit_from_stock, dit_to_stock, dit_unheld
from .dit.model import DiT
from .mmdit.convert import mmdit_from_stock, mmdit_to_stock, mmdit_unheld
from .mmdit.model import MMDiT
from .remote_code import OWN, code_of, from_own, to_own
from .unet.convert import unet_from_stock, unet_to_stock
from .unet.model import UNet

__all__ = [
    "OWN",
    "STOCK_NULL",
    "check_classes",
    "code_of",
    "dit_from_stock",
    "from_exported",
    "from_stock",
    "one_size",
    "to_exported",
    "to_stock",
]


def unheld(model: nn.Module, masked: bool = False, bucketed: bool = False) -> str:
    """Why no stock class can hold a model, as `model.rope: diffusers' DiTTransformer2DModel has no such option`; nothing where one can.

    Args:
        model: any.
        masked: whether it was trained on captions with padding that it does not look at.
        bucketed: whether it was trained on images of several shapes.
    """
    if isinstance(model, DiT):
        stretched = "data.aspect_ratios: diffusers' DiTTransformer2DModel stretches its positions over another shape, and training did not"
        return dit_unheld(model) or (stretched if bucketed else "")
    if isinstance(model, MMDiT):
        return mmdit_unheld(model, masked)
    if isinstance(model, CrossDiT):
        return cross_dit_unheld(model)
    return "" if isinstance(model, UNet) else f"{type(model).__name__} has no stock class: DiT, MMDiT, CrossDiT and UNet have"


def one_size(model: nn.Module, bucketed: bool) -> bool:
    """Return whether a model draws images of the size it was trained on alone: a DiT whose stock class would stretch its positions.

    Args:
        model: any.
        bucketed: as in `unheld`.
    """
    return isinstance(model, DiT) and not unheld(model, bucketed=bucketed)


def to_exported(model: nn.Module, factor: float, masked: bool = False, bucketed: bool = False) -> nn.Module:
    """The network to export, which gives `factor` times the same output: stock where one holds it, or else ours with code (`code_of`).

    Args:
        model: a DiT, MMDiT, CrossDiT or UNet; on meta for one without values.
        factor: on the output layer.
        masked, bucketed: as in `unheld`, which says why.

    Raises:
        ValueError: another class, or for a stock class more classes than its pipeline can tell from none.
    """
    return to_own(model, factor) if unheld(model, masked, bucketed) else to_stock(model, factor, masked)


def from_exported(exported: nn.Module, factor: float, *, num_classes: int | None = None, pooled_width: int = 1) -> nn.Module:
    """What `to_exported` was given, of what it gave; without code from the folder where OWN's class of that name has read it.

    Args:
        exported: a stock network, or one of OWN.
        factor: that `to_exported` was given; it is undone.
        num_classes, pooled_width: as in `from_stock`; ours know them.

    Raises:
        ValueError: another class, or a configuration that ours cannot hold.
    """
    if isinstance(exported, tuple(OWN.values())):
        return from_own(exported, 1 / factor)
    return from_stock(exported, 1 / factor, num_classes=num_classes, pooled_width=pooled_width)


def to_stock(model: nn.Module, factor: float, masked: bool = False) -> nn.Module:
    """A stock network that gives `factor` times the same output.

    Args:
        model: a DiT, MMDiT, CrossDiT or UNet.
        factor: on the output layer.
        masked: as in `unheld`.

    Raises:
        ValueError: another class, options that no stock class has, or more
            classes than the stock pipeline can tell from none.
    """
    check_classes(getattr(model, "num_classes", 0))
    if isinstance(model, DiT):
        return dit_to_stock(model, factor)
    if isinstance(model, MMDiT):
        return mmdit_to_stock(model, factor, masked)
    if isinstance(model, CrossDiT):
        return cross_dit_to_stock(model, factor)
    if isinstance(model, UNet):
        return unet_to_stock(model, factor)
    raise ValueError(f"{unheld(model)}.")


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
