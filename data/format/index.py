"""Indexing: a tar is read once, and each of its samples becomes a RECORD, or a fault that has a name.

Latents and text embeddings lie in encoded shards: other folders of the same form, with the same keys in the same order.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from condot.core.errors import describe_error
from condot.core.file_lock import open_new
from condot.core.hashing import sha256_of_file
from condot.core.printable import printable

from ..images.decode import DECODE_ERRORS, upright_size
from .file_stamps import hash64
from .index_record import MAX_BLOCKS, MAX_SAMPLE_BYTES, RECORD, index_path, index_payload
from .manifest import Tally
from .sample_files import (
    NO_LABEL,
    TEXTS,
    check_text_size,
    has_image,
    image_among,
    is_about_the_data,
    kind_without_image,
    no_image,
    read_texts,
    why_no_image,
)
from .shard_table import Shard
from .tar_headers import BLOCK
from .tar_reader import Span, TarRemarks, samples


def index_shard(
    path: Path,
    *,
    like: np.ndarray | None = None,
    faults: list[str] | None = None,
    verify: Callable[[bytes], None] | None = None,
    image_extension: str = "",
    remarks: TarRemarks | None = None,
) -> tuple[np.ndarray, int]:
    """Read a tar once and describe its samples, in order.

    Args:
        path: the tar.
        like: for encoded shards, the records of the images' shard, whose sizes
            and classes these take over.
        faults: where given, samples that cannot be indexed are left out and
            named here, instead of an error.
        verify: called with each image; its ValueError is the sample's fault.
        image_extension: of the image, where samples have several.
        remarks: where given, files that are no part of a sample are counted here.

    Returns:
        One RECORD a sample, and the number of samples with a caption.

    Raises:
        ValueError: a damaged tar; a sample with no image or several, an image
            whose header cannot be read, a class that is no whole number from 0
            to 65,534, a text that cannot be read; another number of samples
            than `like`.
    """
    remarks = TarRemarks() if remarks is None else remarks
    records, captions, beside, lone = [], 0, set[str](), list[Span]()
    with open(path, "rb", buffering=0) as file:
        for number, span in enumerate(samples(path, remarks=remarks, every=like is not None)):
            known = like is not None or has_image(span.files, image_extension)
            body = _read(file.fileno(), span, path) if known else b""
            try:
                payload = _array(span) if like is not None else _image(span, image_extension)
                if not payload:
                    lone.append(span)
                    continue
                if like is None:
                    label, captioned = read_texts({text: _bytes_of(span, text, body) for text in TEXTS if text in span.files})
                    width, height = _size(_bytes_of(span, payload, body))
                else:
                    captioned, (label, width, height) = False, like[["label", "width", "height"]][number].item()
                if verify is not None:
                    verify(_bytes_of(span, payload, body))
            except DECODE_ERRORS as error:
                _fail(path, span, error, faults)
                continue
            captions += captioned
            beside.update(span.files)
            records.append((*index_payload(body, span.files[payload].offset, span.files[payload].size, span.start), label, width, height))
    for span in lone:
        if not beside.isdisjoint(span.files) and not is_about_the_data(span.key):
            _fail(path, span, ValueError(span.fault or no_image(span.files)), faults)
        else:
            remarks.unknown.update(member.special or kind_without_image(extension) for extension, member in span.files.items())
    if like is not None and len(records) != len(like):
        raise ValueError(f"{path} holds {len(records)} samples, the images' shard {len(like)}: encode it again.")
    return np.array(records, RECORD), captions


def _fail(path: Path, span: Span, error: Exception, faults: list[str] | None) -> None:
    """Note what is wrong with a sample, or raise it."""
    if faults is None:
        raise ValueError(f"{printable(str(path))}: {printable(span.key)} cannot be indexed: {error}. Leave it out when packing.") from error
    faults.append(f"{printable(path.name)}: {printable(span.key)} ({printable(describe_error(error))})")


def _read(file: int, span: Span, path: Path) -> bytes:
    """Return all that a sample spans; nothing where that is too much."""
    length = span.end - span.start
    if length > MAX_SAMPLE_BYTES:
        return b""
    body = os.pread(file, length, span.start)
    if len(body) < length:
        raise ValueError(f"{printable(str(path))}: it was cut while it was read. Pack or copy this shard again.")
    return body


def _array(span: Span) -> str:
    """Return the extension of an encoded shard's array.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    found = next((extension for extension in span.files if extension == "npy" or extension.endswith(".npy")), None)
    if found is None or span.fault:
        raise ValueError(span.fault or f"no array: one of npy is needed beside {', '.join(span.files)}")
    _check(span, found)
    return found


def _image(span: Span, wanted: str) -> str:
    """Return the extension of a sample's image; "" where its files may be no sample at all.

    Raises:
        ValueError: the sample lost its image, has several, or cannot be read.
    """
    if not has_image(span.files, wanted):
        why = why_no_image(span.key, span.files)
        if why:
            raise ValueError(span.fault or why)
        return ""
    if span.fault:
        raise ValueError(span.fault)
    found = image_among(span.files, wanted)
    for text in TEXTS:
        if text in span.files:
            check_text_size(text, span.files[text].size)
    _check(span, found)
    return found


def _check(span: Span, payload: str) -> None:
    """Raise ValueError where a RECORD cannot say where a sample lies."""
    member = span.files[payload]
    if max(member.offset - span.start, span.end - member.end) // BLOCK > MAX_BLOCKS:
        raise ValueError(f"the files beside its {payload} take more than 33 MB")
    if span.end - span.start > MAX_SAMPLE_BYTES:
        raise ValueError(f"its files take {span.end - span.start} bytes, at most {MAX_SAMPLE_BYTES} are read")
    if span.end > BLOCK << 32:
        raise ValueError("it lies more than 2 TB from the tar's beginning: pack several tars")


def _bytes_of(span: Span, extension: str, body: bytes) -> bytes:
    member = span.files[extension]
    return body[member.offset - span.start : member.offset - span.start + member.size]


def _size(image: bytes) -> tuple[int, int]:
    """Width and height of an image file as it is shown upright, as far as two bytes hold them."""
    width, height = upright_size(image)
    return min(width, 65535), min(height, 65535)


def index_tar(
    tar: Path,
    split: str,
    *,
    like: np.ndarray | None = None,
    faults: list[str] | None = None,
    verify: Callable[[bytes], None] | None = None,
    image_extension: str = "",
    remarks: TarRemarks | None = None,
) -> tuple[Shard, Tally]:
    """Index a tar, write the index beside it; return its line of the manifest and what it holds. Arguments as `index_shard`."""
    records, captions = index_shard(tar, like=like, faults=faults, verify=verify, image_extension=image_extension, remarks=remarks)
    path = index_path(tar)
    temporary = path.with_name(f".{os.getpid()}-{hash64(path.name.encode('utf-8', 'surrogateescape')):016x}.npy")  # names may be long
    with open_new(temporary) as file:
        np.lib.format.write_array(file, records, allow_pickle=False)
    os.replace(temporary, path)  # never in place, where another may read it; who needs it on the disk calls `sync`
    sizes = Counter(f"{w}x{h}" for w, h in zip(records["width"].tolist(), records["height"].tolist(), strict=True))
    labels = Counter(str(label) for label in records["label"].tolist() if label != NO_LABEL)
    shard = Shard(
        name=tar.name,
        split=split,
        samples=len(records),
        bytes=tar.stat().st_size,
        sha256=sha256_of_file(tar),
        index_sha256=sha256_of_file(path),
    )
    return shard, Tally() + Tally(sizes=sizes, labels=labels, captions=captions)
