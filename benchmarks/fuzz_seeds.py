"""Files to mutate: one small specimen of each format, made with Pillow, zipped or packed by hand; nothing is read from elsewhere."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms, PngImagePlugin

SIDE = (24, 17)
"""Width and height of the specimens."""


def noise(mode: str, size: tuple[int, int] = SIDE, seed: int = 0) -> Image.Image:
    """Return a picture of blotches in one of Pillow's modes."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 4), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    if mode in ("L", "1", "P"):
        return image.convert("L").convert(mode)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
    return image.convert("RGB").convert(mode) if mode != "RGBA" and bands != 4 else image.convert("RGBA").convert(mode)


def saved(mode: str, kind: str, size: tuple[int, int] = SIDE, **options: object) -> bytes:
    """Return a picture as a file of one of Pillow's formats."""
    buffer = io.BytesIO()
    noise(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    return exif.tobytes()


def _xmp(body: bytes) -> bytes:
    """Return a JPEG with an XMP segment that turns it, behind fill bytes."""
    packet = b"http://ns.adobe.com/xap/1.0/\0" + b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return body[:2] + b"\xff\xff\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + body[2:]


def _frames(count: int) -> list[Image.Image]:
    return [noise("RGB", seed=number) for number in range(1, count)]


def _gray_with_transparency() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add(b"tRNS", b"\x00\x7f")
    return saved("L", "PNG", pnginfo=info)


def _deep_png(color: int, bands: int) -> bytes:
    """Return a PNG of 16 bits and any colour type, which Pillow does not write."""
    width, height = SIDE
    pixels = np.random.default_rng(1).integers(0, 65535, (height, width * bands), np.uint16).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts)


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG chunk with its length and its CRC."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def images() -> dict[str, tuple[str, bytes]]:
    """Return extension and bytes of each kind of image file."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made: dict[str, tuple[str, Callable[[], bytes]]] = {
        "jpeg": ("jpg", lambda: saved("RGB", "JPEG")),
        "jpeg progressive": ("jpg", lambda: saved("RGB", "JPEG", progressive=True)),
        "jpeg gray": ("jpeg", lambda: saved("L", "JPEG")),
        "jpeg cmyk": ("jpg", lambda: saved("CMYK", "JPEG")),
        "jpeg exif": ("jpg", lambda: saved("RGB", "JPEG", exif=_exif(6))),
        "jpeg exif icc": ("jpg", lambda: saved("RGB", "JPEG", exif=_exif(8), icc_profile=srgb)),
        "jpeg odd icc": ("jpg", lambda: saved("RGB", "JPEG", icc_profile=_profile())),
        "jpeg xmp": ("jpg", lambda: _xmp(saved("RGB", "JPEG"))),
        "jpeg restart": ("jfif", lambda: saved("RGB", "JPEG", restart_marker_blocks=1, comment=b"text")),
        "mpo": ("mpo", lambda: saved("RGB", "MPO", save_all=True, append_images=_frames(3))),
        "png 1": ("png", lambda: saved("1", "PNG")),
        "png gray": ("png", lambda: saved("L", "PNG")),
        "png gray alpha": ("png", lambda: saved("LA", "PNG")),
        "png rgb": ("png", lambda: saved("RGB", "PNG", exif=_exif(5))),
        "png rgba icc": ("png", lambda: saved("RGBA", "PNG", icc_profile=srgb)),
        "png palette": ("png", lambda: saved("P", "PNG", bits=4, transparency=3)),
        "png tRNS": ("png", _gray_with_transparency),
        "png 16 gray": ("png", lambda: _deep_png(0, 1)),
        "png 16 rgb": ("png", lambda: _deep_png(2, 3)),
        "png 16 rgba": ("png", lambda: _deep_png(6, 4)),
        "apng": ("png", lambda: saved("RGB", "PNG", save_all=True, append_images=_frames(3))),
        "webp": ("webp", lambda: saved("RGB", "WEBP", exif=_exif(3))),
        "webp lossless": ("webp", lambda: saved("RGBA", "WEBP", lossless=True)),
        "webp animated": ("webp", lambda: saved("RGB", "WEBP", save_all=True, append_images=_frames(3))),
        "avif": ("avif", lambda: saved("RGB", "AVIF", exif=_exif(6))),
        "gif": ("gif", lambda: saved("P", "GIF")),
        "gif animated": ("gif", lambda: saved("RGB", "GIF", save_all=True, append_images=_frames(3))),
        "bmp": ("bmp", lambda: saved("RGB", "BMP")),
        "bmp palette": ("bmp", lambda: saved("P", "BMP")),
        "bmp 1": ("bmp", lambda: saved("1", "BMP")),
        "tiff": ("tif", lambda: saved("RGB", "TIFF", exif=_exif(5))),
        "tiff lzw": ("tiff", lambda: saved("RGB", "TIFF", compression="tiff_lzw")),
        "tiff deflate": ("tif", lambda: saved("RGBA", "TIFF", compression="tiff_adobe_deflate")),
        "tiff packbits": ("tif", lambda: saved("L", "TIFF", compression="packbits")),
        "tiff jpeg": ("tif", lambda: saved("RGB", "TIFF", compression="jpeg")),
        "tiff 16": ("tif", lambda: saved("I;16", "TIFF")),
        "tiff float": ("tif", lambda: saved("F", "TIFF")),
        "tiff pages": ("tif", lambda: saved("RGB", "TIFF", save_all=True, append_images=_frames(3))),
        "tiff big": ("tif", lambda: saved("RGB", "TIFF", big_tiff=True)),
        "jpeg 2000": ("jp2", lambda: saved("RGB", "JPEG2000")),
        "ico": ("ico", lambda: saved("RGBA", "ICO", size=(32, 32))),
        "eps as png": ("png", lambda: saved("RGB", "EPS")),
        "pdf as jpg": ("jpg", lambda: saved("RGB", "PDF")),
        "html as jpg": ("jpg", lambda: b"<!DOCTYPE html><html><body>404 not found</body></html>"),
    }
    return {name: (extension, build()) for name, (extension, build) in made.items()}


def _tar(form: int, long: bool = False, mac: bool = False) -> bytes:
    """Return a tar of three samples, with names beyond 100 characters or with what a Mac adds."""
    buffer = io.BytesIO()
    stem = "a picture of the sea at dawn, seen from a cliff, as a long prompt has it " * (2 if long else 0)
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(3):
            key = f"{stem}café {number:03d}"
            files = {"jpg": saved("RGB", "JPEG"), "txt": f"caption {number}".encode(), "cls": b"1", "json": b'{"a": [1, {"b": null}]}'}
            for extension, body in files.items():
                for prefix in ("._", "") if mac else ("",):
                    info = tarfile.TarInfo(f"{prefix}{key}.{extension}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def _parquet() -> bytes:
    buffer = io.BytesIO()
    rows = {"image": [saved("RGB", "PNG")] * 4, "text": ["a", "b", None, "d"], "label": [0, 1, 1, None]}
    pq.write_table(pa.table(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def containers() -> dict[str, tuple[str, bytes]]:
    """Return the name that `data.prepare` should be given, and the bytes, of each kind of file that holds or describes images."""
    table = "file_name,text,label\n" + "".join(f'{n}.png,"caption, {n}",{n % 2}\n' for n in range(4))
    lines = "".join(json.dumps({"file_name": f"{n}.png", "text": [f"caption {n}", None], "label": n % 2}) + "\n" for n in range(4))
    return {
        "tar ustar": ("a.tar", _tar(tarfile.USTAR_FORMAT)),
        "tar gnu": ("a.tar", _tar(tarfile.GNU_FORMAT, long=True)),
        "tar pax": ("a.tar", _tar(tarfile.PAX_FORMAT, long=True)),
        "tar mac": ("a.tar", _tar(tarfile.GNU_FORMAT, mac=True)),
        "tar twice": ("a.tar", _tar(tarfile.USTAR_FORMAT) + _tar(tarfile.PAX_FORMAT, long=True)),
        "parquet": ("a.parquet", _parquet()),
        "csv": ("metadata.csv", table.encode()),
        "jsonl": ("metadata.jsonl", lines.encode()),
        "sidecar": ("0.txt", "a caption, café".encode()),
    }
