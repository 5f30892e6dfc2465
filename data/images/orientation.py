"""How the camera was held: the one reader of an image's orientation, from EXIF or, where that says nothing, from XMP."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image, TiffImagePlugin

from .formats import parsing

TAG = 0x0112
IN_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>\s*)([0-9])")
IN_PNG = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")
"""One of these stands in each PNG file that says its orientation."""
REVERSED = {
    **{1: (False, False, False), 2: (False, True, False), 3: (True, True, False), 4: (True, False, False)},
    **{5: (False, False, True), 6: (True, False, True), 7: (True, True, True), 8: (False, True, True)},
}
"""Of each orientation: whether rows and columns of the file run backwards, and then are swapped."""
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError)


def stated_orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation, 1 to 8, that EXIF or XMP states; 1 where neither does, or EXIF cannot be read.

    Args:
        exif: with its `Exif` mark, or empty.
        xmp: a packet of XML, or empty.
    """
    tags = Image.Exif()
    try:
        with parsing():
            tags.load(exif)
            stated = tags.get(TAG)
    except UNREADABLE:  # viewers show such pixels as they lie
        return 1
    return _in_xmp(xmp) if stated is None else _known(stated)


def read_orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, in which an opened image lies in its `size`.

    A TIFF file's own tag counts as 1: Pillow gives such a file's size, and later its pixels, turned already. Of a PNG file,
    which may state it behind its pixels, they are decoded for it.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stated = 1 if TAG in image.tag_v2 else None
    else:
        try:
            with parsing():
                stated = image.getexif().get(TAG)
        except UNREADABLE:
            return 1
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""  # of a PNG file there since its EXIF was asked for
    return _in_xmp(xmp) if stated is None else _known(stated)


def load_pixels(image: Image.Image) -> int:
    """Decode an opened image and return the orientation in which its pixels now lie.

    Raises:
        OSError, ValueError and the like: it is damaged.
    """
    with parsing():
        orientation = 0
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            orientation = read_orientation(image)
            image.info.pop("xmp", None)  # Pillow would turn it by some of what may stand there
        try:
            image.load()
        except (OSError, SyntaxError):
            image.load()  # passes where the pixels are whole and only what follows them is damaged, as viewers see it
    return orientation or read_orientation(image)


def rotate_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels, (H, W) or (H, W, C), upright; a view.

    Args:
        pixels: as they lie in a file.
        orientation: 1 to 8, of EXIF.
    """
    rows, columns, swapped = REVERSED[orientation]
    pixels = pixels[::-1] if rows else pixels
    pixels = pixels[:, ::-1] if columns else pixels
    return pixels.swapaxes(0, 1) if swapped else pixels


def swaps_sides(orientation: int) -> bool:
    """Return whether width and height change places when an image is turned upright."""
    return REVERSED[orientation][2]


def _known(stated: object) -> int:
    return stated if isinstance(stated, int) and 1 <= stated <= 8 else 1


def _in_xmp(xmp: bytes | str) -> int:
    found = IN_XMP.search(xmp.encode(errors="replace") if isinstance(xmp, str) else xmp)
    return _known(int(found[1])) if found else 1
