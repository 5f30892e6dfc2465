"""From the bytes of an image file to pixels of a wanted size.

The image is turned upright (EXIF), its transparency laid on white, resized
with antialiasing so that it covers the wanted size, and cropped to it. Plain
JPEG files take simplejpeg, whose pixels are Pillow's to the bit; Pillow takes
the rest, and has the last word on what is damaged.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

DECODE_ERRORS = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What is raised for a damaged, a foreign or an absurd file."""
MAX_PIXELS = 178_956_970
"""A larger image is refused as a decompression bomb: Pillow's own limit."""
MAX_RATIO = 32
"""An image whose long side is longer than so many short ones is refused: nothing is left of it in a crop."""


def upright(data: bytes, channels: int) -> Image.Image:
    """Decode an image as gray (1 channel) or RGB (3), upright, transparency on white; of an animation the first frame.

    Raises:
        One of DECODE_ERRORS: not an image, damaged, larger than MAX_PIXELS,
            more extreme than MAX_RATIO.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    _check(*image.size)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError):
        image.load()  # passes where the pixels are whole and only what follows them is damaged, as viewers see it
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _check(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit (and wider) grays scaled to 8 bits; Pillow's own conversion clips them."""
    values = np.asarray(image, np.float64)
    top = 65535.0 if values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.round(values.clip(0, top) * (255 / top)).astype(np.uint8))


def decode_into(
    out: np.ndarray, data: bytes, mirror: bool = False, at: Sequence[float] | np.ndarray = (0.5, 0.5), plain: bool = False
) -> None:
    """Decode an image file into pixels of a given size.

    Args:
        out: (height, width, channels), uint8, contiguous; channels 1 or 3. Filled.
        data: the file.
        mirror: left to right, after cropping.
        at: where to crop what the wanted size leaves over: 0 at the top (left), 1 at the bottom (right).
        plain: known to be what `is_plain` says, and of the size of `out`.

    Raises:
        One of DECODE_ERRORS.
    """
    if plain or (out.shape[2] == 3 and is_plain(data)):
        try:  # straight into `out`, which reads the header only once
            found = simplejpeg.decode_jpeg(data, buffer=out)
            if plain or found.shape == out.shape:
                if mirror:
                    out[:] = out[:, ::-1].copy()
                return
        except ValueError:  # larger than `out`, or damaged: Pillow has the last word
            found = None
    pixels = _jpeg(data, out.shape[2]) if data[:2] == b"\xff\xd8" else None
    image = upright(data, out.shape[2]) if pixels is None else Image.fromarray(pixels)
    height, width = out.shape[:2]
    if image.size != (width, height):
        box = crop_box(image.width, image.height, width, height, at)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    fitted = np.asarray(image, np.uint8).reshape(out.shape)
    out[:] = fitted[:, ::-1] if mirror else fitted


def has_exif(data: bytes) -> bool:
    """Whether a JPEG file says how the camera was held: an Exif segment before its first scan."""
    return any(data[at + 1] == 0xE1 and data[at + 4 : at + 8] == b"Exif" for at in _segments(data))


def is_plain(data: bytes) -> bool:
    """Whether a file is a JPEG of three colours that says nothing of how the camera was held; where this says no, Pillow is asked."""
    if data[:2] != b"\xff\xd8":
        return False
    if len(data) < 4096:  # searching is faster than walking
        return b"Exif" not in data and (b"\xff\xc0\0\x11" in data or b"\xff\xc2\0\x11" in data)
    for at in _segments(data):
        if data[at + 1] in (0xC0, 0xC2):
            return data[at + 9] == 3
        if data[at + 1] == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            return False
    return False


def _segments(data: bytes) -> Iterator[int]:
    """Where the segments of a JPEG file begin, up to its first scan."""
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        yield at
        at += 2 + int.from_bytes(data[at + 2 : at + 4])


def _jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """The pixels of a JPEG file, (H, W) or (H, W, 3); None for what Pillow should look at."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in (("Gray",) if channels == 1 else ("Gray", "YCbCr", "RGB")) or has_exif(data):
            return None
        _check(width, height)
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY").squeeze(2 if channels == 1 else ())
    except ValueError:
        return None


def crop_box(width: int, height: int, to_width: int, to_height: int, at: Sequence[float] | np.ndarray) -> tuple[float, float, float, float]:
    """The part of an image that fills a wanted size: left, top, right, bottom in its own pixels.

    Args:
        width, height: of the image.
        to_width, to_height: wanted.
        at: where the part lies in what is left over, from the top and from the left, 0 to 1.
    """
    scale = min(width / to_width, height / to_height)
    wide, high = scale * to_width, scale * to_height
    top, left = at[0] * (height - high), at[1] * (width - wide)
    return left, top, min(left + wide, width), min(top + high, height)


def decode_image(data: bytes, channels: int, resolution: int, mirror: bool = False, bit_depth: int = 8) -> np.ndarray:
    """An image file as a square of pixels, cropped at its centre.

    Args:
        data: the file.
        channels: 1 or 3.
        resolution: pixels a side.
        mirror: left to right.
        bit_depth: 8 or 16.

    Returns:
        (channels, resolution, resolution), uint8 or uint16.

    Raises:
        One of DECODE_ERRORS.
    """
    out = np.empty((resolution, resolution, channels), f"uint{bit_depth}")
    decode_into(out, data, mirror)
    return np.ascontiguousarray(out.transpose(2, 0, 1))
