"""Weights of ours as diffusers' stock classes, or where none holds them as classes of our own, and back.

Each network's spec knows how (`common.spec.StockForm`, `CustomForm`); what they share is here.
Where a stock network is to predict a multiple of what ours predicts (noise minus
data for data minus noise), the output layer takes the factor. Both embed 1000 (1 - t).
The stock pipeline calls the null class 1000, so the table of classes is padded
to 1001 rows; the rows between are null as well.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .common.spec import NetworkSpec, StockForm
from .common.weight_mapping import STOCK_NULL
from .registry import NETWORKS, find_spec
from .remote_code import custom_classes, custom_code_file, from_custom, to_custom

__all__ = [
    "STOCK_NULL",
    "check_num_classes",
    "check_travels",
    "custom_classes",
    "custom_code_file",
    "from_diffusers",
    "from_stock",
    "has_fixed_size",
    "stock_classes",
    "stock_form_of",
    "to_diffusers",
    "to_stock",
    "unsupported_by_stock",
]


def stock_classes() -> dict[str, type[nn.Module]]:
    """Return the stock classes that ours can hold, by name."""
    return {cls.__name__: cls for spec in NETWORKS.values() if spec.stock for cls in spec.stock.classes}


def stock_form_of(stock: type[nn.Module]) -> tuple[NetworkSpec, StockForm] | None:
    """Return the network that can hold a stock class, and how; None where none can."""
    held = ((spec, spec.stock) for spec in NETWORKS.values() if spec.stock)
    return next(((spec, form) for spec, form in held if issubclass(stock, tuple(form.classes))), None)


def unsupported_by_stock(model: nn.Module, masked: bool = False, bucketed: bool = False) -> str:
    """Return why no stock class can hold a model, as `model.rope: diffusers' DiTTransformer2DModel has no such option`; "" where one can.

    Args:
        model: any.
        masked: whether it was trained on captions with padding that it does not look at.
        bucketed: whether it was trained on images of several shapes.
    """
    spec = find_spec(model)
    if spec is not None and spec.stock is not None:
        return spec.stock.unsupported(model, masked, bucketed)
    have = _listed(one.network.__name__ for one in NETWORKS.values() if one.stock)
    return f"{type(model).__name__} has no stock class: {have} have"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def has_fixed_size(model: nn.Module, bucketed: bool) -> bool:
    """Return whether a model draws images of the size it was trained on alone: its stock class would stretch its positions.

    Args:
        model: any.
        bucketed: as in `unsupported_by_stock`.
    """
    spec = find_spec(model)
    fixed = spec is not None and spec.stock is not None and spec.stock.fixed_size
    return fixed and not unsupported_by_stock(model, bucketed=bucketed)


def to_diffusers(model: nn.Module, factor: float, masked: bool = False, bucketed: bool = False) -> nn.Module:
    """Return the network to export, which gives `factor` times the same output: stock where one holds it, or else ours with its code.

    Args:
        model: a network; on meta for one without values.
        factor: on the output layer.
        masked, bucketed: as in `unsupported_by_stock`, which says why.

    Raises:
        ValueError: another class, or for a stock class more classes than its pipeline can tell from none.
    """
    return to_custom(model, factor) if unsupported_by_stock(model, masked, bucketed) else to_stock(model, factor, masked)


def from_diffusers(exported: nn.Module, factor: float, *, num_classes: int | None = None, pooled_width: int = 1) -> nn.Module:
    """Return what `to_diffusers` was given, of what it gave; without code from the folder where a class of ours has read it.

    Args:
        exported: a stock network, or one of `custom_classes`.
        factor: that `to_diffusers` was given; it is undone.
        num_classes, pooled_width: as in `from_stock`; ours know them.

    Raises:
        ValueError: another class, or a configuration that ours cannot hold.
    """
    if isinstance(exported, tuple(custom_classes().values())):
        return from_custom(exported, 1 / factor)
    return from_stock(exported, 1 / factor, num_classes=num_classes, pooled_width=pooled_width)


def to_stock(model: nn.Module, factor: float, masked: bool = False) -> nn.Module:
    """Return a stock network that gives `factor` times the same output.

    Args:
        model: a network with a stock form.
        factor: on the output layer.
        masked: as in `unsupported_by_stock`.

    Raises:
        ValueError: another class, options that no stock class has, or more
            classes than the stock pipeline can tell from none.
    """
    check_num_classes(getattr(model, "num_classes", 0))
    spec = find_spec(model)
    if spec is None or spec.stock is None:
        raise ValueError(f"{unsupported_by_stock(model)}.")
    return spec.stock.to_stock(model, factor, masked)


def from_stock(stock: nn.Module, factor: float, *, num_classes: int | None = None, pooled_width: int = 1) -> nn.Module:
    """Return a network of ours that gives `factor` times the same output.

    Args:
        stock: of one of `stock_classes`.
        factor: on the output layer.
        num_classes: of the classes; None for what its table holds.
        pooled_width: for text networks that do not use pooled text.

    Raises:
        ValueError: another class, or a configuration that ours cannot hold.
    """
    found = stock_form_of(type(stock))
    if found is None:
        raise ValueError(f"{type(stock).__name__} is no class that ours can hold: {_listed(stock_classes())} are.")
    return found[1].from_stock(stock, factor, num_classes, pooled_width)


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError for more classes than the stock pipeline can tell from none."""
    if num_classes > STOCK_NULL:
        raise ValueError(
            f"{num_classes} classes: the stock pipeline takes label {STOCK_NULL} for none, so it holds at most {STOCK_NULL}. "
            f"Give --export=false and sample with `sample.py --run`."
        )


def check_travels(kind: str) -> None:
    """Raises ValueError for a kind of network that can be exported in no class."""
    spec = NETWORKS[kind]
    if spec.stock is None and spec.custom is None:
        raise ValueError(
            f"model.kind={kind}: a {spec.network.__name__} has no class to be exported in. Give --export=false and sample with "
            f"`sample.py --run`, or give its NetworkSpec a CustomForm."
        )
