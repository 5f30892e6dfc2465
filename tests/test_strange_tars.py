"""Tars as strangers make them: on a Mac, with masks, with texts of any encoding, in folders by split: right, or refused with a remedy."""

import hashlib
import json
import os
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from test_prepare import picture, refused
from test_tar import add, tar_of

from condot.data.format.index import NO_LABEL, index_shard
from condot.data.format.index_record import index_path, index_payload
from condot.data.format.manifest import Manifest, parse_manifest
from condot.data.format.sample_files import parse_image_extension, parse_label
from condot.data.format.tar_headers import BLOCK
from condot.data.format.tar_reader import samples
from condot.data.images.decode import decode_image
from condot.data.prepare.command import main
from condot.data.prepare.report import read_sample
from condot.data.prepare.verify import ShardCheck, check_shard
from condot.data.storage.local import LocalFolder
from condot.data.storage.shard_reader import Shards


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def prepared(capsys, *words):
    """What the command prints when it succeeds."""
    assert main(["webdataset", *map(str, words)]) == 0
    return capsys.readouterr().out


def webdatasets(tar):
    return [(s["__key__"], {k: v for k, v in s.items() if k[:2] != "__"}) for s in webdataset.WebDataset(str(tar), shardshuffle=False)]


def ours(folder, split="train"):
    shards = Shards(folder, split)
    return [shards.read(s, i) for s, count in enumerate(shards.counts) for i in range(count)]


# --- names


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_prompts_as_names_keep_every_file(tmp_path, capsys, form):
    """`tar --sort=name -cf` of files named by their prompts, beyond 100 bytes and ASCII: each with its caption, as in webdataset."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, stem in enumerate([f"{'a very long prompt ' * 6}", "späte Ernte, 日本", f"{'日本語の長い名前' * 9}", "short"]):
        (folder / f"{stem} {i}.jpg").write_bytes(picture(i, kind="JPEG"))
        (folder / f"{stem} {i}.cls").write_text(str(i))
        (folder / f"{stem} {i}.txt").write_text(f"caption {i}")
    (tmp_path / "tars").mkdir()
    tar = tmp_path / "tars" / "a.tar"
    subprocess.run(["tar", "--sort=name", f"--format={form}", "-C", folder, "-cf", tar, "."], check=True)
    assert "captions: 4\n" in prepared(capsys, tar.parent)
    found = ours(tar.parent)
    assert [(s.key, s.files) for s in found] == webdatasets(tar) and len(found) == 4
    for sample in found:
        i = sample.label
        assert sample.key.endswith(f" {i}") and sample.files["txt"] == b"caption %d" % i and sample.image == picture(i, kind="JPEG")


def test_an_index_of_before_still_gives_its_samples(tmp_path):
    """It began each sample behind the long name of its first file: image and class are read as they were, bit for bit."""
    tar = tar_of(
        tmp_path / "a.tar", *[(f"{'n' * 150}{i}.{e}", body) for i in range(3) for e, body in (("png", picture(i)), ("cls", b"%d" % i))]
    )
    main(["webdataset", str(tmp_path)])
    records, whole = np.load(index_path(tar)), tar.read_bytes()
    for record, span in zip(records, samples(tar), strict=True):
        own = span.files["png"].offset - BLOCK
        assert record["before"] == 3 == (span.files["png"].offset - span.start) // BLOCK
        old = index_payload(whole[own : span.end], own + BLOCK, int(record["bytes"]), own)
        for name, value in zip(("payload", "bytes", "crc32", "before", "after", "rest"), old, strict=True):
            record[name] = value
    assert records["before"].tolist() == [1, 1, 1]
    before = hashlib.sha256(index_path(tar).read_bytes()).hexdigest()
    np.save(index_path(tar), records)
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace(before, hashlib.sha256(index_path(tar).read_bytes()).hexdigest()))
    shards = Shards(tmp_path)
    assert [(shards.read(0, i).image, shards.read(0, i).label) for i in range(3)] == [(picture(i), i) for i in range(3)]
    assert shards.key(0, 0) and read_sample(tar, records[1])[2] == picture(1)


def test_names_cannot_write_to_the_screen(tmp_path, capsys):
    tar_of(tmp_path / "a.tar", ("\x1b[2J\x1b[31m.png", b"no picture"), ("b\u202egnp.png", b"none"), ("ok.png", picture(1)))
    message = refused(capsys, "webdataset", tmp_path)
    assert r"\x1b[2J\x1b[31m (" in message and r"b\u202egnp (" in message and "\x1b" not in message and "\u202e" not in message
    said = prepared(capsys, tmp_path, "--skip_corrupt")
    assert "left out: a.tar: \\x1b[2J" in said and "\x1b" not in said + (tmp_path / "report.json").read_text()


# --- what is no sample


def mac_tar(path, more=()):
    """As bsdtar of macOS packs, with Finder's files."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "dataset_info.json", b"{}")
        for i in range(3):
            for extension, body in (("jpg", picture(i, kind="JPEG")), ("json", b'{"n": %d}' % i), ("txt", b"caption %d" % i)):
                add(tar, f"images/._{i}.{extension}", b"\0\5\x16\7" * 30, mtime=1.5)
                add(tar, f"images/{i}.{extension}", body, mtime=1.5)
        for name in ("images/.DS_Store", "__MACOSX/images/._0.jpg", "README", "__meta__", "LICENSE.txt", "README.md", *more):
            add(tar, name, b"x")
    return path


def test_a_mac_leaves_no_trace(tmp_path, capsys):
    tar = mac_tar(tmp_path / "a.tar")
    said = prepared(capsys, tmp_path)
    found = ours(tmp_path)
    kept = [
        (f"images/{i}", {"jpg": picture(i, kind="JPEG"), "json": b'{"n": %d}' % i, "txt": b"caption %d" % i}) for i in range(3)
    ]  # webdataset takes `images/._0.jpg` for a file of the sample `images/`, which tears the others apart
    assert [(s.key, s.files) for s in found] == kept
    assert "captions: 3\n" in said and report_of(tmp_path)["unreadable"]["count"] == 0
    assert report_of(tmp_path)["unknown_files"] == {
        "that are hidden (._*, .DS_Store, __MACOSX)": 11,
        "without extension": 1,
        "named __*__": 1,
        **{f".{e} without an image": 1 for e in ("json", "txt", "md")},
    }
    assert "not packed: 11 files that are hidden" in said
    shards = Shards(tmp_path)
    line = shards.manifest.shards[0]
    assert check_shard(ShardCheck(tar, line, np.arange(3), 0, True), lambda n: None) == []
    assert [read_sample(tar, r)[:2] for r in shards.records(0)] == kept


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("b.txt", b"x")], "b (no image: one of png, .* is needed beside .txt; the files of a sample follow one another"),
        ([("b.cls", b"1")], "b (no image"),
        ([("b.caption", b"1")], "b (no image"),
        ([("b.heic", b"1"), ("b.txt", b"x")], "b (no image that is read: .heic. Convert it"),
        ([("b.SVG", b"1")], "b (no image that is read: .svg. Convert it"),
        (
            [("b.seg.png", picture(1))],
            "b (no image but .seg.png, .*: name it with --image_extension seg.png",
        ),
        ([("b.json", b"{}")], "b (no image: one of"),
    ],
)
def test_a_sample_that_lost_its_image_is_a_fault(tmp_path, capsys, files, message):
    tar_of(tmp_path / "a.tar", ("a.jpg", picture(1)), ("a.json", b"{}"), *files)
    said = refused(capsys, "webdataset", tmp_path)
    first, _, rest = message.partition(".*")
    assert f"1 of 2 images cannot be read: a.tar: {first}" in said and rest in said
    assert main(["webdataset", str(tmp_path), "--skip_corrupt"]) == 0 and len(ours(tmp_path)) == 1


def test_other_kinds_alone_are_counted(tmp_path, capsys):
    """Where no image has a file of that kind beside it; as many kinds as a stranger likes are a few lines."""
    files = [("stats.json", b"{}"), ("table.csv", b"a"), ("model.safetensors", b"x"), *((f"x.{i:05d}e", b"") for i in range(100))]
    tar_of(tmp_path / "a.tar", ("a.jpg", picture(1)), *files)
    said = prepared(capsys, tmp_path)
    unknown = report_of(tmp_path)["unknown_files"]
    assert sum(unknown.values()) == 103 and len(unknown) <= 21 and said.count("not packed") == len(unknown)


def test_tars_without_an_image_are_refused(tmp_path, capsys):
    tar_of(tmp_path / "a.tar", *((f"{i}.pt", b"x") for i in range(4)), ("README", b"x"))
    assert "a.tar: no image. Looked for files of .png, " in refused(capsys, "webdataset", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_links_are_told(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", picture(1))
        add(tar, "b.png", type=tarfile.LNKTYPE, linkname="a.png")
        add(tar, "c.png", picture(2))
        add(tar, "c.txt", type=tarfile.SYMTYPE, linkname="a.txt")
        add(tar, "latest", type=tarfile.SYMTYPE, linkname="a.png")
        add(tar, "notes.md", type=tarfile.SYMTYPE, linkname="a.png")
    said = refused(capsys, "webdataset", tmp_path)
    assert (
        "2 of 3 images" in said
        and "b (its .png is a link: pack with `tar --dereference --hard-dereference`)" in said
        and "c (its .txt" in said
    )
    assert "not packed: 2 files that are links" in prepared(capsys, tmp_path, "--skip_corrupt")


def test_joined_tars_are_packed_whole_and_told(tmp_path, capsys):
    parts = [tar_of(tmp_path / "x", (f"{i}.png", picture(i)), (f"{i}.txt", b"c")).read_bytes() for i in range(3)]
    (tmp_path / "x").unlink()
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    said = prepared(capsys, tmp_path)
    assert "3 images" in said and "tars joined end to end, all of them read: 2" in said
    assert [s.image for s in ours(tmp_path)] == [picture(i) for i in range(3)]


# --- several images


def mask(i):
    return picture(100 + i)


def masked(folder, *order):
    folder.mkdir()
    tar_of(
        folder / "a.tar",
        *[(f"{i}.{e}", picture(i, kind="JPEG") if e == "jpg" else mask(i) if "png" in e else b"c") for i in range(3) for e in order],
    )
    return folder


@pytest.mark.parametrize("order", [("jpg", "png", "txt"), ("png", "txt", "jpg")])
def test_of_two_images_the_one_that_is_named_is_trained_on(tmp_path, capsys, order):
    """By every reader; and the choice is part of what the shards are."""
    folder = masked(tmp_path / "tars", *order)
    said = refused(capsys, "webdataset", folder)
    assert "3 of 3 images" in said and all(word in said for word in ("2 images", ".jpg", ".png", "--image_extension"))
    prints = []
    for wanted, made in (("jpg", lambda i: picture(i, kind="JPEG")), (".PNG", mask)):
        out = tmp_path / wanted
        prepared(capsys, folder, "--output", out, "--image_extension", wanted)
        shards = Shards(out)
        for i, sample in enumerate(ours(out)):
            record = shards.records(0)[i]
            assert sample.image == made(i) == read_sample(out / "a.tar", record)[2] == shards.payload(0, *record.item()[:3])
            assert np.array_equal(shards.pixels(0, i, 3, 7)[0], decode_image(made(i), 3, 7))
        assert check_shard(ShardCheck(out / "a.tar", shards.manifest.shards[0], np.arange(3), 0, True), lambda n: None) == []
        assert shards.manifest.image_extension == parse_image_extension(wanted)
        prints.append(shards.fingerprint)
        parts = Shards([LocalFolder(out), LocalFolder(out)])
        assert parts.fingerprint == f"{prints[-1]}+{prints[-1]}"
    assert prints[0] != prints[1]


def test_another_image_beside_may_be_named(tmp_path, capsys):
    folder = masked(tmp_path / "tars", "jpg", "seg.png")
    prepared(capsys, folder, "--output", tmp_path / "plain")
    assert [s.image for s in ours(tmp_path / "plain")] == [picture(i, kind="JPEG") for i in range(3)]
    prepared(capsys, folder, "--output", tmp_path / "masks", "--image_extension", "seg.png")
    assert [s.image for s in ours(tmp_path / "masks")] == [mask(i) for i in range(3)]
    said = refused(capsys, "webdataset", folder, "--output", tmp_path / "none", "--image_extension", "webp")
    assert "3 of 3 images" in said and "no .webp, which --image_extension names, only .jpg, .seg.png" in said
    assert "no image that is read. Name one of png" in refused(capsys, "webdataset", folder, "--image_extension", "pt")


def test_a_manifest_says_which_image_only_where_it_was_asked():
    """So that others read as before, to the byte; and older ones have the fingerprint that they had."""
    plain = Manifest(shards=())
    assert plain.fingerprint == plain.shards.fingerprint != Manifest(shards=(), image_extension="png").fingerprint
    old = b'{"version": 2, "class_names": [], "tally": {}, "source": "", "encoding": {}, "shards": []}'
    assert parse_manifest(old, "x").image_extension == ""


def test_jpegs_of_every_name(tmp_path, capsys):
    files = [(f"{i}.{e}", picture(i, kind="JPEG")) for i, e in enumerate(("jpg", "jpeg", "JPG", "jfif", "jpe", "JPEG"))]
    tar_of(tmp_path / "a.tar", *files)
    prepared(capsys, tmp_path)
    assert [s.image for s in ours(tmp_path)] == [body for _, body in files]


def test_a_file_that_is_there_twice_spoils_its_sample_alone(tmp_path, capsys):
    tar_of(tmp_path / "a.tar", ("a.jpg", picture(1)), ("a.JPG", picture(2)), ("b.jpg", picture(3)))
    assert "1 of 2 images cannot be read: a.tar: a ('a.JPG' is there twice)" in refused(capsys, "webdataset", tmp_path)


def test_a_sample_too_large_to_be_read_at_once_is_a_fault(tmp_path):
    """A header of 3 GB over a hole in the file."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3 << 30
        tar.addfile(info)
    body = (tmp_path / "a.tar").read_bytes()[:BLOCK]
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(body)
        file.truncate(BLOCK + (3 << 30) + 2 * BLOCK)
    faults = []
    assert len(index_shard(tmp_path / "a.tar", faults=faults)[0]) == 0 and "a (its files take 3221225984 bytes" in faults[0]


# --- texts


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("txt", "café".encode("latin-1"), "its .txt: the text is no UTF-8 (byte 3): save it as UTF-8"),
        ("txt", "words".encode("utf-16-le"), "its .txt: the text has NUL characters"),
        ("json", b'{"a": 1', "its .json: the text is no JSON"),
        ("json", b"[" * 100_000, "its .json: the JSON is nested too deeply"),
        ("json", '{"a": "é"}'.encode("latin-1"), "its .json: the text is no UTF-8"),
        ("cls", b"cat", "its .cls: class 'cat' is no whole number. Write numbers from 0"),
        ("cls", b"3.5", "class '3.5' is no whole number"),
        ("cls", "٣".encode(), "is no whole number"),
        ("cls", b"1_0", "is no whole number"),
        ("cls", b"-2", "class -2 is not in 0 to 65534"),
        ("cls", b"9" * 5000, "is no whole number"),
    ],
)
def test_texts_that_cannot_be_read_are_faults(tmp_path, capsys, name, body, message):
    tar_of(tmp_path / "a.tar", ("a.png", picture(1)), ("b.png", picture(2)), (f"b.{name}", body))
    said = refused(capsys, "webdataset", tmp_path)
    assert "1 of 2 images cannot be read: a.tar: b (" in said and message in said


def test_classes_as_people_write_them():
    cases = {b"3": 3, b" 3\n": 3, b"\xef\xbb\xbf3": 3, b"3.0": 3, b"3.": 3, b"007": 7, "3".encode("utf-16"): 3, b"65534": 65534}
    cases |= {b"": NO_LABEL, b"\n": NO_LABEL, b"-1": NO_LABEL, b"-1.0\n": NO_LABEL}
    assert {body: parse_label(body) for body in cases} == cases


def test_blank_captions_are_none(tmp_path, capsys):
    texts = [b"one", b"", b" \n", b"\xef\xbb\xbf", "zwei ü".encode("utf-16"), "\ufeffthree".encode()]
    tar_of(tmp_path / "a.tar", *[f for i, body in enumerate(texts) for f in ((f"{i}.png", picture(i)), (f"{i}.txt", body))])
    assert "captions: 3, missing from 3" in prepared(capsys, tmp_path)
    assert report_of(tmp_path)["missing_captions"] == 3


# --- folders by split


def test_folders_say_the_split(tmp_path, capsys):
    for split in ("train", "val", "Test"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for n in range(2):
            tar_of(tmp_path / "in" / split / f"{n:04d}.tar", (f"{split}{n}.png", picture(n)))
    for source, out in ((tmp_path / "in", "a"), (f"{tmp_path}/in/{{train,val,Test}}/*.tar", "b"), (f"{tmp_path}/in/*/*.tar", "c")):
        prepared(capsys, source, "--output", tmp_path / out)
        assert {split: [s.key for s in ours(tmp_path / out, split)] for split in ("train", "val", "test")} == {
            "train": ["train0", "train1"],
            "val": ["val0", "val1"],
            "test": ["Test0", "Test1"],
        }
        names = sorted(path.name for path in (tmp_path / out).glob("*.tar"))
        assert names == [f"{split}-{n:04d}.tar" for split in ("Test", "train", "val") for n in range(2)]
    prepared(capsys, f"{tmp_path}/in/val/*.tar", "--output", tmp_path / "one")
    assert len(ours(tmp_path / "one", "val")) == 2


def test_the_nearest_word_says_the_split(tmp_path, capsys):
    """The name of a tar before that of its folder, as in every other source."""
    for name in ("test/train-0.tar", "train/val-1.tar", "val/2.tar"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        tar_of(tmp_path / "in" / name, ("a.png", picture(1)))
    prepared(capsys, tmp_path / "in", "--output", tmp_path / "out")
    assert [len(ours(tmp_path / "out", split)) for split in ("train", "val")] == [1, 2]
    prepared(capsys, tmp_path / "in", "--output", tmp_path / "all", "--split", "val")
    assert len(ours(tmp_path / "all", "val")) == 3


def test_pipes_among_tars_are_refused(tmp_path, capsys):
    tar_of(tmp_path / "a.tar", ("a.png", picture(1)))
    os.mkfifo(tmp_path / "b.tar")
    assert "b.tar (a FIFO): no files" in refused(capsys, "webdataset", tmp_path)
