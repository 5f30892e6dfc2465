"""From a recipe's section `data` to an open stream, of images or of what was encoded before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from condot.core.data_config import DataConfig
from condot.core.text_states import TextStates

from ..encoders.autoencoder import AutoencoderFacts, check_images
from ..encoders.text_states import TextFacts
from ..format.manifest import Tally
from ..format.shard_table import ShardTable
from ..storage.local import LocalFolder, ShardFolder
from ..storage.resolve import open_shard_folders
from ..storage.shard_reader import Shards
from .batch import Augmentation, BatchLoader, PixelReader
from .buckets import Buckets
from .captions import CaptionReader, EncodedCaptions
from .encoded_cache import (
    MomentReader,
    check_encoding,
    encoded_folder,
    merge_encodings,
    read_null,
    text_cache_name,
    wanted_latents,
    wanted_text,
)
from .shuffle import SampleOrder, ShuffledOrder, WeightedMixture
from .stream import BatchPlanner, BatchStream, Share


class EncodedCache(NamedTuple):
    """What was encoded before: where it lies, and what its manifest says of it."""

    shards: Shards
    encoding: Mapping[str, Any]
    null: TextStates | None = None
    """Of captions: the encoding of the empty one."""


def build(
    options: DataConfig,
    *,
    seed: int,
    share: Share,
    start: int = 0,
    captions: bool = False,
    images: Shards | None = None,
    latents: EncodedCache | None = None,
    text: tuple[EncodedCache, ...] = (),
) -> BatchStream:
    """Open a stream of batches.

    Args:
        options: the recipe's section `data`.
        seed: of the order, the mirroring and the crops.
        share: this rank's part of every global batch.
        start: positions consumed so far by all ranks together: the whole cursor.
        captions: read them too.
        images: opened already, or None to open what `options` names.
        latents: to stream instead of pixels, from `open_encoded_latents`.
        text: encoded captions to stream as well, of each encoder, from `open_encoded_text`.

    Raises:
        ValueError: shards that cannot be had, weights, shapes or a start that cannot be.
    """
    images = images or open_shards(options)
    shards, reader = (
        (latents.shards, MomentReader(latents.encoding)) if latents else (images, PixelReader(options.channels, options.bit_depth))
    )
    buckets = Buckets(options.aspect_ratios, options.resolution, options.bucket_step, whole=bool(options.autoencoder))
    buckets.check(sum((folder.manifest.tally for folder in shards.folders), Tally()).sizes)
    order = build_order(shards, options, seed)
    augmentation = Augmentation(seed, options.horizontal_flip, options.random_crop)
    embeddings = [EncodedCaptions(shards, said["encoder"]["max_tokens"], said["width"], said["pooled"]) for shards, said, _ in text]
    caption_reader = CaptionReader(images, options.caption, embeddings, seed, captions) if captions or text else None
    loader = BatchLoader(shards, order, reader, augmentation, buckets, caption_reader, options.lost_shards == "skip")
    return BatchStream(BatchPlanner(shards, order, buckets, share, augmentation, start), loader, options.workers)


def open_shards(options: DataConfig) -> Shards:
    """The shards that a recipe names.

    Raises:
        ValueError: none named, or one that cannot be opened.
    """
    opened = open_shard_folders(options)
    if options.weights and len(opened) != len(options.weights):
        raise ValueError(
            f"data.weights has {len(options.weights)} numbers, and the patterns of data.shards name {len(opened)} folders: give one each."
        )
    return Shards([folder for folder, _ in opened], options.split, [names for _, names in opened])


def open_encoded_latents(options: DataConfig, images: Shards, facts: AutoencoderFacts) -> EncodedCache | None:
    """The encoded latents of some images, with the statistics of all of them; None where latents are encoded online and never were before.

    Args:
        options: the recipe's section `data`, with `encoded`.
        images: what they must have been made from.
        facts: what they must have been made with.

    Raises:
        ValueError: no such cache, or one of another making, with every difference.
    """
    first = encoded_folder(options.encoded, "latents", 0, len(images.folders)) / "manifest.json"
    if options.encoding == "online" and not (options.encoded and first.is_file()):
        return None
    wanted = [wanted_latents(options, folder.manifest, facts.fingerprint) for folder in images.folders]
    return _open_encoded(options, images, "latents", wanted)


def open_encoded_text(options: DataConfig, images: Shards, facts: tuple[TextFacts, ...]) -> tuple[EncodedCache, ...]:
    """The encoded captions of some images, of each of the encoders with these facts; arguments and errors as in `open_encoded_latents`."""
    found = []
    for number, one in enumerate(facts):
        wanted = [wanted_text(options, folder.manifest, one.fingerprint) | {"name": one.name} for folder in images.folders]
        cache = _open_encoded(options, images, text_cache_name(number), wanted)
        found.append(cache._replace(null=read_null(cache.shards.folders[0].name, cache.encoding)))
    return tuple(found)


def _open_encoded(options: DataConfig, images: Shards, cache_name: str, wanted: list[dict[str, Any]]) -> EncodedCache:
    folders, chosen = list[ShardFolder](), list[ShardTable]()
    for number, (facts, part) in enumerate(zip(wanted, images.parts, strict=True)):
        place = encoded_folder(options.encoded, cache_name, number, len(wanted))
        if not (place / "manifest.json").is_file():
            raise ValueError(f"data.encoded={options.encoded!r}: {place} holds no finished {cache_name}. Run `condot encode --config ...`.")
        cache = LocalFolder(place, options.retry_seconds)
        check_encoding(cache.manifest, facts, cache.name)
        found, missing = cache.manifest.shards.split(options.split), list[str]()
        if not found.has_same_names(part):
            found, missing = cache.manifest.shards.select_names(part.names)
        if missing:
            raise ValueError(
                f"{place} lacks {len(missing)} shards of split {options.split!r}: run `data.encode` with --splits {options.split}."
            )
        if isinstance(of := images.folders[number], LocalFolder):
            of.check_rewritten(part)
        folders.append(cache)
        chosen.append(found)
    encodings = [folder.manifest.encoding for folder in folders]
    return EncodedCache(Shards(folders, options.split, chosen), merge_encodings(encodings) if cache_name == "latents" else encodings[0])


def check_sides(options: DataConfig, unit: int) -> None:
    """Raises ValueError for shapes whose sides the network cannot cut: `unit` is the pixels of its smallest part."""
    for height, width in Buckets(options.aspect_ratios, options.resolution, options.bucket_step).shapes:
        if height % unit or width % unit:
            raise ValueError(
                f"data.bucket_step={options.bucket_step} makes batches of {height} x {width} pixels, and the network takes multiples of "
                f"{unit}. Use a multiple of {unit}."
                if options.aspect_ratios
                else f"data.resolution={options.resolution} is no multiple of {unit}, which the network takes. Use "
                f"{max(1, options.resolution // unit) * unit}."
            )


def check_shapes(options: DataConfig, facts: AutoencoderFacts) -> None:
    """Raises ValueError for images that an autoencoder does not read."""
    for shape in Buckets(options.aspect_ratios, options.resolution, options.bucket_step).shapes:
        check_images(facts, options.channels, *shape)


def build_order(shards: Shards, options: DataConfig, seed: int) -> SampleOrder:
    """The order of the samples: all shards shuffled together, or a mixture by weight."""
    if not options.weights:
        return ShuffledOrder(shards.samples, seed, options.shuffle_block)
    parts, first = [], 0
    for part in shards.parts:
        parts.append((ShuffledOrder(part.samples, seed, options.shuffle_block), first))
        first += len(part)
    return WeightedMixture(parts, options.weights, seed)
