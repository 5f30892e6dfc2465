"""Every number that an option takes has a range, and what lies outside is refused on one line that names the option."""

import dataclasses
import math
import typing

import pytest

from condot.core.data_config import DataConfig
from condot.core.option_ranges import SEED_RANGE, FloatRange, IntRange, NumberRange, ranges_of
from condot.data.prepare.command import main as prepare
from condot.pipeline.config.model import ModelConfig
from condot.pipeline.config.parse import parse, parse_collecting_errors
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.sampling import options

SECTIONS = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
RECIPE = [("", Config)] + [(f"{name}.", cls) for name, cls in SECTIONS.items()] + [("model.", cls) for cls in ModelConfig.kinds.values()]
VERBS = [("--", cls) for cls in vars(options).values() if dataclasses.is_dataclass(cls) and cls.__module__ == options.__name__]


def is_number(hint):
    """Whether a type takes numbers that are not drawn from a list: int, float, tuples of them, or none."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Literal, typing.ClassVar):
        return False
    return hint in (int, float) or any(is_number(one) for one in inner)


def numbers():
    for prefix, cls in RECIPE + VERBS:
        for name, hint in typing.get_type_hints(cls).items():
            if name in {item.name for item in dataclasses.fields(cls)} and is_number(hint):
                yield pytest.param(prefix, cls, name, id=f"{cls.__name__}.{name}")


def outside(within: NumberRange):
    """Numbers that no interval may hold, and those just beyond its ends."""
    beyond = [math.nan, math.inf, -math.inf] if within.kind is float else []
    step = 1 if within.kind is int else 1e-6
    for end, closed, way in ((within.low, within.closed[0], -1), (within.high, within.closed[1], 1)):
        if math.isfinite(end):
            end = within.kind(end)
            beyond.append(end + way * step if closed else end)
        elif within.kind is int:
            beyond.append(way * 2**63 if way > 0 else -(2**63) - 1)
    return beyond


@pytest.mark.parametrize(("prefix", "cls", "name"), numbers())
def test_every_number_has_a_range_and_is_held_to_it(prefix, cls, name):
    within = ranges_of(cls)[name]
    several = typing.get_type_hints(cls)[name] not in (int, float) and "tuple" in str(typing.get_type_hints(cls)[name])
    length = 2 if name in ("guidance_interval", "position_line") else 1
    found = outside(within)
    assert found
    for value in found:
        with pytest.raises(ValueError) as error:
            cls(**{name: (value,) * length if several else value})
        text = str(error.value)
        assert (
            text.startswith(f"{prefix}{name}{' ' if prefix == '--' else '='}") and "\n" not in text and len(text.partition(": ")[2]) > 10
        ), text


@pytest.mark.parametrize(
    "words",
    ["train.weight_decay=-1", "train.beta1=2", "train.beta2=2", "train.learning_rate=inf", "log.guidance_scale=nan", "flow.time_mean=nan",
     "train.lr_decay_fraction=0", "seed=-1", "seed=18446744073709551616", "model.depth=0", "ema.halflife=nan", "data.latent_shift=inf"],
)  # fmt: skip
def test_the_command_line_names_the_option(words):
    """What the issue found to pass, given as a user gives it, to `train.py` and to the dry run that counts mistakes."""
    argv = [f"--{words}", "--train.max_steps=12"]
    name, value = words.split("=")
    with pytest.raises(ValueError, match=f"{name}={value}") as error:
        parse(Config, argv, ALIASES)
    assert "\n" not in str(error.value)
    _, found = parse_collecting_errors(Config, argv, ALIASES)
    assert len(found) == 1 and f"{name}={value}" in found[0]


@pytest.mark.parametrize(
    "words",
    ["--holdout=nan", "--holdout=-0.1", "--holdout=1", "--holdout=inf", "--shard_size=nan", "--shard_size=inf", "--shard_size=-1MB",
     "--max_side=-1", "--max_side=7", "--workers=-1", "--workers=1.5", "--seed=x"],
)  # fmt: skip
def test_numbers_of_prepare(words, tmp_path, capsys):
    """Refused before a folder is made, by the option's name."""
    try:
        assert prepare(["digits", "--output", str(tmp_path / "s"), words]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert words.partition("=")[0] in capsys.readouterr().err and not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["weights", "aspect_ratios", "latent_scale", "latent_shift", "max_bad_share", "retry_seconds"])
def test_data_s_own_options_are_finite(name):
    """`data.encode` and `data.inspect` read the section without `pipeline/`; a NaN behind a good number is found too."""
    for bad in (math.nan, math.inf):
        value = getattr(DataConfig(), name)
        with pytest.raises(ValueError, match=f"data.{name}="):
            DataConfig(**{name: (0.5, bad) if isinstance(value, tuple) else bad, **({"shards": ("a", "b")} if name == "weights" else {})})


def test_intervals():
    """Brackets take their end in; no interval holds NaN; whole numbers have 64 bits with a sign, seeds 64 without."""
    assert [FloatRange("[0, 1)").contains(x) for x in (-1e-9, 0, 0.5, 1, math.nan)] == [False, True, True, False, False]
    assert [FloatRange("(-inf, inf)").contains(x) for x in (-1e308, math.inf, -math.inf, math.nan)] == [True, False, False, False]
    assert [IntRange("[1, inf)").contains(x) for x in (0, 1, 2**63 - 1, 2**63)] == [False, True, True, False]
    assert [SEED_RANGE.contains(x) for x in (-1, 0, 2**32, 2**64 - 1, 2**64)] == [False, True, True, True, False]


def test_help_shows_the_range(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], ALIASES)
    text = capsys.readouterr().out
    for line in (
        "--train.beta1 FLOAT [0, 1)",
        "--train.max_steps INT [1, inf)",
        "--ema.halflife [FLOAT (0, inf)",
        "--flow.time_mean FLOAT ",
    ):
        assert line in text, line
