"""The file of one rank: a safetensors file, copied to host memory at once and written from there at leisure.

The header's metadata holds, for each tensor of which the file has a part, the
whole shape and where the part begins. It is laid out here and not by the
library because checking, hashing and writing are done beside training: each of
them works on long stretches of one buffer, outside Python's lock.
Source: https://github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from condot.core.printable import one_line

from .sharding import Box, TensorPart, overlap, slices_within

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""Names of the format."""
EXPONENT_MASKS = {
    **{"F64": (np.uint64, 0x7FF << 52), "F32": (np.uint32, 0xFF << 23), "F16": (np.uint16, 0x1F << 10), "BF16": (np.uint16, 0xFF << 7)},
    **{"F8_E4M3": (np.uint8, 0x7F), "F8_E5M2": (np.uint8, 0x7C)},
}
"""The bits that are all set in what is not finite, and only there (of F8_E4M3, which has no infinity, those of its NaN)."""
CHECK_CHUNK_BYTES = 2**20
"""Bytes checked at a time: they stay in the processor's cache."""
WRITE_CHUNK_BYTES = 2**23
"""Bytes hashed and written at a time."""
METADATA_KEY = "condot"
TensorIndex = dict[str, tuple[str, tuple[int, ...]]]
"""Type, in the format's words, and shape of whole tensors, by name."""


class PartSpan(NamedTuple):
    """Where a part stands in the buffer, and so in the file behind the header."""

    part: TensorPart
    start: int
    stop: int


class HostBuffer:
    """Memory that parts are copied into, kept from one save to the next: taking it anew costs more than the copies."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._ready: torch.cuda.Event | None = None
        self._reserve_thread: Thread | None = None

    def reserve(self, parts: list[TensorPart]) -> None:
        """Begin to take the memory for copies of these parts, in a thread."""
        self._reserve_thread = Thread(
            target=self._allocate_now, args=(sum(p.tensor.nbytes for p in parts), _on_gpu(parts) is not None), daemon=True
        )
        self._reserve_thread.start()

    def _allocate_now(self, size: int, pinned: bool) -> None:
        if self._memory.nbytes < size:
            with contextlib.suppress(OSError, RuntimeError, MemoryError):  # `copy` tries again, and says why it cannot
                self._memory = _allocate(size, pinned=pinned)
                for begin in range(0, size, CHECK_CHUNK_BYTES):
                    self._memory.numpy()[begin : begin + CHECK_CHUNK_BYTES] = 0

    def copy(self, parts: list[TensorPart]) -> list[PartSpan]:
        """Take a copy of the parts, in the order of the file; on a GPU the copies are only queued.

        Raises:
            ValueError: a type that the format does not have.
            RuntimeError, OSError: not so much memory.
        """
        spans, stop = [], 0
        for part in sorted(parts, key=lambda p: (-p.tensor.element_size(), str(p.tensor.dtype), p.name)):
            if part.tensor.dtype not in DTYPES:
                raise ValueError(f"{part.name} is of the type {part.tensor.dtype}, which a checkpoint cannot hold")
            start, stop = stop, stop + part.tensor.nbytes
            spans.append(PartSpan(part, start, stop))
        if self._reserve_thread:
            self._reserve_thread.join()
            self._reserve_thread = None
        device = _on_gpu(parts)
        if self._memory.nbytes < stop:
            self._memory = _allocate(stop, pinned=device is not None)
        for part, start, stop in spans:
            self._memory[start:stop].view(part.tensor.dtype).view(part.box.shape).copy_(part.tensor, non_blocking=part.tensor.is_cuda)
        self._ready = torch.cuda.current_stream(device).record_event() if device else None
        return spans

    def bytes(self, size: int) -> memoryview:
        """The first bytes of what was copied; waits for a GPU to have copied it."""
        if self._ready:
            self._ready.synchronize()
        return self._memory.numpy().data[:size]


def _on_gpu(parts: list[TensorPart]) -> torch.device | None:
    """The GPU on which parts are, if any."""
    return next((part.tensor.device for part in parts if part.tensor.is_cuda), None)


def _allocate(size: int, *, pinned: bool) -> Tensor:
    """So many bytes: locked where a GPU copies into them, else in huge pages where the system has them."""
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def find_nonfinite(spans: list[PartSpan], data: memoryview) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None."""
    first = 0
    while first < len(spans):  # spans of one type stand together and are checked in one go
        dtype = spans[first].part.tensor.dtype
        last = next((i for i in range(first, len(spans)) if spans[i].part.tensor.dtype != dtype), len(spans))
        if DTYPES[dtype] in EXPONENT_MASKS:
            at = _first_bad(data, spans[first].start, spans[last - 1].stop, *EXPONENT_MASKS[DTYPES[dtype]])
            if at is not None:
                return next(span.part.name for span in spans if span.stop > at)
        first = last
    return None


def _first_bad(data: memoryview, start: int, stop: int, unit: Any, mask: int) -> int | None:
    """Where, in bytes, the first number stands whose exponent has all bits set."""
    size = np.dtype(unit).itemsize
    bits, flags = np.empty(CHECK_CHUNK_BYTES // size, unit), np.empty(CHECK_CHUNK_BYTES // size, bool)
    for begin in range(start, stop, CHECK_CHUNK_BYTES):
        found = np.frombuffer(data[begin : min(begin + CHECK_CHUNK_BYTES, stop)], unit)
        n = len(found)
        np.equal(np.bitwise_and(found, unit(mask), out=bits[:n]), unit(mask), out=flags[:n])
        if flags[:n].any():
            place: int = begin + int(flags[:n].argmax()) * size
            return place
    return None


def build_header(spans: list[PartSpan]) -> bytes:
    """What stands before the tensors: the length, and JSON that names them."""
    about: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for part, start, stop in spans:
        about[part.name] = {"dtype": DTYPES[part.tensor.dtype], "shape": part.box.shape, "data_offsets": [start, stop]}
        if part.box.shape != part.whole:
            parts[part.name] = {"whole": part.whole, "offset": part.box.offset}
    about["__metadata__"] = {"format": "pt", METADATA_KEY: json.dumps({"parts": parts})}
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, spans: list[PartSpan], data: memoryview) -> dict[str, Any]:
    """Write a file and force it to the disk.

    Args:
        path: of the file, new.
        spans: what is in it.
        data: the bytes of all of them.

    Returns:
        Its size in bytes and its sha256.

    Raises:
        OSError: it could not be written.
    """
    sha, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for source in (memoryview(build_header(spans)), data):
            for begin in range(0, len(source), WRITE_CHUNK_BYTES):
                chunk = source[begin : begin + WRITE_CHUNK_BYTES]
                sha.update(chunk)
                size += len(chunk)
                while len(chunk):
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": sha.hexdigest()}


class StoredPart(NamedTuple):
    """One entry of a file: a box of the whole tensor."""

    dtype: str
    whole: tuple[int, ...]
    box: Box


@contextlib.contextmanager
def open_safetensors(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """Open a file to read its tensors.

    Raises:
        ValueError: it is none, or what it says of itself is not so.
        OSError: there is none.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}): take another checkpoint.") from error


def stored_parts(file: Any) -> dict[str, StoredPart]:
    """What an open file (safetensors.safe_open) holds, by name; without our metadata every tensor is a whole one.

    Raises:
        ValueError: metadata that does not fit the tensors.
    """
    parts = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}")).get("parts", {})
    found = {}
    for name in file.keys():  # noqa: SIM118
        one = file.get_slice(name)
        shape = tuple(one.get_shape())
        said = parts.get(name, {"whole": shape, "offset": (0,) * len(shape)})
        stored = StoredPart(one.get_dtype(), tuple(said["whole"]), Box(tuple(said["offset"]), shape))
        ends = zip(stored.whole, *stored.box, strict=True)
        numbers = all(type(n) is int for n in (*stored.whole, *stored.box.offset))
        if not numbers or not all(offset >= 0 and offset + length <= end for end, offset, length in ends):
            raise ValueError(f"{name}: a part of {shape} at {stored.box.offset} does not lie in {stored.whole}")
        found[name] = stored
    return found


def read_tensor_index(files: list[Path]) -> TensorIndex:
    """Return what the headers of some files say that they hold together; errors as `opened`."""
    found: TensorIndex = {}
    for path in files:
        with open_safetensors(path) as file:
            found |= {name: (stored.dtype, stored.whole) for name, stored in stored_parts(file).items()}
    return found


def read_into(path: Path, wanted: dict[str, TensorPart]) -> dict[str, int]:
    """Fill parts from one file, reading only what they have in common with it.

    Args:
        path: of the file.
        wanted: by name; their tensors are filled in place.

    Returns:
        Elements filled, by name.

    Raises:
        ValueError, OSError: a file that cannot be read.
    """
    filled = {}
    with open_safetensors(path) as file, torch.no_grad():
        for name, stored in stored_parts(file).items():
            common = overlap(stored.box, wanted[name].box) if name in wanted and stored.whole == wanted[name].whole else None
            if common:
                inside = file.get_tensor(name) if common == stored.box else file.get_slice(name)[slices_within(common, stored.box)]
                wanted[name].tensor[slices_within(common, wanted[name].box)].copy_(inside)
                filled[name] = common.numel
    return filled


def read_whole(path: Path, device: torch.device | str, shapes: dict[str, tuple[int, ...]], whole: dict[str, Tensor]) -> dict[str, int]:
    """Put what a file holds of some tensors into `whole`, which grows.

    Args:
        path: of the file.
        device: where they are put.
        shapes: of the whole tensors wanted, by name.
        whole: the tensors so far, by name.

    Returns:
        Elements read, by name.

    Raises:
        ValueError, OSError: a file that cannot be read.
    """
    read = {}
    with open_safetensors(path, device) as file:
        for name, stored in stored_parts(file).items():
            if shapes.get(name) == stored.whole:
                tensor = file.get_tensor(name)
                if stored.box.shape == stored.whole:
                    whole[name] = tensor
                else:
                    target = whole.setdefault(name, torch.empty(stored.whole, dtype=tensor.dtype, device=tensor.device))
                    target[slices_within(stored.box, Box((0,) * len(stored.whole), stored.whole))] = tensor
                read[name] = math.prod(stored.box.shape)
    return read
