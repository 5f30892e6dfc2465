"""From the bytes of an image file to pixels of one size.

The image is turned upright (EXIF), its transparency laid on white, its short
side resized to the resolution with antialiasing, and the centre cropped.
Pixels are whole numbers here; `stream.to_unit` makes of them what a pixel model sees.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

DECODE_ERRORS = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a damaged, a foreign or an absurd file."""


def upright(data: bytes, channels: int) -> Image.Image:
    """Decode an image as gray (1 channel) or RGB (3), upright, transparency on white.

    Raises:
        One of DECODE_ERRORS: not an image, damaged, too large.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
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


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit (and wider) grays scaled to 8 bits; Pillow's own conversion clips them."""
    values = np.asarray(image, np.float64)
    top = 65535.0 if values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.round(values.clip(0, top) * (255 / top)).astype(np.uint8))


def decode_image(data: bytes, channels: int, resolution: int, mirror: bool = False) -> np.ndarray:
    """An image file as a square of pixels.

    Args:
        data: the file.
        channels: 1 or 3.
        resolution: pixels a side.
        mirror: left to right.

    Returns:
        (channels, resolution, resolution), uint8.

    Raises:
        One of DECODE_ERRORS.
    """
    image = upright(data, channels)
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8)
    pixels = pixels[:, ::-1] if mirror else pixels
    return np.array(pixels.reshape(resolution, resolution, channels).transpose(2, 0, 1), order="C")
