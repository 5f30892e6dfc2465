"""What is in a shard: where each sample lies, how large it is, and what it must hash to.

A shard is a plain webdataset tar: files that share a name up to the first dot
are one sample and lie next to one another. Beside `train-000000.tar` lies
`train-000000.npy`, 24 bytes a sample, memory-mapped; `manifest.json` lists the
shards of a folder with their hashes. A folder without it is not whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
RECORD = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("crc32", "<u4"), ("width", "<u2"), ("height", "<u2"), ("label", "<i4")])
"""One sample: where its first header lies in the tar, how many bytes its files span, their crc32, the image's size, its class or -1."""
VERSION = 1
_BLOCK = 512


class Member(NamedTuple):
    """One file inside a tar: its name, where its header and its bytes begin, how many there are, and where the next header is."""

    name: str
    header: int
    offset: int
    size: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a folder and what it must be."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A folder of shards: all of it, or the folder is refused."""

    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    """Images of each "width x height"."""
    source: str = ""
    version: int = VERSION

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split.

        Raises:
            ValueError: no shard has it.
        """
        chosen = tuple(shard for shard in self.shards if shard.split == name)
        if not chosen:
            raise ValueError(f"split {name!r} has no shard: the manifest has {', '.join(sorted({s.split for s in self.shards}))}.")
        return chosen

    @property
    def fingerprint(self) -> str:
        """A hash of every shard's content and order, independent of where the folder lies."""
        return hashlib.sha256("".join(f"{s.split}:{s.sha256};" for s in self.shards).encode()).hexdigest()


def members(path: Path) -> Iterator[Member]:
    """Walk the headers of a tar, strictly: where Python's `tarfile` takes a damaged header for the end, this is an error.

    Raises:
        ValueError: a damaged header, a file that is cut, no end-of-archive block.
    """
    size, at, long_name = path.stat().st_size, 0, None
    with open(path, "rb") as file:
        while True:
            head = os.pread(file.fileno(), _BLOCK, at)
            if len(head) < _BLOCK:
                raise ValueError(f"{path}: cut at byte {at}, the end-of-archive block is missing. Pack or copy this shard again.")
            if not head.rstrip(b"\0"):
                return
            name, length, kind = _header(_checked(head, path, at))
            end = at + _BLOCK + -(-length // _BLOCK) * _BLOCK
            if end > size:
                raise ValueError(f"{path}: cut inside {name!r} at byte {at}. Pack or copy this shard again.")
            if kind in (b"L", b"x"):
                long_name = _long_name(kind, os.pread(file.fileno(), length, at + _BLOCK)) or long_name
            elif kind in (b"0", b"\0"):
                yield Member(long_name or name, at, at + _BLOCK, length, end)
                long_name = None
            at = end


def _checked(head: bytes, path: Path, at: int) -> bytes:
    """The header, if its checksum is right."""
    try:
        good = int(head[148:156].strip(b" \0"), 8) == sum(head[:148]) + 256 + sum(head[156:])
        _header(head)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{path}: damaged tar header at byte {at}. Pack or copy this shard again.")
    return head


def _header(head: bytes) -> tuple[str, int, bytes]:
    """Name, length and kind of a tar member; a ValueError where the length is no number."""
    base256 = head[124] & 0x80
    length = int.from_bytes(head[125:136], "big") if base256 else int(head[124:136].strip(b" \0") or b"0", 8)
    ustar = head[257:262] == b"ustar" and head[262:263] == b"\0"
    prefix = head[345:500].rstrip(b"\0").decode(errors="replace") if ustar else ""
    name = head[:100].rstrip(b"\0").decode(errors="replace")
    return (f"{prefix}/{name}" if prefix else name), length, head[156:157]


def _long_name(kind: bytes, body: bytes) -> str | None:
    """A name too long for its header, in GNU's (L) or POSIX's (x) form."""
    if kind == b"L":
        return body.rstrip(b"\0").decode(errors="replace")
    while body:
        length = int(body[: body.index(b" ")])
        key, _, value = body[body.index(b" ") + 1 : length - 1].partition(b"=")
        if key == b"path":
            return value.decode(errors="replace")
        body = body[length:]
    return None


def key_and_extension(name: str) -> tuple[str, str]:
    """`a/b.seg.png` is the file `seg.png` of the sample `a/b`: the name is split at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def sample_files(span: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and files of one sample from the bytes that it spans in its tar.

    Args:
        span: from its first header to the end of its last file's block, as
            `members` walked it or as its crc32 vouches for it.
    """
    at, key, files, long_name = 0, "", {}, None
    while at < len(span):
        name, length, kind = _header(span[at : at + _BLOCK])
        body = span[at + _BLOCK : at + _BLOCK + length]
        if kind in (b"L", b"x"):
            long_name = _long_name(kind, body) or long_name
        else:
            key, extension = key_and_extension(long_name or name)
            files[extension] = body
            long_name = None
        at += _BLOCK + -(-length // _BLOCK) * _BLOCK
    return key, files


def index_shard(path: Path) -> np.ndarray:
    """Read a tar once and describe its samples, in order.

    Returns:
        One RECORD a sample.

    Raises:
        ValueError: a damaged tar, a sample with no image, an image whose
            header cannot be read, a class that is no whole number.
    """
    records, start, end, key = [], 0, 0, None
    with open(path, "rb") as file:
        for member in members(path):
            name, _ = key_and_extension(member.name)
            if key is not None and name != key:
                records.append(_record(os.pread(file.fileno(), end - start, start), start, f"{path}: {key}"))
                start = end
            key, end = name, member.end
        if key is not None:
            records.append(_record(os.pread(file.fileno(), end - start, start), start, f"{path}: {key}"))
    return np.array(records, RECORD)


def _record(span: bytes, start: int, where: str) -> tuple[int, int, int, int, int, int]:
    _, files = sample_files(span)
    image = next((files[e] for e in IMAGE_EXTENSIONS if e in files), None)
    if image is None:
        raise ValueError(f"{where} has no image: one of {', '.join(IMAGE_EXTENSIONS)} is needed beside {', '.join(files)}.")
    try:
        width, height = Image.open(io.BytesIO(image)).size
        label = int(files["cls"]) if "cls" in files else -1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be indexed: {error}. Leave it out when packing.") from error
    return start, len(span), zlib.crc32(span), min(width, 65535), min(height, 65535), label


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_suffix(".npy")


def describe(tar: Path, split: str) -> tuple[Shard, Counter[str]]:
    """Index a tar, write the index beside it, and give its line of the manifest and its images' sizes."""
    records = index_shard(tar)
    path = index_path(tar)
    with open(path, "wb") as file:
        np.lib.format.write_array(file, records, allow_pickle=False)
    sizes = Counter(f"{w}x{h}" for w, h in zip(records["width"].tolist(), records["height"].tolist(), strict=True))
    shard = Shard(
        name=tar.name,
        split=split,
        samples=len(records),
        bytes=tar.stat().st_size,
        sha256=_sha256(tar),
        index_sha256=_sha256(path),
    )
    return shard, sizes


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` under a temporary name and rename it: it is there whole or not at all."""
    temporary = folder / ".manifest.json.tmp"
    with open(temporary, "w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "manifest.json")


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a folder of shards: every file there, of the right length.

    Raises:
        ValueError: no such folder, no manifest, a shard missing or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"data.shards={str(folder)!r} is no folder: make it with `python -m data.prepare imagefolder IMAGES --output {folder}`."
        )
    try:
        raw: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
        manifest = Manifest(**{**raw, "shards": shards, "class_names": tuple(raw["class_names"])})
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no manifest.json, so packing never finished: run `python -m data.prepare` again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/manifest.json cannot be read ({error}): run `python -m data.prepare` again.") from error
    for shard in manifest.shards:
        tar = folder / shard.name
        found = tar.stat().st_size if tar.exists() else None
        if found != shard.bytes:
            raise ValueError(
                f"{tar}: {'missing' if found is None else f'{found} bytes'}, the manifest says {shard.bytes}. Copy or pack it again."
            )
        if not index_path(tar).exists():
            raise ValueError(f"{index_path(tar)} is missing: copy it beside its tar, or pack the folder again.")
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
