"""The section `data` is one dataclass: what is wrong in it is told once, and the commands of `data/` read recipes as training does."""

import pytest

from condot.core.data_config import DataConfig
from condot.core.data_options import read_options
from condot.pipeline.config.parse import parse, parse_collecting_errors
from condot.pipeline.config.schema import ALIASES, Config


def test_a_value_that_is_right_beside_another_is_no_mistake():
    """Weights alone are of no folder, and `cached` alone is of no cache: each is tried with what it belongs to."""
    words = [
        "--data.shards",
        "a",
        "b",
        "--data.weights",
        "0.2",
        "0.8",
        "--data.encoding",
        "cached",
        "--data.encoded",
        "c",
        "--train.max_steps=-1",
    ]
    config, errors = parse_collecting_errors(Config, words, ALIASES)
    assert len(errors) == 1 and errors[0].startswith("train.max_steps=-1")
    assert config.data == DataConfig(shards=("a", "b"), weights=(0.2, 0.8), encoding="cached", encoded="c")


def test_values_that_do_not_fit_one_another_are_told_and_the_rest_is_kept():
    words = ["--data.shards", "a", "b", "--data.weights", "0.2", "--data.resolution", "64", "--data.lost_shards", "never"]
    config, errors = parse_collecting_errors(Config, words, ALIASES)
    assert len(errors) == 2 and "1 numbers for 2 sources" in errors[1] and "choose `stop` or `skip`" in errors[0]
    assert config.data == DataConfig(shards=("a", "b"), resolution=64)


def test_commands_of_data_read_a_recipe_as_training_does(tmp_path):
    """Dotted keys, sections commented out, `extends`, and words that YAML takes for others."""
    (tmp_path / "a.yaml").write_text("data.resolution: 48\ndata.max_bad_share: 1e-3\nflow:\n")
    path = tmp_path / "b.yaml"
    path.write_text("extends: a.yaml\ndata: {shards: s, channels: 1, bit_depth: 16, text_padding: attend}\n")
    options, whole = read_options(path, {"workers": "0"})
    assert options == parse(Config, ["--config", str(path), "--data.workers=0"]).data
    assert (options.resolution, options.bit_depth, options.max_bad_share, options.workers) == (48, 16, 1e-3, 0) and "flow" not in whole
    path.write_text("data: 3\n")
    with pytest.raises(ValueError, match="and `data` is a int"):
        read_options(path)
    with pytest.raises(ValueError, match=r"data.bit_depth=12: 8, or 16"):
        DataConfig(bit_depth=12)
