"""Colours as sRGB: what an embedded ICC profile says of pixels is applied, where that makes a difference."""

from __future__ import annotations

import io
from functools import lru_cache
from threading import Lock

import numpy as np
from PIL import Image, ImageCms

from .formats import BadImage, converted, parsing

SAME = 2
"""A profile that moves no colour of a grid by more than so many of 255 levels counts as sRGB: encoders write sRGB in many ways."""
KEPT = 64
"""Profiles whose conversions are kept, by their bytes: a data set has few."""
SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
"""The colour space that a profile must have to be one of pixels of a mode; another is ignored, as viewers do."""
BUILDING = Lock()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image with its colours as sRGB says them, alpha as it was.

    Args:
        image: of mode L, LA, RGB, RGBA or CMYK, the last of which becomes RGB.
        profile: an ICC profile; without one, or with a damaged one, gray and RGB count as sRGB.
    """
    mode = {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)
    transform = srgb_transform(profile, mode) if profile else None
    if transform is None:
        return converted(image, "RGB") if mode == "CMYK" else image
    if mode == "L":
        curve = _applied(transform, Image.frombytes("L", (256, 1), bytes(range(256)))).convert("L").tobytes()
        return image.point(list(curve) + (list(range(256)) if image.mode == "LA" else []))
    if image.mode == "RGBA":
        colors = _applied(transform, image.convert("RGB"))
        colors.putalpha(image.getchannel("A"))
        return colors
    return _applied(transform, image)


def is_srgb(profile: bytes, mode: str) -> bool:
    """Return whether a profile leaves pixels of a mode (L or RGB) as they are."""
    return srgb_transform(profile, mode) is None


@lru_cache(KEPT)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return littlecms's conversion to sRGB, safe to use by several threads; None where it would change nothing or cannot be made."""
    try:
        with BUILDING, parsing():
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space != SPACES[mode]:
                return None
            flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.HIGHRESPRECALC  # 256 grays need no shortcut
            transform = ImageCms.buildTransform(source, SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags)
    except (OSError, ValueError, SyntaxError, ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    grid = _grid(mode)
    moved = np.abs(np.asarray(_applied(transform, grid), int) - np.asarray(grid.convert("RGB"), int)).max()
    return transform if moved > SAME else None


def _grid(mode: str) -> Image.Image:
    """Return all grays, or 17 levels of each of three colours and all grays."""
    grays = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(grays[None])
    levels = np.round(np.linspace(0, 255, 17)).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([colours, np.repeat(grays[None, :, None], 3, axis=2)], axis=1))


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    with parsing():
        return transform.apply(image)


def srgb_values(values: np.ndarray, profile: bytes, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return colours as sRGB says them.

    Args:
        values: (H, W, 1) gray or (H, W, 3) RGB, uint8 or uint16.
        profile: an ICC profile.
        dtype: wanted: that of the values, or uint8 of uint16.

    Raises:
        BadImage: the profile makes a difference to 16 bits that are kept, and imagecodecs, which converts those, is not installed.
    """
    mode, flat = ("L", values.squeeze(2)) if values.shape[2] == 1 else ("RGB", values)
    if srgb_transform(profile, mode) is None:
        return values if values.dtype == dtype else np.round(values / 257).astype(dtype)
    if values.dtype == np.uint8:
        return np.asarray(to_srgb(Image.fromarray(np.ascontiguousarray(flat)), profile)).reshape(values.shape)
    try:
        import imagecodecs
    except ImportError as error:
        if dtype == np.uint8:  # dark colours are off by up to six levels then
            return srgb_values(np.round(values / 257).astype(dtype), profile, dtype)
        raise BadImage(
            "its ICC profile says that its 16-bit colours are not sRGB, and converting those needs imagecodecs: "
            "`pip install imagecodecs`, or convert the files to sRGB."
        ) from error
    with parsing():
        found = imagecodecs.cms_transform(
            np.ascontiguousarray(flat),
            profile,
            SRGB.tobytes(),
            colorspace="gray" if mode == "L" else "rgb",
            outcolorspace="rgb",
            outdtype="u2",
            flags=imagecodecs.CMS.FLAGS.NOOPTIMIZE,  # littlecms's shortcuts are off by up to 6,000 of 65,535
        )
    found = found[..., :1] if mode == "L" else found
    return found if dtype == np.uint16 else np.round(found / 257).astype(dtype)
