"""Recipes and the command line: one schema, dotted overrides, aliases, errors that name the nearest key."""

import re

import pytest

from condot.pipeline.config.model import DiTConfig, UNetConfig
from condot.pipeline.config.parse import config_from_mapping, config_to_mapping, parse
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.training.resume_rules import find_differences, run_facts


def recipe(tmp_path, text, name="a.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_files_flags_and_aliases_fill_one_schema(tmp_path):
    path = recipe(tmp_path, "output_dir: x\ntrain: {max_steps: 5, learning_rate: 1e-3, mixed_precision: null}\nflow: {time: logit_normal}")
    config = parse(
        Config, ["--config", path, "--train.max_steps=7", "--lr_warmup_steps", "3", "--use_ema=false", "--log.guidance_scale=-1"], ALIASES
    )
    assert (config.output_dir, config.train.max_steps, config.train.learning_rate, config.train.lr_warmup_steps) == ("x", 7, 1e-3, 3)
    assert config.train.mixed_precision is None and config.ema.enabled is False and config.log.guidance_scale == -1


def test_the_kind_chooses_the_fields(tmp_path):
    path = recipe(tmp_path, "model: {kind: unet, block_channels: [32, 64]}")
    assert parse(Config, ["--config", path]).model == UNetConfig(block_channels=(32, 64))
    assert parse(Config, ["--model.width=64"]).model == DiTConfig(width=64)
    with pytest.raises(ValueError, match=r"model.width is a field of model.kind=dit"):
        parse(Config, ["--config", path, "--model.width=64"])
    with pytest.raises(ValueError, match=r"model.kind=vit is unknown: choose one of dit, cross_dit, mmdit, unet"):
        parse(Config, ["--model.kind=vit"])


def test_a_recipe_extends_another(tmp_path):
    recipe(tmp_path, "train: {max_steps: 5, batch_size: 8}\nmodel: {kind: dit, width: 64}", "base.yaml")
    config = parse(Config, ["--config", recipe(tmp_path, "extends: base.yaml\ntrain: {max_steps: 9}")])
    assert (config.train.max_steps, config.train.batch_size, config.model) == (9, 8, DiTConfig(width=64))
    other = parse(Config, ["--config", recipe(tmp_path, "extends: base.yaml\nmodel: {kind: unet}", "b.yaml")])
    assert other.model == UNetConfig(), "another kind starts its section afresh"
    with pytest.raises(ValueError, match="circle"):
        parse(Config, ["--config", recipe(tmp_path, "extends: loop.yaml", "loop.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.max_step=3"], "unknown key 'train.max_step': did you mean 'train.max_steps'"),
        (["--lerning_rate=3"], "unknown key 'lerning_rate': did you mean 'learning_rate'"),
        (["--train.max_steps=many"], "--train.max_steps: invalid literal"),
        (["--flow.path=vpx"], "flow.path=vpx: path 'vpx' is unknown: choose one of condot"),
        (["--train.batch_size=0"], "train.batch_size=0: at least one image"),
        (["--config=/nowhere.yaml"], "no such recipe"),
        (["digits"], "stands alone"),
    ],
)
def test_errors_are_one_line_and_say_what_is_known(words, message):
    with pytest.raises(ValueError) as error:
        parse(Config, words, ALIASES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_class_path_in_a_recipe_is_data_and_not_code(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'model\.class_path'"):
        parse(Config, ["--config", recipe(tmp_path, "model: {class_path: os.system, init_args: {command: id}}")])
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(Config, ["--config", recipe(tmp_path, "output_dir: !!python/object/apply:os.system ['id']")])


def test_a_saved_configuration_comes_back():
    config = parse(Config, ["--model.kind=unet", "--model.block_channels", "32", "64", "--train.mixed_precision=bf16", "--data.shards=a b"])
    assert config_from_mapping(Config, config_to_mapping(config)) == config


def test_every_field_is_explained(capsys):
    """Help shows a text and a default for each field of each kind."""
    for kind in ("dit", "unet"):
        with pytest.raises(SystemExit):
            parse(Config, [f"--model.kind={kind}", "--help"], ALIASES)
        text = " ".join(capsys.readouterr().out.split())
        for key in config_to_mapping(parse(Config, [f"--model.kind={kind}"])):
            assert f"--{key}" in text
        for name, section in config_to_mapping(parse(Config, [f"--model.kind={kind}"])).items():
            for field in section if isinstance(section, dict) else ():
                entry = re.search(rf"--{name}\.{field} (.*?)\(default: ", text.replace("│", " "))
                explained = re.sub(r"^(\{.*?\}|\[?[A-Z][A-Z|{}]*\b[^a-z]*)", "", entry[1].strip()) if entry else ""
                assert explained.split(), f"{name}.{field}: {entry and entry[1]!r}"


def test_shipped_recipes_parse():
    from conftest import ROOT

    for path in (ROOT / "configs").glob("*.yaml"):
        assert parse(Config, ["--config", str(path)], ALIASES).output_dir.startswith("runs/")


@pytest.mark.parametrize(("kind", "found"), [("mmdit", ["data.caption is txt there and json.name here"]), ("dit", [])])
def test_captions_are_a_fact_of_runs_on_text(kind, found):
    one, two = (run_facts(parse(Config, [f"--model.kind={kind}", *more]), "x") for more in ([], ["--data.caption=json.name"]))
    assert find_differences(one, two) == found


def test_values_that_look_like_options_are_values(tmp_path):
    path = recipe(tmp_path, "data: {split: --seed=5, shards: [--x]}\nseed: 3")
    config = parse(Config, ["--config", path])
    assert (config.seed, config.data.split, config.data.shards) == (3, "--seed=5", ("--x",))
    assert config_from_mapping(Config, config_to_mapping(config)) == config


@pytest.mark.parametrize("field", ["data: {shards: [--help, x]}", "data: {shards: [x, --seed, '5']}", "log: {report_to: [wandb, -h]}"])
def test_an_option_among_several_values_of_a_file_is_refused(tmp_path, field):
    with pytest.raises(ValueError, match="read as an option"):
        parse(Config, ["--config", recipe(tmp_path, field)])


def test_one_value_of_a_file_asks_for_no_help(tmp_path, capsys):
    for word in ("-h", "--help"):
        path = recipe(tmp_path, f"log: {{project: '{word}'}}\ndata: {{shards: ['{word}']}}")
        config = parse(Config, ["--config", path])
        assert config.log.project == word and config.data.shards == (word,) and not capsys.readouterr().out


def test_a_dotted_key_is_its_field(tmp_path):
    with pytest.raises(ValueError, match="max_steps stands there twice"):
        parse(Config, ["--config", recipe(tmp_path, "train.max_steps: 3\ntrain: {max_steps: 5}")])
    recipe(tmp_path, "train: {batch_size: 8}\ntrain.max_steps: 3", "base.yaml")
    train = parse(Config, ["--config", recipe(tmp_path, "extends: base.yaml\ntrain: {max_steps: 5}")]).train
    assert (train.max_steps, train.batch_size) == (5, 8)  # a dotted key of the base does not outlive what extends it


def test_a_section_whose_fields_are_all_commented_out_is_empty(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 4\ntrain:\n  # max_steps: 3\n")
    assert parse(Config, ["--config", str(tmp_path / "a.yaml")]) == Config(seed=4)
