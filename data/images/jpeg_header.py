"""What a JPEG file says before its first scan: its components, and its EXIF, XMP and colour profile."""

from __future__ import annotations

import re
from typing import NamedTuple

FILL = re.compile(b"\xff+")
BARE = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))
"""Markers without a length; the first is no marker but an escaped FF."""
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
EXIF, XMP, ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"


class JpegHeader(NamedTuple):
    """What the segments of a JPEG file say, up to its first scan."""

    frame: int
    """The marker of its frame, 0xC0 for baseline and 0xC2 for progressive; 0 where there is none."""
    components: int
    exif: bytes
    """As Pillow joins several: the first with its `Exif` mark, the others without."""
    xmp: bytes
    icc: bytes
    """The joined colour profile; empty where a part of it is missing."""


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Return what a JPEG file says before its first scan, or None where its segments run off its end.

    As libjpeg and Pillow do, skip junk and any number of fill bytes FF before a marker.
    """
    at, frame, components, exif, xmp, profile = 2, 0, 0, b"", b"", list[bytes]()
    try:
        while True:
            if data[at] != 0xFF:
                at = data.index(0xFF, at)
            marker = data[at + 1]
            if marker == 0xDA:
                return JpegHeader(frame, components, exif, xmp, _joined(profile))
            if marker == 0xFF:
                at = FILL.match(data, at).end() - 1  # type: ignore[union-attr]
                continue
            if marker in BARE:
                at += 2
                continue
            first, last = at + 4, at + 2 + (data[at + 2] << 8 | data[at + 3])
            if last < first:
                return None
            if marker == 0xE1 and data.startswith(EXIF, first):
                exif += data[first + len(EXIF) if exif else first : last]
            elif marker == 0xE1 and data.startswith(XMP, first):
                xmp = data[first + len(XMP) : last]
            elif marker == 0xE2 and data.startswith(ICC, first):
                profile.append(data[first + len(ICC) : last])
            elif marker in FRAMES:
                frame, components = marker, data[first + 5]
            at = last
    except (IndexError, ValueError):
        return None


def _joined(parts: list[bytes]) -> bytes:
    """Return a profile from its numbered parts: number, how many, bytes."""
    parts.sort()
    return b"".join(part[2:] for part in parts) if parts and len(parts[0]) > 1 and parts[0][1] == len(parts) else b""
