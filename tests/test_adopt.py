"""Shards from elsewhere: indexed in place, linked, decompressed; never unpacked, never half."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from test_prepare import contents, everything, picture, refused

from condot.data.format.index import index_path
from condot.data.format.tar_reader import members
from condot.data.prepare.command import main
from condot.data.prepare.tar_command import class_names
from condot.data.prepare.tar_sources import find_tars
from condot.data.storage.shard_reader import Shards


def shards_of(folder, names=("train-0.tar", "val-0.tar"), count=6, **more):
    """Tars by webdataset's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, name in enumerate(names):
        with webdataset.TarWriter(str(folder / name)) as sink:
            for i in range(count):
                sink.write({"__key__": f"{i:04d}", "png": picture(10 * t + i), "cls": i % 3, "json": {"source": f"{t}/{i}"}, **more})
    return folder


def test_tars_are_indexed_where_they_lie(tmp_path):
    folder = shards_of(tmp_path / "tars")
    before = everything(folder)
    assert main(["webdataset", str(folder)]) == 0
    after = everything(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"train-0.npy", "val-0.npy", "manifest.json", "report.json", "summary.png"}
    shards = Shards(folder, "val")
    assert [shards.read(0, i).label for i in range(6)] == [0, 1, 2, 0, 1, 2] and shards.manifest.class_names == ("0", "1", "2")
    assert [shards.read(0, i).files["png"] for i in range(6)] == [picture(10 + i) for i in range(6)]
    assert main(["webdataset", str(folder)]) == 0 and everything(folder) == after


def test_webdatasets_tars_are_walked_as_tarfile_walks_them(tmp_path):
    """Long names, keys in folders, empty files."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(4):
            sink.write({"__key__": f"{'long/' * 30}{i:03d}", "png": picture(i), "cls": i, "txt": "ü" * i})
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in members(tmp_path / "a.tar")] == theirs and len(theirs) == 12


def test_tars_are_linked_or_decompressed_elsewhere(tmp_path, capsys):
    folder = shards_of(tmp_path / "tars", ("a.tar", "b.tar"))
    packed = gzip.compress((folder / "b.tar").read_bytes())
    (folder / "b.tar.gz").write_bytes(packed)
    (folder / "b.tar").unlink()
    assert "b.tar.gz cannot be read from the middle" in refused(capsys, "webdataset", folder)
    out = tmp_path / "out"
    words = ["webdataset", f"{folder}/{{a.tar,b.tar.gz}}", "--split", "test", "--output", str(out)]
    assert main(words) == 0 and (out / "a.tar").is_symlink() and (out / "b.tar").read_bytes() == gzip.decompress(packed)
    assert sum(Shards(out, "test").counts) == 12 and not (out / ".packing").exists()
    assert len(contents(out, "test")) == 12


def test_a_gzip_that_is_none_is_cut_or_explodes(tmp_path, capsys):
    tmp_path.joinpath("in").mkdir()
    for body, message in (
        (b"no gzip", "cannot be decompressed"),
        (gzip.compress(bytes(10_000_000)), "more than 200 times its size"),
        (gzip.compress(np.random.default_rng(0).bytes(5000)), "damaged tar header at byte 0"),
        (gzip.compress(np.random.default_rng(0).bytes(50000))[:-5000], "cannot be decompressed"),
    ):
        (tmp_path / "in" / "x.tar.gz").write_bytes(body)
        message_seen = refused(capsys, "webdataset", tmp_path / "in", "--output", tmp_path / "out")
        assert message in message_seen and "1 of 1 tars are damaged" in message_seen
        assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out" / "manifest.json").exists()
        shutil.rmtree(tmp_path / "out")


def test_samples_that_cannot_be_indexed_are_listed(tmp_path, capsys):
    folder = shards_of(tmp_path / "tars", ("a.tar",))
    with webdataset.TarWriter(str(folder / "b.tar")) as sink:
        sink.write({"__key__": "good", "png": picture(1)})
        sink.write({"__key__": "words", "txt": "only"})
        sink.write({"__key__": "header", "png": b"not a picture"})
        sink.write({"__key__": "class", "png": picture(2), "cls": b"-4"})
        sink.write({"__key__": "cut", "png": picture(3)[:-40]})
    message = refused(capsys, "webdataset", folder)
    assert all(f"b.tar: {key}" in message for key in ("words", "header", "class")) and "3 of 11 images" in message
    message = refused(capsys, "webdataset", folder, "--verify", "--output", tmp_path / "verified")
    assert "4 of 11 images" in message and "b.tar: cut" in message
    assert main(["webdataset", str(folder), "--skip_corrupt"]) == 0
    assert "left out: b.tar: words (no image" in capsys.readouterr().out
    assert sum(Shards(folder).counts) == 8 and json.loads((folder / "report.json").read_text())["unreadable"]["count"] == 3


def test_damaged_tars_stop_even_when_samples_may_be_left_out(tmp_path, capsys):
    folder = shards_of(tmp_path / "tars", ("a.tar", "b.tar", "c.tar"))
    body = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(body[: len(body) // 2])
    (folder / "c.tar").write_bytes(body[:1024] + b"\7" * 512 + body[1536:])
    message = refused(capsys, "webdataset", folder, "--skip_corrupt", "--output", tmp_path / "out")
    assert "2 of 3 tars are damaged" in message and "b.tar: cut" in message and "damaged tar header" in message
    with tarfile.open(folder / "d.tar", "w") as tar:
        info = tarfile.TarInfo("../../outside.png")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"body"))
    assert "leads out of its folder" in refused(capsys, "webdataset", folder / "d.tar", "--output", tmp_path / "out2", "--skip_corrupt")
    assert not (tmp_path / "outside.png").exists()


def test_class_names_must_be_those_of_the_shards(tmp_path, capsys):
    folder = shards_of(tmp_path / "tars")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert "has class 2, but --class_names names 2" in refused(capsys, "webdataset", folder, "--class_names", tmp_path / "names.txt")
    (tmp_path / "gap.json").write_text('{"0": "ant", "2": "cat"}')
    assert "number 1 has no name" in refused(capsys, "webdataset", folder, "--class_names", tmp_path / "gap.json")
    shutil.rmtree(folder / ".packing")
    for name, text in (
        ("a.json", '["ant", "bee", "cat"]'),
        ("b.json", '{"1": "bee", "0": "ant", "2": "cat"}'),
        ("c.txt", "ant\nbee\ncat\n\n"),
    ):
        (tmp_path / name).write_text(text)
        assert class_names(tmp_path / name) == ("ant", "bee", "cat")
    assert main(["webdataset", str(folder), "--class_names", str(tmp_path / "a.json")]) == 0
    assert Shards(folder).manifest.class_names == ("ant", "bee", "cat")


def test_sources_of_tars_that_are_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no .tar" in refused(capsys, "webdataset", tmp_path / "empty")
    assert "2 of 2 tars are not there" in refused(capsys, "webdataset", tmp_path / "x-{0..1}.tar")
    one, two = shards_of(tmp_path / "one", ("a.tar",)), shards_of(tmp_path / "two", ("a.tar",))
    (one / "a.tar.gz").write_bytes(gzip.compress((one / "a.tar").read_bytes()))
    assert "two tars would both be" in refused(capsys, "webdataset", f"{one}/a.tar*", "--output", tmp_path / "out")
    assert "has tars in 2 folders" in refused(capsys, "webdataset", f"{two.parent}/{{one,two}}/*.tar")
    one.chmod(0o555)
    assert "cannot be written" in refused(capsys, "webdataset", one)
    assert [path.name for path in find_tars(f"{one.parent}/*/a.tar")] == ["a.tar", "a.tar"]


def test_cifar_is_decompressed_to_what_its_readme_says(shared_data, tmp_path):
    source = shared_data / "cifar10"
    assert main(["webdataset", f"{source}/cifar10-{{train-000003,test-000001}}.tar.gz", "--output", str(tmp_path / "out")]) == 0
    shards, test = Shards(tmp_path / "out"), Shards(tmp_path / "out", "test")
    assert shards.counts == test.counts == [2500] and shards.manifest.tally.sizes == {"32x32": 5000}
    with gzip.open(source / "cifar10-train-000003.tar.gz") as packed:
        assert hashlib.sha256(packed.read()).hexdigest() == shards.shards[0].sha256
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert all(shards.read(0, i).files["txt"].decode().endswith(names[shards.read(0, i).label]) for i in range(0, 2500, 100))


@pytest.mark.filterwarnings("ignore")
def test_of_the_odd_files_those_are_left_that_a_viewer_shows(shared_data, tmp_path):
    """80 of 99 open in Pillow; 2 of those are refused for their aspect ratio. Sizes in the index are those of the manifest, upright."""
    facts = {f["file"]: f["pillow"] for f in json.loads((shared_data / "odd" / "manifest.json").read_text())["files"]}
    assert main(["webdataset", str(shared_data / "odd"), "--output", str(tmp_path / "out"), "--skip_corrupt", "--verify"]) == 0
    shards = Shards(tmp_path / "out")
    assert shards.counts == [78] and json.loads((tmp_path / "out/report.json").read_text())["unreadable"]["count"] == 21
    for i in range(78):
        fact = facts[json.loads(shards.read(0, i).files["json"])["file"]]
        assert fact["to_rgb"] and [*shards.records(0)[i][["width", "height"]].item()] == fact["upright_size"]


def test_real_photos_keep_their_splits_and_captions(shared_data, tmp_path, capsys):
    assert main(["webdataset", str(shared_data / "photos"), "--output", str(tmp_path / "out")]) == 0
    train, val = Shards(tmp_path / "out"), Shards(tmp_path / "out", "val")
    assert sum(train.counts) == 840 and sum(val.counts) == 120 and train.manifest.tally.captions == 960
    assert len(train.manifest.class_names) == 17 and "840 images in 4 shards" in capsys.readouterr().out
    assert index_path(tmp_path / "out" / "clothing-val-000000.tar").exists()
    assert Image.open(tmp_path / "out" / "summary.png").width > 1000
