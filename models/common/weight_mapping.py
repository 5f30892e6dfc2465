"""Tables of which stock tensors hold the numbers of ours, read in either direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Transform = Literal["same", "joined", "swapped", "patch"]
"""joined: several, one after another; swapped: scale, then shift, where ours has shift first; patch: a convolution where ours is linear."""
STOCK_NULL = 1000
"""The label that DiTPipeline passes for no class."""


class StockSource(NamedTuple):
    """What of a stock network makes one tensor of ours."""

    names: tuple[str, ...]
    transform: Transform = "same"


WeightMap = dict[str, StockSource]
"""For each of our tensors its source."""


def map_layer(ours: str, *stock: str, transform: Transform | None = None) -> WeightMap:
    """The rows of a table for one of our linear maps, weight and bias; several stock ones are joined."""
    transform = transform or ("joined" if len(stock) > 1 else "same")
    transforms: dict[str, Transform] = {"weight": transform, "bias": "same" if transform == "patch" else transform}
    return {f"{ours}.{part}": StockSource(tuple(f"{layer}.{part}" for layer in stock), transform) for part, transform in transforms.items()}


def map_from_stock(table: WeightMap, stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from the stock ones; those whose sources are all there."""
    ours = {}
    for name, (names, transform) in table.items():
        parts = [stock[n] for n in names if n in stock]
        if len(parts) < len(names):
            continue
        if transform == "joined":
            ours[name] = torch.cat(parts)
        elif transform == "swapped":
            ours[name] = torch.cat(parts[0].chunk(2)[::-1])
        else:
            ours[name] = parts[0].flatten(1) if transform == "patch" else parts[0]
    return ours


def map_to_stock(table: WeightMap, ours: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stock tensors from ours, in the shapes of `shapes`; the reverse of `map_from_stock`."""
    stock: dict[str, Tensor] = {}
    for name, (names, transform) in table.items():
        value = torch.cat(ours[name].chunk(2)[::-1]) if transform == "swapped" else ours[name]
        for target, part in zip(names, value.chunk(len(names)) if transform == "joined" else [value], strict=True):
            stock[target] = part.reshape(shapes[target].shape)
    return stock


def scale_layer(state: Mapping[str, Tensor], layer: str, factor: float) -> dict[str, Tensor]:
    """The same tensors with those of one layer times a factor."""
    return {
        name: factor * value if factor != 1 and name in (f"{layer}.weight", f"{layer}.bias") else value for name, value in state.items()
    }


def drop_variances(state: Mapping[str, Tensor], channels: int, patch_size: int) -> tuple[dict[str, Tensor], bool]:
    """Without what an output layer `leave` of twice the channels says of variances; whether it did.

    Each token's rows are its rows, columns, channels: of these the first half.
    """
    rows, area = state["leave.weight"].shape[0] if "leave.weight" in state else 0, patch_size**2
    if rows != 2 * channels * area:
        return dict(state), False
    halved = {n: state[n].unflatten(0, (area, 2 * channels))[:, :channels].flatten(0, 1) for n in ("leave.weight", "leave.bias")}
    return {**state, **halved}, True


def pad_class_table(table: Tensor) -> Tensor:
    """Classes, then as many copies of the null row as fill rows up to STOCK_NULL."""
    null = table[-1:]
    return torch.cat([table[:-1], null.expand(STOCK_NULL + 1 - (len(table) - 1), -1)])


def check_stock_config(who: str, config: Mapping[str, object], published: Mapping[str, object]) -> None:
    """Raises ValueError naming every field of a stock configuration that is not as published, where ours can hold nothing else."""
    other = [f"{k}={config[k]!r}" for k, v in published.items() if k in config and config[k] != v]
    if other:
        expected = ", ".join(f"{k}={v!r}" for k, v in published.items() if k in config and config[k] != v)
        raise ValueError(f"this {who} has {', '.join(other)}: ours is the published form, {expected}. It cannot be held.")
