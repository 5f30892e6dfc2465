"""Which split names say, in every source: known, asked about, or told by `--splits`; test data never become training data."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_adopt import shards_of
from test_prepare import contents, picture, refused

from condot.data.prepare.command import main
from condot.data.prepare.source import split_from_name
from condot.data.prepare.splits import SplitChoice, assign_splits, parse_splits, split_name_words, splits_in_name
from condot.data.storage.shard_reader import Shards


def images(root, *names):
    """A file of noise for each name, all different."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(sum(map(ord, name)) + 1000 * len(name)))
    return root


def packed(out, *words):
    """Source names by split after packing."""
    assert main([*map(str, words), "--output", str(out)]) == 0
    return {split: sorted(contents(out, split)) for split in splits_in(out)}


def splits_in(out):
    return sorted({shard["split"] for shard in json.loads((out / "manifest.json").read_text())["shards"]})


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *(("train", {"train"}), ("TRAIN", {"train"}), ("training_set", {"train"}), ("train2017", {"train"}), ("trainA", {"train"})),
        *(
            ("Val", {"val"}),
            ("valid", {"val"}),
            ("validation_hard", {"val"}),
            ("dev-clean", {"val"}),
            ("eval", {"val"}),
            ("evaluation", {"val"}),
        ),
        *(("testA", {"test"}), ("test_seen", {"test"}), ("testing", {"test"}), ("HTMLTest", {"test"}), ("my test", {"test"})),
        *(("test-dev2017", {"test", "val"}), ("train_vs_test", {"train", "test"})),
        *(
            ("unsupervised", set()),
            ("strain", set()),
            ("contest", set()),
            ("latest", set()),
            ("developer", set()),
            ("invalid", set()),
            ("détest", set()),
        ),
    ],
)
def test_words_of_names_say_splits(name, kinds):
    assert splits_in_name(name) == kinds
    assert split_from_name(f"train/{name}-00000-of-00001.tar") == (next(iter(kinds)) if len(kinds) == 1 else None)


def test_words_begin_at_capitals_and_at_what_is_no_letter():
    assert split_name_words("testA_SeenHTMLFile 2.Été") == ["test", "a", "seen", "html", "file", "été"]


@pytest.mark.parametrize(
    "tops",
    [("Train", "Val", "TEST"), ("TRAIN", "validation", "TEST"), ("training", "eval", "testing"), ("train2017", "val2017", "test2017")],
)
def test_folders_are_splits_however_they_are_spelled(tmp_path, tops):
    train, val, test = tops
    root = images(tmp_path / "in", f"{train}/a/1.png", f"{train}/b/2.png", f"{val}/a/3.png", f"{test}/b/4.png")
    found = packed(tmp_path / "out", "imagefolder", root)
    assert found == {"train": [f"{train}/a/1.png", f"{train}/b/2.png"], "val": [f"{val}/a/3.png"], "test": [f"{test}/b/4.png"]}
    assert Shards(tmp_path / "out").manifest.class_names == ("a", "b")


def test_splits_are_found_below_one_folder_that_holds_all(tmp_path):
    root = images(tmp_path / "in", "set/data/train/a/1.png", "set/data/train/b/1.png", "set/data/test/a/2.png")
    found = packed(tmp_path / "out", "imagefolder", root)
    assert found == {"train": ["set/data/train/a/1.png", "set/data/train/b/1.png"], "test": ["set/data/test/a/2.png"]}
    assert Shards(tmp_path / "out").manifest.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (("train/1.png", "unlabeled/2.png"), "train (train) can be known, but unlabeled cannot"),
        (("train/1.png", "val/2.png", "stray/3.png"), "but stray cannot"),
        (("train/1.png", "val/2.png", "loose.png"), "but . cannot"),
        (("bird/1.png", "train/2.png", "plane/3.png"), "but bird, plane cannot"),
        (("train/1.png", "test-dev/2.png"), "but test-dev (test and val) cannot"),
        (("set/train/1.png", "set/extra/2.png"), "but extra cannot"),
    ],
)
def test_folders_of_which_only_some_are_splits_are_asked_about(tmp_path, capsys, names, asked):
    message = refused(capsys, "imagefolder", images(tmp_path / "in", *names), "--output", tmp_path / "out")
    assert asked in message and "--splits none packs all as training data, with the folders as classes" in message
    assert not (tmp_path / "out").exists()


def test_splits_inside_of_classes_are_asked_about(tmp_path, capsys):
    """The layout of MVTec AD: each class has its own train and test."""
    root = images(tmp_path / "in", "cup/train/1.png", "cup/test/2.png", "nut/train/3.png", "nut/test/4.png")
    assert "--splits test,train" in refused(capsys, "imagefolder", root, "--output", tmp_path / "out")
    found = packed(tmp_path / "a", "imagefolder", root, "--splits", "train,test")
    assert found == {"train": ["cup/train/1.png", "nut/train/3.png"], "test": ["cup/test/2.png", "nut/test/4.png"]}
    assert {name: f["cls"] for name, f in contents(tmp_path / "a", "test").items()} == {"cup/test/2.png": b"0", "nut/test/4.png": b"1"}
    assert len(packed(tmp_path / "b", "imagefolder", root, "--splits", "none")["train"]) == 4


def test_the_option_decides_and_what_it_leaves_out_is_told(tmp_path, capsys):
    root = images(tmp_path / "in", "train/a/1.png", "unlabeled/a/2.png", "loose.png")
    assert packed(tmp_path / "a", "imagefolder", root, "--splits", "train") == {"train": ["train/a/1.png"]}
    printed = capsys.readouterr().out
    assert "does not name it: unlabeled (1 images)" in printed and "does not name it: . (1 images)" in printed
    assert json.loads((tmp_path / "a/report.json").read_text())["splits_left_out"] == {"unlabeled": 1, ".": 1}
    both = packed(tmp_path / "b", "imagefolder", root, "--splits", "train, unlabeled=val", "--label_column", "none")
    assert both == {"train": ["train/a/1.png"], "val": ["unlabeled/a/2.png"]}
    assert packed(tmp_path / "c", "imagefolder", root, "--splits", ".=test")["test"] == ["loose.png"]
    assert "--splits 'val': " in refused(capsys, "imagefolder", root, "--splits", "val", "--output", tmp_path / "d")


@pytest.mark.parametrize("text", ["extra", "train,extra", "extra=", "=train", "extra=Bad Name", "test_train"])
def test_options_that_say_no_split_are_refused(text):
    with pytest.raises(ValueError, match="--splits "):
        parse_splits(text)


def test_options_are_read_as_they_are_written():
    assert parse_splits("train, testA ,extra=train,a=b=val").names == (
        ("train", "train"),
        ("testA", "test"),
        ("extra", "train"),
        ("a=b", "val"),
    )
    assert parse_splits("None").ignored and parse_splits("").names == () and not parse_splits(" ").is_given
    assert assign_splits({"x": ["x"]}, SplitChoice(), "here") is None, "where no name says a split, all is training data"


def test_a_column_of_splits_in_a_table_is_kept_to(tmp_path, capsys):
    root = images(tmp_path / "in", *(f"{i}.png" for i in range(4)))
    table = root / "metadata.csv"
    table.write_text("file_name,split\n0.png,train\n1.png,TEST\n2.png,validation\n3.png,train\n")
    assert packed(tmp_path / "a", "imagefolder", root) == {"train": ["0.png", "3.png"], "test": ["1.png"], "val": ["2.png"]}
    table.write_text("file_name,split\n0.png,train\n1.png,test\n2.png,\n3.png,extra\n")
    assert "train (train), test (test) can be known, but (no split), extra cannot" in refused(
        capsys, "imagefolder", root, "--output", tmp_path / "b"
    )
    table.write_text("file_name,split\n0.png,fold 1\n1.png,fold 2\n2.png,\n3.png,\n")
    assert len(packed(tmp_path / "c", "imagefolder", root)["train"]) == 4


# --- parquet


def parquet_file(path, count=1, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    bodies = [picture(sum(map(ord, str(path))) + i) for i in range(count)]
    pq.write_table(pa.table({"image": bodies, **columns}), path)
    return path


def test_parquet_files_are_split_by_their_names_or_the_nearest_folder(tmp_path):
    for name in ("train/0000.parquet", "train/test-0000.parquet", "test/deep/0000.parquet", "dev-set/0000.parquet"):
        parquet_file(tmp_path / "test-set" / name)
    found = packed(tmp_path / "out", "parquet", tmp_path / "test-set")
    assert found == {
        "train": ["train/0000.parquet:0:0"],
        "test": ["test/deep/0000.parquet:0:0", "train/test-0000.parquet:0:0"],
        "val": ["dev-set/0000.parquet:0:0"],
    }
    assert packed(tmp_path / "glob", "parquet", f"{tmp_path}/test-set/train/0*.parquet") == {"train": ["0000.parquet:0:0"]}


def test_parquet_files_of_which_only_some_say_a_split_are_asked_about(tmp_path, capsys):
    for name in ("train-00000-of-00001.parquet", "unsupervised-00000-of-00001.parquet"):
        parquet_file(tmp_path / "in" / name)
    assert "unsupervised-00000-of-00001.parquet cannot" in refused(capsys, "parquet", tmp_path / "in", "--output", tmp_path / "no")
    assert packed(tmp_path / "a", "parquet", tmp_path / "in", "--splits", "train") == {"train": ["train-00000-of-00001.parquet:0:0"]}
    assert "does not name it: unsupervised-00000-of-00001.parquet" in capsys.readouterr().out
    found = packed(tmp_path / "b", "parquet", tmp_path / "in", "--splits", "train,unsup*=val")
    assert found["val"] == ["unsupervised-00000-of-00001.parquet:0:0"]
    assert len(packed(tmp_path / "c", "parquet", tmp_path / "in", "--splits", "none")["train"]) == 2


def test_rows_of_other_splits_in_one_file_are_refused(tmp_path, capsys):
    parquet_file(tmp_path / "all.parquet", 3, split=["train", "test", "val"])
    message = refused(capsys, "parquet", tmp_path / "all.parquet", "--output", tmp_path / "no")
    assert "column 'split' says test, val of some rows" in message
    assert len(packed(tmp_path / "a", "parquet", tmp_path / "all.parquet", "--splits", "none")["train"]) == 3


# --- the Hub and tars


def data_set(root, *splits):
    """A local data set whose card names its splits."""
    listed = "".join(f"  - split: {name}\n    path: data/{name}.parquet\n" for name in splits)
    for name in splits:
        parquet_file(root / "data" / f"{name}.parquet")
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n")
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_splits_of_the_hub_are_read_by_their_words(tmp_path, cache):
    root = data_set(tmp_path / "in", "TRAIN", "testA", "test_seen", "eval", "evaluation", "validation_hard")
    assert packed(tmp_path / "out", "hub", root) == {
        "train": ["TRAIN/0"],
        "test": ["testA/0", "test_seen/0"],
        "val": ["eval/0", "evaluation/0", "validation_hard/0"],
    }


@pytest.mark.parametrize("name", ["unsupervised", "extra", "full", "test_train"])
def test_splits_of_the_hub_that_cannot_be_known_are_asked_about(tmp_path, capsys, cache, name):
    root = data_set(tmp_path / "in", "train", name)
    assert f"{name}=train" in refused(capsys, "hub", root, "--output", tmp_path / "no")
    assert f"--splits {name}" in refused(capsys, "hub", root, "--splits", f"train,{name}", "--output", tmp_path / "no")
    assert packed(tmp_path / "a", "hub", root, "--splits", "train") == {"train": ["train/0"]}
    assert packed(tmp_path / "b", "hub", root, "--splits", f"train,{name}=val") == {"train": ["train/0"], "val": [f"{name}/0"]}
    assert packed(tmp_path / "c", "hub", root, "--splits", "none") == {"train": sorted(["train/0", f"{name}/0"])}


def test_tars_are_split_by_name_or_folder_and_asked_about(tmp_path, capsys):
    one, two = shards_of(tmp_path / "in/train", ("a.tar",)), shards_of(tmp_path / "in/testA", ("b.tar",))
    assert main(["webdataset", f"{one.parent}/*/*.tar", "--output", str(tmp_path / "a")]) == 0
    assert len(contents(tmp_path / "a")) == 6 == len(contents(tmp_path / "a", "test")) and two.exists()
    mixed = shards_of(tmp_path / "mixed", ("train-0.tar", "extra-0.tar"))
    assert "but extra-0.tar cannot" in refused(capsys, "webdataset", mixed, "--output", tmp_path / "no")
    assert main(["webdataset", str(mixed), "--splits", "train", "--output", str(tmp_path / "b")]) == 0
    assert [shard.name for shard in Shards(tmp_path / "b").shards] == [
        "train-0.tar"
    ] and "does not name it: extra-0.tar" in capsys.readouterr().out
    assert main(["webdataset", str(mixed), "--split", "val", "--output", str(tmp_path / "c")]) == 0
    assert sum(Shards(tmp_path / "c", "val").counts) == 12


def test_holding_out_of_no_training_data_is_refused(tmp_path, capsys):
    root = images(tmp_path / "in", "test/1.png", "test/2.png")
    assert "has no training data, only test" in refused(capsys, "imagefolder", root, "--holdout", "0.5", "--output", tmp_path / "out")
