"""What a run takes of memory, disk, hours and money: arithmetic on sizes, without a network and without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, prod
from typing import NamedTuple

from ..config.schema import Config
from ..ema import snapshots as snapped
from ..ema.averages import ema_profiles

FLOAT32_BYTES = 4
"""Bytes of a weight, a gradient, a moment, an average: all are float32."""
ADAM_MOMENTS = 2
"""AdamW's."""
Shape = tuple[int, ...]


class NetworkSizes(NamedTuple):
    """A network."""

    weights: Sequence[Shape]
    """The shape of each."""
    trainable: Sequence[Shape]
    """Of those that are not frozen."""
    fsdp_units: Sequence[Sequence[Shape]]
    """The weights that FSDP2 gathers together: block by block, last all that stands in none."""
    state_numbers: int
    """Numbers in what a checkpoint keeps of it, buffers among them."""


class ParallelDims(NamedTuple):
    """How many processes there are, and among how many of them a tensor is shared out."""

    ranks: int
    shard_degree: int

    @classmethod
    def from_sharding(cls, sharding: str, ranks: int, local: int) -> ParallelDims:
        """`local`: ranks of one machine."""
        return cls(ranks, {"none": 1, "full": ranks, "hybrid": local}[sharding])


def count_numbers(shapes: Iterable[Shape], shard_degree: int = 1) -> int:
    """Numbers in the largest share of some tensors that are cut along their first dimension, as FSDP2 cuts them."""
    return sum(ceil(shape[0] / shard_degree) * prod(shape[1:]) if shape else 1 for shape in shapes)


def count_averages(config: Config) -> int:
    """How many averages are kept: the first of all weights, or without any these themselves; further ones of trained weights."""
    return len(ema_profiles(config.ema))


def resident_bytes(sizes: NetworkSizes, config: Config, world: ParallelDims, half: bool) -> dict[str, int]:
    """Bytes that one rank holds all the time, by part.

    Args:
        sizes: of the network.
        config: of the run.
        world: its processes.
        half: products are in half precision.
    """
    weights, trainable = (count_numbers(shapes, world.shard_degree) for shapes in (sizes.weights, sizes.trainable))
    parts = {
        "weights": FLOAT32_BYTES * weights,
        "gradients": FLOAT32_BYTES * trainable,
        "optimiser": FLOAT32_BYTES * ADAM_MOMENTS * trainable,
        "averages": FLOAT32_BYTES * (weights + (count_averages(config) - 1) * trainable),
    }
    return parts | ({"gathered": gathered_bytes(sizes, half)} if world.shard_degree > 1 else {})


def gathered_bytes(sizes: NetworkSizes, half: bool) -> int:
    """Bytes of what FSDP2 puts together on each rank for a while.

    The weights that stand in no block, and those of the block at work and of
    the next, in the precision of the products; the gradients of a block as
    they come, and in float32 on their way to the other ranks.
    """
    *blocks, rest = [count_numbers(unit) for unit in sizes.fsdp_units]
    block, product_bytes = max(blocks, default=0), FLOAT32_BYTES // 2 if half else FLOAT32_BYTES
    return product_bytes * (rest + 2 * block) + (product_bytes + FLOAT32_BYTES) * block


def checkpoint_bytes(sizes: NetworkSizes, config: Config) -> int:
    """Bytes of one checkpoint: weights, averages, two moments and a step of each trained weight."""
    trainable, further = count_numbers(sizes.trainable), count_averages(config) - 1
    return FLOAT32_BYTES * (2 * sizes.state_numbers + (ADAM_MOMENTS + further) * trainable + len(sizes.trainable))


def estimate_snapshots(sizes: NetworkSizes, config: Config) -> tuple[int, int]:
    """How many snapshots of the power averages a run leaves, and bytes of each."""
    batch = config.train.batch_size
    return snapped.count_snapshots(config.ema, batch, config.train.max_steps * batch), FLOAT32_BYTES * count_numbers(sizes.trainable) * len(
        config.ema.power
    )


def describe_epochs(samples: Sequence[int], config: Config, ranks: int) -> list[str]:
    """How often a run reads its data; `samples` of each shard."""
    total, batch, steps, shards = sum(samples), config.train.batch_size, config.train.max_steps, len(samples)
    spread = f"{min(samples):,} to {max(samples):,} images" if len(set(samples)) > 1 else format_count(samples[0], "image")
    return [
        f"{format_count(total, 'image')} in {format_count(shards, 'shard')} of {spread}",
        f"{total / ranks:,.6g} images and {shards / ranks:,.4g} shards a rank and epoch",
        f"{total / batch:,.6g} steps an epoch, {steps * batch / total:,.4g} epochs in {format_count(steps, 'step')}",
    ]


def describe_cost(config: Config, ranks: int) -> list[str]:
    """Hours, and cost, at the stated throughput."""
    plan, images = config.plan, config.train.max_steps * config.train.batch_size
    if not plan.images_per_second:
        return [f"{images:,} images; hours: give --plan.images_per_second, of one rank, and --plan.cost_per_hour"]
    hours = images / (plan.images_per_second * ranks) / 3600
    line = f"{images:,} images at {plan.images_per_second:,g} a second and rank: {hours:,.4g} hours, {hours * ranks:,.4g} of one rank's"
    return [f"{line}; {hours * ranks * plan.cost_per_hour:,.2f} at {plan.cost_per_hour:g} an hour" if plan.cost_per_hour else line]


def format_bytes(number: float) -> str:
    """Bytes as they are read: 123 MB, 1.5 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:,.0f} {unit}"
    return f"{number:.0f} B"


def format_si(number: float) -> str:
    """A large number: 130.3 M, 23.02 G."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:g}"


def format_count(number: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
