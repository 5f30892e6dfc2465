"""The formats of image files that are read: their extensions, and the only place that hands a stranger's bytes to Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, PngImagePlugin, UnidentifiedImageError

FORMATS = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"},
    **{"AVIF": "avif", "JPEG2000": "jp2", "ICO": "ico", "PSD": "psd"},
}
"""Pillow's name of each format that is read, and the extension that it is stored under. No other is tried: an EPS file would be a
program that Ghostscript runs."""
OPENED = tuple(name for name in FORMATS if name != "MPO")
"""What Pillow is asked to try; an MPO file is opened as the JPEG file that it begins with."""
JPEG_NAMES = ("jfif", "jpe", "jif", "pjpeg", "pjp")
"""Other endings of JPEG files; they are stored as `.jpg`, which every reader knows."""
IMAGE_EXTENSIONS = (
    *("png", "jpg", "jpeg", *JPEG_NAMES, "webp", "bmp", "gif", "tif", "tiff", "apng", "mpo", "avif", "jp2", "ico", "psd"),
    "npy",
)
"""`npy` comes last: an array is a sample's image only where no other file of it is."""
NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8"
PASSED = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What parsers raise of old for a damaged file, which callers catch as it is."""


MAX_PIXELS = 178_956_970
"""A larger image is refused as a decompression bomb: Pillow's own limit."""
MAX_VALUES = 4 * MAX_PIXELS
"""Of all bands of an image together."""
MAX_RATIO = 32
"""An image whose long side is longer than so many short ones is refused: nothing is left of it in a crop."""
PngImagePlugin.MAX_TEXT_CHUNK = 2_000_000
"""Bytes that a text or a profile of a PNG file may inflate to: pictures of generators carry workflows, and scanners profiles, of more
than Pillow's megabyte; what inflates to more is taken for a bomb, as before."""


class BadImage(ValueError):
    """A file that no image can be made of, whatever its parser raised."""


@contextmanager
def parsing() -> Iterator[None]:
    """Turn whatever a parser raises for a stranger's bytes into that sample's fault.

    AVIF raises RuntimeError, others struct.error, MemoryError, RecursionError, KeyError and more. Only calls into parsers
    belong inside: what we get wrong ourselves must stay loud.

    Raises:
        BadImage: in the place of all that is not an OSError, EOFError, ValueError, SyntaxError or DecompressionBombError.
    """
    try:
        yield
    except PASSED:
        raise
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def open_image(data: bytes) -> Image.Image:
    """Open an image file, of one of FORMATS whatever it is named; its pixels are not yet decoded.

    Raises:
        OSError, ValueError and the like: it is damaged, or of another format.
    """
    with parsing():
        return Image.open(io.BytesIO(data), formats=OPENED)


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in another of Pillow's modes.

    Raises:
        ValueError and the like: what is damaged, a palette say, has none.
    """
    with parsing():
        return image.convert(mode)


def check_size(width: int, height: int, bands: int = 1) -> None:
    """Raise ValueError for an image without pixels, with too many, or of too extreme a shape, before it is decoded."""
    if min(width, height, bands) < 1:
        raise BadImage(f"{width} x {height} pixels of {bands} bands are none")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if width * height * bands > MAX_VALUES:
        raise BadImage(f"{width} x {height} pixels of {bands} bands are more than {MAX_VALUES} values")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadImage(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")


def detect_extension(data: bytes) -> str:
    """Return the extension that the bytes of an image ask for.

    Raises:
        OSError, ValueError and the like: they are no image of FORMATS.
    """
    if data[:6] == NUMPY_MAGIC:
        return "npy"
    try:
        return FORMATS[open_image(data).format or ""]
    except UnidentifiedImageError:
        if data[:4] in TIFF_MAGIC:  # of a kind that Pillow does not read
            return "tif"
        raise
