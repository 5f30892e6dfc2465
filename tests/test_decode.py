"""Decoding: pixels are Pillow's to the bit, upright, in sRGB, opaque or with alpha, of the wanted shape; the absurd is refused."""

import hashlib
import io
import json
import re
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin

from condot.core.data_config import DataConfig
from condot.data.format.index import index_tar
from condot.data.format.index_record import PLAIN
from condot.data.format.manifest import Manifest, write_manifest
from condot.data.images import decode
from condot.data.images.color import srgb_transform
from condot.data.images.decode import DECODE_ERRORS, decode_image, decode_into, decode_preview, decode_upright, is_plain, upright_size
from condot.data.images.downscale import downscale
from condot.data.images.formats import MAX_RATIO, BadImage, detect_extension
from condot.data.loader.build import build
from condot.data.loader.stream import Share
from condot.data.prepare.verify import ShardCheck, check_shard
from condot.data.storage.shard_reader import Shards
from tests.image_files import BRADFORD_SRGB, GAMMA, WIDE, XMP, cmyk_profile, exif_of, gray_profile, matrix_profile, saved, segment, srgb_of
from tests.shardmaker import jpeg

ROOT = Path(__file__).resolve().parent.parent


def odd(shared_data):
    """The odd files by their own names."""
    with tarfile.open(shared_data / "odd" / "odd-000000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    return {json.loads(files[n.split(".")[0] + ".json"])["file"]: d for n, d in files.items() if not n.endswith((".txt", ".json"))}


def into(data, height, width, channels=3, **options):
    out = np.full((height, width, channels), 77, np.uint8)
    decode_into(out, data, **options)
    return out


def test_images_arrive_upright_opaque_and_in_eight_bits():
    turned = Image.new("RGB", (2, 1), "red")
    turned.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    assert decode_upright(saved(turned, exif=exif), 3).size == (1, 2)
    assert np.all(decode_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), 3, 2) == 255), "transparency lies on white"
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(decode_upright(saved(deep), 1)).tolist() == [[0, 128, 255]]


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
            assert decode_upright(body, 3).size == (width, height)
            assert np.array_equal(into(body, height, width), np.asarray(decode_upright(body, 3))), name
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


KINDS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("WEBP", {"lossless": True}),
    ("AVIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("MPO", {}),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_format_is_turned_as_pillow_turns_it(kind, options, orientation):
    """Pixels, and the size in the index, which is read from headers alone."""
    data = saved(Image.open(io.BytesIO(jpeg(1, (24, 16)))), kind, exif=exif_of(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert upright_size(data) == expected.shape[1::-1]
    assert np.array_equal(into(data, *expected.shape[:2]), expected)
    assert np.array_equal(np.asarray(decode_upright(data, 4))[..., :3], expected) and downscale(data, 12, "x")


def oriented(orientation, where):
    """A JPEG file that states an orientation in one of the ways that are found, and how its pixels lie."""
    bare = jpeg(1, (24, 16))
    exif = segment(0xE1, exif_of(orientation).tobytes())
    form = {
        "attribute": '<x tiff:Orientation="%d"/>',
        "single": "<x tiff:Orientation = '%d'/>",
        "element": "<tiff:Orientation>%d</tiff:Orientation>",
    }
    if where in form:
        return bare[:2] + segment(0xE1, XMP + (form[where] % orientation).encode()) + bare[2:]
    if where == "behind SOF":
        scan = bare.index(b"\xff\xda")
        return bare[:scan] + exif + bare[scan:]
    fill = {"fill bytes": b"\xff\xff\xff", "escaped": b"\xff\0", "junk": b"junk", "comment with a scan": segment(0xFE, b"\xff\xda\xff\xda")}
    return bare[:20] + fill[where] + exif + bare[20:]  # behind JFIF


@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
@pytest.mark.parametrize("where", ["fill bytes", "escaped", "junk", "comment with a scan", "behind SOF", "attribute", "single", "element"])
def test_wherever_a_jpeg_states_its_orientation(where, orientation):
    """The reference is the bare file, turned by Pillow's transposition of an image that states it in the usual place."""
    bare, data = Image.open(io.BytesIO(jpeg(1, (24, 16)))), oriented(orientation, where)
    bare.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(bare))
    assert upright_size(data) == expected.shape[1::-1] and is_plain(data) == (orientation == 1)
    assert np.array_equal(into(data, *expected.shape[:2]), expected)
    assert np.array_equal(np.asarray(decode_preview(data)), expected)


@pytest.mark.parametrize("quote", ["'", '"'])
def test_xmp_alone_turns_png_and_tiff_and_webp_and_exif_has_the_last_word(quote):
    image = Image.open(io.BytesIO(jpeg(1, (24, 16))))
    xmp = f"<x tiff:Orientation={quote}6{quote}/>".encode()
    text, tags = PngImagePlugin.PngInfo(), TiffImagePlugin.ImageFileDirectory_v2()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    tags[700] = xmp
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    for data in (saved(image, pnginfo=text), saved(image, "TIFF", tiffinfo=tags), saved(image, "WEBP", lossless=True, xmp=xmp)):
        assert upright_size(data) == (16, 24) and np.array_equal(into(data, 24, 16), expected)
    for data in (saved(image, pnginfo=text, exif=exif_of(1)), saved(image, "WEBP", lossless=True, xmp=xmp, exif=exif_of(1))):
        assert upright_size(data) == (24, 16) and np.array_equal(into(data, 16, 24), np.asarray(image))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_wide_colours_become_those_of_srgb(name, kind, options):
    """By the matrix and the power of the profile, and IEC 61966-2-1's curve; alpha stays."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    expected = srgb_of(pixels[..., :3] / 255, WIDE[name], GAMMA[name]) * 255
    icc = matrix_profile(WIDE[name], GAMMA[name])
    data = saved(Image.fromarray(pixels[..., :3]), kind, icc_profile=icc, **options)
    assert np.abs(into(data, 16, 16) - expected).max() < 1.5 < np.abs(pixels[..., :3] - expected).max()
    if kind == "PNG":
        found = into(saved(Image.fromarray(pixels), icc_profile=icc), 16, 16, 4)
        assert np.abs(found[..., :3] - expected).max() < 1.5 and np.array_equal(found[..., 3], pixels[..., 3])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_with_a_profile_is_simplejpegs_pixels_converted(orientation, monkeypatch):
    icc = matrix_profile(WIDE["Adobe RGB"], GAMMA["Adobe RGB"])
    data = saved(Image.open(io.BytesIO(jpeg(1, (24, 16)))), "JPEG", quality=95, icc_profile=icc, exif=exif_of(orientation))
    expected = srgb_of(np.asarray(Image.open(io.BytesIO(data))) / 255, WIDE["Adobe RGB"], GAMMA["Adobe RGB"]) * 255
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    monkeypatch.setattr(Image, "open", None)  # Pillow decodes nothing here
    assert not is_plain(data) and np.abs(into(data, *expected.shape[:2]) - expected).max() < 1.5


def test_profiles_of_srgb_of_other_spaces_and_damaged_ones_change_nothing():
    image = Image.open(io.BytesIO(jpeg(1, (24, 16))))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide = matrix_profile(WIDE["ProPhoto"], 1.8)
    for icc in (srgb, gray_profile(1.0), cmyk_profile(50), wide[:200], b"nothing at all"):
        data = saved(image, "JPEG", quality=95, icc_profile=icc)
        assert is_plain(data) and np.array_equal(into(data, 16, 24), np.asarray(Image.open(io.BytesIO(data))))
    assert not is_plain(saved(image, "JPEG", icc_profile=wide))


def test_png_files_with_long_texts_and_profiles_are_read_and_bombs_are_not():
    """Of 1.9 megabytes, as workflows and scanners' profiles have them; what inflates to 40 MB is that sample's fault."""
    image, icc = Image.open(io.BytesIO(jpeg(1, (24, 16)))), matrix_profile(WIDE["ProPhoto"], 1.8) + bytes(1_900_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_900_000, zip=True)
    data = saved(image, pnginfo=text)
    assert upright_size(data) == (24, 16) and np.array_equal(into(data, 16, 24), np.asarray(image))
    expected = srgb_of(np.asarray(image) / 255, WIDE["ProPhoto"], 1.8) * 255
    assert np.abs(into(saved(image, icc_profile=len(icc).to_bytes(4, "big") + icc[4:]), 16, 24) - expected).max() < 1.6
    text.add_text("bomb", "x" * (40 << 20), zip=True)
    with pytest.raises(DECODE_ERRORS):
        into(saved(image, pnginfo=text), 16, 24)


def test_profiles_of_gray_and_of_ink():
    grays = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = srgb_of(np.repeat(grays[..., None] / 255, 3, 2), BRADFORD_SRGB, 1.0)[..., :1] * 255
    for channels in (1, 3):
        assert np.abs(into(saved(Image.fromarray(grays), icc_profile=gray_profile(1.0)), 16, 16, channels) - expected).max() < 1
    for kind in ("JPEG", "TIFF"):
        icc = cmyk_profile(50)  # L* = 50 is 119 in sRGB
        assert abs(int(into(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), kind, icc_profile=icc), 8, 8)[4, 4, 1]) - 119) <= 2
        assert into(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), kind, icc_profile=icc), 8, 8)[4, 4].tolist() == [255] * 3


def test_an_xyb_photograph_has_the_colours_of_its_plain_copy(shared_data):
    """`indexed.png` of the same collection is the same picture in a palette of sRGB: their means agree, where before they did not."""
    files = odd(shared_data)
    found, plain = (np.asarray(decode_upright(files[name], 3)).reshape(-1, 3).mean(axis=0) for name in ("sample-xyb.jpg", "indexed.png"))
    assert np.abs(found - plain).max() < 8
    assert np.abs(np.asarray(Image.open(io.BytesIO(files["sample-xyb.jpg"]))).reshape(-1, 3).mean(axis=0) - plain).max() > 20


def test_profiles_are_converted_alike_by_many_threads():
    files = [
        saved(Image.open(io.BytesIO(jpeg(n, (64, 48)))), "JPEG", icc_profile=matrix_profile(WIDE[w], 1.5 + n / 9))
        for n, w in enumerate([*WIDE] * 3)
    ]
    once = [into(data, 48, 64) for data in files]
    srgb_transform.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(lambda n: into(files[n % 9], 48, 64), range(180))):
            assert np.array_equal(found, once[number % 9])


@pytest.mark.parametrize(
    "error", [RuntimeError, MemoryError, RecursionError, KeyError, TypeError, IndexError, ZeroDivisionError, struct.error]
)
def test_whatever_a_parser_raises_is_the_samples_fault(error, monkeypatch):
    """Of opening, decoding, EXIF and conversion; what we get wrong ourselves stays loud."""
    for owner, name, data in (
        (Image, "open", saved(Image.new("RGB", (4, 4)))),
        (PngImagePlugin.PngImageFile, "load", saved(Image.new("RGB", (4, 4)))),
        (Image.Image, "convert", saved(Image.new("L", (4, 4)))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, **options: (_ for _ in ()).throw(error("x")))
            with pytest.raises(BadImage, match=error.__name__):
                into(data, 4, 4)
    monkeypatch.setattr(Image.Exif, "get", lambda *args: (_ for _ in ()).throw(error("x")))
    assert upright_size(oriented(6, "fill bytes")) == (24, 16), "where EXIF cannot be read pixels are shown as they lie"
    monkeypatch.setattr(decode, "crop_box", lambda *args: (_ for _ in ()).throw(error("ours")))
    with pytest.raises(error, match="ours"):
        into(jpeg(1, (24, 16)), 4, 4)


def test_a_damaged_avif_is_a_fault():
    whole = saved(Image.open(io.BytesIO(jpeg(1, (24, 16)))), "AVIF")
    begin = whole.index(b"mdat") + 4
    with pytest.raises(DECODE_ERRORS):
        into(whole[:begin] + bytes(len(whole) - begin), 16, 24)


def test_no_program_is_run_for_a_postscript_file(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail("Ghostscript ran"))
    data = saved(Image.new("RGB", (8, 8)), "EPS")
    for what in (lambda: into(data, 8, 8), lambda: upright_size(data), lambda: decode_preview(data), lambda: detect_extension(data)):
        with pytest.raises(DECODE_ERRORS):
            what()


def test_image_open_stands_once():
    """In `image_formats`, with the formats that are meant."""
    calls = [p.name for p in (ROOT / "data").rglob("*.py") for _ in re.findall(r"\bImage\.open\(", p.read_text())]
    assert calls == ["formats.py"]


@pytest.mark.parametrize(("channels", "expected"), [(1, [54]), (2, [54, 255]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_an_opaque_image_in_any_number_of_channels(channels, expected):
    """Red's luminance is 76 of 255 in Rec. 601, as Pillow has it."""
    expected = [76 if v == 54 else v for v in expected]
    for kind, size in (("PNG", 4), ("BMP", 4), ("TIFF", 4)):
        found = into(saved(Image.new("RGB", (size, size), "red"), kind), 4, 4, channels)
        assert found[1, 1].tolist() == expected
        deep = np.zeros((4, 4, channels), np.uint16)
        decode_into(deep, saved(Image.new("RGB", (size, size), "red"), kind))
        assert np.array_equal(deep, found.astype(np.uint16) * 257)


def test_alpha_is_kept_or_laid_on_white():
    for mode, pixel in (("RGBA", (200, 100, 50, 51)), ("LA", (100, 51))):
        data = saved(Image.new(mode, (4, 4), pixel))
        white = [round((v * 51 + 255 * 204) / 255) for v in pixel[:-1]]
        assert into(data, 4, 4, 4)[0, 0].tolist() == list(pixel if mode == "RGBA" else (100, 100, 100, 51))
        assert np.abs(into(data, 4, 4, 3)[0, 0] - np.array(white if mode == "RGBA" else white * 3)).max() <= 1
        assert into(data, 4, 4, 2)[0, 0, 1] == 51
    premultiplied = saved(Image.new("LA", (4, 4), (100, 51)).convert("La"), "TIFF") if "La" in TiffImagePlugin.SAVE_INFO else None
    assert premultiplied is None or into(premultiplied, 4, 4, 2)[0, 0].tolist() == [100, 51]


def test_the_records_of_older_shards_hold_but_their_plain_bit_is_not_believed(tmp_path):
    """Of 85bd0c6: it said so of a JPEG with a wide profile. Samples are read, checked, and decoded as today's rule has it."""
    icc = matrix_profile(WIDE["ProPhoto"], 1.8)
    data = saved(Image.open(io.BytesIO(jpeg(1, (16, 16)))), "JPEG", quality=95, icc_profile=icc)
    with tarfile.open(tmp_path / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    index_tar(tmp_path / "train-000000.tar", "train")
    index = tmp_path / "train-000000.npy"
    records = np.load(index)
    assert records["rest"][0] < PLAIN
    records["rest"] += PLAIN
    np.save(index, records)
    changed = index.read_bytes()
    shard = replace(index_tar(tmp_path / "train-000000.tar", "train")[0], index_sha256=hashlib.sha256(changed).hexdigest())
    index.write_bytes(changed)
    for decoder in (1, 2):
        write_manifest(tmp_path, Manifest(shards=(shard,), decoder=decoder))
        if decoder == 1:
            text = (tmp_path / "manifest.json").read_text()
            (tmp_path / "manifest.json").write_text(text.replace(' "decoder": 1,\n', ""))
        shards = Shards(tmp_path)
        assert shards.read(0, 0).files["jpg"] == data
        assert check_shard(ShardCheck(tmp_path / "train-000000.tar", shard, np.arange(1), 0, verify=False), lambda n: None) == []
        assert shards.knows_plain(np.array([0, 0])).tolist() == [decoder == 2] * 2
    stream = build(DataConfig(shards=(str(tmp_path),), resolution=16, workers=0), seed=0, share=Share(batch_size=1))
    wrong = next(stream).images
    (tmp_path / "manifest.json").write_text(text.replace(' "decoder": 1,\n', ""))
    stream = build(DataConfig(shards=(str(tmp_path),), resolution=16, workers=0), seed=0, share=Share(batch_size=1))
    right = next(stream).images
    assert torch.equal(right[0], torch.from_numpy(decode_image(data, 3, 16)))
    assert not torch.equal(right, wrong)
