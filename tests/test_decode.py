"""Decoding: pixels are Pillow's to the bit, upright, opaque, in eight bits, of the wanted shape; the absurd is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.decode import DECODE_ERRORS, decode_image, decode_into, is_plain, upright
from data.image_formats import MAX_RATIO
from tests.shardmaker import jpeg


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def into(data, height, width, channels=3, **options):
    out = np.full((height, width, channels), 77, np.uint8)
    decode_into(out, data, **options)
    return out


def test_images_arrive_upright_opaque_and_in_eight_bits():
    turned = Image.new("RGB", (2, 1), "red")
    turned.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    assert upright(saved(turned, exif=exif), 3).size == (1, 2)
    assert np.all(decode_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), 3, 2) == 255), "transparency lies on white"
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(upright(saved(deep), 1)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(24, 16), (900, 700)])
def test_a_jpeg_is_turned_as_its_camera_was(orientation, size):
    """Small and large files: the second is walked segment by segment. Pillow's own transposition is the reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.open(io.BytesIO(jpeg(1, size))), "JPEG", quality=95, exif=exif, icc_profile=b"\xff\xda" * 40)
    assert is_plain(data) == (orientation == 1) and is_plain(jpeg(1, size))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(into(data, *expected.shape[:2]), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("size", [(37, 23), (371, 233)])
def test_jpeg_pixels_are_pillows_to_the_bit(mode, channels, subsampling, size):
    """Files below and above the length from which segments are walked."""
    image = Image.open(io.BytesIO(jpeg(3, size))).convert(mode)
    data = saved(image, "JPEG", quality=80 if size[0] < 100 else 100, **({"subsampling": subsampling} if mode != "L" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")).reshape(*size[::-1], channels)
    assert np.array_equal(into(data, *size[::-1], channels), expected)
    assert np.array_equal(into(data, *size[::-1], channels, mirror=True), expected[:, ::-1])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (23, 16), (10, 37), (64, 64), (40, 12)])
def test_resizing_is_pillows_fit(height, width):
    """Smaller, larger, wider and narrower than the image; the corner says where it is cropped."""
    data = jpeg(5, (37, 23))
    image = Image.open(io.BytesIO(data))
    for at in ((0.5, 0.5), (0.0, 1.0), (0.25, 0.75)):
        expected = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=(at[1], at[0]))
        assert np.abs(into(data, height, width, at=at).astype(int) - np.asarray(expected)).max() <= 1
    once = into(data, height, width)
    assert np.array_equal(into(data, height, width, mirror=True), once[:, ::-1])


def test_resizing_keeps_the_middle_and_the_mean():
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    assert decode_image(saved(Image.fromarray(wide)), 1, 4).tolist() == [[[200] * 4] * 4]
    assert decode_image(saved(Image.fromarray(wide)), 3, 2, mirror=True).shape == (3, 2, 2)


def test_bombs_and_extreme_ratios_are_refused_before_they_are_decoded():
    strip = saved(Image.new("RGB", (MAX_RATIO * 4 + 1, 4)))
    with pytest.raises(ValueError, match=f"more than {MAX_RATIO} times"):
        into(strip, 4, 4)
    assert into(saved(Image.new("RGB", (MAX_RATIO * 4, 4))), 4, 4).shape == (4, 4, 3)
    with pytest.raises(ValueError, match=f"more than {MAX_RATIO} times"):
        into(saved(Image.new("RGB", (2000, 8)), "JPEG"), 4, 4)
    with pytest.raises(ValueError, match=f"more than {MAX_RATIO} times"):
        into(saved(Image.new("RGB", (100, 2)), "JPEG"), 128, 128)
    huge = bytearray(saved(Image.new("L", (8, 8)), "JPEG"))
    at = huge.index(b"\xff\xc0") + 5
    huge[at : at + 4] = (40000).to_bytes(2, "big") * 2  # the header says 1.6 Gpx
    with pytest.raises((ValueError, Image.DecompressionBombError)):
        into(bytes(huge), 8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_files_decode_or_are_refused(shared_data):
    """78 real odd files that a viewer opens arrive upright, as their manifest says; 2 of extreme ratio and 19 damaged ones do not."""
    facts = {f["file"]: f["pillow"] for f in json.loads((shared_data / "odd" / "manifest.json").read_text())["files"]}
    with tarfile.open(shared_data / "odd" / "odd-000000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    opened = 0
    for name, body in files.items():
        if name.endswith((".txt", ".json")):
            continue
        fact = facts[json.loads(files[name.split(".")[0] + ".json"])["file"]]
        width, height = fact.get("upright_size") or (1, 1)
        if fact.get("to_rgb") and max(width, height) <= MAX_RATIO * min(width, height):
            assert upright(body, 3).size == (width, height)
            assert np.array_equal(into(body, height, width), np.asarray(upright(body, 3))), name
            assert decode_image(body, 3, 16).shape == (3, 16, 16)
            opened += 1
        else:
            with pytest.raises(DECODE_ERRORS):
                into(body, 16, 16)
    assert opened == 78


def test_real_photographs_are_pillows_to_the_bit(shared_data):
    with tarfile.open(shared_data / "photos" / "clothing-val-000000.tar") as tar:
        photos = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
    assert len(photos) == 120
    for body in photos:
        expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
        assert np.array_equal(into(body, *expected.shape[:2]), expected)
