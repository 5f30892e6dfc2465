"""Folders, tables, parquet files and data sets in forms that strangers use: kohya's, Synology's, pandas', Spark's, `save_to_disk`'s."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_folders import captions, report
from test_labels import classes_of, folder
from test_prepare import contents, picture, refused
from test_splits import images, packed

from condot.data.prepare.command import main
from condot.data.prepare.scan_folder import walk
from condot.data.storage.shard_reader import Shards


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- folders


def test_kohyas_captions_are_sidecars(tmp_path, capsys):
    root = folder(tmp_path / "in", "10_cat/a.png", "10_cat/b.png", "5_dog/c.png")
    (root / "10_cat/a.caption").write_text("one\n")
    (root / "5_dog/c.CAPTION").write_text("three")
    assert captions(tmp_path / "out", "imagefolder", root) == {"10_cat/a.png": "one", "10_cat/b.png": None, "5_dog/c.png": "three"}
    assert "no image is repeated for a number in its folder's name, such as 5_dog" in capsys.readouterr().out
    (root / "10_cat/a.txt").write_text("other")
    assert "have two captions: 10_cat/a.caption and 10_cat/a.txt" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")


def test_what_systems_make_is_no_class_and_counted(tmp_path, capsys):
    names = (
        "@eaDir/1.png/thumb.jpg",
        "__MACOSX/cat/1.png",
        "$RECYCLE.BIN/x.png",
        ".ipynb_checkpoints/1.png",
        "cat/.cache/2.png",
        "cat/._1.png",
    )
    root = folder(tmp_path / "in", "cat/1.png", "dog/2.png", *names)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / "cat" / name).write_bytes(b"\0")
    os.symlink("/", root / ".root")
    assert classes_of(tmp_path / "out", "imagefolder", root) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert report(tmp_path / "out")["unknown_files"] == {
        **{".db": 1, ".ini": 1, "in $RECYCLE.BIN": 1, "in @eaDir": 1, "in __MACOSX": 1},
        "that are hidden": 2,
    }
    assert "not packed: 1 files in @eaDir" in capsys.readouterr().out


def test_arrays_beside_pictures_are_counted_and_alone_are_images(tmp_path):
    root = folder(tmp_path / "in", "b.npy", "a.png", "a.npy", "c.png")
    (root / "a.npy").write_bytes(b"an array")
    found = walk(root)
    assert list(found.images) == ["a.png", "c.png"] and found.count == {".npy": 2}
    assert [facts.bytes for facts in found.images.values()] == [os.path.getsize(root / name) for name in found.images]
    assert list(walk(folder(tmp_path / "arrays", "b.npy", "a.npy")).images) == ["a.npy", "b.npy"]


@pytest.mark.parametrize("above", ["data/", "set/images/", "train/images/"])
def test_classes_lie_below_the_folders_that_hold_all(tmp_path, above):
    root = folder(tmp_path / "in", f"{above}cat/1.png", f"{above}dog/2.png", f"{above}dog/puppies/3.png")
    found = classes_of(tmp_path / "out", "imagefolder", root)
    assert found == {f"{above}cat/1.png": "cat", f"{above}dog/2.png": "dog", f"{above}dog/puppies/3.png": "dog"}


def test_classes_below_the_images_of_every_split(tmp_path, capsys):
    root = images(tmp_path / "in", "train/images/cat/1.png", "train/images/dog/2.png", "val/images/cat/3.png")
    for words in ((), ("--splits", "train,val")):
        out = tmp_path / f"out-{len(words)}"
        assert packed(out, "imagefolder", root, *words)["val"] == ["val/images/cat/3.png"]
        assert Shards(out).manifest.class_names == ("cat", "dog")


def test_one_class_keeps_its_name(tmp_path):
    for number, name in enumerate(("cat/1.png", "train/cat/1.png")):
        assert classes_of(tmp_path / f"{number}", "imagefolder", folder(tmp_path / f"in{number}", name)) == {name: "cat"}


def test_classes_that_differ_in_capitals_are_told(tmp_path, capsys):
    root = images(tmp_path / "in", "Train/Cat/1.png", "test/cat/2.png")
    packed(tmp_path / "out", "imagefolder", root)
    assert "classes that differ in capitals alone: Cat and cat" in capsys.readouterr().out


@pytest.mark.parametrize("tops", [("train_cat", "train_dog"), ("dev board", "dev kit"), ("cats_train", "dogs_train", "cats_test")])
def test_folders_that_may_be_splits_or_classes_are_asked_about(tmp_path, capsys, tops):
    """As splits their images would lose their classes; as classes none is held out."""
    root = images(tmp_path / "in", *(f"{top}/1.png" for top in tops))
    message = refused(capsys, "imagefolder", root, "--output", tmp_path / "no")
    assert f"are {', '.join(sorted(tops))} splits, or classes?" in message and "--splits none" in message
    assert sum(map(len, packed(tmp_path / "a", "imagefolder", root, "--splits", ",".join(tops)).values())) == len(tops)
    assert set(packed(tmp_path / "b", "imagefolder", root, "--splits", "none")) == {"train"}
    assert set(Shards(tmp_path / "b").manifest.class_names) == set(tops)


def test_no_test_data_become_training_data_by_a_class_called_train(tmp_path, capsys):
    root = images(tmp_path / "in", "train/train/1.png", "train/bus/2.png", "test/train/3.png", "test/bus/4.png")
    assert packed(tmp_path / "a", "imagefolder", root)["test"] == ["test/bus/4.png", "test/train/3.png"]
    message = refused(capsys, "imagefolder", root, "--splits", "train,test", "--output", tmp_path / "no")
    assert "has test/train, test by 'test' and training data by 'train'" in message
    inner = images(tmp_path / "inner", "train/a/1.png", "train/val/a/2.png")
    assert packed(tmp_path / "b", "imagefolder", inner, "--splits", "train,val")["val"] == ["train/val/a/2.png"]


def test_a_split_without_classes_beside_one_with_is_left_out_by_name(tmp_path, capsys):
    root = images(tmp_path / "in", "train/cat/1.png", "train/dog/2.png", "test/3.png")
    assert "leave its split out with --splits" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")
    assert packed(tmp_path / "out", "imagefolder", root, "--splits", "train") == {"train": ["train/cat/1.png", "train/dog/2.png"]}


# --- tables


@pytest.mark.parametrize("column", ["split", "Split", "SET", "subset", "partition", "data set"])
def test_columns_of_splits_by_any_usual_name(tmp_path, capsys, cache, column):
    root = images(tmp_path / "in", "0.png", "1.png", "2.png")
    (root / "metadata.csv").write_text(f"file_name,{column}\n0.png,train\n1.png,test\n2.png,Val\n")
    assert packed(tmp_path / "a", "imagefolder", root) == {"train": ["0.png"], "test": ["1.png"], "val": ["2.png"]}
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [picture(1), picture(2)], column: ["train", "test"]}), tmp_path / "p/all.parquet")
    for kind in ("parquet", "hub"):
        message = refused(capsys, kind, tmp_path / "p", "--output", tmp_path / "no")
        assert f"column {column!r} says test of some rows" in message


def test_columns_with_names_of_splits_and_other_values_are_no_splits(tmp_path):
    root = images(tmp_path / "in", "0.png", "1.png")
    (root / "metadata.csv").write_text("file_name,set,split\n0.png,red,test\n1.png,blue,train\n")
    assert packed(tmp_path / "a", "imagefolder", root) == {"train": ["1.png"], "test": ["0.png"]}
    (root / "metadata.csv").write_text("file_name,set,split\n0.png,test,1\n1.png,train,2\n")
    assert packed(tmp_path / "b", "imagefolder", root) == {"train": ["1.png"], "test": ["0.png"]}


def test_columns_are_known_in_capitals_too(tmp_path):
    root = folder(tmp_path / "in", "0.png", "1.png")
    (root / "metadata.csv").write_text("File_Name,Caption,Label\n0.png,hi,b\n1.png,ho,a\n")
    assert captions(tmp_path / "a", "imagefolder", root) == {"0.png": "hi", "1.png": "ho"}
    assert Shards(tmp_path / "a").manifest.class_names == ("a", "b")
    pq.write_table(pa.table({"Image": [picture(1)], "TEXT": ["x"], "text": ["y"], "Label": ["k"]}), tmp_path / "p.parquet")
    assert captions(tmp_path / "b", "parquet", tmp_path / "p.parquet") == {"p.parquet:0:0": "y"}
    assert Shards(tmp_path / "b").manifest.class_names == ("k",)


@pytest.mark.parametrize("below", ["", "x/"])
def test_absolute_names_inside_of_the_folder_are_taken(tmp_path, capsys, below):
    root = folder(tmp_path / "in", "x/a.png", "b.png")
    table = root / f"{below}metadata.csv"
    table.write_text(f"file_name,text\n{root}/x/a.png,one\n{root}/b.png,two\n")
    assert captions(tmp_path / "out", "imagefolder", root) == {"x/a.png": "one", "b.png": "two"}
    for away in (f"{tmp_path}/in-other/a.png", f"{root}/../secret.png", "/etc/passwd"):
        table.write_text(f"file_name,text\n{away},one\n")
        assert "leads out of its folder" in refused(capsys, "imagefolder", root, "--output", tmp_path / "no")


def test_messages_do_not_advise_to_remove_what_the_user_brought(tmp_path, capsys):
    root = folder(tmp_path / "in", "a.png", "b.png")
    for body in ("file_name,text\na.png,x\n,y\n", "file_name,text\na.png,x\na.png,y\n", "file_name,text\na.png,x\nc.png,y\n"):
        (root / "metadata.csv").write_text(body)
        message = refused(capsys, "imagefolder", root, "--output", tmp_path / "no")
        assert not any(word in message for word in ("take these", "remove", "delete", "Keep one"))


def test_text_that_the_index_would_refuse_is_its_samples_fault(tmp_path, capsys):
    pq.write_table(
        pa.table({"image": [picture(i) for i in range(4)], "text": ["a\0b", "nan", "c", "d" * (1 << 20) + "d"]}), tmp_path / "p.parquet"
    )
    message = refused(capsys, "parquet", tmp_path / "p.parquet", "--output", tmp_path / "out")
    assert "2 of 4 images cannot be read: p.parquet:0:0 (the text has NUL" in message and "tmp-" not in message
    assert captions(tmp_path / "out", "parquet", tmp_path / "p.parquet", "--skip_corrupt") == {"p.parquet:0:1": None, "p.parquet:0:2": "c"}


def test_a_variable_that_is_not_set_is_told_of_the_source(tmp_path, capsys, monkeypatch):
    folder(tmp_path / "in", "a.png")
    monkeypatch.setenv("PHOTOS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert captions(tmp_path / "a", "imagefolder", "${PHOTOS}/in") == captions(tmp_path / "b", "imagefolder", "~/in") == {"a.png": None}
    message = refused(capsys, "imagefolder", "${NO_SUCH_FOLDER}/in", "--output", tmp_path / "no")
    assert "source='${NO_SUCH_FOLDER}/in': the environment has no NO_SUCH_FOLDER" in message and "data.shards" not in message


# --- parquet


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_labels_of_numbers_and_texts_are_one_column(tmp_path, capsys):
    write(tmp_path / "in/a.parquet", image=[picture(1), picture(2)], label=[10, 2], extra=[1, 2])
    write(tmp_path / "in/b.parquet", image=[picture(3), picture(4)], label=["2.0", "10"], extra=["x", "y"])
    found = classes_of(tmp_path / "out", "parquet", tmp_path / "in")
    assert list(found.values()).count("10") == 2 and found["a.parquet:0:0"] == found["b.parquet:0:1"] == "10"
    more = {name: json.loads(files["json"])["extra"] for name, files in contents(tmp_path / "out").items()}
    assert more == {"a.parquet:0:0": 1, "a.parquet:0:1": 2, "b.parquet:0:0": "x", "b.parquet:0:1": "y"}
    write(tmp_path / "in/c.parquet", image=[picture(5)], label=[True], extra=["z"])
    assert "c.parquet: column 'label' is not as in other files" in refused(capsys, "parquet", tmp_path / "in", "--output", tmp_path / "no")


def test_hidden_parquet_files_are_passed_over_and_damaged_ones_named(tmp_path, capsys):
    write(tmp_path / ".up/in/a.parquet", image=[picture(1)])
    root = tmp_path / ".up/in"
    for name in ("._a.parquet", "__MACOSX/a.parquet", ".cache/a.parquet"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    assert captions(tmp_path / "out", "parquet", root) == {"a.parquet:0:0": None}
    (root / "b.parquet").write_bytes(b"PAR1 cut")
    assert "b.parquet: " in refused(capsys, "parquet", root, "--output", tmp_path / "no")


def test_partitions_that_are_captions_or_classes_are_not_lost(tmp_path, capsys):
    write(tmp_path / "in/split=train/label=cat/0.parquet", image=[picture(1)])
    write(tmp_path / "in/split=test/label=dog/0.parquet", image=[picture(2)])
    assert "'label' is in the names of folders" in refused(capsys, "parquet", tmp_path / "in", "--output", tmp_path / "no")
    found = packed(tmp_path / "out", "parquet", tmp_path / "in", "--label_column", "none")
    assert found == {"train": ["split=train/label=cat/0.parquet:0:0"], "test": ["split=test/label=dog/0.parquet:0:0"]}


# --- the Hub


def rows(*numbers):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    bodies = [{"bytes": picture(number), "path": None} for number in numbers]
    return datasets.Dataset.from_dict({"image": bodies, "label": [n % 2 for n in numbers]}, features=features)


def test_data_sets_that_were_saved_to_disk_lose_no_split(tmp_path, capsys, cache):
    """`load_dataset` finds the splits with usual names alone, and says nothing of the others."""
    datasets.DatasetDict({"train": rows(1, 2), "unsup": rows(3), "testA": rows(4)}).save_to_disk(str(tmp_path / "set"))
    assert "unsup cannot" in refused(capsys, "hub", tmp_path / "set", "--output", tmp_path / "no")
    found = packed(tmp_path / "out", "hub", tmp_path / "set", "--splits", "train,testA,unsup=val")
    assert found == {"train": ["train/0", "train/1"], "test": ["testA/0"], "val": ["unsup/0"]}
    assert {files["png"]: files["cls"] for files in contents(tmp_path / "out").values()} == {picture(1): b"1", picture(2): b"0"}


def test_one_split_that_was_saved_to_disk_is_read_and_read_again(tmp_path, cache):
    out = tmp_path / "out"
    for numbers in ((1, 2), (3, 4)):
        rows(*numbers).save_to_disk(str(tmp_path / "set"))
        assert main(["hub", str(tmp_path / "set"), "--output", str(out)]) == 0
        assert {files["png"] for files in contents(out).values()} == set(map(picture, numbers))
