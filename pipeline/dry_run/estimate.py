"""What a run takes of memory, disk, hours and money: arithmetic on sizes, without a network and without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, prod
from typing import NamedTuple

from ..config.schema import Config
from ..ema import snapshots as snapped
from ..ema.averages import laws

FLOAT = 4
"""Bytes of a weight, a gradient, a moment, an average: all are float32."""
MOMENTS = 2
"""AdamW's."""
Shape = tuple[int, ...]


class Sizes(NamedTuple):
    """A network."""

    weights: Sequence[Shape]
    """The shape of each."""
    trained: Sequence[Shape]
    """Of those that are not frozen."""
    units: Sequence[Sequence[Shape]]
    """The weights that FSDP2 gathers together: block by block, last all that stands in none."""
    kept: int
    """Numbers in what a checkpoint keeps of it, buffers among them."""


class World(NamedTuple):
    """How many processes there are, and among how many of them a tensor is shared out."""

    ranks: int
    among: int

    @classmethod
    def of(cls, sharding: str, ranks: int, local: int) -> World:
        """`local`: ranks of one machine."""
        return cls(ranks, {"none": 1, "full": ranks, "hybrid": local}[sharding])


def numbers(shapes: Iterable[Shape], among: int = 1) -> int:
    """Numbers in the largest share of some tensors that are cut along their first dimension, as FSDP2 cuts them."""
    return sum(ceil(shape[0] / among) * prod(shape[1:]) if shape else 1 for shape in shapes)


def averages(config: Config) -> int:
    """How many averages are kept: the first of all weights, or without any these themselves; further ones of trained weights."""
    return len(laws(config.ema))


def held(sizes: Sizes, config: Config, world: World, half: bool) -> dict[str, int]:
    """Bytes that one rank holds all the time, by part.

    Args:
        sizes: of the network.
        config: of the run.
        world: its processes.
        half: products are in half precision.
    """
    whole, trained = (numbers(shapes, world.among) for shapes in (sizes.weights, sizes.trained))
    parts = {
        "weights": FLOAT * whole,
        "gradients": FLOAT * trained,
        "optimiser": FLOAT * MOMENTS * trained,
        "averages": FLOAT * (whole + (averages(config) - 1) * trained),
    }
    return parts | ({"gathered": gathered(sizes, half)} if world.among > 1 else {})


def gathered(sizes: Sizes, half: bool) -> int:
    """Bytes of what FSDP2 puts together on each rank for a while.

    The weights that stand in no block, and those of the block at work and of
    the next, in the precision of the products; the gradients of a block as
    they come, and in float32 on their way to the other ranks.
    """
    *blocks, rest = [numbers(unit) for unit in sizes.units]
    block, one = max(blocks, default=0), FLOAT // 2 if half else FLOAT
    return one * (rest + 2 * block) + (one + FLOAT) * block


def checkpoint(sizes: Sizes, config: Config) -> int:
    """Bytes of one checkpoint: weights, averages, two moments and a step of each trained weight."""
    trained, further = numbers(sizes.trained), averages(config) - 1
    return FLOAT * (2 * sizes.kept + (MOMENTS + further) * trained + len(sizes.trained))


def snapshots(sizes: Sizes, config: Config) -> tuple[int, int]:
    """How many snapshots of the power averages a run leaves, and bytes of each."""
    batch = config.train.batch_size
    return snapped.count(config.ema, batch, config.train.max_steps * batch), FLOAT * numbers(sizes.trained) * len(config.ema.power)


def reading(samples: Sequence[int], config: Config, ranks: int) -> list[str]:
    """How often a run reads its data; `samples` of each shard."""
    total, batch, steps, shards = sum(samples), config.train.batch_size, config.train.max_steps, len(samples)
    spread = f"{min(samples):,} to {max(samples):,} images" if len(set(samples)) > 1 else count(samples[0], "image")
    return [
        f"{count(total, 'image')} in {count(shards, 'shard')} of {spread}",
        f"{total / ranks:,.6g} images and {shards / ranks:,.4g} shards a rank and epoch",
        f"{total / batch:,.6g} steps an epoch, {steps * batch / total:,.4g} epochs in {count(steps, 'step')}",
    ]


def price(config: Config, ranks: int) -> list[str]:
    """Hours, and cost, at the stated throughput."""
    plan, images = config.plan, config.train.max_steps * config.train.batch_size
    if not plan.images_per_second:
        return [f"{images:,} images; hours: give --plan.images_per_second, of one rank, and --plan.cost_per_hour"]
    hours = images / (plan.images_per_second * ranks) / 3600
    said = f"{images:,} images at {plan.images_per_second:,g} a second and rank: {hours:,.4g} hours, {hours * ranks:,.4g} of one rank's"
    return [f"{said}; {hours * ranks * plan.cost_per_hour:,.2f} at {plan.cost_per_hour:g} an hour" if plan.cost_per_hour else said]


def size(number: float) -> str:
    """Bytes as they are read: 123 MB, 1.5 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:,.0f} {unit}"
    return f"{number:.0f} B"


def amount(number: float) -> str:
    """A large number: 130.3 M, 23.02 G."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:g}"


def count(number: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
