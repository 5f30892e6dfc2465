"""What `data.inspect` says of shards is what is in them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from condot.core.data_options import read_options
from condot.data.inspect import main, parser, resolve_options
from condot.data.prepare.report import (
    CHARTS,
    MARGIN,
    SIDE,
    contact_sheet,
    draw_histogram,
    format_count,
    nearest_ratio,
    plot_histograms,
    ratio_name,
)
from condot.data.storage.shard_reader import Shards
from condot.pipeline.config.parse import load_recipe


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr("condot.data.inspect.SECONDS", 0.05)


def test_counts_and_first_batch_are_those_of_training(digits, tmp_path, capsys):
    from condot.core.data_config import DataConfig
    from condot.data.loader.build import build
    from condot.data.loader.stream import Share

    picture = tmp_path / "first.png"
    words = [str(digits), "--resolution", "8", "--channels", "1", "--seed", "3", "--batch_size", "8", "--output", str(picture), "--verify"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    labels = np.concatenate([Shards(digits).records(s)["label"] for s in range(len(Shards(digits).counts))])
    assert "train: 1,438 images" in printed and "captions: 1,797 of 1,797" in printed and "8x8 (1,438)" in printed
    assert all(f"{name} ({count:,})" in printed for name, count in zip(*np.unique(labels, return_counts=True), strict=True))
    assert "checked: 1,438 of 1,438 images and all hashes, 0 bad" in printed and "images/s at 8 px" in printed
    batch = next(build(DataConfig(shards=(str(digits),), resolution=8, channels=1), seed=3, share=Share(batch_size=8)))
    sheet = np.asarray(Image.open(picture))
    for i in range(8):
        x = MARGIN + i * (SIDE + MARGIN)
        tile = sheet[MARGIN : MARGIN + SIDE : SIDE // 8, x : x + SIDE : SIDE // 8, 0]
        assert np.array_equal(tile, batch.images[i, 0].numpy())


def test_damage_is_named_by_shard_and_key(digits, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(digits, folder)
    shards = Shards(folder)
    record, tar = shards.records(1)[5], folder / shards.shards[1].name
    key = shards.read(1, 5).key
    body = bytearray(tar.read_bytes())
    body[int(record["payload"]) * 512 + 20] ^= 1
    tar.write_bytes(body)
    words = [str(folder), "--resolution", "8", "--channels", "1", "--output", str(tmp_path / "x.png")]
    assert main([*words, "--verify", "--workers", "2"]) == 1
    printed = capsys.readouterr().out
    assert f"{tar.name}: {key} (its bytes changed since it was indexed)" in printed
    assert f"{tar.name}: its sha256 is not what the manifest says" in printed and ", 2 bad" in printed
    assert main([*words, "--samples", "1"]) == 0 and "checked: 1 of 1,438 images, 0 bad" in capsys.readouterr().out


def test_a_recipe_says_how_and_the_command_overrides_it(digits, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 5\ntrain: {batch_size: 12}\ndata: {resolution: 16, horizontal_flip: true, split: val}\n")
    options, seed, batch = resolve_options(parser().parse_args([str(digits), "--config", str(recipe), "--resolution", "8"]))
    assert (options.resolution, options.horizontal_flip, options.split, options.shards, seed, batch) == (
        8,
        True,
        "val",
        (str(digits),),
        5,
        12,
    )


def test_what_cannot_be_inspected(digits, tmp_path, capsys):
    for words, message in (
        ([str(tmp_path / "absent")], "is no folder"),
        ([str(digits), "--split", "test"], "split 'test' has no shard"),
        ([str(digits), "--config", str(tmp_path / "no.yaml")], "no such recipe"),
        ([str(digits), "--batch_size", "0"], "at least one image"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_ratios_and_sheets():
    assert [ratio_name(nearest_ratio(*size)) for size in ((640, 480), (480, 640), (100, 100), (1920, 1080), (1080, 1920), (3000, 30))] == [
        "4:3",
        "3:4",
        "1:1",
        "16:9",
        "9:16",
        "4:1",
    ]
    sheet = contact_sheet([(Image.new("RGB", (50, 20), "red"), "a long caption " * 9)] * 3, 2)
    assert sheet.size == (MARGIN + 2 * (SIDE + MARGIN), MARGIN + 2 * (SIDE + 16 + MARGIN))


def test_a_recipe_is_merged_section_by_section_and_typed(tmp_path):
    """As training reads it: what a stage leaves out it has from the one it extends; YAML's 1e-3 is a number, a folder 2020 is none."""
    (tmp_path / "a.yaml").write_text("data: {shards: 2020, resolution: 64, max_bad_share: 1e-3}\ntrain: {batch_size: 24, max_steps: 9}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\ndata: {resolution: 128, horizontal_flip: true}\ntrain: {max_steps: 5}\n")
    options, whole = read_options(tmp_path / "b.yaml")
    assert whole["train"] == load_recipe(tmp_path / "b.yaml")["train"] == {"batch_size": 24, "max_steps": 5}
    assert (options.shards, options.resolution, options.max_bad_share, options.horizontal_flip) == (("2020",), 128, 0.001, True)
    for text, message in (
        ("data: {resolution: 64.5}", "data.resolution=64.5: give int"),
        ("- a", "a recipe is a mapping"),
        ("data: 3", "a recipe is"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_options(tmp_path / "c.yaml")


def test_histograms_have_a_bar_for_each_count():
    """Heights and labels are the counts; what was not seen has neither."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_histogram(axes, "sides", {"16": 3, "32": 0, "64": 12_345})
    assert [bar.get_height() for bar in axes.patches] == [3, 0, 12_345]
    assert [text.get_text() for text in axes.texts] == ["3", "", "12k"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32", "64"]
    assert axes.get_title(loc="left") == "sides" and axes.get_ylim()[1] > 12_345
    assert (format_count(9_999), format_count(10_000), format_count(23_400_000)) == ("9999", "10k", "23M")


def test_histograms_fill_their_width_and_are_the_same_each_time():
    from condot.data.format.manifest import Tally

    one, other = (plot_histograms(Tally(sizes={"8x8": 5, "512x384": 20_000, "other": 1}), 1096) for _ in range(2))
    assert one.size == (1096, CHARTS) and one.mode == "RGB" and one.tobytes() == other.tobytes()
    assert plot_histograms(Tally(sizes={}), 1096).size == (1096, CHARTS), "an empty folder has empty histograms"
