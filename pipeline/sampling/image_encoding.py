"""One image as the bytes of a file that keeps all of it: a PNG of 8 or 16 bits, alpha included, or .npy for five bands or more.

Pillow writes 16 bits of gray alone, so PNGs of 16 bits are written here: the
file must not depend on which optional libraries a machine has.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's number for gray, gray and alpha, RGB, RGB and alpha, by the number of channels."""
PNG_FILTER_UP = 2
"""The PNG filter that keeps the difference of each byte from the one above it."""


def quantise(image: Tensor, bit_depth: int = 8) -> np.ndarray:
    """Return (C, H, W), -1..1, as (H, W, C), uint8 or uint16: the nearest of 2^bit_depth values, the inverse of `data.stream.to_unit`."""
    top = 2**bit_depth - 1
    levels = ((image + 1) * (top / 2)).round().clamp(0, top)
    pixels = levels.to(torch.uint8 if bit_depth == 8 else torch.uint16)
    array: np.ndarray = rearrange(pixels, "c h w -> h w c").contiguous().numpy()
    return array


def file_extension(channels: int) -> str:
    """Return what the file of an image of so many channels is called: png up to four, npy for more."""
    return "png" if channels in PNG_COLOUR_TYPES else "npy"


def encode_image(image: Tensor, bit_depth: int = 8) -> bytes:
    """Return (C, H, W), -1..1, as the bytes of a file, of the kind that `file_extension` names; a .npy holds (H, W, C)."""
    pixels, buffer = quantise(image, bit_depth), io.BytesIO()
    if pixels.shape[2] not in PNG_COLOUR_TYPES:
        np.save(buffer, pixels)
    elif bit_depth == 16:
        return _encode_png_16(pixels)
    else:
        array_to_pil(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def array_to_pil(pixels: np.ndarray) -> Image.Image:
    """Return (H, W, C), uint8, as L, LA, RGB or RGBA; of five bands or more the first three."""
    shown = np.ascontiguousarray(pixels[..., :3]) if pixels.shape[2] not in PNG_COLOUR_TYPES else pixels
    return Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)


def composite_on_white(picture: Image.Image) -> Image.Image:
    """Return a picture without its alpha, laid on white; one without alpha as it is."""
    if "A" not in picture.getbands():
        return picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert(picture.mode.removesuffix("A"))


def _encode_png_16(pixels: np.ndarray) -> bytes:
    """Return (H, W, C), uint16, C from 1 to 4, as a PNG.

    Source: W3C, Portable Network Graphics, third edition, 5.3 (chunks), 9.2 (filters), 11.2.1 (IHDR).
    """
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.concatenate(
        [np.full((height, 1), PNG_FILTER_UP, np.uint8), rows - above], axis=1
    )  # bytes wrap around, as the filter wants them
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR_TYPES[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
