"""What is in a shard: where each sample lies, how large it is, and what it must hash to.

Beside `train-000000.tar` lies `train-000000.npy`, 24 bytes a sample,
memory-mapped. Latents and text embeddings lie in side shards: other folders of
the same form, with the same keys in the same order.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from isal.isal_zlib import crc32 as crc32_of  # zlib's, three times as fast
from PIL import Image

from .decode import has_exif, is_plain
from .listing import reason
from .manifest import Tally
from .shardlist import Shard
from .tar import BLOCK, Span, samples

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "apng", "mpo", "avif", "jp2", "ico", "psd")
RECORD = np.dtype(
    [
        ("payload", "<u4"),
        ("bytes", "<u4"),
        ("crc32", "<u4"),
        ("before", "<u2"),
        ("after", "<u2"),
        ("rest", "<u2"),
        ("label", "<u2"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)
"""One sample: the block of 512 bytes at which its image (or array) begins, that file's length and crc32; the blocks of the same
sample before and after it, with 15 bits of their crc32, and a bit that says `decode.is_plain`; its class or NO_LABEL; the upright
image's size in pixels."""
PLAIN = 0x8000
"""That bit of `rest`."""
NO_LABEL = 65535
REMEMBERED = 1 << 17
"""Indexes known to be right at most, 100 bytes each."""
_verified: set[int] = set()
MAX_TEXT_BYTES = 1 << 20
"""A larger .json, .txt or .cls is refused."""


def index_shard(
    path: Path,
    *,
    like: np.ndarray | None = None,
    faults: list[str] | None = None,
    verify: Callable[[bytes], None] | None = None,
) -> tuple[np.ndarray, int]:
    """Read a tar once and describe its samples, in order.

    Args:
        path: the tar.
        like: for side shards, the records of the images' shard, whose sizes
            and classes these take over.
        faults: where given, samples that cannot be indexed are left out and
            named here, instead of an error.
        verify: called with each image; its ValueError is the sample's fault.

    Returns:
        One RECORD a sample, and the number of samples with a caption.

    Raises:
        ValueError: a damaged tar; a sample with no image, an image whose
            header cannot be read, a class that is no whole number from 0 to
            65,534, a text of more than a megabyte; another number of samples
            than `like`.
    """
    records, captions = [], 0
    with open(path, "rb") as file:
        for number, span in enumerate(samples(path)):
            body = os.pread(file.fileno(), span.end - span.start, span.start)
            try:
                label, width, height = (NO_LABEL, 0, 0) if like is None else like[["label", "width", "height"]][number].item()
                payload = _payload(span, ("npy",) if like is not None else IMAGE_EXTENSIONS)
                if like is None:
                    label = _label(span, body)
                    width, height = _size(_bytes_of(span, payload, body))
                if verify is not None:
                    verify(_bytes_of(span, payload, body))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if faults is None:
                    raise ValueError(f"{path}: {span.key} cannot be indexed: {error}. Leave it out when packing.") from error
                faults.append(f"{path.name}: {span.key} ({reason(error)})")
                continue
            captions += "txt" in span.files
            records.append((*locate(body, span.files[payload].offset, span.files[payload].size, span.start), label, width, height))
    if like is not None and len(records) != len(like):
        raise ValueError(f"{path} holds {len(records)} samples, the images' shard {len(like)}: encode it again.")
    return np.array(records, RECORD), captions


def _payload(span: Span, extensions: tuple[str, ...]) -> str:
    """The extension of a sample's image, or of its array."""
    found = next((e for kind in extensions for e in span.files if e == kind or (kind == "npy" and e.endswith(".npy"))), None)
    if found is None:
        raise ValueError(f"no image: one of {', '.join(extensions)} is needed beside {', '.join(span.files)}")
    for text in ("json", "txt", "cls"):
        if text in span.files and span.files[text].size > MAX_TEXT_BYTES:
            raise ValueError(f"its .{text} has {span.files[text].size} bytes, at most {MAX_TEXT_BYTES} are read")
    if max(span.files[found].offset - span.start, span.end - span.files[found].end) // BLOCK > 65535:
        raise ValueError(f"the files beside its {found} take more than 33 MB")
    return found


def locate(body: bytes, offset: int, size: int, start: int) -> tuple[int, int, int, int, int, int]:
    """Where a payload lies and what it and the rest of its sample hash to: the first six fields of a RECORD.

    Args:
        body: all that the sample spans.
        offset, size: of the payload, bytes from the tar's beginning.
        start: of the sample, likewise.
    """
    first, last = offset - start, offset - start + size
    payload = body[first:last]
    rest = crc32_of(body[last:], crc32_of(body[:first])) % PLAIN + PLAIN * is_plain(payload)
    after = len(body) // BLOCK - (last + BLOCK - 1) // BLOCK
    return offset // BLOCK, size, crc32_of(payload), first // BLOCK, after, rest


def _bytes_of(span: Span, extension: str, body: bytes) -> bytes:
    member = span.files[extension]
    return body[member.offset - span.start : member.offset - span.start + member.size]


def _label(span: Span, body: bytes) -> int:
    if "cls" not in span.files:
        return NO_LABEL
    label = int(_bytes_of(span, "cls", body))
    if not 0 <= label < NO_LABEL:
        raise ValueError(f"class {label} is not in 0 to {NO_LABEL - 1}")
    return label


def _size(image: bytes) -> tuple[int, int]:
    """Width and height of an image file as it is shown upright, from its header alone."""
    turned = False
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        if has_exif(image):
            turned = _turned(Image.open(io.BytesIO(image)))
    except ValueError:  # no JPEG, or an odd one
        picture = Image.open(io.BytesIO(image))
        width, height = picture.size
        turned = _turned(picture)
    width, height = min(width, 65535), min(height, 65535)
    return (height, width) if turned else (width, height)


def _turned(picture: Image.Image) -> bool:
    """Whether the camera was held upright; where that cannot be read the pixels often can, and `decode.upright` shows them as they lie."""
    try:
        return picture.getexif().get(0x0112) in (5, 6, 7, 8)
    except (OSError, SyntaxError):
        return False


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_suffix(".npy")


def open_index(path: Path, shard: Shard, classes: int) -> np.ndarray:
    """Return the memory-mapped index at `path`, one RECORD a sample, if it is the one that the manifest means.

    Hashing takes 0.2 ms for 10,000 samples. A file that this process has found to be right is not hashed again as long as
    its place on the disk, its size and its times stay.

    Args:
        path: of the index.
        shard: its line of the manifest.
        classes: how many the manifest names.

    Raises:
        ValueError: it is another, or has a class that the manifest does not name.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        known = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, shard.index_sha256, classes))
        found = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        if known in _verified:
            return found
        if len(found) != shard.samples:
            raise ValueError(f"its index has {len(found)} samples, the manifest says {shard.samples}. Copy both again.")
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.index_sha256:
            raise ValueError("its index is not the one that the manifest means (another sha256). Copy both or pack again.")
    if found.dtype != RECORD:
        raise ValueError(f"its index has rows of {found.dtype}, which are no samples. Index the folder again.")
    labels = found["label"][found["label"] != NO_LABEL]
    if len(labels) and labels.max() >= classes:
        raise ValueError(f"its index has class {labels.max()}, the manifest names {classes} classes. Pack or index the folder again.")
    if len(_verified) >= REMEMBERED:
        _verified.clear()
    _verified.add(known)
    return found


def describe(
    tar: Path,
    split: str,
    *,
    like: np.ndarray | None = None,
    faults: list[str] | None = None,
    verify: Callable[[bytes], None] | None = None,
) -> tuple[Shard, Tally]:
    """Index a tar, write the index beside it, and give its line of the manifest and what it holds; arguments as `index_shard`."""
    records, captions = index_shard(tar, like=like, faults=faults, verify=verify)
    path = index_path(tar)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    with open(temporary, "wb") as file:
        np.lib.format.write_array(file, records, allow_pickle=False)
    os.replace(temporary, path)  # never in place: a process that has the index before mapped would die of a shorter one
    sizes = Counter(f"{w}x{h}" for w, h in zip(records["width"].tolist(), records["height"].tolist(), strict=True))
    labels = Counter(str(label) for label in records["label"].tolist() if label != NO_LABEL)
    shard = Shard(
        name=tar.name,
        split=split,
        samples=len(records),
        bytes=tar.stat().st_size,
        sha256=sha256(tar),
        index_sha256=sha256(path),
    )
    return shard, Tally() + Tally(sizes=sizes, labels=labels, captions=captions)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
