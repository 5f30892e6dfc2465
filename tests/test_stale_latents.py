"""Latents of images that were changed since: refused, whether prepare was run again or not; so is going on with an old run."""

import os

import frozen
import pytest
from conftest import fit
from PIL import Image
from shardmaker import jpeg, make, samples
from test_latents import words

from condot.data.encode import command
from condot.data.prepare.command import main as prepare
from condot.data.storage.local import LocalFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, one_thread):
    """Images that this command packed, and their latents."""
    folder = tmp_path_factory.mktemp("stale")
    (folder / "photos").mkdir()
    for i in range(16):
        (folder / "photos" / f"{i:02d}.jpg").write_bytes(jpeg(i, (32, 32)))
    assert prepare(["imagefolder", str(folder / "photos"), "--output", str(folder / "images")]) == 0
    frozen.kl(folder / "vae")
    recipe = frozen.recipe(folder / "r.yaml", shards=folder / "images", autoencoder=folder / "vae", resolution=32)
    assert command.main(["--config", str(recipe), "--output", str(folder / "encoded"), "--flips=both"]) == 0
    return folder


def rewrite(tar):
    """A byte of an image, in place: the same length, another content."""
    body = bytearray(tar.read_bytes())
    body[1024 + 40] ^= 1
    tar.write_bytes(body)


def test_a_tar_rewritten_in_place_is_refused_though_latents_are_read(parts, tmp_path, capsys):
    cached = words(parts, "--data.encoding=cached", "--train.max_steps=2")
    assert fit(parts / "images", tmp_path / "run", *cached) == 0
    tar, manifest = parts / "images" / "train-000000.tar", parts / "images" / "manifest.json"
    whole, times = tar.read_bytes(), manifest.stat()
    rewrite(tar)
    assert fit(parts / "images", tmp_path / "other", *cached) == 2
    message = capsys.readouterr().err
    assert "train-000000.tar changed after they were indexed" in message and "condot prepare" in message and "Traceback" not in message
    tar.write_bytes(whole)
    assert fit(parts / "images", tmp_path / "other", *cached) == 0, "only newer: hashed, and right"
    assert manifest.stat().st_mtime_ns > max(times.st_mtime_ns, tar.stat().st_mtime_ns), "the next look is free"


def test_after_an_edit_and_prepare_old_latents_and_the_old_run_are_refused(parts, tmp_path, capsys):
    cached = words(parts, "--data.encoding=cached", "--train.max_steps=2")
    plain = ("--data.channels=3", "--data.resolution=32", "--train.max_steps=2")
    assert fit(parts / "images", tmp_path / "run", *cached) == 0 and fit(parts / "images", tmp_path / "pixels", *plain) == 0
    Image.new("RGB", (32, 32), "red").save(parts / "photos" / "03.jpg")
    assert prepare(["imagefolder", str(parts / "photos"), "--output", str(parts / "images")]) == 0
    capsys.readouterr()
    assert fit(parts / "images", tmp_path / "new", *cached) == 2
    assert "is of another making: images are" in capsys.readouterr().err
    assert fit(parts / "images", tmp_path / "pixels", *plain[:-1], "--train.max_steps=4") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_only_tars_newer_than_their_manifest_are_hashed(tmp_path, monkeypatch, capsys):
    hashed = []
    folder = make(tmp_path / "s", samples([5, 5, 5]))
    real = __import__("condot.data.storage.local", fromlist=["sha256_of_file"]).sha256_of_file
    monkeypatch.setattr("condot.data.storage.local.sha256_of_file", lambda path: hashed.append(path.name) or real(path))

    def look(shards=None):
        opened = LocalFolder(folder)
        opened.check_rewritten(opened.manifest.shards if shards is None else opened.manifest.shards.select_names(shards)[0])
        return [hashed.pop() for _ in range(len(hashed))]

    assert look() == []
    later = (folder / "manifest.json").stat().st_mtime_ns + 10**9
    for number in (0, 2):
        os.utime(folder / f"train-{number:06d}.tar", ns=(later, later))
    os.utime(folder / "manifest.json", ns=(later - 1, later - 1))
    assert look(["train-000002.tar"]) == ["train-000002.tar"], "those that matter alone"
    monkeypatch.setattr("condot.data.storage.local.LARGE", 10)
    assert sorted(look()) == ["train-000000.tar", "train-000002.tar"]
    assert "2 tars are newer than their manifest" in capsys.readouterr().out
