"""An image file made smaller before it is packed, with all the channels and bits that it has."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from .bands import resized
from .decode import decode_native
from .formats import JPEG_NAMES, PNG_MAGIC

SAVED_AS: dict[str, dict[str, Any]] = {"jpg": {"format": "JPEG", "quality": 95}, "webp": {"format": "WEBP", "quality": 95}}
SAME_FORMAT = {"jpeg": "jpg", "mpo": "jpg", **dict.fromkeys(JPEG_NAMES, "jpg")}
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Of PNG, for gray, gray with alpha, RGB and RGBA."""


def downscale(data: bytes, side: int, extension: str) -> tuple[str, bytes]:
    """Return an image file whose longer side is `side`, upright and in sRGB, and its extension.

    JPEG and WebP stay such; other formats, and what they do not hold, become PNG; bands that are no colours become
    .npy, or TIFF where the first of them are colours for who wants no more.

    Args:
        data: a file of more pixels.
        side: pixels.
        extension: of the file.

    Raises:
        One of DECODE_ERRORS: it cannot be decoded.
    """
    pixels = decode_native(data)
    width, height = pixels.image.size if pixels.image else pixels.values.shape[1::-1]
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if pixels.image is None:
        values = resized(pixels.values, size, (0, 0, width, height), pixels.alpha)
        if pixels.is_color:
            return "png", deep_png(values)
        return ("tif", _tiff(values, *pixels.form)) if pixels.form else ("npy", _array(values))
    image = pixels.image.resize(size, Image.Resampling.LANCZOS)
    family = SAME_FORMAT.get(extension, extension)
    family = family if family in SAVED_AS and (family != "jpg" or image.mode in ("L", "RGB")) else "png"
    buffer = io.BytesIO()
    image.save(buffer, **SAVED_AS.get(family, {"format": "PNG"}))
    return family, buffer.getvalue()


def _array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _tiff(values: np.ndarray, photometric: int, *extra: int) -> bytes:
    """Return a TIFF file of bands.

    Args:
        values: (H, W, C), uint8 or uint16.
        photometric: interpretation of the first bands, 1 gray or 2 RGB.
        extra: what the others are, as ExtraSamples has it.
    """
    height, width, count = values.shape
    body = zlib.compress(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes(), 6)
    tags = {256: (width,), 257: (height,), 258: (8 * values.dtype.itemsize,) * count, 259: (8,), 262: (photometric,), 273: (8,)}
    tags |= {277: (count,), 278: (height,), 279: (len(body),), 284: (1,)} | ({338: extra} if extra else {})
    first = 8 + len(body) + len(body) % 2
    table, beyond, free = struct.pack("<H", len(tags)), b"", first + 6 + 12 * len(tags)
    for tag, numbers in tags.items():
        kind, size = ("I", 4) if tag in (273, 279) else ("H", 2)
        packed = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        if len(packed) > 4:
            packed, beyond = struct.pack("<I", free + len(beyond)), beyond + packed
        table += struct.pack("<HHI", tag, 4 if size == 4 else 3, len(numbers)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", first) + body + bytes(len(body) % 2) + table + bytes(4) + beyond


def deep_png(values: np.ndarray) -> bytes:
    """Return a PNG file of 8 or 16 bits, which Pillow writes of gray alone.

    Args:
        values: (H, W, C), uint8 or uint16; 1 to 4 channels: gray, gray with alpha, RGB, RGBA.
    """
    height, width, channels = values.shape
    depth = 8 * values.dtype.itemsize
    rows = np.ascontiguousarray(values, values.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows - above], axis=1)  # filter 2: the difference from the row above
    header = struct.pack(">IIBBBBB", width, height, depth, COLOR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b""))
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
