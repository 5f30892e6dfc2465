"""Classes: one rule for what values and folder names say, in folders, CSV, JSON lines, parquet and Hub data sets."""

import json
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import contents, picture, refused

from condot.data.prepare.class_labels import class_number, natural_sort_key, number_classes, parse_class, sort_class_names
from condot.data.prepare.command import main
from condot.data.prepare.table_columns import ColumnChoice, choose_columns, common_type
from condot.data.storage.shard_reader import Shards

GAP = float("nan")


@pytest.mark.parametrize(
    "value", [10, 10.0, "10", "10.0", " 10 ", "+10", "010", np.int64(10), np.float32(10), Decimal("10.00"), [10], ("10",)]
)
def test_whole_numbers_are_one_class_however_they_are_written(value):
    assert parse_class(value) == 10


@pytest.mark.parametrize("value", [None, "", "  ", -1, "-1", -1.0, "-1.0", GAP, np.float64("nan"), Decimal("nan"), [], [None]])
def test_nothing_is_no_label(value):
    assert parse_class(value) is None and class_number(value, {"a": 0}) is None


@pytest.mark.parametrize("value", [1.5, Decimal("1.5"), float("inf"), [1, 2], ["a", "b"], {"a": 1}, b"a", -2, 65535, "65535"])
def test_what_is_no_class_is_refused(value):
    with pytest.raises(ValueError, match=r"here: .* with --label_column none\."):
        sort_class_names([value], "here")


def test_texts_that_are_fractions_are_no_names_unless_names_stand_beside_them():
    with pytest.raises(ValueError, match=r"'1.5' is no class"):
        sort_class_names(["1.5", "2"], "here")
    assert sort_class_names(["1.5", "v"], "here") == ("1.5", "v")


def test_names_are_in_natural_order_without_blanks_and_composed():
    assert sort_class_names(["class10", " cat", "class2 ", "cat ", "cafe\u0301", "caf\u00e9"], "here") == (
        "caf\u00e9",
        "cat",
        "class2",
        "class10",
    )
    assert sorted(["10", "9", "1a10", "1a9", "01", "1"], key=natural_sort_key) == ["01", "1", "1a9", "1a10", "9", "10"]
    assert sort_class_names([True, False, np.bool_(True)], "here") == ("False", "True")
    assert sort_class_names([2, "0", GAP, "nan"], "here") == ("0", "1", "2")


def test_numbers_are_places_among_names_that_the_source_gave():
    """A ClassLabel whose names are digits: 0 is the class called `1`."""
    given = number_classes(("1", "2", "3"), given=True)
    assert [class_number(value, given) for value in (0, 2, 1.0)] == [0, 2, 1]
    found = number_classes(sort_class_names(["cat", 3], "here"), given=False)
    assert found == {"3": 0, 3: 0, "cat": 1} and [class_number(value, found) for value in (3, "3.0", "cat ")] == [0, 0, 1]


# --- as a user packs them


def folder(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def classes_of(out, *words):
    """Class of each source, by its name in the manifest; None where it has none."""
    assert main([*map(str, words), "--output", str(out)]) == 0
    names = Shards(out).manifest.class_names
    return {name: names[int(files["cls"])] if "cls" in files else None for name, files in contents(out).items()}


def test_folders_are_classes_in_natural_order(tmp_path):
    """12 folders 0 to 11: each class has its folder's number."""
    root = folder(tmp_path / "in", *(f"{i}/x.png" for i in range(12)))
    assert classes_of(tmp_path / "out", "imagefolder", root) == {f"{i}/x.png": str(i) for i in range(12)}
    assert {name: int(files["cls"]) for name, files in contents(tmp_path / "out").items()} == {f"{i}/x.png": i for i in range(12)}
    assert Shards(tmp_path / "out").manifest.class_names == tuple(map(str, range(12)))


def test_folders_whose_names_differ_in_blanks_or_composition_are_one_class(tmp_path):
    root = folder(tmp_path / "in", "train/caf\u00e9/1.png", "train/cat/2.png", "train/cat /3.png", "val/cafe\u0301/4.png", "val/ cat/5.png")
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "out")]) == 0
    assert Shards(tmp_path / "out").manifest.class_names == ("caf\u00e9", "cat")
    assert {name: files["cls"] for name, files in contents(tmp_path / "out", "val").items()} == {
        "val/cafe\u0301/4.png": b"0",
        "val/ cat/5.png": b"1",
    }


def test_folders_called_by_other_numbers_than_their_classes_are_told(tmp_path, capsys):
    root = folder(tmp_path / "in", "1/x.png", "2/x.png", "10/x.png")
    assert classes_of(tmp_path / "out", "imagefolder", root) == {"1/x.png": "1", "2/x.png": "2", "10/x.png": "10"}
    assert "folders named by numbers" in capsys.readouterr().out


CASES = {
    "numbers": ([10.0, 2, -1], ["10", "2", None]),
    "gap": ([0.0, None, 1.0], ["0", None, "1"]),
    "bools": ([True, False, True], ["True", "False", "True"]),
    "texts": (["10", "2.0", "-1"], ["10", "2", None]),
    "names": (["cat", " cat ", ""], ["cat", "cat", None]),
    "single": ([[1], [0], []], ["1", "0", None]),
}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub"])
@pytest.mark.parametrize("case", list(CASES))
def test_a_column_means_the_same_in_every_source(tmp_path, monkeypatch, case, kind):
    values, wanted = CASES[case]
    if (case, kind) == ("single", "csv"):
        pytest.skip("a CSV has no lists")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "in"
    if kind in ("jsonl", "csv"):
        folder(root, *(f"{i}.png" for i in range(3)))
        rows = [{"file_name": f"{i}.png", "label": value} for i, value in enumerate(values)]
        text = (
            "\n".join(map(json.dumps, rows))
            if kind == "jsonl"
            else "file_name,label\n" + "\n".join(f"{row['file_name']},{'' if row['label'] is None else row['label']}" for row in rows)
        )
        (root / f"metadata.{kind}").write_text(text)
        found = classes_of(tmp_path / "out", "imagefolder", root)
    else:
        root.mkdir()
        floats = case in ("numbers", "gap")
        column = pa.array([GAP if value is None else value for value in values], pa.float64()) if floats else pa.array(values)
        pq.write_table(pa.table({"image": [picture(i) for i in range(3)], "label": column}), root / "train.parquet")
        found = classes_of(tmp_path / "out", "parquet" if kind == "parquet" else "hub", root)
    assert [found[name] for name in sorted(found)] == wanted


def test_gaps_among_numbers_are_told(tmp_path, capsys):
    root = folder(tmp_path / "in", "0.png", "1.png")
    (root / "metadata.csv").write_text("file_name,label\n0.png,10\n1.png,2.0\n")
    assert classes_of(tmp_path / "out", "imagefolder", root) == {"0.png": "10", "1.png": "2"}
    assert "class numbers without an image: 9, such as 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["classes_without_image"] == [0, 1, *range(3, 10)]


@pytest.mark.parametrize("values", [[[1, 2], [0]], [{"a": 1}, {"a": 2}], [0.25, 1.0], [b"a", b"b"]])
def test_columns_that_are_no_classes_name_file_and_column_and_may_be_left_alone(tmp_path, capsys, values):
    table = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"image": [picture(1), picture(2)], "label": values}), table)
    message = refused(capsys, "parquet", table, "--image_column", "image", "--output", tmp_path / "out")
    assert "photos.parquet, column 'label': " in message and "--label_column none" in message and "tmp-" not in message
    assert set(classes_of(tmp_path / "ok", "parquet", table, "--image_column", "image", "--label_column", "none").values()) == {None}


def test_rows_that_are_no_classes_name_their_line(tmp_path, capsys):
    root = folder(tmp_path / "in", "0.png", "1.png")
    (root / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "a"}\n{"file_name": "1.png", "label": ["a", "b"]}\n')
    assert "metadata.jsonl:2, column 'label': ['a', 'b'] are several classes" in refused(
        capsys, "imagefolder", root, "--output", tmp_path / "no"
    )
    assert set(classes_of(tmp_path / "ok", "imagefolder", root, "--label_column", "none").values()) == {None}


def test_a_column_that_is_called_none_is_meant(tmp_path):
    table = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": [picture(1), picture(2)], "none": ["x", "y"], "label": ["a", "b"]}), table)
    assert sorted(classes_of(tmp_path / "a", "parquet", table, "--label_column", "none").values()) == ["x", "y"]
    assert sorted(classes_of(tmp_path / "b", "parquet", table).values()) == ["a", "b"]


def test_classes_that_files_name_differently_are_refused(tmp_path, capsys):
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": picture(number), "path": None}], "label": [0]}
        (tmp_path / "in").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"in/{number}.parquet"))
    assert "classes of column 'label' are not named as in" in refused(capsys, "parquet", tmp_path / "in", "--output", tmp_path / "no")


# --- parquet files that differ only in how they are stored


def test_files_that_differ_in_storage_alone_are_one_table(tmp_path):
    texts = [
        pa.array([None, None]),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "a"]).dictionary_encode(),
        pa.array(["c", "d"]),
    ]
    numbers = [pa.array([1, 2], pa.int32()), pa.array([1.0, None]), pa.array([None, None]), pa.array([3, 4], pa.int64())]
    (tmp_path / "in").mkdir()
    for i, (text, number) in enumerate(zip(texts, numbers, strict=True)):
        body = pa.array([picture(2 * i), picture(2 * i + 1)], pa.large_binary() if i % 2 else pa.binary())
        pq.write_table(pa.table({"image": body, "text": text, "label": number}), tmp_path / f"in/{i}.parquet")
    found = classes_of(tmp_path / "out", "parquet", tmp_path / "in")
    assert [found[f"{i}.parquet:0:{row}"] for i in range(4) for row in range(2)] == ["1", "2", "1", None, None, None, "3", "4"]
    captions = {name: files.get("txt") for name, files in contents(tmp_path / "out").items()}
    assert [captions[f"{i}.parquet:0:{row}"] for i in range(4) for row in range(2)] == [None, None, b"a", b"b", b"a", b"a", b"c", b"d"]


def test_types_have_a_common_one_where_values_are_the_same():
    nested = pa.struct([("bytes", pa.binary()), ("path", pa.null())])
    other = pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])
    assert common_type(nested, other) == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    inner = pa.list_(pa.field("item", pa.string(), nullable=False))
    assert (
        common_type(inner, pa.large_list(pa.large_string())) == pa.list_(pa.string())
        and common_type(pa.list_(pa.null()), inner) is not None
    )
    assert common_type(pa.string(), pa.int64()) is None and common_type(pa.bool_(), pa.int8()) is None


def test_a_caption_that_only_some_files_have_is_not_dropped(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [picture(1)]}), tmp_path / "in/a.parquet")
    pq.write_table(pa.table({"image": [picture(2)], "text": ["b"], "extra": [1]}), tmp_path / "in/b.parquet")
    assert "a.parquet: column 'text' is not as in other files" in refused(capsys, "parquet", tmp_path / "in", "--output", tmp_path / "no")
    classes_of(tmp_path / "out", "parquet", tmp_path / "in", "--caption_column", "none")
    more = {name: json.loads(files["json"]) for name, files in contents(tmp_path / "out").items()}
    assert more["b.parquet:0:0"] == {"source": "b.parquet:0:0", "text": "b", "extra": 1} and "extra" not in more["a.parquet:0:0"]


def test_captions_are_texts_or_refused(tmp_path, capsys):
    bodies = [picture(i) for i in range(4)]
    for values, wanted in (
        ([GAP, 2.0, None, 3.5], {b"2.0", b"3.5"}),
        ([[None, "b"], [], ["  "], None], {b"b"}),
        ([b"caf\xc3\xa9", b" ", None, b"x"], {"café".encode(), b"x"}),
    ):
        pq.write_table(pa.table({"image": bodies, "text": values}), tmp_path / "p.parquet")
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        assert main(["parquet", str(tmp_path / "p.parquet"), "--image_column", "image", "--output", str(out)]) == 0
        assert {files["txt"] for files in contents(out).values() if "txt" in files} == wanted
    schema = pa.schema([("image", pa.binary()), ("text", pa.struct([("en", pa.string())]))])
    with pytest.raises(ValueError, match=r"column 'text' holds struct<en: string>, not captions\. .* --caption_column none"):
        choose_columns(schema, {}, ColumnChoice(), "here")
    assert choose_columns(schema, {}, ColumnChoice(caption="none"), "here").caption == ""
