"""Images as arrays of bands, of any number and depth: from 16-bit PNG and NumPy's .npy here, from TIFF in `tiff`.

The range of values is what the file declares, never what its values happen to
reach: 2^bits - 1 of whole numbers, 1 of floats. What declares none is refused.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .color import srgb_values
from .formats import BadImage, check_size, open_image, parsing
from .orientation import load_pixels, rotate_upright


class Bands(NamedTuple):
    """The pixels of a file as they lie there."""

    values: np.ndarray
    """(H, W, S), numbers."""
    low: float
    high: float
    """Black and white."""
    colors: int
    """How many of the S are colours: 1 gray, 3 RGB; 0 for bands that are no colours."""
    alpha: bool = False
    """Whether opacity follows the colours."""
    premultiplied: bool = False
    orientation: int = 1
    profile: bytes | None = None
    form: tuple[int, ...] = ()
    """Of bands that may be read as colours too: the photometric interpretation and ExtraSamples of their TIFF file."""


def value_limits(dtype: np.dtype, bits: int) -> tuple[float, float]:
    """Return black and white of whole numbers of so many bits, or of floats.

    Raises:
        BadImage: they say neither.
    """
    if dtype.kind == "f" or dtype.kind == "b":
        return 0.0, 1.0
    if dtype.kind == "u" and bits <= 16:
        return 0.0, 2.0**bits - 1
    what = "signed" if dtype.kind == "i" else f"{bits}-bit"
    raise BadImage(
        f"its values are {what} ({dtype}), which says neither black nor white: save unsigned whole numbers of 8 or 16 bits, or floats "
        f"from 0 to 1"
    )


def scaled(found: Bands, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return the values of bands as whole numbers from 0 to the highest of a type, uint8 or uint16, rounded.

    Raises:
        BadImage: floats (or what has a declared range) beyond their range, or not a number.
    """
    values, low, high, top = found.values, found.low, found.high, np.iinfo(dtype).max
    if values.dtype == dtype and (low, high) == (0, top):
        return values
    whole = values.dtype.kind in "ub" and values.dtype.itemsize <= 2
    if not whole or max(low, high) != 2.0 ** (8 * values.dtype.itemsize) - 1:
        least, most = float(values.min()), float(values.max())
        if not (least >= min(low, high) and most <= max(low, high)):  # also where one is not a number
            raise BadImage(f"its values reach from {least:g} to {most:g}, they are to be from {min(low, high):g} to {max(low, high):g}")
    scale = top / (high - low)
    numbers: np.ndarray = values.astype(np.float32 if whole or values.dtype == np.float32 else np.float64)
    return np.round((numbers - low) * scale).astype(dtype)


def as_channels(found: Bands, channels: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return bands as an upright image, (H, W, channels), in sRGB.

    Args:
        found: bands.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA; without alpha, transparency is laid on white. More, or of what is no
            colours: exactly the bands that there are.
        dtype: uint8 or uint16.

    Raises:
        ValueError: another number of bands, or values beyond their range.
    """
    samples = found.values.shape[2]
    if samples != channels and (found.colors == 0 or channels > 4):
        raise BadImage(
            f"it has {samples} band{'s' * (samples != 1)}, {channels} are wanted: set data.channels to {samples}, or save others"
        )
    exact = np.uint16 if found.profile and found.values.dtype.itemsize > 1 else dtype  # dark colours of a wide profile grow twelvefold
    values = scaled(found, dtype if channels > 4 else exact)
    if found.colors == 0 or channels > 4:
        return rotate_upright(values, found.orientation)
    top = int(np.iinfo(dtype).max)
    color, opacity = values[..., : found.colors], values[..., found.colors : found.colors + 1] if found.alpha else None
    if found.premultiplied and opacity is not None:
        most = np.iinfo(exact).max
        color = np.minimum(color.astype(np.float64) * most / np.maximum(opacity, 1), most).round().astype(exact)
    if found.profile:
        color = srgb_values(color, found.profile, dtype)
    if opacity is not None and exact != dtype:
        opacity = np.round(opacity / 257).astype(dtype)
    if opacity is not None and channels in (1, 3):
        whole = color.astype(np.uint32) * opacity + np.uint32(top) * (top - opacity.astype(np.uint32))
        color = ((whole + top // 2) // top).astype(dtype)
    if found.colors == 3 and channels < 3:  # Pillow's weights
        gray = color.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + np.uint32(32768)
        color = (gray >> 16).astype(dtype)[..., None]
    if found.colors == 1 and channels >= 3:
        color = color.repeat(3, axis=2)
    if channels in (2, 4):
        color = np.concatenate([color, np.full_like(color[..., :1], top) if opacity is None else opacity], axis=2)
    return rotate_upright(color, found.orientation)


def resized(values: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float], alpha: bool) -> np.ndarray:
    """Return the part `box` of an image in another size, with Pillow's antialiased Lanczos, band by band, rounded.

    Args:
        values: (H, W, C), uint8 or uint16.
        size: width and height.
        box: left, top, right, bottom, in pixels of `values`.
        alpha: whether the last band is opacity, which weighs the others.
    """
    top = float(np.iinfo(values.dtype).max)
    opacity = values[..., -1].astype(np.float32) / top if alpha else None
    bands = []
    for number in range(values.shape[2]):
        band = values[..., number].astype(np.float32)
        if opacity is not None and number < values.shape[2] - 1:
            band *= opacity
        bands.append(np.asarray(Image.fromarray(band).resize(size, Image.Resampling.LANCZOS, box=box)))
    out = np.stack(bands, axis=-1)
    if alpha:
        out[..., :-1] /= np.maximum(out[..., -1:] / top, 0.5 / top)
    return np.round(out).clip(0, top).astype(values.dtype)


def read_array(data: bytes) -> Bands:
    """Return the bands of a .npy file of (H, W, C) or (H, W): whole numbers of 8 or 16 bits, bools, or floats from 0 to 1.

    Raises:
        ValueError: it is damaged, of another shape or another type.
    """
    shape, fortran, dtype, start = _array_header(data)
    count = int(np.prod(shape, dtype=object))
    if len(data) - start < count * dtype.itemsize:
        raise BadImage(f"its array of {shape} needs {count * dtype.itemsize} bytes, it has {len(data) - start}")
    values = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran else "C")
    return Bands(values if values.ndim == 3 else values[..., None], *value_limits(dtype, 8 * dtype.itemsize), 0)


def array_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the image in a .npy file, from its header."""
    shape = _array_header(data)[0]
    return shape[1], shape[0]


def _array_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    file = io.BytesIO(data)
    with parsing():
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise BadImage(f"its .npy version {version} is neither 1.0 nor 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    if len(shape) not in (2, 3):
        raise BadImage(f"its array has the shape {shape}, an image's is (height, width) or (height, width, channels)")
    check_size(shape[1], shape[0], shape[2] if len(shape) == 3 else 1)
    return shape, fortran, dtype, file.tell()


def read_png(data: bytes, image: Image.Image) -> Bands:
    """Return the bands of a 16-bit PNG file, its transparent colour as alpha.

    Pillow keeps 16 bits of gray alone; of others it gives the upper bytes, and, told that they are swapped, the lower ones.

    Args:
        data: the file.
        image: the same, opened by `open_image`.
    """
    check_size(*image.size)
    kind, tile = data[25], image.tile  # type: ignore[attr-defined]  # of each image that was opened
    orientation = load_pixels(image)
    if kind == 0:
        values = np.asarray(image).astype(np.uint16)[..., None]
    elif kind == 4:
        both = _unpacked(data, tile, "RGBA", "RGBA")
        values = both[..., 0::2].astype(np.uint16) << 8 | both[..., 1::2]
    else:
        mode = "RGB" if kind == 2 else "RGBA"
        values = _unpacked(data, tile, mode, f"{mode};16B").astype(np.uint16) << 8 | _unpacked(data, tile, mode, f"{mode};16L")
    clear = image.info.get("transparency")
    if clear is not None and kind in (0, 2):
        opaque = (values != np.array(clear, np.uint16).reshape(-1)).any(axis=2, keepdims=True)
        values = np.concatenate([values, opaque * np.uint16(65535)], axis=2)
    colors = 1 if kind in (0, 4) else 3
    return Bands(values, 0, 65535, colors, values.shape[2] > colors, False, orientation, image.info.get("icc_profile"))


def _unpacked(data: bytes, tile: list[Any], mode: str, raw: str) -> np.ndarray:
    """Return the pixels of a PNG file as Pillow's unpacker of a raw mode gives them."""
    with parsing():
        image: Any = open_image(data)
        image._mode, image.tile = mode, [tile[0]._replace(args=raw)]  # the tile says how its bytes become pixels
        load_pixels(image)
        return np.asarray(image)
