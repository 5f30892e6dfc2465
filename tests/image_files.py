"""Image files made by hand for the tests of decoding: orientations, ICC profiles, EXIF and XMP segments."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

XMP = b"http://ns.adobe.com/xap/1.0/\0"
BRADFORD_SRGB = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]])
"""Linear sRGB to XYZ under D50: Lindbloom's table, as are those of WIDE."""
WIDE = {
    "Display P3": np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]),
    "Adobe RGB": np.array([[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]),
    "ProPhoto": np.array([[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857], [0.0, 0.0, 0.8252100]]),
}
GAMMA = {"Display P3": 2.2, "Adobe RGB": 563 / 256, "ProPhoto": 1.8}


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2."""
    offset, table, bodies = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += name + struct.pack(">II", offset + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    size = offset + len(bodies)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, kind, space, pcs) + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    return head + bytes(128 - len(head)) + table + bodies


def _xyz(values: object) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(float(v) * 65536) for v in values))


def _gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def _text(name: bytes) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(1 + 8 + 3 + 67)


def matrix_profile(matrix: np.ndarray, gamma: float) -> bytes:
    """An RGB profile of three primaries, the columns of a matrix to XYZ under D50, and a power."""
    colours = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma))
    return profile(b"RGB ", {b"desc": _text(b"made"), b"wtpt": _xyz((0.9642, 1, 0.8249)), **colours, **curves})


def gray_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"desc": _text(b"made"), b"wtpt": _xyz((0.9642, 1, 0.8249)), b"kTRC": _gamma(gamma)})


def cmyk_profile(lightness: float) -> bytes:
    """A CMYK profile in which paper is white, each ink alone is a gray of a lightness, and two inks are black."""
    inks = [bin(number).count("1") for number in range(16)]
    grid = bytes(v for ink in inks for v in ({0: 255, 1: round(lightness * 2.55)}.get(ink, 0), 128, 128))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    return profile(
        b"CMYK",
        {b"desc": _text(b"made"), b"wtpt": _xyz((0.9642, 1, 0.8249)), b"A2B0": table + ramp * 4 + grid + ramp * 3},
        b"Lab ",
        b"prtr",
    )


def srgb_of(values: np.ndarray, matrix: np.ndarray, gamma: float) -> np.ndarray:
    """What colours, 0 to 1, of a matrix profile are in sRGB, 0 to 1, clipped: IEC 61966-2-1's curve."""
    linear = (values**gamma) @ (np.linalg.inv(BRADFORD_SRGB) @ matrix).T
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
