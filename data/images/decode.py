"""From the bytes of an image file to pixels of a wanted size.

The image is turned upright, its colours are converted to sRGB where its
profile says otherwise, its transparency is kept or laid on white, and it is
resized with antialiasing so that it covers the wanted size, and cropped to it.
JPEG files take simplejpeg, whose pixels are Pillow's to the bit; Pillow takes
the rest of 8 bits, and has the last word on what is damaged; deeper files, and
those of other bands, are arrays (`bands`, `tiff`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from .bands import Bands, array_size, as_channels, read_array, read_png, resized
from .color import is_srgb, to_srgb
from .formats import JPEG_MAGIC, NUMPY_MAGIC, PASSED, PNG_MAGIC, TIFF_MAGIC, BadImage, check_size, converted, open_image
from .jpeg_header import jpeg_header
from .orientation import IN_PNG, load_pixels, read_orientation, rotate_upright, stated_orientation, swaps_sides
from .tiff import needs_bands, read_tiff, tiff_size

DECODE_ERRORS = PASSED
"""What is raised for a damaged, a foreign or an absurd file; BadImage, a ValueError, for whatever else its parser raised."""
APP1_APP2 = re.compile(b"\xff[\xe1\xe2]")
"""Where the segments begin that say more of a JPEG file: EXIF, XMP, its profile."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's, of each number of channels."""


def decode_into(
    out: np.ndarray, data: bytes, mirror: bool = False, at: Sequence[float] | np.ndarray = (0.5, 0.5), plain: bool = False
) -> None:
    """Decode an image file into pixels of a given size.

    Args:
        out: (height, width, channels), contiguous. Filled. Channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA, more: so many bands.
            uint8, or uint16, where 16 bits are kept and 8-bit values are times 257.
        data: the file.
        mirror: left to right, after cropping.
        at: where to crop what the wanted size leaves over: 0 at the top (left), 1 at the bottom (right).
        plain: known to be what `is_plain` says, and of the size of `out`, which has 3 channels of uint8.

    Raises:
        One of DECODE_ERRORS.
    """
    if plain or (out.strides[1] == 3 and is_plain(data)):  # three bytes a pixel
        try:  # straight into `out`, which reads the header only once
            found = simplejpeg.decode_jpeg(data, buffer=out)
            if plain or found.shape == out.shape:
                if mirror:
                    out[:] = out[:, ::-1].copy()
                return
        except (ValueError, RuntimeError, MemoryError):  # larger than `out`, or damaged: Pillow has the last word
            found = None
    fitted = _fitted(data, out.shape, out.itemsize > 1, at)
    out[:] = fitted[:, ::-1] if mirror else fitted


def _fitted(data: bytes, shape: tuple[int, ...], deep: bool, at: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return an image resized and cropped to (height, width, channels), uint8 or, where it is deep, uint16."""
    height, width, channels = shape
    bands, opened = _bands(data, channels, deep)
    if bands is not None:
        values = as_channels(bands, channels, np.uint16 if deep else np.uint8)
        if values.shape == shape:
            return values
        box = crop_box(values.shape[1], values.shape[0], width, height, at)
        return resized(values, (width, height), box, alpha=channels in (2, 4) and bands.colors > 0)
    image = _eight_bits(data, channels, opened)
    if image.size != (width, height):
        box = crop_box(image.width, image.height, width, height, at)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = np.asarray(image, np.uint8).reshape(shape)
    return pixels * np.uint16(257) if deep else pixels


def decode_upright(data: bytes, channels: int) -> Image.Image:
    """Decode an image as gray (1 channel), gray with alpha (2), RGB (3) or RGBA (4), of 8 bits, upright, in sRGB.

    Without alpha, transparency is laid on white. Of an animation the first frame.

    Raises:
        One of DECODE_ERRORS: not an image, damaged, larger than MAX_PIXELS,
            more extreme than MAX_RATIO.
    """
    bands, opened = _bands(data, channels, False)
    if bands is None:
        return _eight_bits(data, channels, opened)
    pixels = as_channels(bands, channels, np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if channels == 1 else pixels))


def decode_preview(data: bytes) -> Image.Image:
    """Decode any image that can be trained on, with whatever number of channels, as RGB to look at: of bands the first three.

    Raises:
        One of DECODE_ERRORS.
    """
    bands, opened = _bands(data, 3, False)
    if bands is None:
        return _eight_bits(data, 3, opened)
    if bands.colors == 0:
        count = 3 if bands.values.shape[2] >= 3 else 1
        bands = bands._replace(values=bands.values[..., :count], colors=count)
    return Image.fromarray(np.ascontiguousarray(as_channels(bands, 3, np.uint8)))


class NativeImage(NamedTuple):
    """An image with all the channels and bits of its file, upright and in sRGB: as Pillow's, or as an array."""

    image: Image.Image | None
    """Of mode L, LA, RGB or RGBA."""
    values: np.ndarray
    """(H, W, C), uint8 or uint16; empty where there is an `image`."""
    is_color: bool = True
    alpha: bool = False
    form: tuple[int, ...] = ()


def decode_native(data: bytes) -> NativeImage:
    """Decode an image with all the channels and bits that it has.

    Raises:
        One of DECODE_ERRORS.
    """
    bands, opened = _bands(data, None, True)
    if bands is None:
        return NativeImage(_eight_bits(data, None, opened), np.empty((0, 0, 0), np.uint8))
    channels = bands.colors + bands.alpha if bands.colors else bands.values.shape[2]
    values = as_channels(bands, channels, np.uint8 if bands.values.dtype.itemsize == 1 else np.uint16)
    return NativeImage(None, values, bands.colors > 0, bands.alpha, bands.form)


def upright_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an image as it is shown upright, from its headers alone.

    Raises:
        One of DECODE_ERRORS.
    """
    if data[:2] == JPEG_MAGIC and (header := jpeg_header(data)) is not None:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            turns = stated_orientation(header.exif, header.xmp) if header.exif or header.xmp else 1
            return (height, width) if swaps_sides(turns) else (width, height)
        except ValueError:  # an odd one
            pass
    if data[:6] == NUMPY_MAGIC:
        return array_size(data)
    try:
        image = open_image(data)
    except UnidentifiedImageError:
        if data[:4] not in TIFF_MAGIC:
            raise
        return tiff_size(data)
    width, height = image.size
    states = data[:8] != PNG_MAGIC or any(word in data for word in IN_PNG)  # or else a PNG would be decoded for nothing
    return (height, width) if states and swaps_sides(read_orientation(image)) else (width, height)


def _bands(data: bytes, channels: int | None, deep: bool) -> tuple[Bands | None, Image.Image | None]:
    """Return the bands of a file that has to be read as an array; else None, and the file as Pillow opened it, unless it is a JPEG.

    Args:
        data: the file.
        channels: wanted; None for those of the file.
        deep: whether more than 8 bits are wanted.
    """
    if data[:6] == NUMPY_MAGIC:
        return read_array(data), None
    if data[:2] == JPEG_MAGIC and (channels is None or channels <= 4):
        return None, None
    try:
        image = open_image(data)
    except UnidentifiedImageError:
        if data[:4] not in TIFF_MAGIC:
            raise
        return read_tiff(data, channels), None
    check_size(*image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if needs_bands(image, channels, deep):
            return read_tiff(data, channels, image), None
    elif image.format == "PNG" and data[24] == 16:
        wide = not is_srgb(image.info.get("icc_profile", b""), "L" if data[25] == 4 else "RGB")  # Pillow cuts what is then stretched
        if deep or data[25] == 0 or wide or "transparency" in image.info:
            return read_png(data, image), None
    if channels is not None and channels > 4:
        bands = len(image.getbands())
        raise BadImage(f"it has {bands} channel{'s' * (bands != 1)}, {channels} are wanted: bands are read from TIFF and .npy files")
    return None, image


def _eight_bits(data: bytes, channels: int | None, image: Image.Image | None) -> Image.Image:
    """Return an image of 8 bits a channel, upright; `image` is the file as Pillow opened it, None for a JPEG; channels None: its own."""
    decoded = _jpeg(data) if image is None else None
    if decoded is None:
        image = image or open_image(data)
        check_size(*image.size)
        decoded = image, load_pixels(image), image.info.get("icc_profile")
    pixels, orientation, profile = decoded
    pixels = _channels(to_srgb(_standard(pixels, data), profile), channels)
    return pixels if orientation == 1 else Image.fromarray(np.ascontiguousarray(rotate_upright(np.asarray(pixels), orientation)))


def _jpeg(data: bytes) -> tuple[Image.Image, int, bytes | None] | None:
    """Return the pixels of a JPEG file, their orientation and profile; None for what Pillow should look at."""
    header = jpeg_header(data)
    if header is None or header.components not in (1, 3):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)
        if space not in ("Gray", "YCbCr", "RGB"):
            return None
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if space == "Gray" else "RGB")
    except (ValueError, RuntimeError, MemoryError):
        return None
    image = Image.fromarray(pixels.squeeze(2) if space == "Gray" else pixels)
    return image, stated_orientation(header.exif, header.xmp) if header.exif or header.xmp else 1, header.icc


def _standard(image: Image.Image, data: bytes) -> Image.Image:
    """Return an image in mode L, LA, RGB, RGBA or CMYK, with transparency as alpha."""
    clear = image.info.get("transparency")
    if clear is not None and image.mode == "L" and image.format == "PNG" and data[24] in (2, 4, 8):
        top = 2 ** data[24] - 1
        image.info["transparency"] = (clear & top) * (255 // top)  # Pillow scales pixels of 2 and 4 bits to 8, and not this
    if clear is not None and image.mode in ("1", "L", "RGB", "P"):
        return converted(image, "LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode.startswith("I;16"):  # of JPEG 2000, whose values Pillow shifts to 16 bits
        return Image.fromarray(np.round(np.asarray(image) * (255 / 65535)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage(f"its {image.mode} values say neither black nor white: save 8 or 16 bits")
    kept = {"1": "L", "La": "LA", "RGBa": "RGBA", "PA": "RGBA", **{mode: mode for mode in ("L", "LA", "RGB", "RGBA", "CMYK")}}
    mode = kept.get(image.mode, "RGB")
    return image if image.mode == mode else converted(image, mode)


def _channels(image: Image.Image, channels: int | None) -> Image.Image:
    """Return an image of mode L, LA, RGB or RGBA in that of a number of channels; transparency is kept, or laid on white."""
    if channels is None:
        return image
    if image.mode in ("LA", "RGBA") and channels in (1, 3):
        image = converted(image, "RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = MODES[channels]
    return image if image.mode == mode else converted(image, mode)


def is_plain(data: bytes) -> bool:
    """Return whether a JPEG file's decoded components are its image: three colours that need no turning and are sRGB.

    Where this says no, more has to be asked.
    """
    if data[:2] != JPEG_MAGIC:
        return False
    if len(data) < 4096 and not APP1_APP2.search(data):  # searching is faster than walking
        return b"\xff\xc0\0\x11" in data or b"\xff\xc2\0\x11" in data
    header = jpeg_header(data)
    if header is None or header.frame not in (0xC0, 0xC2) or header.components != 3:
        return False
    if (header.exif or header.xmp) and stated_orientation(header.exif, header.xmp) != 1:
        return False
    return not header.icc or is_srgb(header.icc, "RGB")


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
        channels: as `decode_into` takes them.
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
