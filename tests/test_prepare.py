"""From any source to shards: byte for byte, in one order, whatever interrupts it; what cannot be right is refused with a remedy."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from condot.core.data_config import parse_size
from condot.data.format.manifest import parse_manifest
from condot.data.images.decode import decode_upright
from condot.data.prepare.command import main
from condot.data.prepare.imagefolder import imagefolder
from condot.data.prepare.pack import pack
from condot.data.prepare.parquet import parquet
from condot.data.prepare.shard_plan import Packing, plan_shards
from condot.data.prepare.table_columns import ColumnChoice
from condot.data.prepare.verify import ShardCheck, check_shard
from condot.data.prepare.worker_pool import run_jobs
from condot.data.storage.shard_reader import Shards


def picture(number, size=(9, 7), kind="PNG"):
    """A file of noise that no other number has."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def folder_of_images(root, classes=("cat", "dog"), count=5, size=(9, 7)):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"image {i}.png").write_bytes(picture(1000 * c + i, size))
    return root


def contents(folder, split="train"):
    """Source name -> files, of every sample of a split, by webdataset's own reader."""
    manifest = parse_manifest((folder / "manifest.json").read_bytes(), str(folder))
    tars = [str(folder / shard.name) for shard in manifest.split(split)]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        found[json.loads(sample["json"])["source"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return found


def everything(folder):
    """Name -> bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def refused(capsys, *words):
    """The error of a command that must fail without a manifest."""
    assert main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "error: " in message
    return message


# --- what is packed


def test_digits_come_back_exactly(digits):
    """The 17 grays of the scans survive PNG, tar and index; every scan is there once, a fifth of them held out."""
    bunch = load_digits()
    seen = []
    for split in ("train", "val"):
        for name, files in contents(digits, split).items():
            number = int(name.split("/")[1])
            pixels = np.asarray(Image.open(io.BytesIO(files["png"])))
            assert int(files["cls"]) == bunch.target[number] and np.array_equal(np.round(pixels * (16 / 255)), bunch.images[number])
            seen.append(number)
    assert sorted(seen) == list(range(1797)) and len(contents(digits, "val")) == 359


def test_files_are_copied_byte_for_byte_and_stored_as_any_tool_reads_them(tmp_path):
    root = folder_of_images(tmp_path / "images")
    (root / "cat" / "image 0.txt").write_text("ein Kätzchen\n")
    out = tmp_path / "shards"
    assert main(["imagefolder", str(root), "--output", str(out)]) == 0
    found = contents(out)
    assert {name: f["png"] for name, f in found.items()} == {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.png")}
    assert found["cat/image 0.png"]["txt"].decode() == "ein Kätzchen" and sum("txt" in f for f in found.values()) == 1
    assert {n.split("/")[0]: int(f["cls"]) for n, f in found.items()} == {"cat": 0, "dog": 1}
    with tarfile.open(out / "train-000000.tar") as tar:
        names = [member.name for member in tar]
        assert all(m.isreg() and m.mtime == 0 and m.uid == 0 for m in tar.getmembers())
    keys = [name.split(".")[0] for name in names]
    assert all(key.isdigit() and len(key) == 9 for key in keys) and keys == sorted(keys)
    assert all(name.endswith(".png") for name, before in zip(names, [None, *keys], strict=False) if name.split(".")[0] != before)
    checked = subprocess.run(["tar", "tf", str(out / "train-000000.tar")], capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.split() == names
    report = json.loads((out / "report.json").read_text())
    assert report["missing_captions"] == 9 and report["samples"] == 10
    assert Image.open(out / "summary.png").size[0] > 500
    assert Shards(out).manifest.tally.sizes == {"9x7": 10}


def test_shards_are_shuffled_as_a_whole_and_keep_to_their_size(tmp_path):
    """Rank correlation of stored and source order within 5 sigma of none; every sample in one shard."""
    root = folder_of_images(tmp_path / "images", classes=("a",), count=400)
    source = imagefolder(root)
    shards = plan_shards(source, Packing(100_000, holdout=0.1, seed=4))
    numbers = np.concatenate([shard.numbers for shard in shards])
    assert sorted(numbers.tolist()) == list(range(400)) and sum(len(s.numbers) for s in shards if s.split == "val") == 40
    order = np.concatenate([shard.numbers for shard in shards if shard.split == "train"])
    assert abs(np.corrcoef(np.arange(360), order)[0, 1]) < 5 / np.sqrt(360)
    manifest, _ = pack(source, tmp_path / "out", Packing(100_000, holdout=0.1, seed=4), workers=1)
    sizes = [shard.bytes for shard in manifest.shards if shard.split == "train"]
    assert len(sizes) > 5 and max(sizes) < 110_000 and min(sizes[:-1]) > 60_000


def test_larger_images_are_made_smaller_in_their_own_family(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for name, kind in (("big.jpg", "JPEG"), ("big.png", "PNG"), ("big.webp", "WEBP"), ("big.gif", "GIF"), ("small.png", "PNG")):
        (root / name).write_bytes(picture(1, (40, 20) if "big" in name else (10, 16), kind))
    turned = Image.open(io.BytesIO(picture(1, (40, 20), "JPEG")))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpeg", exif=exif)
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "out"), "--max_side", "16"]) == 0
    found = contents(tmp_path / "out")
    assert found["small.png"]["png"] == (root / "small.png").read_bytes() and "resized_from" not in json.loads(found["small.png"]["json"])
    for name, extension, size in (
        ("big.jpg", "jpg", (16, 8)),
        ("big.png", "png", (16, 8)),
        ("big.webp", "webp", (16, 8)),
        ("big.gif", "png", (16, 8)),
        ("turned.jpeg", "jpg", (8, 16)),
    ):
        image = Image.open(io.BytesIO(found[name][extension]))
        assert image.size == size and {"jpg": "JPEG"}.get(extension, extension.upper()) == image.format
        assert json.loads(found[name]["json"])["resized_from"] == ([20, 40] if name == "turned.jpeg" else [40, 20])
        whole = decode_upright((root / name).read_bytes(), 3).resize(size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(whole, int)).mean() < (40 if extension == "webp" else 25)


def test_duplicates_are_counted_and_the_first_is_kept(tmp_path, capsys):
    root = folder_of_images(tmp_path / "images", count=30)
    for copy, original in (("dog/zz.png", "cat/image 3.png"), ("dog/zzz.png", "cat/image 3.png"), ("cat/zz.png", "dog/image 1.png")):
        shutil.copy(root / original, root / copy)
    words = ["imagefolder", str(root), "--shard_size", "30kB", "--output"]
    assert main([*words, str(tmp_path / "all")]) == 0
    assert "duplicates: 3" in capsys.readouterr().out and len(contents(tmp_path / "all")) == 63
    pairs = json.loads((tmp_path / "all" / "report.json").read_text())["duplicates"]["list"]
    assert sorted(map(tuple, pairs)) == [
        ("cat/image 3.png", "dog/zz.png"),
        ("cat/image 3.png", "dog/zzz.png"),
        ("cat/zz.png", "dog/image 1.png"),
    ]
    assert main([*words, str(tmp_path / "few"), "--drop_duplicates"]) == 0
    kept = contents(tmp_path / "few")
    assert set(contents(tmp_path / "all")) - set(kept) == {"dog/zz.png", "dog/zzz.png", "dog/image 1.png"} and len(kept) == 60
    shards = Shards(tmp_path / "few")
    assert sum(shards.counts) == 60 and len({shards.read(s, n).key for s, c in enumerate(shards.counts) for n in range(c)}) == 60


def test_a_duplicate_is_found_beside_what_cannot_be_read(tmp_path):
    """Samples that are left out for one reason do not shift which are left out for another."""
    root = folder_of_images(tmp_path / "images", count=30)
    shutil.copy(root / "cat" / "image 3.png", root / "dog" / "zz.png")
    for i in range(10):
        (root / "cat" / f"broken {i}.png").write_bytes(b"x" * i)
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "out"), "--drop_duplicates", "--skip_corrupt"]) == 0
    wanted = {f"{name}/image {i}.png" for name in ("cat", "dog") for i in range(30)}
    assert set(contents(tmp_path / "out")) == wanted


# --- whatever happens


def run(*words, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "data.prepare", *map(str, words)], cwd=ROOT, env=env, stderr=subprocess.PIPE, **more)


def test_killed_anywhere_and_with_any_workers_the_shards_are_the_same(tmp_path):
    """kill -9 at random moments; the last run finishes; every file is compared bit by bit."""
    root = folder_of_images(tmp_path / "images", count=300, size=(60, 60))
    shutil.copy(root / "cat" / "image 3.png", root / "dog" / "copy.png")
    words = ["imagefolder", root, "--shard_size", "300kB", "--holdout", "0.1", "--drop_duplicates", "--output"]
    assert main([str(w) for w in [*words, tmp_path / "whole", "--workers", "1"]]) == 0
    chance, out = random.Random(0), tmp_path / "killed"
    for attempt, workers in enumerate((2, 1)):
        process = run(*words, out, "--workers", workers)
        packing = out / ".packing"
        wanted = len(list(packing.glob("train*.json"))) + 1 + chance.randrange(2)
        while process.poll() is None and len(list(packing.glob("train*.json"))) < wanted:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "manifest.json").exists(), attempt
    kept = {path.name: path.stat().st_mtime_ns for path in packing.glob("*.tar") if not path.name.startswith("tmp-")}
    assert main([str(w) for w in [*words, out]]) == 0
    assert everything(out) == everything(tmp_path / "whole") and not packing.exists()
    journalled = [name for name, when in kept.items() if (out / name).stat().st_mtime_ns == when]
    assert len(journalled) >= 2, "finished shards are not done again"


@pytest.mark.parametrize("point", ["commit_json", "draw_summary", "write_manifest", "Manifest"])
def test_an_interrupted_packing_leaves_nothing_that_passes_for_whole(tmp_path, monkeypatch, capsys, point):
    root = folder_of_images(tmp_path / "images")
    words = ["imagefolder", str(root), "--output", str(tmp_path / "shards"), "--shard_size", "20kB", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(f"condot.data.prepare.pack.{point}", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        message = refused(capsys, *words)
    assert "No space left" in message and "run the same command again" in message and not (tmp_path / "shards/manifest.json").exists()
    with pytest.raises(ValueError, match=r"no manifest.json, so packing never finished"):
        Shards(tmp_path / "shards")
    assert main(words) == 0 and len(contents(tmp_path / "shards")) == 10
    assert not (tmp_path / "shards" / ".packing").exists()


def test_ctrl_c_is_one_line_and_resumable(tmp_path):
    root = folder_of_images(tmp_path / "images", count=300, size=(60, 60))
    words = ["imagefolder", root, "--shard_size", "200kB", "--workers", "2", "--output", tmp_path / "out"]
    process = run(*words, text=True)
    while not list((tmp_path / "out" / ".packing").glob("train*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1].split("\r")[-1]
    assert process.returncode == 130 and "Traceback" not in error and "interrupted: finished shards are kept" in error


def test_packing_twice_is_packing_once_and_another_packing_is_refused(tmp_path, capsys):
    root = folder_of_images(tmp_path / "images")
    words = ["imagefolder", str(root), "--output", str(tmp_path / "shards")]
    assert main(words) == 0
    before = everything(tmp_path / "shards")
    assert main(words) == 0 and everything(tmp_path / "shards") == before
    assert "other images or settings: choose another --output" in refused(capsys, *words, "--seed", "1")
    assert everything(tmp_path / "shards") == before
    shutil.copytree(tmp_path / "shards", tmp_path / "foreign", ignore=shutil.ignore_patterns("manifest.json"))
    assert "holds train-000000.tar and no manifest" in refused(capsys, *words[:-1], tmp_path / "foreign")


def test_images_that_cannot_be_read_are_listed_and_good_work_is_kept(tmp_path, capsys):
    root = folder_of_images(tmp_path / "images", count=40)
    (root / "dog" / "broken.jpg").write_bytes(b"no image at all")
    (root / "dog" / "cut.png").write_bytes((root / "dog" / "image 1.png").read_bytes()[:48])
    words = ["imagefolder", str(root), "--output", str(tmp_path / "shards"), "--shard_size", "40kB", "--workers", "1"]
    message = refused(capsys, *words)
    assert "2 of 82 images cannot be read" in message and "dog/broken.jpg (cannot identify image file)" in message
    assert "dog/cut.png" in message and "--skip_corrupt" in message
    done = {path.name: path.stat().st_ino for path in (tmp_path / "shards" / ".packing").glob("*.tar")}
    assert main([*words, "--skip_corrupt"]) == 0
    assert "left out: dog/broken.jpg" in capsys.readouterr().out
    assert {path.name: path.stat().st_ino for path in (tmp_path / "shards").glob("*.tar")} == done and len(done) > 5
    assert (
        len(contents(tmp_path / "shards")) == 80 and json.loads((tmp_path / "shards/report.json").read_text())["unreadable"]["count"] == 2
    )
    assert "2 of 82 images cannot be read" in refused(capsys, *words), "finished, but not what is asked for"
    only = tmp_path / "only"
    only.mkdir()
    (only / "broken.jpg").write_bytes(b"x")
    assert "1 of 1 images" in refused(capsys, "imagefolder", only, "--output", tmp_path / "none", "--skip_corrupt")


def test_half_packed_shards_of_another_request_are_refused(tmp_path, capsys, monkeypatch):
    root = folder_of_images(tmp_path / "images")
    words = ["imagefolder", str(root), "--output", str(tmp_path / "shards"), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("condot.data.prepare.pack.draw_summary", lambda *a: (_ for _ in ()).throw(OSError("stopped here")))
        assert "stopped here" in refused(capsys, *words)
    assert "holds half-packed shards of other images or settings" in refused(capsys, *words, "--seed", "1")
    assert main(words) == 0


def test_progress_of_all_processes_adds_up(digits):
    """Each sample is counted once, however often the counter is looked at."""
    shards, told = Shards(digits), []
    jobs = [ShardCheck(digits / shard.name, shard, np.arange(shard.samples), 10, True) for shard in shards.shards]
    assert all(bad == [] for bad in run_jobs(check_shard, jobs, 2, told.append)) and sum(told) == 1438


def test_a_second_process_is_refused(tmp_path, capsys):
    import fcntl

    root = folder_of_images(tmp_path / "images")
    (tmp_path / "shards" / ".packing").mkdir(parents=True)
    with open(tmp_path / "shards" / ".packing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is packing there" in refused(capsys, "imagefolder", root, "--output", tmp_path / "shards")


# --- folders and tables


@pytest.mark.parametrize(("text", "value"), [("256MB", 256_000_000), ("1GB", 10**9), ("1.5kB", 1500), ("77", 77), ("2k", 2000)])
def test_sizes(text, value):
    assert parse_size(text, "--shard_size") == value


def table_of(root, rows, name="metadata.csv"):
    """A flat folder of ten images and a table."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(10):
        (root / f"{i}.png").write_bytes(picture(i))
    if name.endswith(".csv"):
        with open(root / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".jsonl"):
        (root / name).write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), root / name)
    return root


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_metadata_table_means_what_it_means_to_datasets(tmp_path, name):
    """Hugging Face's own ImageFolder reads the same captions and fields for the same files."""
    rows = [{"file_name": f"{i}.png", "text": f'a "quoted", {i}', "source_id": i * 7} for i in range(10)]
    root = table_of(tmp_path / "images" / "train", rows, name).parent
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "out")]) == 0
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    wanted = {os.path.basename(row["image"]["path"]): (row["text"], int(row["source_id"])) for row in theirs}
    found = contents(tmp_path / "out")
    assert {n.split("/")[1]: (f["txt"].decode(), int(json.loads(f["json"])["source_id"])) for n, f in found.items()} == wanted
    assert len(wanted) == 10 and Shards(tmp_path / "out").manifest.class_names == ()


def test_tables_give_classes_captions_and_say_what_is_missing(tmp_path, capsys):
    rows = [{"image": f"{i}.png", "caption": f"number {i}" if i else "", "label": ["b", "a"][i % 2], "note": i} for i in range(8)]
    root = table_of(tmp_path / "images", rows, "captions.jsonl")
    (root / "notes.docx").write_text("x")
    for source, out in ((root, "one"), (root / "captions.jsonl", "two")):
        assert main(["imagefolder", str(source), "--output", str(tmp_path / out)]) == 0
    printed = capsys.readouterr().out
    assert "not packed: 1 files .docx" in printed and "images that no table names: 2" in printed and "missing from 3" in printed
    found = contents(tmp_path / "one")
    assert found["3.png"]["cls"] == b"0" and found["2.png"]["cls"] == b"1" and "cls" not in found["9.png"]
    assert json.loads(found["3.png"]["json"]) == {"source": "3.png", "note": 3}
    assert Shards(tmp_path / "one").manifest.class_names == ("a", "b") and len(found) == 10
    assert contents(tmp_path / "two") == {name: files for name, files in found.items() if name not in ("8.png", "9.png")}
    assert "images that no table names: 2, packed without caption or class" in printed and "table names: 2, not packed" in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "0.png"}, {"file_name": "gone.png"}], "1 rows of metadata.csv name no image that is there"),
        ([{"file_name": "0.png", "text": "x"}, {"file_name": "", "text": "y"}], "1 rows name no image: metadata.csv:3"),
        ([{"file_name": "0.png"}, {"file_name": "0.png"}], "1 images are listed twice: 0.png"),
        ([{"file_name": "../0.png"}], "'../0.png' leads out of its folder"),
        ([{"file_name": "/etc/passwd"}], "leads out of its folder"),
        ([{"name": "0.png"}], "no column names the image: call one `file_name`"),
    ],
)
def test_tables_that_contradict_themselves(tmp_path, capsys, rows, message):
    root = table_of(tmp_path / "images", rows)
    assert message in refused(capsys, "imagefolder", root, "--output", tmp_path / "out") and not (tmp_path / "out").exists()


def test_sources_that_cannot_be_packed(tmp_path, capsys):
    out = ("--output", tmp_path / "shards")
    assert "is no folder" in refused(capsys, "imagefolder", tmp_path / "missing", *out)
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(capsys, "imagefolder", tmp_path / "empty", *out)
    (tmp_path / "empty" / "a.heic").write_bytes(b"x")
    assert "found 1 .heic (a.heic)" in refused(capsys, "imagefolder", tmp_path / "empty", *out)
    (tmp_path / "empty" / "a.txt").write_text("x")
    assert "captions without images (1 .txt files)" in refused(capsys, "imagefolder", tmp_path / "empty", *out)
    root = folder_of_images(tmp_path / "images")
    assert "is no size" in refused(capsys, "imagefolder", root, *out, "--shard_size", "many")
    assert "at least 0 and below 1" in refused(capsys, "imagefolder", root, *out, "--holdout", "1")
    assert "leaves none to train on" in refused(capsys, "imagefolder", root, *out, "--holdout", "0.99")
    assert "--max_side 3" in refused(capsys, "imagefolder", root, *out, "--max_side", "3")
    (root / "cat" / "image 0.txt").write_text("x")
    (root / "cat" / "other.txt").write_text("x")
    assert "1 captions have no image: cat/other.txt" in refused(capsys, "imagefolder", root, *out)
    (root / "loose.png").write_bytes(picture(5))
    assert "beside the class folders" in refused(capsys, "imagefolder", root, *out, "--skip_corrupt")
    (tmp_path / "bad.csv").write_text("file_name,text\n0.png,a,b\n")
    (tmp_path / "0.png").write_bytes(picture(0))
    assert "has 3 values for 2 columns" in refused(capsys, "imagefolder", tmp_path / "bad.csv", *out)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_folders_named_like_splits_are_splits(tmp_path):
    for split in ("train", "validation"):
        folder_of_images(tmp_path / "images" / split)
    assert main(["imagefolder", str(tmp_path / "images"), "--output", str(tmp_path / "out")]) == 0
    manifest = Shards(tmp_path / "out").manifest
    assert manifest.class_names == ("cat", "dog") and {s.split: s.samples for s in manifest.shards} == {"train": 10, "val": 10}


# --- parquet and the Hub


def images_of(count, seed=0):
    return [picture(seed + i) for i in range(count)]


def written_by_datasets(path, count=90, labels=True):
    """A parquet file as `datasets` writes it, sorted by class; returns what is in it."""
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "extra": datasets.Value("int64")}
    columns = {"image": [{"bytes": body, "path": None} for body in images_of(count)], "text": [f"c {i}" for i in range(count)]}
    columns["extra"] = list(range(count))
    if labels:
        features["label"] = datasets.ClassLabel(names=["x", "y", "z"])
        columns["label"] = [i * 3 // count for i in range(count)]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path), batch_size=10)
    return columns


def test_parquet_of_datasets_comes_back(tmp_path):
    wanted = written_by_datasets(tmp_path / "set" / "train-00000-of-00001.parquet")
    assert pq.ParquetFile(tmp_path / "set" / "train-00000-of-00001.parquet").num_row_groups == 9
    words = ["--shard_size", "60kB", "--holdout", "0.2", "--output"]
    for source, out, workers in (
        (tmp_path / "set", "a", "1"),
        (f"file://{tmp_path}/set/*.parquet", "b", "2"),
        (tmp_path / "set" / "train-00000-of-00001.parquet", "c", "1"),
    ):
        assert main(["parquet", str(source), *words, str(tmp_path / out), "--workers", workers]) == 0
    assert everything(tmp_path / "a") == everything(tmp_path / "b") == everything(tmp_path / "c")
    train, val = contents(tmp_path / "a"), contents(tmp_path / "a", "val")
    assert len(val) == 18 and len({files["cls"] for files in val.values()}) == 3, "held-out rows come from many row groups"
    seen = {}
    for files in [*train.values(), *val.values()]:
        i = json.loads(files["json"])["extra"]
        assert (files["png"], files["txt"].decode(), int(files["cls"])) == (wanted["image"][i]["bytes"], f"c {i}", wanted["label"][i])
        seen[i] = True
    assert len(seen) == 90 and Shards(tmp_path / "a").manifest.class_names == ("x", "y", "z")
    first = contents_of_first_shard(tmp_path / "a")
    assert len({i // 10 for i in first}) > 1 and first != sorted(first), "a shard mixes row groups"


def contents_of_first_shard(folder):
    with tarfile.open(folder / "train-000000.tar") as tar:
        return [json.loads(tar.extractfile(m).read())["extra"] for m in tar if m.name.endswith(".json")]


def test_plain_parquet_with_named_columns_and_faults(tmp_path, capsys):
    bodies = [*images_of(6, 50), b"broken", None]
    table = pa.table({"pixels": bodies, "thumb": bodies, "kind": ["b", "a"] * 4, "words": [[f"one {i}", "two"] for i in range(8)]})
    pq.write_table(table, tmp_path / "plain.parquet", row_group_size=3)
    words = ["parquet", str(tmp_path / "plain.parquet"), "--output", str(tmp_path / "out")]
    assert "There are 2 columns that could be: pixels, thumb" in refused(capsys, *words)
    assert "has no such column" in refused(capsys, *words, "--image_column", "nothing")
    assert "holds string, not files" in refused(capsys, *words, "--image_column", "kind")
    words += ["--image_column", "pixels", "--label_column", "kind", "--caption_column", "words"]
    message = refused(capsys, *words)
    assert "2 of 8 images" in message and "plain.parquet:2:1 (its row has no image)" in message and "plain.parquet:2:0" in message
    assert main([*words, "--skip_corrupt"]) == 0
    found = contents(tmp_path / "out")
    assert {f["txt"].decode(): int(f["cls"]) for f in found.values()} == {f"one {i}": 1 - i % 2 for i in range(6)}
    assert sorted(json.loads(f["json"])["words"][0] for f in found.values()) == [f"one {i}" for i in range(6)]
    assert "names no .parquet file" in refused(capsys, "parquet", tmp_path / "*.pq", "--output", tmp_path / "no")
    assert "cannot be read as parquet" in refused(capsys, "parquet", tmp_path / "absent.parquet", "--output", tmp_path / "no")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read as parquet" in refused(capsys, "parquet", tmp_path / "bad.parquet", "--output", tmp_path / "no")


def test_rows_keep_their_numbers(tmp_path):
    """What duplicates are called by number is what the samples are called that were read."""
    bodies = images_of(40, 300)
    bodies[31], bodies[22] = bodies[4], bodies[17]
    pq.write_table(pa.table({"image": bodies, "n": list(range(40))}), tmp_path / "p.parquet", row_group_size=7)
    assert (
        main(["parquet", str(tmp_path / "p.parquet"), "--output", str(tmp_path / "out"), "--shard_size", "15kB", "--drop_duplicates"]) == 0
    )
    found = contents(tmp_path / "out")
    assert {json.loads(f["json"])["n"] for f in found.values()} == set(range(40)) - {22, 31}
    assert all(name == f"p.parquet:{n // 7}:{n % 7}" for name, f in found.items() for n in [json.loads(f["json"])["n"]])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["duplicates"]["list"] == [["p.parquet:2:3", "p.parquet:3:1"], ["p.parquet:0:4", "p.parquet:4:3"]]


def test_a_large_row_group_is_cut_into_several_shards(tmp_path):
    written_by_datasets(tmp_path / "one.parquet", count=60)
    pq.write_table(pq.read_table(tmp_path / "one.parquet"), tmp_path / "big.parquet", row_group_size=60)
    shards = plan_shards(parquet(str(tmp_path / "big.parquet"), ColumnChoice()), Packing(50_000))
    assert len(shards) > 3 and sorted(np.concatenate([s.numbers for s in shards]).tolist()) == list(range(60))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch, capsys):
    """A local folder that `load_dataset` opens, with splits and ClassLabel names."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    wanted = written_by_datasets(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", 30)
    written_by_datasets(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", 12)
    for out, workers in (("a", "1"), ("b", "2")):
        assert main(["hub", str(tmp_path / "set"), "--output", str(tmp_path / out), "--shard_size", "30kB", "--workers", workers]) == 0
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    train = contents(tmp_path / "a")
    assert {json.loads(f["json"])["extra"]: f["png"] for f in train.values()} == {i: wanted["image"][i]["bytes"] for i in range(30)}
    assert len(contents(tmp_path / "a", "test")) == 12 and Shards(tmp_path / "a").manifest.class_names == ("x", "y", "z")
    assert "--splits 'dev'" in refused(capsys, "hub", tmp_path / "set", "--splits", "dev", "--output", tmp_path / "c")
    assert "cannot be loaded by `datasets`" in refused(capsys, "hub", tmp_path / "absent", "--output", tmp_path / "c")
    assert not {"torchvision", "torchaudio"} & set(sys.modules)


def test_what_a_killed_packing_left_is_swept(tmp_path):
    """Temporary names of each file of a finished folder; what is called otherwise is somebody's."""
    folder = tmp_path / "in"
    for kind in "ab":
        (folder / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, ord(kind), 9)).save(folder / kind / "1.png")
    left = [".123-summary.png", "tmp-5-report.json", ".manifest.json.77", ".packed/tmp-9.npz", f".8-{'0a' * 8}.npy"]
    kept = [".mine-summary.png", "notes.txt", ".packed/notes"]
    (tmp_path / "out" / ".packed").mkdir(parents=True)
    for name in (*left, *kept):
        (tmp_path / "out" / name).write_text("x")
    assert main(["imagefolder", str(folder), "--output", str(tmp_path / "out"), "--workers", "0"]) == 0
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert there.isdisjoint(left) and there.issuperset(kept)
