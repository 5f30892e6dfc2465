"""Folders as people have them: tables that select, describe or have nothing to do with images; sidecars, links, odd names and files."""

import json
import os
import time
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_labels import folder
from test_prepare import contents, everything, picture, refused

from condot.core.regular_files import open_regular, read_regular
from condot.data.prepare.command import main
from condot.data.prepare.metadata_tables import read_rows
from condot.data.prepare.scan_folder import FolderScan, walk
from condot.data.prepare.tar_sources import find_tars
from condot.data.storage.shard_reader import Shards

NFC, NFD = "caf\u00e9", "cafe\u0301"


def captions(out, *words):
    """Caption of each source, None where it has none."""
    assert main([*map(str, words), "--output", str(out)]) == 0
    return {name: files["txt"].decode() if "txt" in files else None for name, files in contents(out).items()}


def report(out):
    return json.loads((out / "report.json").read_text())


# --- tables


@pytest.mark.parametrize("name", ["good.csv", "good.jsonl", "metadata.csv", "good.parquet"])
def test_a_table_as_the_source_selects(tmp_path, capsys, name):
    root = folder(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "3.png", "text": "three"}]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), root / name)
    elif name.endswith(".jsonl"):
        (root / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        (root / name).write_text("file_name,text\n1.png,one\n3.png,three\n")
    assert captions(tmp_path / "out", "imagefolder", root / name) == {"1.png": "one", "3.png": "three"}
    assert "images that no table names: 3, not packed" in capsys.readouterr().out and report(tmp_path / "out")["found"] == 2


def test_a_folder_with_a_table_is_packed_whole_unlike_with_datasets(tmp_path, capsys):
    """`datasets` takes the rows of metadata.csv alone; here the folder was asked for, and what has no row is told."""
    root = folder(tmp_path / "in", *(f"{i}.png" for i in range(3)))
    (root / "metadata.csv").write_text("file_name,text\n1.png,one\n")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(theirs) == 1
    assert captions(tmp_path / "out", "imagefolder", root) == {"0.png": None, "1.png": "one", "2.png": None}
    assert "images that no table names: 2, packed without caption or class" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ('file_name, text\n0.png, hi there\n1.png, "a, b"\n', ("hi there", "a, b")),
        ("\ufefffile_name,text\r\n0.png,hi\r\n1.png,ho\r\n", ("hi", "ho")),
        ('file_name;text\n0.png;hi, you\n1.png;"a;b"\n', ("hi, you", "a;b")),
        ("file_name\ttext\n0.png\thi, you\n1.png\tho\n", ("hi, you", "ho")),
        (",file_name,text\n0,0.png,hi\n1,1.png,ho\n", ("hi", "ho")),
        ("file_name,text,,\n0.png,hi,,\n1.png,ho,,\n", ("hi", "ho")),
        ('file_name,text\n0.png,"two\nlines"\n1.png,"say ""hi"""\n', ("two\nlines", 'say "hi"')),
        ("file_name,text\r0.png,hi\r1.png,ho\r", ("hi", "ho")),
        (" text , file_name \nhi,0.png\n\nho,./1.png\n,\n", ("hi", "ho")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_as_spreadsheets_write_them(tmp_path, body, wanted, encoding):
    root = folder(tmp_path / "in", "0.png", "1.png")
    (root / "metadata.csv").write_bytes(body.encode(encoding) if not body.startswith("\ufeff") else body.encode())
    assert captions(tmp_path / "out", "imagefolder", root) == dict(zip(("0.png", "1.png"), wanted, strict=True))
    assert all(set(json.loads(files["json"])) == {"source"} for files in contents(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'file_name,text\n0.png,"hi\n1.png,ho\n', "metadata.csv:3: unexpected end of data"),
        (b"file_name,text\n0.png,a,b\n", "metadata.csv:2 has 3 values for 2 columns"),
        ("file_name,text\n0.png,café\n".encode("latin-1"), "Save it as UTF-8"),
        (b"file_name,file_name\n0.png,1.png\n", "two columns are called 'file_name'"),
        (b"file_name,\n0.png,lost\n", "metadata.csv:2: 'lost' stands in a column without a name"),
        (b"file_name,text\n", "has no rows"),
        (b"", "has no rows"),
        (b"picture,text\n0.png,a\n", "--file_column"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(tmp_path, capsys, body, message):
    root = folder(tmp_path / "in", "0.png", "1.png")
    (root / "metadata.csv").write_bytes(body)
    assert message in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")
    assert captions(tmp_path / "out", "imagefolder", root, "--file_column", "none") == {"0.png": None, "1.png": None}


def test_lines_of_json_that_are_bombs_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"file_name": "0.png"}\n' + b"[" * 200_000 + b"\n")
    rows = read_rows(tmp_path / "t.jsonl")
    assert next(rows) == (1, {"file_name": "0.png"})
    with pytest.raises(ValueError, match=r"t\.jsonl:2 is no JSON object"):
        next(rows)


def test_columns_of_a_table_are_named_by_options(tmp_path, capsys):
    root = folder(tmp_path / "in", "0.png", "1.png")
    (root / "table.csv").write_text("picture,words,kind,text\n0.png,hello,b,x\n1.png,bye,a,y\n")
    words = ["imagefolder", root, "--file_column", "picture", "--caption_column", "words", "--label_column", "kind"]
    assert captions(tmp_path / "out", *words) == {"0.png": "hello", "1.png": "bye"}
    assert Shards(tmp_path / "out").manifest.class_names == ("a", "b")
    assert json.loads(contents(tmp_path / "out")["0.png"]["json"]) == {"source": "0.png", "text": "x"}
    assert captions(tmp_path / "none", *words[:4], "--caption_column", "none") == {"0.png": None, "1.png": None}
    assert "--label_column 'sort': table.csv has no such column" in refused(
        capsys, *words[:4], "--label_column", "sort", "--output", tmp_path / "no"
    )
    (root / "table.csv").rename(tmp_path / "table.csv")
    assert "has no table of images" in refused(capsys, *words, "--output", tmp_path / "no")


@pytest.mark.parametrize(
    "body", [b"sku,price\n1,2\n", b"path,price\nshelf/3,2\n", b"image,price\nhttps://x.org/a.png,2\n", "größe,b\n1,2,3\n".encode("latin-1")]
)
def test_a_table_of_other_things_beside_class_folders_changes_nothing(tmp_path, capsys, body):
    root = folder(tmp_path / "in", "cat/1.png", "dog/2.png")
    (root / "prices.csv").write_bytes(body)
    (root / "cat/notes.csv").write_bytes(b"file_name,text\n1.png,a note\n")
    captions(tmp_path / "out", "imagefolder", root)
    assert Shards(tmp_path / "out").manifest.class_names == ("cat", "dog") and "not packed: 2 files .csv" in capsys.readouterr().out


@pytest.mark.parametrize("body", [b"file_name,text\ngone.png,hi\n", "file_name,text\n1.png,café\n".encode("latin-1")])
def test_a_table_that_was_meant_is_no_bystander(tmp_path, capsys, body):
    root = folder(tmp_path / "in", "cat/1.png", "dog/2.png")
    (root / "captions.csv").write_bytes(body)
    assert "captions.csv" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")


def test_names_in_tables_match_however_they_are_composed(tmp_path, capsys):
    root = folder(tmp_path / "in", f"{NFD}.png", f"{NFC}.jpg", "b.png")
    (root / f"{NFC}.jpg").write_bytes(picture(9, kind="JPEG"))
    (root / "metadata.csv").write_text(f"file_name,text\n{NFC}.png,one\n{NFD}.jpg,two\n")
    found = captions(tmp_path / "out", "imagefolder", root)
    assert {unicodedata.normalize("NFC", name): text for name, text in found.items()} == {
        f"{NFC}.png": "one",
        f"{NFC}.jpg": "two",
        "b.png": None,
    }
    folder(root, f"{NFC}.png")
    (root / "metadata.csv").write_text(f"file_name,text\n{NFC}.png,one\n{NFD}.png,other\n")
    both = captions(tmp_path / "both", "imagefolder", root)
    assert (both[f"{NFC}.png"], both[f"{NFD}.png"]) == ("one", "other"), "names that are there to the byte are meant"
    third = "\u1e69", "s\u0307\u0323", "s\u0323\u0307"
    root = folder(tmp_path / "odd", f"{third[0]}.png", f"{third[1]}.png")
    (root / "metadata.csv").write_text(f"file_name,text\n{third[2]}.png,which\n")
    assert "could be 2 files" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")


# --- sidecars and images


def test_sidecars_and_images_of_any_ending(tmp_path, capsys):
    root = folder(tmp_path / "in", "a.png", "b.png", f"{NFC}.png")
    for name in ("c.jfif", "d.JPE", "e.JPG"):
        (root / name).write_bytes(picture(len(name), kind="JPEG"))
    for name, body in (("a.TXT", b"\xef\xbb\xbfone"), ("b.Txt", "zwei".encode("utf-16")), ("c.txt", b" \n"), (f"{NFD}.txt", b"three")):
        (root / name).write_bytes(body)
    found = captions(tmp_path / "out", "imagefolder", root)
    assert found == {"a.png": "one", "b.png": "zwei", f"{NFC}.png": "three", "c.jfif": None, "d.JPE": None, "e.JPG": None}
    stored = contents(tmp_path / "out")
    assert all("jpg" in stored[name] for name in ("c.jfif", "d.JPE", "e.JPG"))
    assert set(captions(tmp_path / "none", "imagefolder", root, "--caption_column", "none").values()) == {None}
    (root / "a.txt").write_text("other")
    assert "1 images have two captions: a.TXT and a.txt" in refused(
        capsys, "imagefolder", root, "--output", tmp_path / "no", "--skip_corrupt"
    )


def test_a_sidecar_that_cannot_be_read_is_its_images_fault(tmp_path, capsys):
    root = folder(tmp_path / "in", "a.png", "b.png", "c.png", "d.png")
    (root / "a.txt").write_bytes("café".encode("latin-1"))
    (root / "b.txt").write_bytes(b"x" * (1 << 20) + b"y")
    os.symlink(tmp_path / "nowhere", root / "c.txt")
    message = refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    assert "3 of 4 images" in message and "a.png (its caption a.txt: the text is no UTF-8" in message
    assert captions(tmp_path / "out", "imagefolder", root, "--skip_corrupt") == {"d.png": None}


def test_sidecars_beside_a_table_are_told(tmp_path, capsys):
    root = folder(tmp_path / "in", "a.png", "b.png")
    (root / "a.txt").write_text("sidecar")
    (root / "metadata.csv").write_text("file_name,text\na.png,table\n")
    assert captions(tmp_path / "out", "imagefolder", root)["a.png"] == "table"
    assert "not packed: 1 files .txt, since a table describes the images" in capsys.readouterr().out


def test_names_that_are_no_utf8_are_samples_like_others(tmp_path, capsys):
    root = folder(tmp_path / "in", "k/a.png", "l/b.png", "l/c.png", "l/d.png")
    os.rename(root / "l/c.png", os.fsencode(root) + b"/l/caf\xe9.png")
    os.rename(root / "l/d.png", os.fsencode(root) + b"/l/\xff\x1b[31m.png")
    Path(os.fsdecode(os.fsencode(root) + b"/l/\xff\x1b[31m.png")).write_bytes(b"no image")
    os.rename(root / "k", os.fsencode(root) + b"/k\xe9")
    assert "l/\\xff\\x1b[31m.png (cannot identify" in refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "out"), "--skip_corrupt"]) == 0
    assert set(contents(tmp_path / "out")) == {"k\\xe9/a.png", "l/b.png", "l/caf\\xe9.png"}
    assert Shards(tmp_path / "out").manifest.class_names == ("k\\xe9", "l")
    assert "left out: l/\\xff\\x1b[31m.png" in capsys.readouterr().out


# --- links, and where shards go


def test_a_folder_is_read_once_and_a_second_link_is_told(tmp_path, capsys):
    root = folder(tmp_path / "in", "dog/1.png", "cat/2.png")
    folder(tmp_path / "away", "3.png")
    for link, to in (("a_link", root / "dog"), ("dog/up", root), ("zebra", tmp_path / "away"), ("zoo", tmp_path / "away"), ("top", "/")):
        os.symlink(to, root / link)
    captions(tmp_path / "out", "imagefolder", root)
    assert set(contents(tmp_path / "out")) == {"dog/1.png", "cat/2.png", "zebra/3.png"}
    assert Shards(tmp_path / "out").manifest.class_names == ("cat", "dog", "zebra")
    assert sorted(map(tuple, report(tmp_path / "out")["repeated_folders"])) == sorted(
        [("a_link", "dog"), ("dog/up", str(root)), ("zoo", "zebra"), ("top", "/")]
    )
    assert "link not followed: a_link leads to dog, which is read already" in capsys.readouterr().out


def test_images_keep_the_order_of_names_folder_by_folder(tmp_path):
    names = ["b.png", "z.png", "a/1.png", "a/9.png", "a/0/x.png", "c-d/1.png", "c/1.png"]
    found = walk(folder(tmp_path / "in", *names)).images
    assert list(found) == ["b.png", "z.png", "a/1.png", "a/9.png", "a/0/x.png", "c/1.png", "c-d/1.png"]
    assert {name: facts.bytes for name, facts in found.items()} == {name: os.path.getsize(tmp_path / "in" / name) for name in names}


def test_arrays_beside_as_many_images_are_left_out_in_linear_time():
    """A mask, or features, beside each of very many images: quadratic code takes minutes here, and hours for a million."""
    found, status = FolderScan(), os.stat(__file__)
    for number in range(60_000):
        found.add(f"{number:06d}.png", status)
        found.add(f"{number:06d}.npy", status)
    began = time.process_time()
    found.sort()
    assert time.process_time() - began < 10
    assert list(found.images) == [f"{number:06d}.png" for number in range(60_000)] and found.count[".npy"] == 60_000


@pytest.mark.parametrize("link", ["dead.png", "bird", "loop"])
def test_a_link_that_leads_to_nothing_is_a_fault(tmp_path, capsys, link):
    root = folder(tmp_path / "in", "dog/1.png", "cat/2.png")
    os.symlink(root / "loop" if link == "loop" else tmp_path / "gone", root / link)
    message = refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    assert f"1 of 3 images cannot be read: {link} (it is a link that leads to nothing)" in message
    captions(tmp_path / "out", "imagefolder", root, "--skip_corrupt")
    assert Shards(tmp_path / "out").manifest.class_names == ("cat", "dog") and len(contents(tmp_path / "out")) == 2


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("cat/1.png", "dog/2.png"), ("train/cat/1.png", "val/cat/2.png")])
def test_what_the_command_writes_is_never_a_source(tmp_path, names):
    """Shards inside the folder of the images: the same command goes on, and another finds the same images."""
    root = folder(tmp_path / "in", *names)
    words = ["imagefolder", str(root), "--output", str(root / "shards")]
    assert main(words) == 0
    before = everything(root / "shards")
    assert main(words) == 0 and everything(root / "shards") == before
    assert main([*words[:-1], str(root / "more")]) == 0
    assert {name: body for name, body in everything(root / "more").items() if name.endswith(".tar")} == {
        name: body for name, body in before.items() if name.endswith(".tar")
    }
    assert report(root / "more")["found"] == 2 and not report(root / "more")["unknown_files"]


def test_shards_do_not_go_where_they_would_replace_a_picture(tmp_path, capsys):
    root = folder(tmp_path / "in", "cat/1.png", "dog/summary.png")
    assert "is the folder of the images" in refused(capsys, "imagefolder", root, "--output", root)
    assert "holds summary.png and no manifest" in refused(capsys, "imagefolder", root, "--output", root / "dog")
    assert "lies inside the source" in refused(capsys, "hub", root, "--output", root / "shards")
    assert (root / "dog/summary.png").read_bytes() == picture(1)


def test_hidden_images_are_counted(tmp_path, capsys):
    captions(tmp_path / "out", "imagefolder", folder(tmp_path / "in", "1.png", ".2.png", "._1.png"))
    assert "not packed: 1 files that are hidden" in capsys.readouterr().out


# --- only regular files are opened


def special(kind, path):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        os.symlink("/dev/zero", path)
    else:
        os.symlink("/proc/self/maps", path)


@pytest.mark.parametrize("kind", ["fifo", "zero", "proc"])
def test_what_is_no_file_is_a_fault_and_never_waited_for(tmp_path, capsys, kind):
    root = folder(tmp_path / "in", "0.png", "1.png")
    special(kind, root / "2.png")
    special(kind, root / "1.txt")
    special(kind, root / "notes")
    message = refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    assert "2.png (it " in message and "1.png (its caption 1.txt: it is " in message
    assert captions(tmp_path / "out", "imagefolder", root, "--skip_corrupt") == {"0.png": None}


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_tables_and_tars_that_are_no_files_are_refused(tmp_path, capsys, kind):
    root = folder(tmp_path / "in", "0.png")
    special(kind, root / "metadata.jsonl")
    assert "metadata.jsonl cannot be read as a table: it is a" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")
    assert "metadata.jsonl: it is a" in refused(capsys, "hub", root, "--output", tmp_path / "no")
    (tmp_path / "p").mkdir()
    special(kind, tmp_path / "p/a.parquet")
    assert "it is a" in refused(capsys, "parquet", tmp_path / "p", "--output", tmp_path / "no")
    (tmp_path / "t").mkdir()
    special(kind, tmp_path / "t/a.tar")
    with pytest.raises(ValueError, match=r"a\.tar \(a .*\): no files"):
        find_tars(str(tmp_path / "t"))


def test_no_more_is_read_than_was_listed(tmp_path, capsys):
    """A sparse file of 2 TB is left out, and does not fill the memory."""
    root = folder(tmp_path / "in", "0.png")
    with open(root / "big.png", "wb") as file:
        file.truncate(1 << 41)
    assert "big.png (it has 2199023255552 bytes, at most" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_regular(root / "0.png", 9)
    with pytest.raises(ValueError, match="it is a folder"):
        open_regular(root)


# --- rows that name files


def rows_with_paths(path, *paths):
    """A parquet file as `datasets` writes one whose images lie elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": str(p)} for p in paths] + [{"bytes": picture(77), "path": None}], kind)
    marks = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
    pq.write_table(pa.Table.from_arrays([column], schema=pa.schema([("image", kind)], metadata=marks)), path)


def test_a_row_of_the_hub_reads_no_file_of_this_machine(tmp_path, capsys, monkeypatch):
    """By an absolute path, by a relative one, and by a link inside the data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "secret.png").write_bytes(picture(5))
    root = tmp_path / "set"
    folder(root, "own.png")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    secrets = (tmp_path / "secret.png", root / "link.png", root / ".." / "secret.png", os.path.relpath(tmp_path / "secret.png"))
    rows_with_paths(root / "data/train.parquet", *secrets, root / "own.png", "/dev/zero", "/nowhere.png")
    message = refused(capsys, "hub", root, "--output", tmp_path / "out")
    assert "6 of 8 images" in message and message.count("a file outside the data set, which is not read") == 5
    assert main(["hub", str(root), "--output", str(tmp_path / "out"), "--skip_corrupt"]) == 0
    assert {files["png"] for files in contents(tmp_path / "out").values()} == {picture(0), picture(77)}
    message = refused(capsys, "parquet", root / "data", "--output", tmp_path / "p")
    assert "7 of 8 images" in message and "its image lies elsewhere" in message


def test_images_of_a_local_data_set_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = folder(tmp_path / "set", "a.png", "b.png")
    (root / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,two\n")
    assert set(captions(tmp_path / "out", "hub", root).values()) == {"one", "two"}


def test_a_data_sets_code_is_not_run(tmp_path, capsys):
    root = tmp_path / "script"
    root.mkdir()
    (root / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert (
        "cannot be loaded by `datasets`" in refused(capsys, "hub", root, "--output", tmp_path / "out") and not (tmp_path / "ran").exists()
    )


def test_messages_hold_no_escape_sequences(tmp_path, capsys):
    root = folder(tmp_path / "in", "a.png")
    (root / "x\x1b[31m\u202egnp.png").write_bytes(b"no image")
    message = refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    assert "\x1b" not in message.split("error: ")[1] and "x\\x1b[31m\\u202egnp.png" in message
    assert np.all([ord(sign) >= 32 for sign in message.split("error: ")[1].strip()])
