"""The stream: from images in tar shards to batches whose order is a pure function of (seed, epoch, position).

`prepare` packs images into shards, `index` says what is in them, `order` which
sample comes when, `buckets` in what shape, `decode` makes pixels of files,
`stream` puts it together, `build` opens it.
"""

from __future__ import annotations

from .batch import Loader, Look, Pixels
from .buckets import Buckets
from .index import Tally
from .options import Options
from .order import Mixture, Order, Sequence
from .shards import Shards
from .source import LocalFolder
from .stream import Planner, Share, Stream


def build(options: Options, *, seed: int, share: Share, start: int = 0, captions: bool = False, shards: Shards | None = None) -> Stream:
    """Open a stream of batches.

    Args:
        options: the recipe's section `data`.
        seed: of the order, the mirroring and the crops.
        share: this rank's part of every global batch.
        start: positions consumed so far by all ranks together: the whole cursor.
        captions: read them too.
        shards: opened already, or None to open what `options` names.

    Raises:
        ValueError: shards that cannot be had, weights, shapes or a start that cannot be.
    """
    shards = shards or open_shards(options)
    buckets = Buckets(options.aspect_ratios, options.resolution, options.bucket_step)
    buckets.check(sum((folder.manifest.tally for folder in shards.folders), Tally()).sizes)
    order = order_of(shards, options, seed)
    look = Look(seed, options.horizontal_flip, options.random_crop)
    loader = Loader(shards, order, Pixels(options.channels), look, options.caption if captions else "", options.lost_shards == "skip")
    return Stream(Planner(shards, order, buckets, share, look, start), loader, options.workers)


def open_shards(options: Options) -> Shards:
    """The shards that a recipe names.

    Raises:
        ValueError: none named, or one that cannot be opened.
    """
    if not options.shards:
        raise ValueError("data.shards is empty: name a folder of shards, as `python -m data.prepare` makes it.")
    return Shards([LocalFolder(source) for source in options.shards], options.split)


def order_of(shards: Shards, options: Options, seed: int) -> Sequence:
    """The order of the samples: all shards shuffled together, or a mixture by weight."""
    if not options.weights:
        return Order(shards.counts, seed, options.shuffle_block)
    parts, first = [], 0
    for part in shards.parts:
        parts.append((Order([shard.samples for shard in part], seed, options.shuffle_block), first))
        first += len(part)
    return Mixture(parts, options.weights, seed)
