"""YAML of strangers: bombs, cycles, depth and doubled keys are refused before anything is built; so are words that nobody would read."""

import resource
import tracemalloc

import pytest

from condot.core.data_options import read_options
from condot.core.safe_yaml import MOST_BYTES, MOST_DEPTH, read_yaml
from condot.data.prepare.command import main as prepare
from condot.pipeline.config.parse import load_recipe, parse, parse_collecting_errors
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.export.load import load_flow_model

LAUGHS = "a0: &a0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "b0: &b0 {k: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{','.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
LONG = f"a: &a '{'x' * 500_000}'\nb: [{','.join(['*a'] * 100)}]\n"
HOSTILE = {
    "laughs": (LAUGHS, "too many once aliases"),
    "merges": (MERGES, "too many once aliases"),
    "long": (LONG, "too many once aliases"),
    "cycle": ("data: &a {shards: [*a]}", r"the alias \*a stands inside what it names"),
    "deep": ("[" * 500_000 + "]" * 500_000, f"deeper than {MOST_DEPTH}"),
    "deep maps": ("{a: " * 100_000, f"deeper than {MOST_DEPTH}"),
    "large": ("a: " + "b" * MOST_BYTES, "more than 1,048,576 bytes"),
    "twice": ("train: {max_steps: 3}\ntrain: {max_steps: 4}", "line 2: the key 'train' stands there twice"),
    "twice inside": ("train:\n  max_steps: 3\n  'max_steps': 4", "line 3: the key 'max_steps' stands there twice"),
    "no int": ("a: !!int ''", "not valid YAML"),
    "no time": ("a: !!timestamp x", "not valid YAML"),
    "digits": (f"a: {'9' * 5000}", "not valid YAML"),
    "bytes": (b"\xff\xfe\x00\xd8", "not valid YAML"),
    "code": ("a: !!python/object/apply:os.system ['id']", "not valid YAML"),
    "unknown alias": ("a: *nowhere", "not valid YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_recipe_needs_is_refused_before_it_is_built(name, tmp_path):
    """By every reader of recipes, on one line that names the file, without memory to speak of."""
    text, message = HOSTILE[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (read_yaml, load_recipe, lambda p: read_options(p), lambda p: parse(Config, ["--config", str(p)])):
        tracemalloc.start()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with pytest.raises(ValueError, match=message) as error:
                read(path)
            assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
            assert tracemalloc.get_traced_memory()[1] < 40e6
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes, of C libraries too"
        finally:
            tracemalloc.stop()
    assert parse_collecting_errors(Config, ["--config", str(path)])[1], "a mistake of the dry run too"


def test_a_hostile_folder_is_refused(tmp_path):
    """Its config.yaml is a stranger's."""
    import shutil

    from diffusers import DDPMScheduler, UNet2DModel

    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}'
    )
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    load_flow_model(tmp_path)
    (tmp_path / "config.yaml").write_text(LAUGHS)
    with pytest.raises(ValueError, match="too many once aliases"):
        load_flow_model(tmp_path)
    shutil.rmtree(tmp_path / "unet")


def test_aliases_and_merges_of_a_recipe_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: &d {resolution: 64}\nlog: {every: &n 7, sample_every: *n}\ntrain: {<<: {max_steps: 3}, batch_size: 8}\n")
    config = parse(Config, ["--config", str(path)])
    assert (config.log.every, config.log.sample_every, config.train.max_steps, config.train.batch_size) == (7, 7, 3, 8)
    path.write_text("")
    assert load_recipe(path) == {} and read_yaml(path) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_steps=3"], r"'max_steps=3' stands behind --config \S+a.yaml: write --train.max_steps 3"),
        (["train.max_steps=3"], "write --train.max_steps 3"),
        (["fast"], "write --section.field value"),
        (["b.yaml"], r"--config names \S+a.yaml and b.yaml: give one, whose `extends` names another"),
        (["--config", "b.yaml"], "--config names several recipes"),
        (["--config=b.yaml"], "--config names several recipes"),
        (["--train.max_steps", "3", "4"], "nrecognized options: 4"),
        (["--seed=1", "2"], "nrecognized options: 2"),
    ],
)
def test_words_that_nobody_would_read_are_refused(words, message, tmp_path):
    (tmp_path / "a.yaml").write_text("train: {max_steps: 5}")
    argv = ["--config", str(tmp_path / "a.yaml"), *words]
    with pytest.raises(ValueError, match=message):
        parse(Config, argv, ALIASES)
    assert len(parse_collecting_errors(Config, argv, ALIASES)[1]) == 1


def test_words_after_the_options_of_other_commands(tmp_path, capsys):
    from condot.cli import sample
    from condot.data.encode.command import main as encode

    for words in (["--run", "x", "y"], ["evaluate", "--run", "x", "--seed", "1", "2"], ["images", "--run=x", "--output", "a.png", "b.png"]):
        assert sample.main(words) == 2
        assert "nrecognized options" in capsys.readouterr().err
    for command in (lambda: prepare(["digits", "--output", str(tmp_path / "s"), "more"]), lambda: encode(["--config", "r.yaml", "more"])):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2 and "more" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text("data: {resolution: 5}")
    with pytest.raises(ValueError, match=r"data.resolution=64 32: give int, one alone"):
        read_options(tmp_path / "a.yaml", {"resolution": ["64", "32"]})
