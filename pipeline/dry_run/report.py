"""`--dry_run`: what a recipe takes, and every mistake in it, told in a minute; nothing is trained, nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from condot.core.printable import say

from ..checkpoint.disk_space import lacking
from ..checkpoint.store import Store
from ..config.parse import parse_all
from ..config.schema import ALIASES, Config
from ..export.model_card import kind_of
from . import estimate
from .error_collector import Mistakes
from .estimate import amount, count, size
from .resolved_recipe import Case, Rooms

PRODUCTS = {"no": 6e10, "half": 1.5e10}
"""Multiply-adds of the forward pass that is measured here, at most: seconds on two cores."""
SHALLOW = 2
"""Blocks of the network that is measured."""
TRAINING = 3
"""A training step takes so many forward passes: each product has two gradients."""
UNSEEN = "CUDA itself, NCCL and what the allocator loses between blocks, often 1 to 3 GB, come on top."


def dry_run(argv: list[str], rooms: Rooms) -> int:
    """Print what a recipe takes, and its mistakes.

    Args:
        argv: the command line, `--dry_run` among its words.
        rooms: see there.

    Returns:
        The exit status: 2 if there is a mistake.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    config, found = parse_all(Config, argv, ALIASES)
    case = Case(config, rooms, Mistakes(found))
    for line in told(case):
        say(line)
    return 2 if case.mistakes else 0


def told(case: Case) -> Iterator[str]:
    """All that is to be said, as it is found."""
    yield f"{case.config.output_dir}: what it takes; nothing is trained, nothing is written."
    yield from _titled("network", network(case))
    yield from _titled("data", data(case))
    yield from _titled("memory", memory(case))
    yield from _titled("disk", disk(case))
    yield from _titled("time", estimate.price(case.config, case.world.ranks))
    yield from _titled("start", [case.begin()])
    yield from _titled("note", case.notes)
    yield f"{count(len(case.mistakes), 'mistake')}{':' if case.mistakes else '.'}"
    yield from (f"  - {text}" for text in case.mistakes)


def network(case: Case) -> Iterator[str]:
    """Weights and multiply-adds."""
    if not case.model:
        yield "cannot be built"
        return
    products = case.rooms.cost(case.bare(), case.shape, **case.text)[1]
    every, trained = estimate.numbers(case.sizes.weights), estimate.numbers(case.sizes.trained)
    yield f"{case.config.model.kind}: {amount(every)} weights, {'all' if trained == every else amount(trained)} trained"
    again = "; a fourth forward pass where blocks are computed again" if case.config.model.gradient_checkpointing else ""
    image = " x ".join(map(str, case.shape))
    yield f"{amount(products)} multiply-adds forwards for an image of {image}, {amount(TRAINING * products)} in training{again}"
    for one in case.encoders:
        yield f"{one.title}, frozen: {amount(one.weights)} weights, {amount(one.products)} multiply-adds an image"
    if case.encoders:
        yield f"{amount(TRAINING * products + sum(one.products for one in case.encoders))} in training with the encoders"


def data(case: Case) -> Iterator[str]:
    """How much there is, and how often it is read."""
    train, world = case.config.train, case.world
    parts = f"{world.ranks} x {train.gradient_accumulation_steps} x {case.micro_batch}"
    yield f"a step's batch of {count(train.batch_size, 'image')}: ranks x accumulation x micro-batch = {parts}"
    yield pixels(case)
    if case.seen.samples:
        yield from estimate.reading(case.seen.samples, case.config, world.ranks)
    else:
        yield "the shards are not here: what hangs on their number is not known"


def pixels(case: Case) -> str:
    """What is decoded: channels, bits, and the bytes that wait in the host's memory, where workers read ahead."""
    options, (height, width) = case.seen.options, case.seen.shape
    each = height * width * options.channels * options.bit_depth // 8
    ahead = 2 * options.workers + 1  # as Stream reads ahead, and the one that is learned
    kind = f"{kind_of(options.channels, options.bit_depth)}, {height} x {width} pixels: {size(each)} each"
    latents = options.autoencoder and options.encoding == "cached"
    return kind if latents else f"{kind}, up to {size(ahead * case.micro_batch * each)} decoded ahead"


def memory(case: Case) -> Iterator[str]:
    """Bytes of one rank by part, on a GPU and on a CPU; and whether what is foretold is what is measured here."""
    if not case.model:
        return
    try:
        prints = {
            kind: case.rooms.foretell(case.network, case.step(case.micro_batch, case.shape), case.precision, kind)
            for kind in ("gpu", "cpu")
        }
    except RuntimeError as error:
        case.notes.append(f"activations could not be foretold ({' '.join(str(error).split())[:300]}).")
        return
    world = case.world
    kind = f"{case.sharding}{f' among {world.among}' if world.among > 1 else ''}"
    yield f"of one rank of {world.ranks}; sharding {kind}; mixed precision {case.precision}; micro-batch {case.micro_batch}"
    yield f"{'':34}{'on a GPU':>10}{'on a CPU':>10}"
    rows = {kind: parts(case, found, kind) for kind, found in prints.items()}
    for name in rows["gpu"]:
        yield f"{name:34}{size(rows['gpu'][name]):>10}{size(rows['cpu'][name]):>10}"
    sums = {kind: sum(row.values()) for kind, row in rows.items()}
    yield f"{'sum, at most':34}{size(sums['gpu']):>10}{size(sums['cpu']):>10}"
    yield UNSEEN
    yield from check_device(case, sums["gpu"])
    yield from compared(case)


def parts(case: Case, found: Any, kind: str) -> dict[str, int]:
    """Bytes by part, of a kind of device on which a step leaves this footprint; on a GPU those of the host are not among them."""
    half, many = case.precision != "no", estimate.averages(case.config)
    held = estimate.held(case.sizes, case.config, case.world, half)
    held[f"averages ({many})"] = held.pop("averages")
    if case.encoders:
        held["frozen encoders"] = estimate.FLOAT * sum(one.weights for one in case.encoders)
    if half and case.world.among == 1:
        held["weights in half precision"] = found.copies
    if case.world.among > 1:
        held["gathered for a while"] = held.pop("gathered")
    held["copy for checkpoints"] = share(case) if kind == "cpu" else 0
    encoding = max((one.bytes for one in case.encoders), default=0)  # done before the network's activations begin
    held["activations" if found.activations >= encoding else "activations of an encoder"] = max(found.activations, encoding)
    return held


def share(case: Case) -> int:
    """Bytes of a checkpoint that one rank copies into the host's memory, and writes while training goes on."""
    return -(-estimate.checkpoint(case.sizes, case.config) // case.world.ranks)


def check_device(case: Case, needed: int) -> Iterator[str]:
    """Whether that much fits on the device that the plan names."""
    estimate = case.config.plan
    room = case.mistakes.tried(case.rooms.bytes_of, estimate.memory, "plan.memory") if estimate.memory else None
    if room and needed > room:
        train, more = case.config.train, case.config.train.gradient_accumulation_steps * 2
        ways = [f"train.gradient_accumulation_steps={more}"] if case.micro_batch > 1 else []
        ways += [] if case.config.model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
        ways += ["train.sharding=full"] if case.world.among == 1 < case.world.ranks else []
        ways += ["train.mixed_precision=bf16"] if train.mixed_precision in (None, "no") else []
        case.mistakes.add(f"plan.memory={estimate.memory}: a rank needs {size(needed)}. Try {', '.join(ways) or 'more ranks'}.")
    elif room:
        yield f"fits into plan.memory={estimate.memory}, {size(room - needed)} are left"


def compared(case: Case) -> Iterator[str]:
    """Activations foretold and measured here and now: of a few images, halved until they are soon done, in a network of few blocks."""
    blocks = len(case.sizes.units) - 1
    few = {"depth": min(SHALLOW, blocks)} if "depth" in case.model else {}
    if "dual_attention_blocks" in case.model:
        few["dual_attention_blocks"] = min(SHALLOW, blocks, case.model["dual_attention_blocks"])
    network, half = case.bare(**few), case.precision != "no"
    shape: tuple[int, ...] = case.shape
    unit, limit = int(network.multiple), PRODUCTS["half" if half else "no"]  # type: ignore[arg-type]
    while (products := case.rooms.cost(network, shape, **case.text)[1]) > limit and min(shape[1:]) > unit:
        shape = shape[0], *(max(unit, side // 2 // unit * unit) for side in shape[1:])
    images = min(case.micro_batch, max(1, int(limit // products)))
    what = f"{few['depth']} blocks" if few else "the whole network"
    what += f", {count(images, 'image')} of {' x '.join(map(str, shape))}"
    step = case.step(images, shape)
    foretold = case.rooms.foretell(lambda: case.network(**few), step, case.precision, "cpu").peak
    if products > 4 * limit or foretold + 2 * estimate.FLOAT * estimate.numbers(case.sizes.weights) > free() / 2:
        yield f"not measured here: a step of {what} takes {size(foretold)} and {amount(TRAINING * products * images)} multiply-adds"
        return
    found = case.rooms.measured(case.network(**few, device="cpu", seed=0), step, case.precision)
    yield f"activations measured here, {what}: {size(found)}, foretold {size(foretold)} ({foretold / found - 1:+.1%})"


def free() -> int:
    """Return the bytes of memory that this machine has left; where the system does not say, as on a Mac, half of what it has."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def disk(case: Case) -> Iterator[str]:
    """Checkpoints, and snapshots of the power averages."""
    if not case.model:
        return
    config, one = case.config, estimate.checkpoint(case.sizes, case.config)
    kept = min(config.checkpoint.keep, -(-config.train.max_steps // config.checkpoint.every))
    yield f"a checkpoint: {size(one)} in {count(case.world.ranks, 'file')}; a rank's {size(share(case))} pass through the host's memory"
    yield f"{kept} kept: {size(kept * one)}, and {size((kept + 1) * one)} while one is written"
    many, each = estimate.snapshots(case.sizes, config)
    folder = Path(config.output_dir)
    there = min(kept, len(Store(folder, 1).folders()))
    fault = lacking(folder, one, share(case), kept + 1 - there)
    if fault:
        case.mistakes.add(f"output_dir={config.output_dir!r} cannot hold the checkpoints of this run: {fault}.")
    if many:
        yield f"{count(many, 'snapshot')} of the power averages, {size(each)} each: {size(many * each)}"


def _titled(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines under a title in the margin."""
    for line in lines:
        yield f"{title:9}{line}"
        title = ""
