"""The same command again: what a source holds now is what the shards hold, and only what changed is packed again."""

import gzip
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_adopt import shards_of
from test_prepare import contents, everything, folder_of_images, picture, refused

from condot.data.format.manifest import parse_manifest
from condot.data.prepare import source_changes
from condot.data.prepare.command import main
from condot.data.prepare.pack_state import FOLDER
from condot.data.prepare.shard_writer import write_shard
from condot.data.storage.shard_reader import Shards


def bmp(value, size=(6, 5)):
    """One file length for every value."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 7, 9)).save(buffer, "BMP")
    return buffer.getvalue()


def manifest_of(folder):
    return parse_manifest((folder / "manifest.json").read_bytes(), str(folder))


def captioned(root, count=12):
    root.mkdir(parents=True)
    for i in range(count):
        (root / f"{i:02d}.bmp").write_bytes(bmp(i))
        (root / f"{i:02d}.txt").write_text(f"caption {i:02d}")
    return root


@pytest.fixture
def filled(monkeypatch):
    """The shards that were written, by name, as they are."""
    names = []

    def noted(job, progress):
        names.append(job.name)
        return write_shard(job, progress)

    monkeypatch.setattr("condot.data.prepare.pack.write_shard", noted)
    return names


@pytest.fixture
def read(monkeypatch):
    """How many samples of each shard were read to be compared."""
    seen, real = {}, source_changes.read_inputs

    def noted(job, progress):
        seen[job.name] = job.count
        return real(job, progress)

    monkeypatch.setattr("condot.data.prepare.source_changes.read_inputs", noted)
    return seen


def edit_caption(root):
    (root / "03.txt").write_text("CAPTION 03")


def edit_image(root):
    (root / "04.bmp").write_bytes(bmp(200))


def rename_over(root):
    """As editors save: another file takes the name, with the times of the old one."""
    old = os.stat(root / "05.bmp")
    (root / "new").write_bytes(bmp(201))
    os.utime(root / "new", ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(root / "new", root / "05.bmp")


def swap(root):
    for ending in ("bmp", "txt"):
        os.rename(root / f"01.{ending}", root / "x")
        os.rename(root / f"02.{ending}", root / f"01.{ending}")
        os.rename(root / "x", root / f"02.{ending}")


def add(root):
    (root / "99.bmp").write_bytes(bmp(99))


def grow(root):
    (root / "03.txt").write_text("a caption of another length")
    (root / "03.bmp").write_bytes(bmp(77, (9, 9)))


CHANGES = [edit_caption, edit_image, rename_over, swap, add, grow]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [[], ["--drop_duplicates"]])
def test_what_changed_is_packed_again_as_a_clean_packing_would(tmp_path, change, more):
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    words = ["imagefolder", str(root), "--shard_size", "12kB", "--holdout", "0.2", "--workers", "1", *more, "--output"]
    assert main([*words, str(out)]) == 0
    fingerprint = Shards(out).fingerprint
    change(root)
    assert main([*words, str(out)]) == 0
    assert main([*words, str(tmp_path / "clean")]) == 0
    assert everything(out) == everything(tmp_path / "clean") and Shards(out).fingerprint != fingerprint
    assert not (out / ".packing").exists()


def test_only_shards_with_changed_samples_are_written(tmp_path, filled, read):
    root, out = captioned(tmp_path / "images", 40), tmp_path / "out"
    words = ["imagefolder", str(root), "--shard_size", "12kB", "--workers", "1", "--output", str(out)]
    assert main(words) == 0 and len(filled) > 5
    places = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    edit_caption(root)
    edit_image(root)
    wanted = {s.name for s in manifest_of(out).shards if {"03.bmp", "04.bmp"} & set(sources(out, s.name))}
    filled.clear()
    assert main(words) == 0
    assert set(filled) == wanted and 1 <= len(wanted) <= 2 and sum(read.values()) == 2
    assert {n for n, inode in places.items() if (out / n).stat().st_ino != inode} == wanted
    found = contents(out)
    assert found["03.bmp"]["txt"] == b"CAPTION 03" and found["04.bmp"]["bmp"] == bmp(200)


def sources(folder, name):
    import webdataset

    return [json.loads(sample["json"])["source"] for sample in webdataset.WebDataset([str(folder / name)], shardshuffle=False)]


def test_what_is_touched_or_copied_is_read_once_and_packed_already(tmp_path, filled, read):
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    words = ["imagefolder", str(root), "--workers", "1", "--output", str(out)]
    assert main(words) == 0
    before, wrote = everything(out), (out / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0 and not read, "equal stamps: nothing is read"
    os.utime(root / "03.bmp")
    os.utime(root / "04.txt")
    assert main(words) == 0 and sum(read.values()) == 2
    read.clear()
    shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(root)
    os.rename(tmp_path / "copy", root)
    assert main(words) == 0 and sum(read.values()) == 12
    read.clear()
    assert main(words) == 0 and not read, "the stamps were renewed"
    assert everything(out) == before and len(filled) == 1 and (out / "manifest.json").stat().st_mtime_ns == wrote


def test_what_an_earlier_release_packed_is_packed_again_to_the_same_bits(tmp_path, filled):
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    words = ["imagefolder", str(root), "--workers", "1", "--output", str(out)]
    assert main(words) == 0
    before = everything(out)
    shutil.rmtree(out / FOLDER)
    assert main(words) == 0 and everything(out) == before and len(filled) == 2
    assert main(words) == 0 and len(filled) == 2


def of_85bd0c6(out, request):
    """Leave what that release left: a manifest with the request as it hashed it, and no memory."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    facts = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(facts | {"source": request}))


@pytest.mark.parametrize(
    ("kind", "request_of_then"),
    [
        ("captions", "d64aad0cd175efec4a43893369870d6830ca0f21d941e008a549a48e64bbbe73"),
        ("classes", "10d9f44141eb595ea245a8ca5d720c4a2a2f12c93d7505a11cabc83c5f574383"),
        ("table", "6661b7202067c6afe5a35c9654268ce03a0d34a055410ddedf6bbd3a5b386f5e"),
    ],
)
def test_a_folder_that_85bd0c6_packed_or_half_packed_is_known(tmp_path, filled, capsys, kind, request_of_then):
    """The hashes are those of its own code, for these very files."""
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    if kind != "captions":
        for path in root.glob("*.txt"):
            path.unlink()
    if kind == "classes":
        for i, path in enumerate(sorted(root.glob("*.bmp"))):
            (root / "ab"[i // 6]).mkdir(exist_ok=True)
            path.rename(root / "ab"[i // 6] / f"{i % 6}.bmp")
    if kind == "table":
        rows = "".join(f"{i:02d}.bmp,caption {i},{'ab'[i % 2]},{i}\n" for i in range(12))
        (root / "metadata.csv").write_text("file_name,text,label,year\n" + rows)
    words = ["imagefolder", str(root), "--workers", "1", "--output", str(out)]
    assert main(words) == 0
    before = everything(out)
    of_85bd0c6(out, request_of_then)
    assert main(words) == 0 and everything(out) == before and len(filled) == 2
    of_85bd0c6(out, request_of_then)
    (out / "manifest.json").unlink()
    (out / ".packing").mkdir()
    (out / ".packing" / "request.json").write_text(json.dumps(request_of_then))  # it kept a plain string
    journal = {"shard": {"name": "train-000000.tar"}, "faults": [], "hashes": []}
    (out / ".packing" / "train-000000.json").write_text(json.dumps(journal))
    (out / ".packing" / "train-000000.tar").write_bytes(b"")
    assert main(words) == 0 and everything(out) == before and len(filled) == 3
    assert not (out / ".packing").exists() and main(words) == 0 and len(filled) == 3
    for other in ("0" * 64, ""):
        of_85bd0c6(out, other)
        assert "other images or settings, or of an earlier release that" in refused(capsys, *words)


def test_parquets_that_85bd0c6_packed_are_known(tmp_path, filled):
    """Its hash is written out here, as its code took it."""
    out, path = tmp_path / "out", tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": [bmp(i) for i in range(4)], "label": [0, 1, 0, 1], "year": [1, 2, 3, 4]}), path)
    words = ["parquet", str(path), "--workers", "1", "--output", str(out)]
    assert main(words) == 0
    columns = "Columns(image='image', caption='', label='label', class_names=('0', '1'), others=('year',))"
    packing = "Packing(shard_bytes=256000000, holdout=0.0, seed=0, max_side=0, drop_duplicates=False)"
    identity = hashed("'parquet'", repr(("p.parquet", path.stat().st_size, [4])), columns)
    before = everything(out)
    of_85bd0c6(out, hashed(repr(identity), "('0', '1')", packing))
    assert main(words) == 0 and everything(out) == before and len(filled) == 2


def hashed(*printed):
    return hashlib.sha256("".join(f"{text}\0" for text in printed).encode()).hexdigest()


def test_an_index_that_a_kill_left_half_is_swept(tmp_path, monkeypatch):
    tars = shards_of(tmp_path / "tars")
    words = ["webdataset", str(tars), "--workers", "1"]
    real = os.replace

    def stops(source, target):
        if str(target).endswith(".npy"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr("condot.data.format.index.os.replace", stops)
        raise SystemExit(main(words))
    mine = tars / ".notes-1.npy"
    mine.write_bytes(b"mine")
    assert list(tars.glob(".[0-9]*.npy"))
    assert main(words) == 0 and list(tars.glob(".*.npy")) == [mine]


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "linked"])
def test_an_index_that_is_wrong_is_made_again(tmp_path, kind):
    """As the message about it advises."""
    out = tmp_path / "out"
    if kind == "imagefolder":
        words = ["imagefolder", str(folder_of_images(tmp_path / "images")), "--workers", "1", "--output", str(out)]
    else:
        tars = shards_of(tmp_path / "tars")
        words = ["webdataset", str(tars), "--workers", "1", *(["--output", str(out)] if kind == "linked" else [])]
        out = out if kind == "linked" else tars
    assert main(words) == 0
    before, index = everything(out), sorted(out.glob("*.npy"))[0]
    records = np.load(index)
    records["label"] = records["label"][::-1].copy()
    np.save(index, records)
    assert main(words) == 0 and everything(out) == before
    index.write_bytes(b"")
    assert main(words) == 0 and everything(out) == before


def test_what_may_be_the_last_copy_is_not_overwritten(tmp_path, capsys):
    """Images that are gone from the source; another folder with the same names; tars that nobody here wrote."""
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    words = ["imagefolder", str(root), "--output", str(out)]
    assert main(words) == 0
    before = everything(out)
    os.rename(root / "07.bmp", tmp_path / "07.bmp")
    os.rename(root / "07.txt", tmp_path / "07.txt")
    message = refused(capsys, *words)
    assert "1 of the images in" in message and "Choose another --output" in message and "delet" not in message
    os.rename(tmp_path / "07.bmp", root / "07.bmp")
    os.rename(tmp_path / "07.txt", root / "07.txt")
    other = captioned(tmp_path / "other")
    edit_image(other)
    message = refused(capsys, "imagefolder", other, "--output", out)
    assert f"was packed from {root}" in message and "choose another --output" in message
    assert everything(out) == before and main(words) == 0 and everything(out) == before


@pytest.mark.parametrize("point", ["write_shard", "_assemble", "draw_summary", "write_pack_state", "write_manifest"])
def test_packing_again_goes_on_after_a_kill(tmp_path, monkeypatch, capsys, point):
    """Half-way it is no whole folder; another edit meanwhile counts; the end is that of one clean run."""
    root, out = captioned(tmp_path / "images", 30), tmp_path / "out"
    shutil.copy(root / "03.bmp", root / "copy.bmp")
    words = ["imagefolder", str(root), "--shard_size", "12kB", "--drop_duplicates", "--workers", "1", "--output"]
    assert main([*words, str(out)]) == 0
    edit_caption(root)
    edit_image(root)
    real, calls = getattr(__import__("condot.data.prepare.pack", fromlist=[point]), point), []

    def stops(*a, **k):
        calls.append(a)
        if point != "write_shard" or len(calls) > 1:
            raise OSError("stopped here")
        return real(*a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(f"condot.data.prepare.pack.{point}", stops)
        assert "stopped here" in refused(capsys, *words, out)
    with pytest.raises(ValueError, match=r"no manifest\.json, so packing never finished"):
        Shards(out)
    rename_over(root)
    (root / "04.bmp").write_bytes(bmp(4))  # as it was at first
    assert main([*words, str(out)]) == 0
    assert main([*words, str(tmp_path / "clean")]) == 0
    assert everything(out) == everything(tmp_path / "clean") and not (out / ".packing").exists()


def test_an_edit_before_the_first_packing_ended_counts(tmp_path, monkeypatch, capsys):
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    words = ["imagefolder", str(root), "--workers", "1", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr("condot.data.prepare.pack.draw_summary", lambda *a: (_ for _ in ()).throw(OSError("stopped here")))
        assert "stopped here" in refused(capsys, *words, out)
    edit_caption(root)
    assert main([*words, str(out)]) == 0 and main([*words, str(tmp_path / "clean")]) == 0
    assert everything(out) == everything(tmp_path / "clean") and contents(out)["03.bmp"]["txt"] == b"CAPTION 03"


def test_a_mended_image_is_packed_and_what_was_a_duplicate_comes_back(tmp_path):
    root, out = folder_of_images(tmp_path / "images", count=20), tmp_path / "out"
    shutil.copy(root / "cat" / "image 3.png", root / "dog" / "zz.png")
    (root / "dog" / "broken.png").write_bytes(b"no image")
    words = ["imagefolder", str(root), "--shard_size", "30kB", "--drop_duplicates", "--skip_corrupt", "--workers", "1", "--output"]
    assert main([*words, str(out)]) == 0 and len(contents(out)) == 40
    (root / "dog" / "broken.png").write_bytes(picture(77))
    (root / "cat" / "image 3.png").write_bytes(picture(78))
    assert main([*words, str(out)]) == 0 and main([*words, str(tmp_path / "clean")]) == 0
    assert everything(out) == everything(tmp_path / "clean")
    assert len(contents(out)) == 42 and contents(out)["dog/zz.png"]["png"] == picture(3)


def test_a_table_that_is_edited(tmp_path):
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    for path in root.glob("*.txt"):
        path.unlink()
    table = "file_name,text\n" + "".join(f"{i:02d}.bmp,words {i:02d}\n" for i in range(12))
    (root / "metadata.csv").write_text(table)
    words = ["imagefolder", str(root), "--output", str(out)]
    assert main(words) == 0
    (root / "metadata.csv").write_text(table.replace("words 03", "WORDS 03"))
    assert main(words) == 0
    assert contents(out)["03.bmp"]["txt"] == b"WORDS 03" and contents(out)["04.bmp"]["txt"] == b"words 04"


def test_parquet_of_the_same_size_with_other_values(tmp_path, filled, read):
    def write(label):
        rows = {"image": [bmp(i) for i in range(10)], "label": [label if i == 4 else i % 3 for i in range(10)]}
        pq.write_table(pa.table(rows), tmp_path / "in" / "b.parquet", compression="none", use_dictionary=False, write_statistics=False)

    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [bmp(50 + i) for i in range(10)], "label": [i % 3 for i in range(10)]}), tmp_path / "in/a.parquet")
    write(1)
    words = ["parquet", str(tmp_path / "in"), "--shard_size", "20kB", "--workers", "1", "--output"]
    out, size = tmp_path / "out", (tmp_path / "in/b.parquet").stat().st_size
    assert main([*words, str(out)]) == 0 and contents(out)["b.parquet:0:4"]["cls"] == b"1"
    count = len(filled)
    write(2)
    assert (tmp_path / "in/b.parquet").stat().st_size == size
    assert main([*words, str(out)]) == 0 and contents(out)["b.parquet:0:4"]["cls"] == b"2"
    assert sum(read.values()) == 10 and len(filled) == count + 1, "the rows of one file are read, one shard is written"
    assert main([*words, str(tmp_path / "clean")]) == 0 and everything(out) == everything(tmp_path / "clean")


@pytest.mark.parametrize("place", ["in place", "linked", "compressed"])
def test_tars_rewritten_with_other_classes_of_the_same_size(tmp_path, place, monkeypatch):
    import webdataset

    folder, ending = tmp_path / "tars", ".tar.gz" if place == "compressed" else ".tar"

    def write(name, first):
        with webdataset.TarWriter(str(folder / name)) as sink:
            for i in range(6):
                sink.write({"__key__": f"{i:04d}", "bmp": bmp(i), "cls": (first + i) % 3})
        if place == "compressed":
            body = bytearray((folder / name).read_bytes())
            (folder / name).unlink()
            (folder / f"{name}.gz").write_bytes(gzip.compress(bytes(body), compresslevel=0, mtime=0))

    folder.mkdir()
    write("a.tar", 0)
    write("b.tar", 0)
    out = folder if place == "in place" else tmp_path / "out"
    words = ["webdataset", str(folder), *([] if place == "in place" else ["--output", str(out)])]
    assert main(words) == 0
    size, inode = (folder / f"b{ending}").stat().st_size, (out / "a.npy").stat().st_ino
    write("b.tar", 1)
    assert (folder / f"b{ending}").stat().st_size == size
    assert main(words) == 0
    shards = Shards(out)
    assert [shards.read(1, i).label for i in range(6)] == [1, 2, 0, 1, 2, 0] and [shards.read(0, i).label for i in range(3)] == [0, 1, 2]
    assert (out / "a.npy").stat().st_ino == inode, "a tar that is as it was is not indexed again"
    before, hashed = everything(out), []
    os.utime(folder / f"a{ending}")
    real = source_changes.sha256_of_file
    monkeypatch.setattr("condot.data.prepare.source_changes.sha256_of_file", lambda path: hashed.append(path.name) or real(path))
    assert main(words) == 0 and main(words) == 0 and everything(out) == before
    assert [name for name in hashed if not name.endswith(".npy")] == [f"a{ending}"], "indexes are 24 bytes a sample"
    write("c.tar", 2)
    assert main(words) == 0 and sum(Shards(out).counts) == 18, "a tar more is indexed"


def test_decompressed_tars_whose_sources_are_gone_are_kept(tmp_path, capsys):
    folder = shards_of(tmp_path / "tars", ("a.tar", "b.tar"))
    for name in ("a.tar", "b.tar"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    words = ["webdataset", str(folder), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    before = everything(tmp_path / "out")
    (folder / "b.tar.gz").unlink()
    assert "b.tar, decompressed from" in refused(capsys, *words) and everything(tmp_path / "out") == before


def test_digits_are_packed_already(digits, tmp_path, filled, read):
    shutil.copytree(digits, tmp_path / "copy")
    before = everything(tmp_path / "copy")
    assert main(["digits", "--output", str(tmp_path / "copy"), "--shard_size", "400kB"]) == 0
    assert everything(tmp_path / "copy") == before and not read


def test_a_lock_that_is_a_link_is_not_followed(tmp_path, capsys):
    root = captioned(tmp_path / "images")
    (tmp_path / "out" / ".packing").mkdir(parents=True)
    (tmp_path / "precious").write_text("kept")
    os.symlink(tmp_path / "precious", tmp_path / "out" / ".packing" / "lock")
    assert "lock is a link, a folder or a device" in refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "kept"


def test_names_that_are_no_utf8_are_reported(tmp_path):
    from condot.core.atomic_files import commit_json

    name = os.fsdecode(b"caf\xe9.png")
    commit_json({"list": [name]}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"list": [name]}


def test_the_memory_of_a_folder_is_small(tmp_path):
    root, out = captioned(tmp_path / "images", 200), tmp_path / "out"
    assert main(["imagefolder", str(root), "--output", str(out)]) == 0
    with np.load(out / FOLDER / "inputs.npz") as held:
        assert held["inputs"].nbytes == 41 * 200


def test_files_that_rows_of_a_data_set_name(tmp_path, monkeypatch, read):
    """`datasets` keeps a table of paths: an image edited in place changes no table."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    captioned(root / "data")
    for path in (root / "data").glob("*.txt"):
        path.unlink()
    rows = [{"file_name": f"{i:02d}.bmp", "text": f"words {i}"} for i in range(12)]
    (root / "data" / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["hub", str(root), "--workers", "1", "--output"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert main([*words, str(tmp_path / "out")]) == 0 and not read
    edit_image(root / "data")
    assert main([*words, str(tmp_path / "out")]) == 0
    assert main([*words, str(tmp_path / "clean")]) == 0
    assert everything(tmp_path / "out") == everything(tmp_path / "clean")
    assert bmp(200) in [files["bmp"] for files in contents(tmp_path / "out").values()]


def test_what_is_renamed_or_was_never_packed_is_not_missed(tmp_path):
    """An image that moves to another class, a copy that goes, a broken one that goes: all is still there."""
    root, out = folder_of_images(tmp_path / "images", count=6), tmp_path / "out"
    shutil.copy(root / "cat" / "image 3.png", root / "dog" / "zz.png")
    (root / "dog" / "broken.png").write_bytes(b"no image")
    words = ["imagefolder", str(root), "--shard_size", "12kB", "--skip_corrupt", "--workers", "1", "--output"]
    assert main([*words, str(out)]) == 0
    os.rename(root / "cat" / "image 1.png", root / "dog" / "moved.png")
    (root / "dog" / "broken.png").unlink()
    (root / "dog" / "zz.png").unlink()
    assert main([*words, str(out)]) == 0 and main([*words, str(tmp_path / "clean")]) == 0
    assert everything(out) == everything(tmp_path / "clean")
    assert contents(out)["dog/moved.png"]["cls"] == b"1" and len(contents(out)) == 12


def test_a_journal_does_not_vouch_for_a_shard_that_was_written_after_it(tmp_path, monkeypatch, capsys):
    """Killed when all was done, edited back, and killed between a shard and its journal."""
    root, out = captioned(tmp_path / "images"), tmp_path / "out"
    words = ["imagefolder", str(root), "--workers", "1", "--output"]
    for point, change in (
        ("condot.data.prepare.pack.draw_summary", edit_caption),
        ("condot.data.prepare.shard_writer.commit_json", edit_image),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(point, lambda *a: (_ for _ in ()).throw(OSError("stopped here")))
            assert "stopped here" in refused(capsys, *words, out)
        change(root) if point == "condot.data.prepare.pack.draw_summary" else None
    assert main([*words, str(out)]) == 0 and main([*words, str(tmp_path / "clean")]) == 0
    assert everything(out) == everything(tmp_path / "clean")
