"""From what a user writes in `data.shards` to opened folders: paths and URLs, brace patterns, chosen shards."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from condot.core.data_config import DataConfig
from condot.core.printable import redact_url
from condot.core.urls import expand_path

from .cache import Cache
from .local import LocalFolder, ShardFolder, expand_braces
from .remote import RemoteFolder

Opened = tuple[ShardFolder, tuple[str, ...] | None]
"""A folder, and the shards chosen from it in order; None for all of a split."""


def open_shard_folders(options: DataConfig) -> list[Opened]:
    """Everything that `data.shards` names, in order; a brace pattern of folders is several.

    Raises:
        ValueError: as `open_shard_folder`; a cache that holds less than one shuffled block.
    """
    if not options.shards:
        raise ValueError("data.shards is empty: name a folder that `condot prepare` made, or a URL of one.")
    opened = [_open(folder, names, options) for source in options.shards for folder, names in _parse(source)]
    remote = [(folder, names) for folder, names in opened if isinstance(folder, RemoteFolder)]
    if remote:
        needed = sum(_block_bytes(folder, names, options) for folder, names in remote)
        _cache(options).require(needed, f"{options.shuffle_block} shards (data.shuffle_block) and the next one take")
    return opened


def open_shard_folder(source: str, options: DataConfig) -> Opened:
    """One source: a folder, a URL of one, or a pattern of tars inside one, as in `s3://b/data/train-{000000..000009}.tar`.

    Raises:
        ValueError: no such folder, a shard that its manifest does not list, a
            pattern of several folders.
    """
    parsed = _parse(source)
    if len(parsed) != 1:
        folders = ", ".join(redact_url(folder) for folder, _ in parsed[:5])
        raise ValueError(f"data.shards={redact_url(source)!r} names {len(parsed)} folders where one is wanted: {folders}.")
    return _open(*parsed[0], options)


def cache_folder(options: DataConfig) -> Path:
    """Where shards from elsewhere are kept: `data.cache_dir`, else $CONDOT_CACHE, else ~/.cache/condot/shards."""
    return Path(options.cache_dir or os.environ.get("CONDOT_CACHE") or "~/.cache/condot/shards").expanduser()


def _parse(source: str) -> list[tuple[str, tuple[str, ...] | None]]:
    """Folders, each with the tars chosen from it, in the order they are written."""
    folders: dict[str, list[str]] = {}
    for place in map(expand_path, expand_braces(source)):
        path, question, query = place.partition("?") if _is_web(place) else (place, "", "")
        folder, _, name = path.rpartition("/")
        is_tar = name.endswith(".tar")
        folders.setdefault((folder or "." if is_tar else path.rstrip("/") or "/") + question + query, []).append(name if is_tar else "")
    for folder, names in folders.items():
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(
                f"data.shards={redact_url(source)!r} names {twice or redact_url(folder)} twice. "
                f"A weight (data.weights) says how often a source comes."
            )
    return [(folder, None if names == [""] else tuple(names)) for folder, names in folders.items()]


def _is_web(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _open(place: str, names: tuple[str, ...] | None, options: DataConfig) -> Opened:
    folder: ShardFolder = (
        RemoteFolder(place, cache=_cache(options), retry_seconds=options.retry_seconds)
        if "://" in place
        else LocalFolder(place, options.retry_seconds)
    )
    there = folder.manifest.shards
    if names and "://" in place:  # a name in a URL may be written as URLs have it, on the web first of all
        ways = (unquote, str) if _is_web(place) else (str, unquote)
        known = {shard.name for shard in there.select_names([way(name) for way in ways for name in names])[0]}
        names = tuple(next((way(name) for way in ways if way(name) in known), name) for name in names)
    missing = there.select_names(names)[1] if names else []
    if missing:
        display_url = f"{there[0].name} to {there[-1].name}, {len(there)} shards" if there else "none"
        raise ValueError(
            f"{folder.name} has no {missing[0]}{f' and {len(missing) - 1} more of those named' if missing[1:] else ''}: "
            f"its manifest lists {display_url}. Name some of these, or the folder for all."
        )
    return folder, names


def _block_bytes(folder: ShardFolder, names: tuple[str, ...] | None, options: DataConfig) -> int:
    """What the largest block of a source takes, and the shard that comes next."""
    shards = folder.manifest.shards
    chosen = shards.split(options.split) if names is None else shards.select_names(names)[0]
    return int(np.sort(chosen.bytes)[::-1][: options.shuffle_block + 1].sum())


def _cache(options: DataConfig) -> Cache:
    return _shared(cache_folder(options), options.cache_bytes)


@lru_cache
def _shared(folder: Path, limit_bytes: int) -> Cache:
    """One for all sources of a process, so that they share its bound on what is held."""
    return Cache(folder, limit_bytes)
