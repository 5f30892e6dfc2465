"""Encode shards once: `condot encode --config recipe.yaml`; the same command goes on, and more may join.

Writes latents and text embeddings, whichever encoders the recipe names, into
encoded shards below `data.encoded`. A shard is the unit of work, claimed by
whoever is free; nobody waits for anybody.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from condot.core.caption_fields import parse_captions
from condot.core.data_config import DataConfig
from condot.core.data_options import read_options
from condot.core.printable import one_line, printable
from condot.core.process import available_cpus
from condot.core.urls import RedactingParser

from ..encoders.autoencoder import Autoencoder, read_autoencoder
from ..encoders.text import TextEncoder, read_text_encoders
from ..format.shard_table import Shard, ShardTable
from ..loader.captions import check_captions
from ..loader.encoded_cache import EXTENSIONS, encoded_folder, text_cache_name
from ..storage.local import ShardFolder
from ..storage.resolve import open_shard_folders
from ..storage.retry import LONGEST
from ..storage.shard_reader import Shards
from .encoded_writer import EncodedWriter
from .targets import EncodeItem, EncodeTarget, LatentTarget, TextTarget
from .work_claims import Claim


class EncodeInterrupted(BaseException):
    """A signal came."""


WINDOW = 4
"""Batches that are read and decoded ahead, and kept in memory."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return run(*_parse_arguments(sys.argv[1:] if argv is None else argv))
    except EncodeInterrupted as signalled:
        print("\ninterrupted: finished shards are kept; the same command goes on.", file=sys.stderr, flush=True)
        return 128 + int(signalled.args[0])
    except (ValueError, OSError) as error:
        if os.environ.get("CONDOT_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error{f' (rank {rank})' if rank != '0' else ''}: {one_line(error, LONGEST)}", file=sys.stderr, flush=True)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise EncodeInterrupted(number)


def _parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command's own options, and the fields of the recipe's section `data` that `--data.key=value` replaces."""
    parser = RedactingParser(
        prog="condot encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`--data.key=value` replaces a field of the recipe's section data; several values: --data.shards a b.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the recipe; its section data names shards and encoders")
    parser.add_argument("--output", default="", help="folder of the cache (default: data.encoded)")
    parser.add_argument("--batch_size", type=int, default=32, help="images or captions at once (default: 32)")
    parser.add_argument("--flips", choices=("both", "none"), help="also encode mirrored images (default: as data.horizontal_flip)")
    parser.add_argument("--splits", default="", help="splits to encode, as train,val (default: all)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the encoders (default: fp32)")
    args, rest = parser.parse_known_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: at least 1")
    return args, _fields(rest, parser)


def _fields(words: list[str], parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Words such as `--data.resolution=64` or `--data.shards a b` as fields of the section."""
    over: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--data."):
            name, equals, value = word.removeprefix("--data.").partition("=")
            over[name] = [value] if equals else []
        elif not name or word.startswith("--"):
            parser.error(f"unknown option {word}: fields of the recipe are written --data.key=value")
        else:
            over[name].append(word)
    return {name: given or ["true"] for name, given in over.items()}


def run(args: argparse.Namespace, over: dict[str, Any]) -> int:
    """Encode what nobody else has, and say how things stand."""
    options, _ = read_options(args.config, over)
    output = args.output or options.encoded
    if not output:
        raise ValueError("data.encoded is empty: name the folder of the cache there, or with --output.")
    targets = _build_targets(args, options)
    sources = open_shard_folders(options)
    plans = list[tuple[ShardFolder, list[Shard]]]()
    for folder, names in sources:
        splits = [split for split in args.splits.split(",") if split] or folder.manifest.shards.splits
        chosen = None if names is None else set(names)
        shards = [shard for split in splits for shard in folder.manifest.split(split)]
        plans.append((folder, [shard for shard in shards if chosen is None or shard.name in chosen]))
    if options.text_encoder:
        _check_captions(plans, options.caption)
    for number, (folder, wanted) in enumerate(plans):
        for name, target in targets.items():
            encoded_writer = EncodedWriter(
                encoded_folder(output, name, number, len(sources)), target.facts(folder.manifest), folder.manifest
            )
            encode(folder, wanted, name, target, encoded_writer, options)
    return 0


def _check_captions(plans: list[tuple[ShardFolder, list[Shard]]], caption: str) -> None:
    """Raise ValueError where a folder has no captions; of several fields each folder may have its own, and each field must be in one."""
    firsts = [Shards([folder], wanted[0].split, [ShardTable.of(wanted[:1])]) for folder, wanted in plans if wanted]
    groups = [firsts] if parse_captions(caption).several and firsts else [[one] for one in firsts]
    for note in dict.fromkeys(check_captions(group, caption) for group in groups):
        if note:
            print(note, flush=True)


def _build_targets(args: argparse.Namespace, options: DataConfig) -> dict[str, EncodeTarget]:
    """What the recipe's encoders make, the networks still to be built."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    targets: dict[str, EncodeTarget] = {}
    if options.autoencoder:
        mirrored = options.horizontal_flip if args.flips is None else args.flips == "both"
        targets["latents"] = LatentTarget(
            options,
            read_autoencoder(options.autoencoder),
            lambda: Autoencoder(options.autoencoder, device, dtype),
            mirrored,
            args.batch_size,
            args.dtype,
        )
    for number, known in enumerate(read_text_encoders(options)):
        load = partial(TextEncoder, known.name, device, dtype, known.max_tokens, known.padding)
        targets[text_cache_name(number)] = TextTarget(options, known, load, args.batch_size, args.dtype)
    if not targets:
        raise ValueError("neither data.autoencoder nor data.text_encoder is named: there is nothing to encode. Name one in the recipe.")
    return targets


def encode(
    folder: ShardFolder, wanted: list[Shard], name: str, target: EncodeTarget, encoded_writer: EncodedWriter, options: DataConfig
) -> None:
    """Encode the shards of one folder that are neither done nor claimed; whoever finds all done writes the manifest.

    Raises:
        ValueError: more samples that cannot be decoded than data.max_bad_share allows.
    """

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    turned = wanted[rank * len(wanted) // ranks :] + wanted[: rank * len(wanted) // ranks]  # ranks begin apart, so that they seldom meet
    samples = sum(shard.samples for shard in wanted)
    bad: list[str] = []
    found_work = True
    todo = [shard for shard in turned if not encoded_writer.is_done(shard)]
    worked = bool(todo)
    title = f"{name}{f' (rank {rank})' if ranks > 1 else ''}"
    with (
        tqdm(total=samples, initial=samples - sum(s.samples for s in todo), desc=title, unit="sample", mininterval=1, position=rank) as bar,
        ThreadPoolExecutor(max(1, options.workers), "decode") as pool,
    ):
        while found_work:
            found_work = False
            for number, shard in enumerate(todo):
                folder.prefetch(todo[number : number + 2])
                claim = None if encoded_writer.is_done(shard) else encoded_writer.claim(shard)
                if claim is None:
                    continue
                with claim:
                    if not encoded_writer.is_done(shard):
                        found_work = True
                        _encode_shard(folder, shard, target, encoded_writer, claim, pool, bar)
                        bad += encoded_writer.read_note(shard)["sums"]["bad"]
                _check_bad(bad, samples, options.max_bad_share)
    left = [shard for shard in wanted if not encoded_writer.is_done(shard)]
    if left:
        print(
            f"{encoded_writer.folder}: others still encode {len(left)} of {len(wanted)} shards; the last of them writes the manifest.",
            flush=True,
        )
    else:
        _finish(encoded_writer, target, wanted, options, worked)


def _finish(encoded_writer: EncodedWriter, target: EncodeTarget, wanted: list[Shard], options: DataConfig, worked: bool) -> None:
    """Write the manifest, unless it is there already."""
    manifest = encoded_writer.manifest()
    names = set(manifest.shards.names) if manifest else set()
    if manifest is None or worked or not {shard.name for shard in wanted} <= names:
        bad = [text for shard in wanted for text in encoded_writer.read_note(shard)["sums"]["bad"]]
        _check_bad(bad, sum(shard.samples for shard in wanted), options.max_bad_share)
        extra = target.write_extra(encoded_writer.folder)
        manifest = encoded_writer.finish(lambda total: target.summarize_sums(total) | extra)
    count, size = int(manifest.shards.samples.sum()), int(manifest.shards.bytes.sum())
    bad_count = len(manifest.encoding["bad"])
    already = "" if worked else "already "
    print(f"{encoded_writer.folder}: {count:,} samples {already}encoded, {size:,} bytes, {bad_count} of them undecodable.", flush=True)
    if encoded_writer.facts["form"] == "text":
        said, most = manifest.encoding["statistics"], encoded_writer.facts["encoder"]["max_tokens"]
        shares = f"{said['captions']:,} captions, " if "captions" in said else ""
        encoded = said["captions"] + said["missing"] if "captions" in said else said["samples"]
        shares += f"{said['tokens'] / max(1, encoded):.1f} tokens a caption; {said['cut']:,} captions cut to {most} tokens"
        print(f"{encoded_writer.folder}: {shares}, {said['missing']:,} samples without one.", flush=True)


def _check_bad(bad: list[str], samples: int, most: float) -> None:
    if len(bad) > most * samples:
        shown = "; ".join(bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise ValueError(
            f"{len(bad)} of {samples} samples cannot be decoded, above data.max_bad_share={most}: {shown}. "
            f"Pack the images without them, or raise data.max_bad_share and run the same command again."
        )


def _encode_shard(
    folder: ShardFolder, shard: Shard, target: EncodeTarget, encoded_writer: EncodedWriter, claim: Claim, pool: ThreadPoolExecutor, bar: Any
) -> None:
    """One shard from its tar to its encoded shard."""

    images = Shards([folder], shard.split, [ShardTable.of([shard])])
    records = np.array(images.records(0))
    extension = EXTENSIONS[encoded_writer.facts["form"]]
    target.take_sums()
    with encoded_writer.open_shard(shard, claim, records, target.take_sums) as writer:
        for items, prepared in _prefetch_windows(images, records, target, pool, WINDOW * target.batch_size):
            for item, array in zip(items, target.encode(items, prepared), strict=True):
                writer.add(f"{item.key}.{extension}", array)
            claim.touch()
            bar.update(len(items))


def _prefetch_windows(
    images: Shards, records: Any, target: EncodeTarget, pool: ThreadPoolExecutor, size: int
) -> Iterator[tuple[list[EncodeItem], list[Any]]]:
    """Windows of a shard, in order, the next one read and prepared by threads while this one is encoded."""

    def one(number: int) -> tuple[EncodeItem, Any]:
        item = _read_item(images, number, records[number])
        return item, target.prepare(item)

    def begin(first: int) -> list[Any]:
        return [pool.submit(one, number) for number in range(first, min(first + size, len(records)))]

    waiting = begin(0)
    for first in range(0, len(records), size):
        ready, waiting = [future.result() for future in waiting], begin(first + size)
        yield [item for item, _ in ready], [prepared for _, prepared in ready]


def _read_item(images: Shards, number: int, record: Any) -> EncodeItem:
    """One sample, its bytes checked."""

    sample = images.read(0, number)
    where = f"{images.shards[0].name}: {printable(sample.key)}"
    return EncodeItem(sample.key, where, sample.image, sample.files, int(record["width"]), int(record["height"]))
