"""Depth and bands: 16 bits and any number of bands come through as they are, by the range that the file declares, or are refused."""

import io
import itertools
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from condot.data.images.bands import resized
from condot.data.images.decode import DECODE_ERRORS, decode_into, decode_preview, decode_upright, upright_size
from condot.data.images.downscale import deep_png
from condot.data.images.formats import MAX_PIXELS
from condot.data.images.orientation import rotate_upright
from condot.data.prepare.shard_writer import prepare_sample
from condot.data.prepare.source import RawSample, UnreadableSample
from tests.image_files import BRADFORD_SRGB, GAMMA, WIDE, gray_profile, matrix_profile, saved, srgb_of

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")
DRAW = np.random.default_rng(0).integers(0, 65536, (5, 7, 8), dtype=np.uint16)


def tif(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def bands(pixels, **options):
    """A TIFF file of bands of no declared purpose."""
    return tif(pixels, photometric="minisblack", planarconfig="contig", **options)


def npy(pixels):
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def into(data, channels, dtype=np.uint16, size=None):
    width, height = size or upright_size(data)
    out = np.full((height, width, channels), 77, dtype)
    decode_into(out, data)
    return out


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(row, width, depth, kind, *chunks):
    """A PNG file of one row."""
    head = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_profile(data, icc):
    """A PNG file with a profile behind its header."""
    return data[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(icc)) + data[33:]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("top", [200, 65536])
def test_sixteen_bits_of_png_and_tiff_are_kept(channels, top):
    """libpng and tifffile wrote them; values of at most 255 are as dark as they say."""
    pixels = (DRAW.astype(int) % top).astype(np.uint16)[..., :channels].copy()
    kinds = {1: {}, 2: {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}}
    options = kinds.get(channels, {"photometric": "rgb"}) | ({"extrasamples": ["unassalpha"]} if channels == 4 else {})
    for data in (
        imagecodecs.png_encode(pixels.squeeze()),
        tif(pixels.squeeze(), **options),
        tif(pixels.squeeze(), byteorder=">", **options),
    ):
        assert np.array_equal(into(data, channels), pixels)
        assert np.abs(into(data, channels, np.uint8) - pixels / 257).max() <= (0.51 if channels == 1 else 1)
    assert np.array_equal(into(deep_png(pixels), channels), pixels)
    assert np.array_equal(imagecodecs.png_decode(deep_png(pixels)).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_grays_have_the_range_that_tiff_declares(byteorder, white_is_zero):
    gray, options = DRAW[..., 0], {"byteorder": byteorder, "photometric": "miniswhite" if white_is_zero else "minisblack"}

    def seen(values):
        return 1 - values if white_is_zero else values

    for pixels, top in (
        (gray, 65535), (gray % 256, 65535), ((gray >> 8).astype(np.uint8), 255), ((gray / 65535).astype(np.float32), 1), (gray / 65535, 1),
        ((gray / 65535).astype(np.float16), 1),
    ):  # fmt: skip
        for dtype in (np.uint8, np.uint16):
            high = np.iinfo(dtype).max
            found, expected = into(tif(pixels, **options), 1, dtype)[..., 0], seen(pixels.astype(np.float64) / top) * high
            assert np.abs(found - expected).max() < (0.51 if pixels.dtype != np.float16 else 0.51 + high / 65535 * 20)
    if byteorder == "<" and not white_is_zero:
        for bits in (12, 10, 14):
            pixels = gray >> (16 - bits)
            for tags in (
                [],
                [(340, "H", 1, 5, True), (341, "H", 1, 900, True)],
            ):  # a picture's own extremes, as writers have them, are no range
                found = into(tif(pixels, bitspersample=bits, extratags=tags), 1)[..., 0]
                assert np.abs(found - pixels / (2**bits - 1) * 65535).max() < 0.51


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32, np.uint64, np.float32])
def test_values_without_a_known_range_are_refused_and_those_with_one_are_not(dtype):
    pixels = (DRAW[..., 0] % 100).astype(dtype)
    rule = "they are to be from 0 to 1" if dtype == np.float32 else "says neither black nor white: save unsigned whole numbers of 8 or 16"
    for data in (tif(pixels), npy(pixels)):
        with pytest.raises(ValueError, match=rule):
            into(data, 1)
    if dtype in (np.int16, np.int32, np.float32):
        kind = {np.int16: "h", np.int32: "i", np.float32: "f"}[dtype]
        tags = [(340, kind, 1, 0, True), (341, kind, 1, 200, True)]  # SMinSampleValue, SMaxSampleValue
        assert np.abs(into(tif(pixels, extratags=tags), 1)[..., 0] - pixels / 200 * 65535).max() < 0.51
    with pytest.raises(ValueError, match="from nan"):
        into(tif(np.array([[np.nan, 0.5]], np.float32)), 1)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_gray_of_a_png_is_transparent_at_its_own_depth(depth):
    values = np.linspace(0, 2**depth - 1, min(2**depth, 16)).round().astype(int)
    text = "".join(format(v, f"0{depth}b") for v in values)
    text += "0" * (-len(text) % 8)
    clear = len(values) // 2
    data = png(int(text, 2).to_bytes(len(text) // 8), len(values), depth, 0, chunk(b"tRNS", struct.pack(">H", values[clear])))
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max
        gray = np.round(values / (2**depth - 1) * top)
        found = into(data, 2, dtype)[0]
        assert found[:, 1].tolist() == [0 if i == clear else top for i in range(len(values))] and np.array_equal(found[:, 0], gray)
        gray[clear] = top
        assert np.array_equal(into(data, 1, dtype)[0, :, 0], gray) and np.array_equal(into(data, 3, dtype)[0, :, 2], gray)


def test_the_transparent_colour_of_a_png_is_exact():
    """At 16 bits too: a colour of the same upper bytes is opaque."""
    deep = png(
        np.array([[1000, 2000, 3000], [1000, 2000, 3001]], ">u2").tobytes(), 2, 16, 2, chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000))
    )
    assert into(deep, 4)[0].tolist() == [[1000, 2000, 3000, 0], [1000, 2000, 3001, 65535]]
    assert into(deep, 3, np.uint8)[0].tolist() == [[255, 255, 255], [4, 8, 12]]
    shallow = png(bytes([1, 2, 3, 1, 2, 4]), 2, 8, 2, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert into(shallow, 4, np.uint8)[0].tolist() == [[1, 2, 3, 0], [1, 2, 4, 255]]
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])) + chunk(b"tRNS", bytes([0, 128]))
    assert into(png(bytes([0, 1, 2]), 3, 8, 3, palette), 4, np.uint8)[0].tolist() == [[255, 0, 0, 0], [0, 255, 0, 128], [0, 0, 255, 255]]


@pytest.mark.parametrize("channels", [2, 4, 5, 8])
def test_bands_are_taken_as_they_are_exactly_so_many_or_refused(channels):
    pixels = DRAW[..., :channels]
    files = [
        bands(pixels), bands(pixels, compression="zlib"), bands(pixels, compression="lzw", predictor=True), bands(pixels, byteorder=">"),
        tif(pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"), npy(pixels), npy(np.asfortranarray(pixels)),
        npy(pixels.astype(">u2")), bands((pixels / 65535).astype(np.float32)), npy((pixels / 65535).astype(np.float32)),
    ]  # fmt: skip
    if channels == 4:
        files += [tif(pixels, photometric="rgb"), tif(pixels, photometric="rgb", extrasamples=["unspecified"])]
    for data in files:
        assert np.array_equal(into(data, channels), pixels)
        assert np.abs(into(data, channels, np.uint8) - pixels / 257).max() < 1  # Pillow cuts those of RGBA, others are rounded
        assert decode_preview(data).size == (7, 5)
        with pytest.raises(ValueError, match=rf"has {channels} band|has \d channel"):
            into(data, 6)
    assert np.array_equal(into(bands((pixels >> 8).astype(np.uint8)), channels, np.uint8), pixels >> 8)
    for data in (files[0], files[5]) if channels > 2 else ():
        with pytest.raises(ValueError, match=f"it has {channels} bands, 3 are wanted: set data.channels to {channels}"):
            into(data, 3)
    with pytest.raises(ValueError, match="it has 3 channels, 5 are wanted"):
        into(saved(Image.new("RGB", (8, 8))), 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_of_a_tiff_are_turned(orientation):
    """As `rotate_upright`, which is Pillow's transposition in test_decode."""
    tag = [(274, "H", 1, orientation, True)]
    for data, pixels in (
        (bands(DRAW[..., :6], extratags=tag), DRAW[..., :6]),
        (tif(DRAW[..., :3], photometric="rgb", extratags=tag), DRAW[..., :3]),
    ):
        expected = rotate_upright(pixels, orientation)
        assert upright_size(data) == expected.shape[1::-1] and np.array_equal(into(data, pixels.shape[2]), expected)
    image = Image.open(io.BytesIO(tif(DRAW[..., 0], extratags=tag)))
    assert np.array_equal(into(tif(DRAW[..., 0], extratags=tag), 1)[..., 0], np.asarray(image))
    assert np.array_equal(np.asarray(image), rotate_upright(DRAW[..., 0], orientation))


def test_resizing_bands_is_pillows_lanczos_and_alpha_weighs_colours():
    y, x = np.mgrid[0:40, 0:60]
    waves = np.stack([32768 + 30000 * np.sin(x / 9 + c) * np.cos(y / 7) for c in range(6)], axis=-1).astype(np.uint16)
    found = into(npy(waves), 6, size=(20, 20))
    for c in range(6):
        band = Image.fromarray(waves[..., c].astype(np.float32)).resize((20, 20), Image.Resampling.LANCZOS, box=(10, 0, 50, 40))
        assert np.abs(found[..., c] - np.asarray(band)).max() <= 0.5
    edges = np.where(x[..., None] % 20 < 10, 0, 65535).astype(np.uint16)
    assert resized(edges, (37, 23), (0, 0, 60, 40), False).max() == 65535, "what Lanczos overshoots is cut, and does not wrap"
    rgba = np.concatenate([np.where(x[..., None] < 30, 60000, 20000) * np.ones(3, int), np.where(x[..., None] < 30, 65535, 0)], axis=2)
    small = into(imagecodecs.png_encode(rgba.astype(np.uint16)), 4, size=(6, 4))
    assert np.abs(small[small[..., 3] > 3000][:, :3].astype(int) - 60000).max() < 200, "what is clear has no colour to bleed"


@pytest.mark.parametrize("name", WIDE)
def test_wide_colours_of_sixteen_bits_become_those_of_srgb(name):
    pixels = np.random.default_rng(1).integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    expected = srgb_of(pixels / 65535, WIDE[name], GAMMA[name]) * 65535
    icc = matrix_profile(WIDE[name], GAMMA[name])
    for data in (with_profile(imagecodecs.png_encode(pixels), icc), tif(pixels, photometric="rgb", iccprofile=icc)):
        assert np.abs(into(data, 3) - expected).max() < 2 * 257
        assert np.abs(into(data, 3, np.uint8) - expected / 257).max() < 2, "not of values that were cut to 8 bits"
    gray = pixels[..., 0].copy()
    linear = srgb_of(pixels[..., :1].repeat(3, 2) / 65535, BRADFORD_SRGB, 1.0)[..., 0]
    assert np.abs(into(with_profile(imagecodecs.png_encode(gray), gray_profile(1.0)), 1)[..., 0] - linear * 65535).max() < 20


def test_eight_bits_of_a_deep_png_are_pillows_unless_its_profile_stretches_them():
    """With a profile of sRGB they are those of ever; alpha beside a wide one is rounded."""
    pixels = DRAW[..., :4].copy()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for found in (pixels, pixels[..., :3].copy()):
        data, count = imagecodecs.png_encode(found), found.shape[2]
        assert np.array_equal(into(with_profile(data, srgb), count, np.uint8), np.asarray(Image.open(io.BytesIO(data))))
    icc = matrix_profile(WIDE["ProPhoto"], 1.8)
    expected = srgb_of(pixels[..., :3] / 65535, WIDE["ProPhoto"], 1.8) * 255
    found, alpha = into(with_profile(imagecodecs.png_encode(pixels), icc), 4, np.uint8), pixels[..., 3] / 257
    assert np.abs(found[..., :3] - expected).max() < 2 and np.abs(found[..., 3] - alpha).max() < 0.51
    laid = expected * alpha[..., None] / 255 + 255 - alpha[..., None]
    assert np.abs(into(with_profile(imagecodecs.png_encode(pixels), icc), 3, np.uint8) - laid).max() < 3


def test_white_is_zero_and_clear_is_clear():
    for pixels, top in ((DRAW[..., :2], 65535), ((DRAW[..., :2] >> 8).astype(np.uint8), 255)):
        data = tif(pixels, photometric="miniswhite", extrasamples=["unassalpha"], planarconfig="contig")
        assert np.array_equal(into(data, 2, pixels.dtype), np.stack([top - pixels[..., 0], pixels[..., 1]], axis=-1))


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_what_is_not_installed_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    wide = with_profile(imagecodecs.png_encode(DRAW[..., :3].copy()), matrix_profile(WIDE["ProPhoto"], 1.8))
    with pytest.raises(ValueError, match=f"pip install .*{missing}"):
        into(bands(DRAW[..., :6]), 6) if missing == "tifffile" else into(wide, 3)
    assert np.abs(into(wide, 3, np.uint8) - srgb_of(DRAW[..., :3] / 65535, WIDE["ProPhoto"], 1.8) * 255).max() < 7, "8 bits need neither"
    assert np.array_equal(into(imagecodecs.png_encode(DRAW[..., :3].copy()), 3), DRAW[..., :3])
    assert np.array_equal(into(tif(DRAW[..., 0]), 1)[..., 0], DRAW[..., 0])


def test_bombs_are_refused_before_memory_is_taken():
    huge = npy(DRAW).replace(b"(5, 7, 8), }  ", b"(50000, 50000, 8), }")
    cut, deep = npy(DRAW)[:-4], npy(DRAW).replace(b"(5, 7, 8), }    ", b"(13000, 13000, 8), }")
    for data in (huge, cut, deep, npy(DRAW[None]), npy(DRAW[:0]), npy(DRAW.astype(object)), b"\x93NUMPY\1\0\xff\xff{"):
        with pytest.raises(ValueError):
            into(data, 8, size=(4, 4))
    page = bytearray(bands(DRAW[..., :6]))
    for tag in (256, 257):
        at = (
            page.index(struct.pack("<HHI", tag, 4, 1))
            if struct.pack("<HHI", tag, 4, 1) in page
            else page.index(struct.pack("<HHI", tag, 3, 1))
        )
        page[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 100_000)
    for channels in (3, 6):
        with pytest.raises(ValueError, match=f"more than {MAX_PIXELS}"):
            into(bytes(page), channels, size=(4, 4))
    with pytest.raises(DECODE_ERRORS):
        decode_upright(bands(DRAW[..., :6], compression="jpeg2000"), 3)


def test_max_side_keeps_alpha_depth_and_bands():
    """What is packed smaller still decodes to the same picture in each number of channels."""
    y, x = np.mgrid[0:40, 0:60]
    waves = np.stack([32768 + 30000 * np.sin(x / 9 + c) * np.cos(y / 7) for c in range(6)], axis=-1).astype(np.uint16)
    shallow = saved(Image.fromarray((waves[..., :4] >> 8).astype(np.uint8)), "WEBP", lossless=True)
    cases = [(imagecodecs.png_encode(waves[..., :channels].squeeze().copy()), "png", channels, "png") for channels in (1, 2, 3, 4)]
    cases += [(bands(waves), "tif", 6, "npy"), (npy(waves), "npy", 6, "npy"), (shallow, "webp", 4, "webp")]
    for data, extension, channels, kept in cases:
        record, files = prepare_sample(RawSample("x", data, extension), 30)
        assert record.more["resized_from"] == [60, 40] and kept in files and upright_size(files[kept]) == (30, 20)
        found, expected = into(files[kept], channels).astype(int), into(data, channels, size=(30, 20)).astype(int)
        weight = expected[..., -1:] / 65535 if channels in (2, 4) else 1
        assert (np.abs(found - expected) * weight).max() <= (1 if kept != "webp" else 257 * 24), extension
    for data, extension in ((saved(Image.new("RGBA", (8, 8), (1, 2, 3, 4))), "jpg"), (saved(Image.new("P", (8, 8))), ""), (npy(waves), "")):
        record, files = prepare_sample(RawSample("x", data, extension), 4)
        assert next(iter(files)) in ("png", "npy")
    assert isinstance(prepare_sample(RawSample("x", npy(waves.astype(np.int32)), "npy"), 0), UnreadableSample)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"photometric": "minisblack", "planarconfig": "contig"}),
        (4, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
        (5, {"photometric": "rgb", "extrasamples": ["unspecified", "unspecified"]}),
        (5, {"photometric": "rgb", "extrasamples": ["unassalpha", "unspecified"]}),
    ],
)
def test_colours_with_further_bands_are_both_before_and_after_max_side(count, options, dtype):
    """Whoever wants all bands gets them, and whoever wants colours gets those, in each number of channels as without --max_side."""
    smooth = np.stack(
        [np.asarray(Image.fromarray(DRAW[..., c].astype(np.float32)).resize((60, 40), Image.Resampling.BILINEAR)) for c in range(count)],
        axis=-1,
    )
    smooth[..., 3:4] = 65535  # what is opaque: bands as they are do not weigh one another
    pixels = smooth.astype(np.uint16) if dtype == np.uint16 else (smooth / 257).astype(np.uint8)
    data = tif(pixels, **options)
    assert np.array_equal(into(data, count, dtype), pixels)
    files = prepare_sample(RawSample("x", data, "tif"), 30)[1]
    assert "tif" in files and upright_size(files["tif"]) == (30, 20)
    served = []
    for channels in range(1, 7):
        try:
            expected = into(data, channels, dtype, (30, 20)).astype(int)
        except ValueError as error:
            with pytest.raises(type(error)):
                into(files["tif"], channels, dtype)
            continue
        served.append(channels)
        assert np.abs(expected - into(files["tif"], channels, dtype)).max() <= (1 if dtype == np.uint8 else 2), channels
    assert count in served and (1 in served or 3 in served)


def test_every_conversion_of_channels_agrees_with_eight_bits():
    """Of each of the four colour forms into each, beside Pillow's road."""
    for have, want in itertools.product((1, 2, 3, 4), repeat=2):
        shallow = (DRAW[..., :have] >> 8).astype(np.uint8)
        deep = imagecodecs.png_encode((shallow.astype(np.uint16) * 257).squeeze())
        assert np.abs(into(deep, want) / 257 - into(imagecodecs.png_encode(shallow.squeeze().copy()), want, np.uint8)).max() <= 1, (
            have,
            want,
        )
