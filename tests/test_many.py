"""Images by the thousand: the same ones however many processes draw them, whole after a kill, and readable as shards."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import launch_ranks
from PIL import Image, ImageSequence
from test_methods import gaussian_source

from condot.cli import sample
from condot.cli.assembly.load_models import load_models
from condot.core.process import InterruptHandler
from condot.data.loader.read_samples import read_captions, read_images
from condot.data.prepare.generated import GeneratedShards
from condot.data.storage.shard_reader import Shards
from condot.pipeline.config.parse import parse
from condot.pipeline.flow import Purpose, normal
from condot.pipeline.sampling.bulk import FolderWriter, consecutive_ranges, generate_missing, work_units
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.image_grid import make_grid, tensor_to_pil
from condot.pipeline.sampling.images import generate_image_file, generate_image_folder
from condot.pipeline.sampling.options import ImagesOptions
from condot.pipeline.sampling.requests import ImageRequests, read_requests
from condot.pipeline.sampling.sampler import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")


def run(capsys, *words):
    status = sample.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def read(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def close(some, others):
    """The same files, whose pixels differ by one level of 255 at most."""
    return some.keys() == others.keys() and all(np.abs(some[name] - others[name]).max() <= 1 for name in some)


def hidden(folder):
    return sorted(path.name for path in folder.rglob("*") if "tmp-" in path.name)


@pytest.fixture
def ask(trained):
    return ["--pipeline", trained / "export", "--num_inference_steps", 3, "--guidance_scale", 2, "--seed", 5]


# --- who makes which


def test_every_number_is_made_once_by_somebody():
    for count, size, ranks in itertools.product((1, 6, 7, 20), (1, 3, 20, 50), (1, 2, 5)):
        shares = [work_units(count, size, rank, ranks) for rank in range(ranks)]
        assert sorted(i for share in shares for unit in share for i in unit) == list(range(count))
        assert all(len(unit) <= size for share in shares for unit in share)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1, "units are dealt out in turn"
        assert sorted(itertools.chain(*shares), key=lambda unit: unit[0]) == work_units(count, size), "whoever they belong to"


def test_runs_are_what_follows_one_another():
    assert list(consecutive_ranges([0, 1, 2, 5, 6, 9], 2)) == [range(0, 2), range(2, 3), range(5, 7), range(9, 10)]
    assert list(consecutive_ranges([4, 5, 6], 9)) == [range(4, 7)] and list(consecutive_ranges([], 9)) == []


@pytest.mark.parametrize("solver", [pytest.param("heun", marks=pytest.mark.faults), "euler_maruyama"])
def test_an_image_is_the_same_whoever_draws_it(ask, tmp_path, capsys, solver):
    """One process, another size of batch, two ranks; and it is the image of (seed, index) that a grid has."""
    words = [*ask, "--solver", solver, "--num_images", 13]
    assert run(capsys, *words, "--batch_size", 5, "--output", tmp_path / "one")[0] == 0
    one = read(tmp_path / "one")
    assert list(one) == [f"{i:06d}.png" for i in range(13)]
    assert all(np.abs(a - b).max() > 3 for a, b in itertools.combinations(one.values(), 2)), "no two are alike"
    assert run(capsys, *words, "--batch_size", 13, "--output", tmp_path / "whole")[0] == 0
    assert close(one, read(tmp_path / "whole"))
    two = [str(word) for word in (*words, "--batch_size", 3, "--output", tmp_path / "two")]
    done = launch_ranks(2, "sample", *two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("13 images by") == 1 and "process 1 of 2" in done.stderr and "0 of them were there" in done.stdout
    assert close(one, read(tmp_path / "two")) and not hidden(tmp_path)
    source = load_models(ImagesOptions(pipeline=str(words[1]))).model
    made = generate(source, torch.arange(13) % 10, Sampler(solver, 3, 2.0), seed=5).images
    assert close(one, {f"{i:06d}.png": np.asarray(tensor_to_pil(image)).astype(int) for i, image in enumerate(made)})


def test_one_picture_is_the_work_of_one_process(ask, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("condot.core.process.exit_if_distributed", lambda status: None)
    assert "is the work of one process, and 2 were started" in run(capsys, *ask, "--output", tmp_path / "a.png")[2]
    assert "evaluate is the work of one process" in run(capsys, "evaluate", *ask[:2])[2]


# --- stopped and gone on with


@pytest.mark.parametrize("form", [pytest.param("png", marks=pytest.mark.faults), "shards"])
def test_a_killed_folder_goes_on(ask, tmp_path, capsys, form):
    """kill -9 in the middle, then another batch size: complete, equal to an uninterrupted one, and nothing whole was made again."""
    words = [*ask, "--num_images", 96, "--format", form, "--images_per_shard", 8]
    assert run(capsys, *words, "--output", tmp_path / "whole")[0] == 0
    folder = tmp_path / "killed"
    done = folder if form == "png" else folder / ".making"
    command = [sys.executable, "sample.py", *words, "--batch_size", 1, "--output", folder]
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    end = "0*.png" if form == "png" else "train-*.json"  # of what is whole
    until = time.monotonic() + 120
    while len(list(done.glob(end))) < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    names = [path.with_suffix(".png" if form == "png" else ".tar").name for path in done.glob(end)]
    there = {name: (done / name).stat().st_mtime_ns for name in names}
    whole = len(names) * (1 if form == "png" else 8)
    assert whole < 96 and not (folder / "manifest.json").exists()
    (done / ".tmp-half.png").write_bytes(b"half")
    if form == "png":
        (folder / "000095.png").touch()  # as a failing power supply leaves files: named and empty
    status, out, _ = run(capsys, *words, "--output", folder)
    assert status == 0 and not hidden(tmp_path)
    assert f"{whole} of them were there" in out
    assert all((folder / name).stat().st_mtime_ns == then for name, then in there.items())
    if form == "png":
        assert len(read(folder)) == 96 and close(read(folder), read(tmp_path / "whole"))
    else:
        mine, its = (read_images(Shards(path), 1, 8) for path in (folder, tmp_path / "whole"))
        assert len(mine[0]) == 96 and (mine[0] - its[0]).abs().max() <= 2.1 / 255 and torch.equal(mine[1], its[1])


@pytest.mark.parametrize("form", [pytest.param("png", marks=pytest.mark.faults), "shards"])
def test_a_signal_ends_the_work_after_the_batch(ask, tmp_path, capsys, form):
    folder = tmp_path / "folder"
    words = [*ask, "--num_images", 4000, "--format", form, "--batch_size", 2, "--output", folder]
    command = [sys.executable, "sample.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pattern = "*.png" if form == "png" else ".making/.tmp-*"
    until = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopping after this step" in err
    left = 4000 - len(read(folder))
    assert (f"{left} of 4000 images are still to be made; the same command goes on" in out and left < 4000) or form == "shards"
    assert not hidden(folder) and not (folder / "manifest.json").exists()


def test_a_batch_that_fails_leaves_no_half_shard(tmp_path):
    def make(numbers):
        if numbers[0] >= 4:
            raise ValueError("the end point is not finite")
        return [{"png": picture_of(i), "cls": b"0"} for i in numbers]

    class Bar:
        def update(self, images):
            pass

    keeper = GeneratedShards(tmp_path, 10, ("a",))
    with pytest.raises(ValueError, match="not finite"):
        generate_missing(keeper, work_units(20, 10), make, 4, lambda: False, Bar())
    assert not hidden(tmp_path) and GeneratedShards(tmp_path, 10).there == 0


def picture_of(number):
    from shardmaker import png

    return png(number)


def test_settings_bind_a_folder_and_more_images_do_not(ask, trained, tmp_path, capsys):
    words = [*ask, "--output", tmp_path / "a", "--class_labels", 3, 1]
    assert run(capsys, *words)[0] == 0
    kept = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert kept["settings"]["seed"] == 5 and kept["settings"]["steps"] == 3 and kept["num_images"] == 2
    for more, message in (
        (["--seed", 6], "seed is 5 there and 6 here"),
        (["--num_inference_steps", 4], "steps is 3 there and 4 here"),
        (["--guidance_interval", 0.1, 0.9], "guidance_interval is [0.0, 1.0] there and [0.1, 0.9] here"),
        (["--class_labels", 1, 3], "conditions is"),
        (["--pipeline=", "--run", trained], "model is"),
        (["--guide_run", trained], "guide is None there"),
        (["--format", "shards"], "format is png there and shards here"),
    ):
        status, _, err = run(capsys, *words, *more)
        assert status == 2 and message in err and "holds images of other settings" in err, err
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.png")}
    status, out, _ = run(capsys, *words, "--num_images", 5, "--batch_size", 1)
    assert status == 0 and "5 images by dpmpp_2m, 2 of them were there" in out
    assert len(read(tmp_path / "a")) == 5 and all((tmp_path / "a" / n).stat().st_mtime_ns == then for n, then in before.items())
    assert "3 images by dpmpp_2m, 3 of them were there" in run(capsys, *words, "--num_images", 3)[1]


def test_a_folder_of_others_is_left_alone_and_one_that_never_began_is_not(ask, tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert "holds photo.jpg and no samples.json" in run(capsys, *ask, "--output", tmp_path)[2]
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "samples.json").write_text('{"settings": {"seed": 1}, "num_images": 3}')
    assert run(capsys, *ask, "--output", folder)[0] == 0, "no image was made with those settings"
    (folder / "samples.json").write_text("{")
    assert "cannot be read" in run(capsys, *ask, "--output", folder)[2]


def test_two_commands_do_not_fill_one_folder(ask, tmp_path, capsys):
    from condot.pipeline.launch.folder_lock import lock_folder

    with closing(lock_folder(tmp_path / "a", "--output")):
        assert f"--output={str(tmp_path / 'a')!r} is in use by another run" in run(capsys, *ask, "--output", tmp_path / "a")[2]


# --- what is asked for


def options_of(*words):
    return parse(ImagesOptions, [str(word) for word in words])


def test_lines_of_a_file_are_the_conditions_in_turn(ask, tmp_path, capsys):
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbf7\r\n 2 \n9")
    assert read_requests(options_of("--labels", tmp_path / "labels.txt")).labels == (7, 2, 9)
    assert run(capsys, *ask, "--labels", tmp_path / "labels.txt", "--num_images", 5, "--output", tmp_path / "a")[0] == 0
    assert run(capsys, *ask, "--class_labels", 7, 2, 9, 7, 2, "--output", tmp_path / "b")[0] == 0
    assert close(read(tmp_path / "a"), read(tmp_path / "b"))
    (tmp_path / "p.txt").write_text("a red apple\n  un chat noir \u2028et blanc\n")
    wanted = read_requests(options_of("--prompts", tmp_path / "p.txt", "--negative_prompt", "blurred"))
    assert wanted.prompts == ("a red apple", "un chat noir \u2028et blanc") and wanted.negative_prompts == ("blurred", "blurred")
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n{"prompt": "b", "negative_prompt": "c"}\n')
    wanted = read_requests(options_of("--prompts", tmp_path / "p.jsonl"))
    assert wanted.prompts == ("", "b") and wanted.negative_prompts == ("", "c")
    assert (
        len(
            {
                wanted.digest,
                ImageRequests(prompts=("", "b")).digest,
                ImageRequests(prompts=("b", ""), negative_prompts=("", "c")).digest,
                ImageRequests().digest,
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", "1\ntwo\n", "labels, line 2: 'two' is no class"),
        ("labels", "1\n\n2\n", "labels, line 2: '' is no class"),
        ("labels", "1\n2.0\n", "labels, line 2: '2.0' is no class"),
        ("labels", "", "is empty"),
        ("labels", "1\n2\n10\n", "labels, line 3: class label 10 is out of range: the model has classes 0 to 9"),
        ("labels", "-1\n", "labels, line 1: class label -1 is out of range"),
        ("prompts", "", "is empty"),
        ("prompts", "a\n \nb\n", "prompts, line 2: no prompt"),
        ("prompts", "a\n\udcff\n", "prompts, line 2: invalid start byte at byte 0"),
        ("prompts", "a cat\n", "--prompt 'a cat' of a model that takes no text"),
        ("prompts.jsonl", '{"prompt": "a"}\n{', "line 2: not valid JSON"),
        ("prompts.jsonl", '["a"]\n', "line 1: '[\"a\"]' is no mapping of texts"),
        ("prompts.jsonl", '{"prompt": 3}\n', "is no mapping of texts"),
        ("prompts.jsonl", '{"prompt": "a", "negativ": "b"}\n', "line 1: unknown key 'negativ'"),
        ("prompts.jsonl", '{"negative_prompt": "b"}\n', "line 1: no prompt"),
    ],
)
def test_files_with_mistakes_are_refused_by_their_line(ask, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    status, _, err = run(capsys, *ask, f"--{name.split('.')[0]}", tmp_path / name, "--output", tmp_path / "folder")
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class_labels", "1", "--labels", "a.txt"], "--class_labels and --labels beside one another"),
        (["--class_labels", "1", "--prompt", "a"], "--class_labels and --prompt beside one another"),
        (["--labels", "a.txt"], "--labels 'a.txt' is no file"),
        (["--class_labels", "10"], "class label 10 is out of range"),
        (["--negative_prompt", "a"], "--negative_prompt 'a' beside no --prompt"),
        (["--num_inference_steps", "0"], "--num_inference_steps 0: "),
        (["--batch_size", "0"], "--batch_size 0: at least 1"),
        (["--images_per_shard", "0"], "--images_per_shard 0"),
        (["--num_images", "-1"], "--num_images -1"),
        (["--output", "a.tiff"], ".tiff is none of .png"),
        (["--output", "a.png", "--show", "state"], "that does not move"),
        (["--output", "a/", "--show", "state"], "that does not move"),
        (["--output", "a.png", "--format", "shards"], "that is one picture"),
        (["--output", "a.gif", "--solver", "langevin"], "no way from noise to data to show"),
        (["--output", "a.gif", "--solver", "dormand_prince"], "chooses its own steps"),
        (["--guidance_rescale", "2"], "--guidance_rescale 2.0: "),
        (["--given_times", "0.5", "0.2"], "0.2"),
        (["--guide_run", "x", "--guidance_scale", "1"], "beside --guidance_scale 1, which is none"),
        (["--guide_run", "x", "--guide_pipeline", "y"], "give one of them"),
        (["--guide_run", "/nowhere"], "holds no whole checkpoint"),
    ],
)
def test_mistakes_are_one_line_before_any_work(ask, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *ask, "--output", "folder", *words)
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_a_model_without_classes_is_guided_by_a_weaker_one_alone(tmp_path):
    source = gaussian_source("condot", "velocity")
    options = options_of("--num_images", 3, "--num_inference_steps", 2, "--guidance_scale", 2, "--output", tmp_path / "a")
    with pytest.raises(ValueError, match="nothing to guide by"):
        generate_image_folder(options, source, ImageRequests().check(source, True), [], None, InterruptHandler(""))
    assert not (tmp_path / "a").exists()
    weak = dataclasses.replace(source, weak=source.field)
    assert generate_image_folder(options, weak, ImageRequests().check(weak, False), [], None, InterruptHandler("")) == 0


# --- shards


def test_shards_are_read_by_the_data_room_and_grow(ask, tmp_path, capsys):
    """Pixels, labels and names come back through data.shards; more images leave whole tars as they are and fill up the last one."""
    words = [*ask, "--class_labels", 4, 0, 9]
    assert run(capsys, *words, "--num_images", 11, "--output", tmp_path / "files")[0] == 0
    tars = [*words, "--format", "shards", "--images_per_shard", 3, "--batch_size", 2, "--output", tmp_path / "tars"]
    assert run(capsys, *tars, "--num_images", 7)[0] == 0
    assert Shards(tmp_path / "tars").counts == [3, 3, 1]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tars").glob("*.tar")}
    status, out, _ = run(capsys, *tars, "--num_images", 11)
    assert status == 0 and "11 images by dpmpp_2m, 7 of them were there" in out
    changed = {path.name for path in (tmp_path / "tars").glob("*.tar") if path.stat().st_mtime_ns != before.get(path.name)}
    assert changed == {"train-000002.tar", "train-000003.tar"}
    shards = Shards(tmp_path / "tars")
    assert shards.counts == [3, 3, 3, 2] and shards.manifest.class_names == tuple(map(str, range(10)))
    images, labels = read_images(shards, 1, 8)
    assert labels.tolist() == [(4, 0, 9)[i % 3] for i in range(11)]
    found = {f"{i:06d}.png": ((image[0] + 1) * 127.5).round().int().numpy() for i, image in enumerate(images)}
    assert close(found, read(tmp_path / "files"))
    assert [shards.read(s, n).key for s, n in ((0, 0), (2, 1), (3, 1))] == ["000000000", "000000007", "000000010"]
    assert run(capsys, *tars, "--num_images", 4)[0] == 0 and Shards(tmp_path / "tars").counts == [3, 3, 3, 2], "fewer lose nothing"


def test_two_processes_write_one_folder_of_shards(ask, tmp_path, capsys):
    words = [str(w) for w in (*ask, "--num_images", 11, "--format", "shards", "--images_per_shard", 2)]
    assert run(capsys, *words, "--output", tmp_path / "one")[0] == 0
    two = [*words, "--batch_size", "1", "--output", str(tmp_path / "two")]
    done = launch_ranks(2, "sample", *two)
    assert done.returncode == 0, done.stderr[-2000:]
    one, both = (read_images(Shards(tmp_path / name), 1, 8) for name in ("one", "two"))
    assert (one[0] - both[0]).abs().max() <= 2.1 / 255 and one[1].tolist() == both[1].tolist() == [i % 10 for i in range(11)]


def lettered(**more):
    """A source that takes text, whose samples are constant: a caption's mean is its length over 10."""
    mean = lambda c: c[0][:, :1, None, None] / 10  # noqa: E731
    plain = gaussian_source("condot", "velocity")
    read = lambda texts: (torch.tensor([[float(len(text))] for text in texts]),)  # noqa: E731
    field = lambda x, t, c: (mean(c) - x) / (1 - t)[:, None, None, None].clamp(min=1e-3)  # noqa: E731
    return dataclasses.replace(plain, field=field, encode_text=read, null=read([""]), predict="data", **more)


def test_captions_lie_beside_their_images(tmp_path):
    """Each image is of its own caption, led away from its own negative prompt; with w = 2, length 2 a - b."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "xxx"}\n{"prompt": "xxxx", "negative_prompt": "yy"}\n{"prompt": "x"}\n')
    words = ("--prompts", tmp_path / "p.jsonl", "--num_images", 7, "--guidance_scale", 2, "--num_inference_steps", 2, "--solver", "euler")
    options = options_of(*words, "--batch_size", 2, "--format", "shards", "--output", tmp_path / "tars")
    source = lettered()
    wanted = read_requests(options).check(source, True)
    assert generate_image_folder(options, source, wanted, [], lambda: GeneratedShards(tmp_path / "tars", 1000), InterruptHandler("")) == 0
    shards = Shards(tmp_path / "tars")
    assert read_captions(shards, "txt") == ["xxx", "xxxx", "x"] * 2 + ["xxx"]
    images, labels = read_images(shards, 1, 8)
    assert set(labels.tolist()) == {-1} and images.flatten(1).std(1).max() < 0.02
    expected = torch.tensor(([0.6, 0.6, 0.2] * 2) + [0.6])
    torch.testing.assert_close(images.flatten(1).mean(1), expected, atol=0.01, rtol=0)
    condition, away = wanted.conditions(source, range(7))
    together = generate(source, condition, options.sampler(), seed=0, null=away, batch_size=3)
    torch.testing.assert_close(together.images.flatten(1).mean(1), expected, atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="'yy' has no effect without guidance"):
        read_requests(options).check(source, False)
    with pytest.raises(ValueError, match="--prompt is missing"):
        ImageRequests().check(source, True)
    with pytest.raises(ValueError, match="of a model that takes text"):
        ImageRequests(labels=(1,)).check(source, True)


# --- animations


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
@pytest.mark.parametrize("solver", ["heun", "euler_maruyama", "multistep"])
def test_an_animation_ends_in_the_grid(ask, tmp_path, capsys, name, solver):
    words = [*ask, "--class_labels", 1, 2, 3, "--solver", solver, "--batch_size", 2]
    assert run(capsys, *words, "--output", tmp_path / "a.png")[0] == 0
    assert run(capsys, *words, "--output", tmp_path / name, "--show", "state")[0] == 0
    still = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    moving = Image.open(tmp_path / name)
    frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(moving)]
    assert len(frames) == 4 and np.array_equal(frames[-1], still) and not np.array_equal(frames[-2], still)
    noise = make_grid(normal(5, Purpose.INITIAL, 0, torch.arange(3), (1, 8, 8)).clamp(-1, 1), 3, scale=8)
    assert np.abs(frames[0].astype(int) - np.asarray(tensor_to_pil(noise)).astype(int)).max() <= 1
    if name == "a.gif":
        held = []
        for k in range(4):
            moving.seek(k)
            held.append(moving.info["duration"])
        assert held == [600, 1500, 1500, 2000]


@pytest.mark.parametrize("path", ["condot", "ve"])
def test_frames_are_the_path_and_what_it_leads_to(tmp_path, path):
    """Gaussian data: at t = 0 the prediction is the data's mean, whatever the noise; the state of a wide path is shown at unit size."""
    source = gaussian_source(path, "data" if path == "ve" else "velocity")
    for show in ("state", "prediction"):
        words = ("--num_images", 4, "--num_inference_steps", 6, "--show", show, "--output", tmp_path / f"{show}.webp")
        assert generate_image_file(options_of(*words), source, ImageRequests()) == 0
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(Image.open(tmp_path / f"{show}.webp"))]
        first = frames[0][frames[0] < 255] / 127.5 - 1
        assert len(frames) == 7
        if show == "prediction":
            assert abs(np.median(first) - 0.3) < 0.02 and first.std() < 0.05
        else:
            assert abs((first > -1).mean() - 0.81) < 0.1, "of unit noise below 1, four fifths lie above -1"


def test_files_keep_the_image_alone(tmp_path):
    keeper = FolderWriter(tmp_path)
    keeper.put(1234567, {"png": b"x", "cls": b"3"})
    assert [path.name for path in tmp_path.iterdir()] == ["1234567.png"] and FolderWriter(tmp_path).there == 1
