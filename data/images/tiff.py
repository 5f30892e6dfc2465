"""TIFF files of any depth and number of bands, as `bands.Bands`: what Pillow does not read needs tifffile, imported only then."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from .bands import Bands, value_limits
from .color import is_srgb
from .formats import BadImage, check_size, parsing
from .orientation import load_pixels

BITS, PHOTOMETRIC, SAMPLES, PLANES, EXTRA, FORMAT = 258, 262, 277, 284, 338, 339
LOWEST, HIGHEST, PROFILE = 340, 341, 34675
ALPHA = (1, 2, 999)
"""Of ExtraSamples: premultiplied alpha, alpha, and Corel's."""
LOSSLESS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstandard"}
"""Compressions of TIFF that are read here: they cannot give more bytes than they are asked for."""
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is that sample's fault, and reported there
INSTALL = "`pip install tifffile imagecodecs`"


def needs_bands(image: TiffImagePlugin.TiffImageFile, channels: int | None, deep: bool) -> bool:
    """Return whether Pillow's pixels of a TIFF file would not be all that is wanted.

    Args:
        image: opened.
        channels: wanted; None for all that it has.
        deep: whether more than 8 bits are wanted, where there are some.
    """
    tags = _tags_of(image)
    if tags.get(PHOTOMETRIC, 1) not in (0, 1, 2):
        return False
    samples = (_numbers(tags.get(SAMPLES, 1)) or (1,))[0]
    if (channels or 0) > 4 or _are_bare(samples, channels, tags):
        return True
    if max(_numbers(tags.get(BITS, 1)), default=1) > 8 or max(_numbers(tags.get(FORMAT, 1)), default=1) > 1:
        return deep or image.mode not in ("RGB", "RGBA") or tags.get(PLANES) == 2 or (_is_wide(image) and _has_packages())
    return samples > 4 and tags.get(PLANES) == 2


def _is_wide(image: Image.Image) -> bool:
    """Return whether a profile stretches values, so that more than eight bits of them are needed for eight."""
    return not is_srgb(image.info.get("icc_profile", b""), "RGB")


def _has_packages() -> bool:
    return all(find_spec(name) for name in ("tifffile", "imagecodecs"))


def _tags_of(image: TiffImagePlugin.TiffImageFile) -> dict[int, Any]:
    """Return the tags of a page as Pillow reads them, which it does when they are asked for."""
    with parsing():
        return dict(image.tag_v2)


def read_tiff(data: bytes, channels: int | None, image: Image.Image | None = None) -> Bands:
    """Return the bands of the first page of a TIFF file.

    Args:
        data: the file.
        channels: wanted: so many bands without declared alpha are taken as they are; None takes all bands of such a file.
        image: the file opened, where Pillow can; its grays of 12 and 16 bits and of 32-bit floats need no further package.

    Raises:
        ValueError: it is damaged, of a kind that is not read, or tifffile is not installed.
    """
    tags = _tags_of(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image is not None and tags and image.mode in ("I;16", "I;16B", "F") and tags.get(SAMPLES, 1) == 1:
        check_size(*image.size)
        profile = image.info.get("icc_profile")
        orientation = load_pixels(image)
        return _grays(np.asarray(image)[..., None], tags, orientation)._replace(profile=profile)
    with _pages(data) as file:
        page = file.pages[0]
        tags = {tag.code: tag.value for tag in page.tags}
        _check_page(page)
        values = page.asarray(maxworkers=1)
        if page.axes == "SYX":
            values = values.transpose(1, 2, 0)
    if values.size != np.prod(_shape(page)):
        raise BadImage("its pixels are missing")
    found = _grays(values.reshape(_shape(page)), tags, _orientation(tags))
    return _roles(found, tags, channels)


def tiff_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the first page of a TIFF file, upright, from its tags."""
    with _pages(data) as file:
        page = file.pages[0]
        height, width, _ = _shape(page)
        return (height, width) if _orientation({tag.code: tag.value for tag in page.tags}) >= 5 else (width, height)


@contextmanager
def _pages(data: bytes) -> Iterator[Any]:
    """Open a TIFF file with tifffile.

    Raises:
        BadImage: it is not installed; or what it raises for a damaged file.
    """
    try:
        import tifffile
    except ImportError as error:
        raise BadImage(f"this kind of TIFF (more than 8 bits, or other bands than gray and RGB) needs tifffile: {INSTALL}") from error
    with parsing(), tifffile.TiffFile(io.BytesIO(data)) as file:
        yield file


def _shape(page: Any) -> tuple[int, int, int]:
    """Return height, width and bands of a page; damaged ones may have any type."""
    found = page.imagelength, page.imagewidth, page.samplesperpixel
    if not all(isinstance(number, int) for number in found):
        raise BadImage(f"its height, width and bands {found} are no whole numbers")
    return found


def _orientation(tags: dict[int, Any]) -> int:
    stated = (_numbers(tags.get(274, 1)) or (1,))[0]
    return int(stated) if 1 <= stated <= 8 else 1


def _check_page(page: Any) -> None:
    """Raise for a page that is not read, before memory is taken for it."""
    height, width, bands = _shape(page)
    check_size(width, height, bands)
    if page.axes not in ("YX", "YXS", "SYX"):
        raise BadImage(f"its first page has the axes {page.axes}: save it as (height, width, bands)")
    if page.compression not in LOSSLESS:
        raise BadImage(f"its compression {int(page.compression)} is none of {', '.join(dict.fromkeys(LOSSLESS.values()))}: save it again")
    if page.photometric not in (0, 1, 2):
        raise BadImage(f"its photometric interpretation {int(page.photometric)} is neither gray nor RGB: save it again")
    if page.is_tiled:
        check_size(page.tilewidth, page.tilelength, bands)


def _grays(values: np.ndarray, tags: dict[int, Any], orientation: int) -> Bands:
    """Return the values of a TIFF file with its black and white."""
    bits = max(_numbers(tags.get(BITS, 1)), default=1)
    lows, highs = _numbers(tags.get(LOWEST, ())), _numbers(tags.get(HIGHEST, ()))
    if lows and highs and 0 < min(highs) - max(lows) < np.inf and values.dtype.kind != "b":
        low, high = float(min(lows)), float(max(highs))
        if values.dtype.kind == "u" and bits <= 16:
            low, high = 0.0, 2.0**bits - 1
    else:
        low, high = value_limits(values.dtype, bits)
    if tags.get(PHOTOMETRIC, 1) == 0:  # white is zero
        low, high = high, low
    return Bands(values, low, high, 1, orientation=orientation)


def _roles(found: Bands, tags: dict[int, Any], channels: int | None) -> Bands:
    """Return the bands of a TIFF file with what each is: colours, alpha, or nothing but bands."""
    samples, extra = found.values.shape[2], _numbers(tags.get(EXTRA, ()))
    colors = 3 if tags.get(PHOTOMETRIC, 1) == 2 else 1
    bare, alpha = _are_bare(samples, channels, tags), _says_alpha(extra) and samples > colors
    if bare or (not alpha and (samples < colors or (colors == 1 and samples > 2))):
        form = (tags.get(PHOTOMETRIC, 1) or 1, *extra) if samples > colors > (samples > 2) else ()
        return found._replace(colors=0, form=form)
    alpha = alpha or (colors == 3 and samples == 4 and not extra)  # as old writers of RGBA have it, and Pillow reads it
    if alpha and found.low > found.high:  # white is zero, and clear is not
        values = found.values.copy()
        values[..., colors:] = found.low + found.high - values[..., colors:]
        found = found._replace(values=values)
    profile = tags.get(PROFILE)
    profile = bytes(profile) if isinstance(profile, (bytes, bytearray)) else None
    return found._replace(colors=colors, alpha=alpha, premultiplied=extra[:1] == (1,), profile=profile)


def _are_bare(samples: int, channels: int | None, tags: Any) -> bool:
    """Return whether the bands of a gray or RGB file are taken as they are: as many as wanted, and more than colours and alpha."""
    extra = _numbers(tags.get(EXTRA, ()))
    if samples in (1, 3):
        return False
    if _says_alpha(extra):
        return samples > 4 and channels in (None, samples)
    if channels is None:
        return not (tags.get(PHOTOMETRIC, 1) == 2 and samples == 4 and not extra)
    return samples == channels


def _says_alpha(extra: tuple[Any, ...]) -> bool:
    return bool(extra) and extra[0] in ALPHA


def _numbers(value: Any) -> tuple[Any, ...]:
    """Return a tag's value as a tuple; that of other things than numbers is none."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(v for v in values if isinstance(v, (int, float)))
