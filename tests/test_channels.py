"""One to many channels, 8 or 16 bits: from image files through a recipe, shards and training to samples and stock diffusers."""

import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import UNET, fit
from diffusers import DiffusionPipeline
from PIL import Image
from shardmaker import jpeg
from stocks import shake
from test_export import ours_on_stock_schedule

from condot.cli import sample
from condot.cli.assembly.trained_model import TrainedModel
from condot.core.data_config import DataConfig
from condot.data.encoders.autoencoder import check_images
from condot.data.format.manifest import Manifest
from condot.data.images.decode import decode_into, decode_preview
from condot.data.inspect import main as inspect
from condot.data.inspect import shown
from condot.data.loader.batch import PixelReader
from condot.data.loader.build import build
from condot.data.loader.encoded_cache import encoding_differences, wanted_latents
from condot.data.loader.read_samples import read_images
from condot.data.loader.stream import Share, to_unit
from condot.data.prepare.command import main as prepare
from condot.data.storage.shard_reader import Shards
from condot.models import registry
from condot.models.convert import to_diffusers
from condot.models.cost import example_inputs
from condot.models.cross_dit.spec import CrossDiTConfig
from condot.models.dit.spec import DiTConfig
from condot.models.mmdit.spec import MMDiTConfig
from condot.models.unet.spec import UNetConfig
from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.parse import config_from_mapping as fill_config
from condot.pipeline.config.parse import config_to_mapping
from condot.pipeline.config.schema import Config
from condot.pipeline.evaluation.features import check_features
from condot.pipeline.export.identity_autoencoder import MAX_IDENTITY_CHANNELS, identity_autoencoder
from condot.pipeline.export.load import flow_model_from_pipeline, load_flow_model
from condot.pipeline.export.model_card import note_beyond_pil
from condot.pipeline.export.pipeline_class import choose_pipeline
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.sampling.animation import save_animation
from condot.pipeline.sampling.bulk import FolderWriter
from condot.pipeline.sampling.image_encoding import encode_image, file_extension, quantise
from condot.pipeline.sampling.image_grid import make_grid, save_image
from condot.pipeline.sampling.images import image_settings
from condot.pipeline.sampling.likelihood import compute_bits_per_dimension
from condot.pipeline.sampling.restore import measurement
from condot.pipeline.training.resume_rules import find_differences, run_facts

SIDE = 8
KINDS = {
    "gray and alpha": (2, 8),
    "RGBA": (4, 8),
    "16-bit gray": (1, 16),
    "16-bit bands": (5, 16),
    "RGBA, unet": (4, 8),
}
"""Channels and bits of each kind of images that is trained on."""


def pixels_of(kind, number):
    """(SIDE, SIDE, C), every value another one, and none of 16 bits a multiple of 257, but by chance."""
    channels, depth = KINDS[kind]
    values = np.random.default_rng(number).integers(0, 2**depth, (SIDE, SIDE, channels))
    return values.astype(f"uint{depth}")


def write(kind, number, stem):
    """The image as people save it: PNG by Pillow, bands by NumPy; transparent pixels, of which PNG keeps the colour."""
    pixels = pixels_of(kind, number)
    if kind == "16-bit bands":
        np.save(f"{stem}.npy", pixels)
    else:
        Image.fromarray(pixels.squeeze()).save(f"{stem}.png")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Shards of each kind: 24 images of two classes."""
    root, found = tmp_path_factory.mktemp("channels"), {}
    for kind in KINDS:
        place = root / kind.replace(" ", "-").replace(",", "")
        for number in range(24):
            folder = place / "images" / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            write(kind, number, folder / f"{number:02d}")
        assert prepare(["imagefolder", str(place / "images"), "--output", str(place / "shards")]) == 0
        found[kind] = place / "shards"
    return found


def words(kind):
    channels, depth = KINDS[kind]
    more = UNET if "unet" in kind else ()
    return (f"--data.channels={channels}", f"--data.bit_depth={depth}", "--train.max_steps=2", *more)


@pytest.fixture(scope="module")
def runs(packed, tmp_path_factory):
    """A run of two steps of each kind, with its preview and its export."""
    root = tmp_path_factory.mktemp("runs")
    found = {kind: root / kind.replace(" ", "-").replace(",", "") for kind in KINDS}
    for kind, run in found.items():
        more = ("--export=true", "--train.learning_rate=1e-2", "--log.sample_every=2", "--log.sample_steps=1")
        assert fit(packed[kind], run, *words(kind), *more) == 0
    return found


# --- from files to what is learned


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_holds_is_what_is_learned(packed, kind):
    """Every value of every band, alpha and the colour of transparent pixels among them, in 8 and in 16 bits."""
    channels, depth = KINDS[kind]
    options = DataConfig(shards=(str(packed[kind]),), resolution=SIDE, channels=channels, bit_depth=depth, workers=0)
    batch = next(build(options, seed=0, share=Share(batch_size=24)))
    assert batch.images.dtype == (torch.uint8 if depth == 8 else torch.uint16) and not batch.faults
    found = {image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in batch.images}
    assert found == {pixels_of(kind, number).tobytes() for number in range(24)}


def test_units_of_8_bits_are_those_of_ever_and_of_the_same_in_16():
    eight = torch.arange(256, dtype=torch.uint8)
    deep = torch.from_numpy(np.arange(65536, dtype=np.uint16))
    assert torch.equal(to_unit(eight), eight.float() / 127.5 - 1)
    assert torch.equal(to_unit(torch.from_numpy(np.arange(256, dtype=np.uint16) * 257)), to_unit(eight))
    exact = np.arange(65536) / 32767.5 - 1
    assert np.abs(to_unit(deep).double().numpy() - exact).max() < 1e-7
    crossed = to_unit(deep.reshape(2, 32, 32, 32).permute(0, 3, 1, 2))
    assert crossed.is_contiguous() and torch.equal(crossed.permute(0, 2, 3, 1).flatten(), to_unit(deep))


@pytest.mark.gpu
def test_units_on_a_gpu_are_those_of_the_cpu():
    deep = torch.from_numpy(np.arange(65536, dtype=np.uint16)).reshape(1, 256, 256, 1).permute(0, 3, 1, 2)
    torch.testing.assert_close(to_unit(deep.pin_memory().to("cuda", non_blocking=True)).cpu(), to_unit(deep), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("channels", "depth"), [(1, 8), (3, 8), (4, 8), (3, 16)])
def test_what_the_index_calls_plain_is_so_only_for_three_bytes_a_pixel(channels, depth):
    data = jpeg(1, (16, 8))
    found, expected = PixelReader(channels, depth).empty(1, (8, 16))[0], PixelReader(channels, depth).empty(1, (8, 16))[0]
    PixelReader(channels, depth).fill(found, data, True, (0.5, 0.5), True)
    decode_into(expected, data, mirror=True)
    assert np.array_equal(found, expected)


def test_a_batch_has_the_bytes_of_its_depth():
    assert PixelReader(3).empty(2, (4, 5)).nbytes == 120 and PixelReader(5, 16).empty(2, (4, 5)).nbytes == 400


# --- files and pictures


@pytest.mark.parametrize("depth", [8, 16])
def test_an_output_of_k_comes_back_as_k(depth):
    """All values, to and from -1..1; what lies beyond is cut."""
    top = 2**depth - 1
    k = np.arange(top + 1)
    image = torch.from_numpy(2 * k / top - 1).float().reshape(1, 16, -1)
    assert np.array_equal(quantise(image, depth).ravel(), k)
    assert quantise(torch.tensor([-9.0, 9.0]).reshape(1, 1, 2), depth).ravel().tolist() == [0, top]


def as_bytes(png):
    """Every byte of a 16-bit PNG as Pillow decodes it: told that it is of 8 bits and twice as wide, since it keeps 16 of gray alone."""
    width, height, depth = struct.unpack(">IIB", png[16:25])
    assert depth == 16
    header = b"IHDR" + struct.pack(">IIB", 2 * width, height, 8) + png[25:29]
    return np.asarray(Image.open(BytesIO(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_holds_every_bit(channels, depth):
    pixels = np.random.default_rng(0).integers(0, 2**depth, (5, 7, channels)).astype(f"uint{depth}")
    png = encode_image(to_unit(torch.from_numpy(pixels)).permute(2, 0, 1), depth)
    image = Image.open(BytesIO(png))
    image.load()
    assert file_extension(channels) == "png" and image.size == (7, 5)
    if depth == 8:
        assert image.mode == ("L", "LA", "RGB", "RGBA")[channels - 1] and np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    else:
        assert as_bytes(png).tobytes() == pixels.astype(">u2").tobytes()
        assert channels > 1 or np.array_equal(np.asarray(image), pixels[..., 0])


@pytest.mark.parametrize("depth", [8, 16])
def test_bands_are_arrays(depth):
    pixels = np.random.default_rng(0).integers(0, 2**depth, (5, 7, 6)).astype(f"uint{depth}")
    found = np.load(BytesIO(encode_image(to_unit(torch.from_numpy(pixels)).permute(2, 0, 1), depth)))
    assert file_extension(6) == "npy" and found.dtype == pixels.dtype and np.array_equal(found, pixels)


def test_a_grid_keeps_alpha_where_its_file_can_and_lies_on_white_where_not(tmp_path):
    red = torch.tensor([1.0, -1.0, -1.0, -1.0]).reshape(1, 4, 1, 1).expand(2, 4, 2, 2)  # and transparent
    for suffix in (".png", ".webp"):
        save_image(make_grid(red, 2), tmp_path / f"x{suffix}")
        image = Image.open(tmp_path / f"x{suffix}")
        assert image.mode == "RGBA" and image.getpixel((0, 0)) == (255,) * 4 and image.getpixel((1, 1))[3] == 0
    assert Image.open(tmp_path / "x.png").getpixel((1, 1)) == (255, 0, 0, 0), "the colour below is kept"
    save_image(make_grid(red, 2, 8), tmp_path / "x.jpg")
    assert np.asarray(Image.open(tmp_path / "x.jpg")).min() > 250
    gray = torch.tensor([-1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)  # black, half seen
    save_image(make_grid(gray, 1), tmp_path / "gray.png")
    assert Image.open(tmp_path / "gray.png").mode == "LA" and Image.open(tmp_path / "gray.png").getpixel((1, 1)) == (0, 128)
    for suffix in (".gif", ".webp"):
        save_animation([make_grid(gray, 1)[None], make_grid(-gray, 1)[None]], tmp_path / f"film{suffix}", 1)
        film = Image.open(tmp_path / f"film{suffix}")
        assert film.n_frames == 2 and abs(film.convert("RGB").getpixel((2, 2))[0] - 127) <= 1
    save_image(make_grid(torch.cat([red[:, :3], torch.zeros(2, 4, 2, 2)], 1), 2), tmp_path / "bands.png")
    assert Image.open(tmp_path / "bands.png").mode == "RGB" and Image.open(tmp_path / "bands.png").getpixel((1, 1)) == (255, 0, 0)


def test_a_folder_of_arrays_is_gone_on_with(tmp_path):
    keeper = FolderWriter(tmp_path, "npy")
    keeper.put(1, {"npy": b"x"})
    again = FolderWriter(tmp_path, "npy")
    assert again.there == 1 and again.missing(range(3)) == [0, 2] and (tmp_path / "000001.npy").read_bytes() == b"x"


# --- networks


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("model", [DiTConfig, UNetConfig, MMDiTConfig, CrossDiTConfig])
def test_every_network_and_its_export_hold_any_number_of_channels(model, channels):
    """Exported, -1 times the same output; and each channel of the input has its say in each of the output."""
    small = {"block_channels": (32,), "head_width": 32} if model is UNetConfig else {"width": 32, "depth": 2, "heads": 2}
    config, widths = model(**small), (16, 16)
    network = shake(registry.build(seed=0, **build_model_kwargs(config, (channels, 8, 8), 2, widths)))
    text = {"tokens": 5, "text_width": 16, "pooled_width": 16} if config.conditioning == "text" else {}
    x, t, *condition = example_inputs(network, (channels, 8, 8), batch=2, **text)
    x.requires_grad_(True)
    out = network(x, t, *condition)
    assert out.shape == x.shape
    for one in out.sum((0, 2, 3)):
        assert (torch.autograd.grad(one, x, retain_graph=True)[0].abs().amax((0, 2, 3)) > 0).all()
    exported = to_diffusers(network, -1.0, masked=config.conditioning == "text").eval()
    assert exported.config.in_channels == exported.config.out_channels == channels
    place = "unet" if model is UNetConfig else "transformer"
    pipe = CondotPipeline(choose_scheduler(), **{place: exported})
    if config.conditioning == "class":
        with torch.no_grad():
            labels = torch.where(condition[0] == 2, 1000, condition[0])
            torch.testing.assert_close(pipe.predict(x, 1000 * (1 - t), labels), -out, atol=1e-4, rtol=1e-4)


def choose_scheduler():
    from condot.pipeline.export.scheduler_map import build_scheduler

    return build_scheduler(FlowConfig())


# --- runs


STRANGER = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "solver_order": 1})
    pipe.set_progress_bar_config(disable=True)
    def draw(kind):
        how = {"num_inference_steps": 7, "guidance_scale": 2.5, "generator": torch.manual_seed(5), "output_type": kind}
        return pipe(class_labels=[0, 1], **how).images
    np.save(out, draw("np"))
    try:
        print(type(pipe).__name__, draw("pil")[0].mode)
    except TypeError:
        print(type(pipe).__name__, "no PIL image")
print([m for m in sys.modules if m.split(".")[0] in ("condot", "pipeline", "models", "data", "train")])
"""


def test_a_stranger_draws_the_same_with_stock_diffusers(runs, tmp_path):
    """In a process of its own, without code of ours: stock classes, the trainer's images on the same noise and steps."""
    files = {kind: tmp_path / f"{number}.npy" for number, kind in enumerate(runs)}
    pairs = [str(word) for kind, run in runs.items() for word in (run / "export", files[kind])]
    done = subprocess.run([sys.executable, "-I", "-c", STRANGER, *pairs], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said = ["DiTPipeline LA", "DiTPipeline RGBA", "DiTPipeline L", "DiTPipeline no PIL image", "DiTPipeline RGBA", "[]"]
    assert done.stdout.splitlines() == said
    for kind, run in runs.items():
        channels = KINDS[kind][0]
        pipe = DiffusionPipeline.from_pretrained(run / "export")
        pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "solver_order": 1})
        pipe.scheduler.set_timesteps(7)
        noise = torch.randn(2, channels, SIDE, SIDE, generator=torch.manual_seed(5))
        ours = ours_on_stock_schedule(TrainedModel(run), [0, 1], noise, pipe.scheduler.sigmas, 2.5)
        ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        theirs = np.load(files[kind])
        assert theirs.shape == (2, SIDE, SIDE, channels) and np.abs(ours - theirs).max() < 1e-4
        assert ((theirs > 0) & (theirs < 1)).mean() > 0.3, "not all was cut"


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_run_and_export_are_files_that_can_be_trained_on(runs, tmp_path, capsys, kind):
    """From the folder as from the run; as files, and as shards that read back as the same values."""
    channels, depth = KINDS[kind]
    extension = "png" if channels < 5 else "npy"
    more = ("--num_images=3", "--num_inference_steps=2", "--class_labels", "0", "1")
    found = []
    for which in (f"--run={runs[kind]}", f"--pipeline={runs[kind] / 'export'}"):
        folder = tmp_path / which[2:5]
        assert sample.main([which, *more, f"--output={folder}/"]) == 0
        assert sorted(path.name for path in folder.glob("0*")) == [f"{i:06d}.{extension}" for i in range(3)]
        assert sample.main([which, *more, "--format=shards", f"--output={folder}-shards/"]) == 0
        shards = Shards(folder.with_name(f"{folder.name}-shards"))
        found.append(read_images(shards, channels, SIDE, bit_depth=depth)[0])
        for number in range(3):
            file = (folder / f"{number:06d}.{extension}").read_bytes()
            assert file == shards.read(0, number).files[extension]
            assert file == encode_image(found[-1][number], depth)
    assert (found[0] - found[1]).abs().max() < 1e-3
    settings = json.loads((tmp_path / "run" / "samples.json").read_text())["settings"]
    assert settings.get("channels", 1) == channels and settings.get("bit_depth", 8) == depth
    capsys.readouterr()
    assert sample.main([f"--run={runs[kind]}", *more, f"--output={tmp_path / 'grid.png'}"]) == 0
    said = capsys.readouterr().out
    assert ("first three of 5 bands" in said) == (channels == 5) and ("8 of 16 bits" in said) == (kind == "16-bit gray")
    assert Image.open(tmp_path / "grid.png").mode == {1: "L", 2: "LA", 4: "RGBA", 5: "RGB"}[channels]
    assert Image.open(next((runs[kind] / "samples").glob("*.png"))).mode == {1: "L", 2: "LA", 4: "RGBA", 5: "RGB"}[channels]


def test_cards_say_how_to_have_all_of_an_image(runs):
    for kind, run in runs.items():
        channels, depth = KINDS[kind]
        card = " ".join((run / "export/README.md").read_text().split())
        assert f"images with {channels} channel(s)" in card and ("of 16 bits" in card) == (depth == 16)
        assert ('output_type="np").images[0]' in card) == (channels == 5)
        assert (f"(height, width, {channels}), to be multiplied by 65535." in card) == (depth == 16)
    assert note_beyond_pil(3, 8) == "" and image_settings(load_flow_model(runs["RGBA"] / "export")) == {"channels": 4}


def test_a_run_goes_on_with_its_own_depth_alone(packed, runs, capsys):
    assert fit(packed["RGBA"], runs["RGBA"], *words("RGBA"), "--data.bit_depth=16", "--train.max_steps=3") == 2
    assert "data.bit_depth is 8 there and 16 here" in capsys.readouterr().err


def test_recipes_and_checkpoints_of_before_are_of_8_bits():
    config = fill_config(Config, {"data": {"channels": 1}})
    assert config.data.bit_depth == 8
    old = run_facts(config, "x")
    del old["data"]["bit_depth"]
    deep = replace(config, data=replace(config.data, bit_depth=16))
    assert find_differences(old, run_facts(config, "x")) == []
    assert find_differences(old, run_facts(deep, "x")) == ["data.bit_depth is 8 there and 16 here"]
    assert fill_config(Config, config_to_mapping(deep)) == deep


def test_a_cache_of_latents_is_of_its_depth():
    options, images = DataConfig(resolution=8), Manifest(shards=())
    eight, deep = wanted_latents(options, images), wanted_latents(replace(options, bit_depth=16), images)
    assert "bit_depth" not in eight, "as caches of before have it"
    assert encoding_differences(eight, eight) == encoding_differences(deep, deep) == []
    assert encoding_differences(eight, deep) == ["bit_depth is 8 there and 16 here"]
    assert encoding_differences(deep, eight) == ["bit_depth is 16 there and 8 here"]


# --- what else reads images


def test_inspect_shows_what_training_sees(packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condot.data.inspect.SECONDS", 0.01)
    for kind, mode in (("RGBA", "RGBA"), ("gray and alpha", "RGBA"), ("16-bit gray", "RGB"), ("16-bit bands", "RGB")):
        channels, depth = KINDS[kind]
        look = ["--channels", str(channels), "--bit_depth", str(depth), "--resolution", str(SIDE), "--batch_size", "24"]
        assert inspect([str(packed[kind]), *look, "--output", str(tmp_path / "x.png")]) == 0
        said = capsys.readouterr().out
        assert "24 of 24 images, 0 bad" in said and ("first three of 5 bands" in said) == (channels == 5)
        assert Image.open(tmp_path / "x.png").mode == mode
    assert inspect([str(packed["RGBA"]), "--channels=4", f"--resolution={SIDE}", "--output", str(tmp_path / "new/x.jpg")]) == 0
    assert Image.open(tmp_path / "new/x.jpg").mode == "RGB" and np.asarray(Image.open(tmp_path / "new/x.jpg"))[:6, :6].mean() > 250
    assert inspect([str(packed["16-bit bands"]), "--channels", "6", "--output", str(tmp_path / "y.png")]) != 0
    assert "24 bad" in capsys.readouterr().out, "as training would find them"


def test_what_is_shown_of_deep_pixels_and_of_bands():
    """The nearest of 8 bits, and the first three bands, here and in the packing's summary."""
    deep = np.array([0, 25828, 65535], np.uint16).reshape(3, 1, 1)
    assert np.asarray(shown(deep)).ravel().tolist() == [0, 100, 255]
    bands = np.array([10, 20, 30, 40, 50, 60], np.uint8)
    assert np.asarray(shown(bands.reshape(6, 1, 1))).ravel().tolist() == [10, 20, 30]
    buffer = BytesIO()
    np.save(buffer, bands.reshape(1, 1, 6))
    assert np.asarray(decode_preview(buffer.getvalue())).ravel().tolist() == [10, 20, 30]


def test_bits_of_a_finer_lattice(runs):
    """Of the same images 2 log 257 / 2 log 2 more: the same density, in bins 257 times as narrow."""
    source = TrainedModel(runs["16-bit gray"]).build_model("cpu")
    assert source.bit_depth == 16
    x, labels = to_unit(torch.from_numpy(np.full((4, 1, SIDE, SIDE), 128, np.uint8))), torch.zeros(4, dtype=torch.int64)
    of = [compute_bits_per_dimension(replace(source, bit_depth=depth), x, labels, tolerance=1e-3, seed=0, exact=True) for depth in (8, 16)]
    assert abs(of[1].mean - of[0].mean - np.log2(65535 / 255)) < 0.02 and "16-bit lattice" in str(of[1])


@pytest.mark.parametrize("channels", [1, 2, 4, 5, MAX_IDENTITY_CHANNELS])
def test_the_identity_of_more_channels_is_exact_to_less_than_half_a_step_of_16_bits(channels):
    x = torch.cat([torch.rand(1, channels, 4, 4, generator=torch.manual_seed(0)) * 2 - 1, torch.ones(1, channels, 4, 4)])
    with torch.no_grad():
        assert (identity_autoencoder(channels, 4).decode(x).sample - x).abs().max() < 1e-5 < 1 / 65535


def test_many_bands_take_the_pipeline_that_needs_no_autoencoder(monkeypatch):
    monkeypatch.setattr("condot.pipeline.export.pipeline_class.identity_autoencoder", lambda *_: pytest.fail("of gigabytes"))
    channels = MAX_IDENTITY_CHANNELS + 1
    config = DiTConfig(width=32, depth=1, heads=2)
    network = to_diffusers(shake(registry.build(seed=0, **build_model_kwargs(config, (channels, 4, 4), 2))), -1.0)
    found = choose_pipeline(network, "", FlowConfig(), LatentSpace.from_pixels(channels, 4), ("a", "b"), None, ())
    assert (
        type(found.pipeline) is CondotPipeline
        and found.needs_remote_code
        and f"more than {MAX_IDENTITY_CHANNELS} channels" in found.why_not_stock
    )
    images = found.pipeline(class_labels=["b"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 4, 4, channels) and flow_model_from_pipeline(found.pipeline).shape == (channels, 4, 4)


def test_an_unconditional_unet_of_bands_is_a_stock_pipeline_without_autoencoder():
    config = UNetConfig(block_channels=(32,), head_width=32)
    network = to_diffusers(shake(registry.build(seed=0, **build_model_kwargs(config, (5, 8, 8), 0))), -1.0)
    found = choose_pipeline(network, "", FlowConfig(), LatentSpace.from_pixels(5, 8), (), None, ())
    assert found.example_calls((), (), 1.0, bands=True)[0] == 'num_inference_steps=25, output_type="np"'
    assert type(found.pipeline).__name__ == "DDPMPipeline" and not found.needs_remote_code
    assert found.pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 5)


# --- what is refused


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("channels=0", "data.channels=0: choose 1 (gray), 2 (gray, alpha), 3 (RGB), 4 (RGB, alpha), or up to 1024"),
        ("channels=-1", "data.channels=-1: choose"),
        ("channels=1000000", "data.channels=1000000: choose"),
        ("bit_depth=12", "data.bit_depth"),
    ],
)
def test_absurd_values_are_one_line_before_any_work(packed, tmp_path, capsys, option, message):
    assert fit(packed["RGBA"], tmp_path / "run", f"--data.{option}") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert fit(packed["RGBA"], tmp_path / "run", f"--data.{option}", "--dry_run") == 2
    assert message in capsys.readouterr().out
    name, value = option.split("=")
    with pytest.raises(ValueError, match=f"data.{name}={value}: "):
        DataConfig(**{name: int(value)})


def test_a_dry_run_says_channels_bits_and_bytes(packed, tmp_path, capsys):
    assert fit(packed["16-bit bands"], tmp_path / "run", *words("16-bit bands"), "--data.workers=3", "--dry_run") == 0
    said = capsys.readouterr().out
    assert f"images with 5 channel(s) of 16 bits, 8 x 8 pixels: {8 * 8 * 5 * 2} B each" in said
    assert f"up to {7 * 16 * 640 / 1000:.3g} kB decoded ahead" in said


def test_an_autoencoder_of_other_channels_is_refused():
    class Facts:
        name, image_channels, factor = "taef", 3, 8

    with pytest.raises(
        ValueError, match=r"data.channels=4: the autoencoder taef reads 3 channel\(s\). Use 3, or leave data.autoencoder out"
    ):
        check_images(Facts(), 4, 8)


def test_what_needs_colours_says_so():
    with pytest.raises(ValueError, match=r"colourise with a model of 4 channel\(s\): it takes one of three"):
        measurement("colourise", (4, 8, 8), None, 2)
    rgb = torch.nn.Conv2d(3, 2, 1)
    check_features(rgb, torch.zeros(2, 3, 8, 8), "f.py:g")
    with pytest.raises(ValueError, match=r"--features=f.py:g: it fails on images of 4 channel\(s\)"):
        check_features(rgb, torch.zeros(2, 4, 8, 8), "f.py:g")
