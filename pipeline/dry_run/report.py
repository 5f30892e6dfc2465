"""`--dry_run`: what a recipe takes, and every mistake in it, told in a minute; nothing is trained, nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from condot.core.printable import say

from ..checkpoint.disk_space import disk_shortage
from ..checkpoint.store import CheckpointManager
from ..config.parse import parse_collecting_errors
from ..config.schema import ALIASES, Config
from ..export.model_card import describe_images
from . import estimate
from .error_collector import Mistakes
from .estimate import format_bytes, format_count, format_si
from .resolved_recipe import DryRunHooks, ResolvedRecipe

MAX_MACS = {"no": 6e10, "half": 1.5e10}
"""Multiply-adds of the forward pass that is measured here, at most: seconds on two cores."""
MAX_BLOCKS = 2
"""Blocks of the network that is measured."""
PASSES_PER_STEP = 3
"""A training step takes so many forward passes: each product has two gradients."""
NOT_COUNTED = "CUDA itself, NCCL and what the allocator loses between blocks, often 1 to 3 GB, come on top."


def dry_run(argv: list[str], hooks: DryRunHooks) -> int:
    """Print what a recipe takes, and its mistakes.

    Args:
        argv: the command line, `--dry_run` among its words.
        hooks: see there.

    Returns:
        The exit status: 2 if there is a mistake.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    config, found = parse_collecting_errors(Config, argv, ALIASES)
    recipe = ResolvedRecipe(config, hooks, Mistakes(found))
    for line in report_lines(recipe):
        say(line)
    return 2 if recipe.mistakes else 0


def report_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """All that is to be said, as it is found."""
    yield f"{recipe.config.output_dir}: what it takes; nothing is trained, nothing is written."
    yield from _titled("network", network_lines(recipe))
    yield from _titled("data", data_lines(recipe))
    yield from _titled("memory", memory_lines(recipe))
    yield from _titled("disk", disk_lines(recipe))
    yield from _titled("time", estimate.describe_cost(recipe.config, recipe.world.ranks))
    yield from _titled("start", [recipe.check_start()])
    yield from _titled("note", recipe.notes)
    yield f"{format_count(len(recipe.mistakes), 'mistake')}{':' if recipe.mistakes else '.'}"
    yield from (f"  - {text}" for text in recipe.mistakes)


def network_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """Return the lines on weights and multiply-adds."""
    if not recipe.model:
        yield "cannot be built"
        return
    macs = recipe.hooks.count_params_and_macs(recipe.build_base_network(), recipe.shape, **recipe.text)[1]
    every, trained = estimate.count_numbers(recipe.sizes.weights), estimate.count_numbers(recipe.sizes.trainable)
    yield f"{recipe.config.model.kind}: {format_si(every)} weights, {'all' if trained == every else format_si(trained)} trained"
    again = "; a fourth forward pass where blocks are computed again" if recipe.config.model.gradient_checkpointing else ""
    image = " x ".join(map(str, recipe.shape))
    yield f"{format_si(macs)} multiply-adds forwards for an image of {image}, {format_si(PASSES_PER_STEP * macs)} in training{again}"
    for one in recipe.encoders:
        yield f"{one.title}, frozen: {format_si(one.weights)} weights, {format_si(one.macs)} multiply-adds an image"
    if recipe.encoders:
        yield f"{format_si(PASSES_PER_STEP * macs + sum(one.macs for one in recipe.encoders))} in training with the encoders"


def data_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """How much there is, and how often it is read."""
    train, world = recipe.config.train, recipe.world
    parts = f"{world.ranks} x {train.gradient_accumulation_steps} x {recipe.micro_batch}"
    yield f"a step's batch of {format_count(train.batch_size, 'image')}: ranks x accumulation x micro-batch = {parts}"
    yield image_line(recipe)
    if recipe.survey.samples:
        yield from estimate.describe_epochs(recipe.survey.samples, recipe.config, world.ranks)
    else:
        yield "the shards are not here: what hangs on their number is not known"


def image_line(recipe: ResolvedRecipe) -> str:
    """What is decoded: channels, bits, and the bytes that wait in the host's memory, where workers read ahead."""
    options, (height, width) = recipe.survey.options, recipe.survey.shape
    each = height * width * options.channels * options.bit_depth // 8
    ahead = 2 * options.workers + 1  # as Stream reads ahead, and the one that is learned
    kind = f"{describe_images(options.channels, options.bit_depth)}, {height} x {width} pixels: {format_bytes(each)} each"
    latents = options.autoencoder and options.encoding == "cached"
    return kind if latents else f"{kind}, up to {format_bytes(ahead * recipe.micro_batch * each)} decoded ahead"


def memory_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """Bytes of one rank by part, on a GPU and on a CPU; and whether the estimate agrees with what is measured here."""
    if not recipe.model:
        return
    try:
        prints = {
            kind: recipe.hooks.estimate_memory(
                recipe.build_network, recipe.build_step(recipe.micro_batch, recipe.shape), recipe.precision, kind
            )
            for kind in ("gpu", "cpu")
        }
    except RuntimeError as error:
        recipe.notes.append(f"activations could not be estimated ({' '.join(str(error).split())[:300]}).")
        return
    world = recipe.world
    kind = f"{recipe.sharding}{f' among {world.shard_degree}' if world.shard_degree > 1 else ''}"
    yield f"of one rank of {world.ranks}; sharding {kind}; mixed precision {recipe.precision}; micro-batch {recipe.micro_batch}"
    yield f"{'':34}{'on a GPU':>10}{'on a CPU':>10}"
    rows = {kind: memory_parts(recipe, found, kind) for kind, found in prints.items()}
    for name in rows["gpu"]:
        yield f"{name:34}{format_bytes(rows['gpu'][name]):>10}{format_bytes(rows['cpu'][name]):>10}"
    sums = {kind: sum(row.values()) for kind, row in rows.items()}
    yield f"{'sum, at most':34}{format_bytes(sums['gpu']):>10}{format_bytes(sums['cpu']):>10}"
    yield NOT_COUNTED
    yield from check_device(recipe, sums["gpu"])
    yield from compare_with_measurement(recipe)


def memory_parts(recipe: ResolvedRecipe, found: Any, kind: str) -> dict[str, int]:
    """Bytes by part, of a kind of device on which a step leaves this footprint; on a GPU those of the host are not among them."""
    half, many = recipe.precision != "no", estimate.count_averages(recipe.config)
    held = estimate.resident_bytes(recipe.sizes, recipe.config, recipe.world, half)
    held[f"averages ({many})"] = held.pop("averages")
    if recipe.encoders:
        held["frozen encoders"] = estimate.FLOAT32_BYTES * sum(one.weights for one in recipe.encoders)
    if half and recipe.world.shard_degree == 1:
        held["weights in half precision"] = found.copies
    if recipe.world.shard_degree > 1:
        held["gathered for a while"] = held.pop("gathered")
    held["copy for checkpoints"] = checkpoint_share(recipe) if kind == "cpu" else 0
    encoding = max((one.bytes for one in recipe.encoders), default=0)  # done before the network's activations begin
    held["activations" if found.activations >= encoding else "activations of an encoder"] = max(found.activations, encoding)
    return held


def checkpoint_share(recipe: ResolvedRecipe) -> int:
    """Bytes of a checkpoint that one rank copies into the host's memory, and writes while training goes on."""
    return -(-estimate.checkpoint_bytes(recipe.sizes, recipe.config) // recipe.world.ranks)


def check_device(recipe: ResolvedRecipe, needed: int) -> Iterator[str]:
    """Whether that much fits on the device that the plan names."""
    estimate = recipe.config.plan
    room = recipe.mistakes.attempt(recipe.hooks.bytes_of, estimate.memory, "plan.memory") if estimate.memory else None
    if room and needed > room:
        train, more = recipe.config.train, recipe.config.train.gradient_accumulation_steps * 2
        ways = [f"train.gradient_accumulation_steps={more}"] if recipe.micro_batch > 1 else []
        ways += [] if recipe.config.model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
        ways += ["train.sharding=full"] if recipe.world.shard_degree == 1 < recipe.world.ranks else []
        ways += ["train.mixed_precision=bf16"] if train.mixed_precision in (None, "no") else []
        recipe.mistakes.add(f"plan.memory={estimate.memory}: a rank needs {format_bytes(needed)}. Try {', '.join(ways) or 'more ranks'}.")
    elif room:
        yield f"fits into plan.memory={estimate.memory}, {format_bytes(room - needed)} are left"


def compare_with_measurement(recipe: ResolvedRecipe) -> Iterator[str]:
    """Activations estimated and measured here and now: of a few images, halved until they are soon done, in a network of few blocks."""
    blocks = len(recipe.sizes.fsdp_units) - 1
    reduced = {"depth": min(MAX_BLOCKS, blocks)} if "depth" in recipe.model else {}
    if "dual_attention_blocks" in recipe.model:
        reduced["dual_attention_blocks"] = min(MAX_BLOCKS, blocks, recipe.model["dual_attention_blocks"])
    network, half = recipe.build_base_network(**reduced), recipe.precision != "no"
    shape: tuple[int, ...] = recipe.shape
    unit, limit = int(network.size_multiple), MAX_MACS["half" if half else "no"]  # type: ignore[arg-type]
    while (macs := recipe.hooks.count_params_and_macs(network, shape, **recipe.text)[1]) > limit and min(shape[1:]) > unit:
        shape = shape[0], *(max(unit, side // 2 // unit * unit) for side in shape[1:])
    images = min(recipe.micro_batch, max(1, int(limit // macs)))
    what = f"{reduced['depth']} blocks" if reduced else "the whole network"
    what += f", {format_count(images, 'image')} of {' x '.join(map(str, shape))}"
    step = recipe.build_step(images, shape)
    estimated = recipe.hooks.estimate_memory(lambda: recipe.build_network(**reduced), step, recipe.precision, "cpu").peak
    if macs > 4 * limit or estimated + 2 * estimate.FLOAT32_BYTES * estimate.count_numbers(recipe.sizes.weights) > free_memory() / 2:
        yield (
            f"not measured here: a step of {what} takes {format_bytes(estimated)} "
            f"and {format_si(PASSES_PER_STEP * macs * images)} multiply-adds"
        )
        return
    found = recipe.hooks.measure_memory(recipe.build_network(**reduced, device="cpu", seed=0), step, recipe.precision)
    yield f"activations measured here, {what}: {format_bytes(found)}, estimated {format_bytes(estimated)} ({estimated / found - 1:+.1%})"


def free_memory() -> int:
    """Return the bytes of memory that this machine has left; where the system does not say, as on a Mac, half of what it has."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def disk_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """Checkpoints, and snapshots of the power averages."""
    if not recipe.model:
        return
    config, one = recipe.config, estimate.checkpoint_bytes(recipe.sizes, recipe.config)
    kept = min(config.checkpoint.keep, -(-config.train.max_steps // config.checkpoint.every))
    yield (
        f"a checkpoint: {format_bytes(one)} in {format_count(recipe.world.ranks, 'file')}; "
        f"a rank's {format_bytes(checkpoint_share(recipe))} pass through the host's memory"
    )
    yield f"{kept} kept: {format_bytes(kept * one)}, and {format_bytes((kept + 1) * one)} while one is written"
    many, each = estimate.estimate_snapshots(recipe.sizes, config)
    folder = Path(config.output_dir)
    there = min(kept, len(CheckpointManager(folder, 1).folders()))
    fault = disk_shortage(folder, one, checkpoint_share(recipe), kept + 1 - there)
    if fault:
        recipe.mistakes.add(f"output_dir={config.output_dir!r} cannot hold the checkpoints of this run: {fault}.")
    if many:
        yield f"{format_count(many, 'snapshot')} of the power averages, {format_bytes(each)} each: {format_bytes(many * each)}"


def _titled(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines under a title in the margin."""
    for line in lines:
        yield f"{title:9}{line}"
        title = ""
