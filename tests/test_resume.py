"""What a resumed run changes of its recipe: free, recorded, refused or kept from the beginning; every field has one rule."""

import dataclasses
import json
import shutil
import typing

import pytest
import torch
import yaml
from conftest import fit

from condot.cli import sample
from condot.core.data_config import DataConfig
from condot.core.option_ranges import ranges_of
from condot.pipeline.checkpoint.store import averages, load_state, load_tensors
from condot.pipeline.config.kinds import kind_fields
from condot.pipeline.config.model import ModelConfig
from condot.pipeline.config.parse import _dotted_keys, config_from_mapping, config_to_mapping
from condot.pipeline.config.schema import Config, TrainConfig
from condot.pipeline.training.optimizer import learning_rate
from condot.pipeline.training.resume_rules import (
    JOURNAL_FILE,
    RESUME_RULES,
    SettingsChange,
    change_notes,
    find_differences,
    resume_config,
    rule_of,
    run_facts,
)

KINDS = dict(ModelConfig.kinds)


def fields():
    """Every field of a recipe, of every kind of network."""
    return sorted({key for kind in KINDS.values() for key in _dotted_keys(Config(model=kind()))})


OTHER = {"data.cache_size": "5GB", "data.caption": "json.x", "data.encoding": "cached", "data.lost_shards": "skip", "data.weights": (1.0,)}
"""Of fields whose values are checked by rules of their own."""


def changed(config, key):
    """A recipe with another value of a field."""
    section, _, name = key.rpartition(".")
    holder = getattr(config, section) if section else config
    value, hint = getattr(holder, name), typing.get_type_hints(type(holder))[name]
    choices = [one for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal for one in typing.get_args(part)]
    choices += kind_fields(type(holder))[name].names if name in kind_fields(type(holder)) else ()
    if key in OTHER:
        other = OTHER[key]
    elif isinstance(value, bool) or hint is bool or bool in typing.get_args(hint):
        other = not value
    elif choices:
        other = next(one for one in choices if one != value and (one,) != value)
        other = (other,) if isinstance(value, tuple) else other
    elif (within := ranges_of(type(holder)).get(name)) is not None:
        tries = [within.kind(number) for number in ((7, 64) if "spike" in name else (0.0625, 0.25, 0.75, 2, 7, 64))]
        other = next(one for one in tries if within.contains(one) and one != value and (one,) != value)
        several = "tuple" in str(hint)
        other = (other, other + 1) if "line" in name else (other,) if several else other
    else:
        other = ("other",) if isinstance(value, tuple) else "other"
    new = dataclasses.replace(holder, **{name: other})
    return dataclasses.replace(config, **{section: new}) if section else new


def test_every_field_has_one_rule():
    for key in fields():
        rule_of(key)
    listed = [key for keys in RESUME_RULES.values() for key in keys]
    assert len(set(listed)) == len(listed)
    assert {key for key in listed if not key.endswith("*")} <= set(fields()), "and no rule is of a field that is gone"


@pytest.mark.parametrize("key", [key for key in fields() if key != "model.kind"])
def test_every_field_is_held_to_its_rule(key):
    """Recorded: in the journal, before and after. Refused: a fact that differs. Free: neither. A beginning: refused by itself."""
    kind = next(kind for kind in KINDS.values() if key in _dotted_keys(Config(model=kind())))
    base = Config(model=kind(), data=DataConfig(shards=("a",), encoded="c"))
    new, rule = changed(base, key), rule_of(key)
    assert config_to_mapping(new) != config_to_mapping(base)
    facts = [run_facts(config, "x") | {"lora": [config.train.lora_rank, config.train.lora_alpha]} for config in (base, new)]
    differ = find_differences(*facts)
    state = {"step": 5, "images": 80, "config": config_to_mapping(base)}
    if rule == "beginning":
        with pytest.raises(ValueError, match=f"{key}=other: the run in runs/untitled began from scratch.*Leave --{key} out"):
            resume_config(new, state)
        return
    _, change = resume_config(new, state)
    assert bool(change) == (rule == "recorded") and bool(differ) == (
        rule == "refused" or (key == "data.caption" and new.model.conditioning == "text")
    )
    if change:
        before, after = (value for config in (base, new) for value in [config_to_mapping(config)])
        section, name = key.split(".")
        assert dict(change.settings) == {key: (before[section][name], after[section][name])}
        assert json.loads(json.dumps(change.as_dict()))["step"] == 5 and key in change_notes(change, new)[0]
    if rule == "refused":
        assert key.rpartition(".")[2] in differ[0] or "lora" in differ[0]


def test_the_beginning_is_the_run_s_own(tmp_path):
    """What was left out is taken from the run, what is said again is compared, and another one is refused either way round."""
    (tmp_path / "w").mkdir()
    begun = Config(init_from=str(tmp_path / "w"))
    state = {"step": 5, "images": 80, "config": config_to_mapping(begun)}
    for given in ("", str(tmp_path / "w"), f"{tmp_path}/./w/"):
        assert resume_config(Config(init_from=given), state) == (begun, None)
    with pytest.raises(
        ValueError, match=r"init_from=facebook/DiT-XL-2-256: the run in runs/untitled began from init_from=.*w, and weights"
    ):
        resume_config(Config(init_from="facebook/DiT-XL-2-256"), state)
    with pytest.raises(ValueError, match=r"checkpoint.start_from=runs/a: the run in .* began from init_from"):
        resume_config(config_from_mapping(Config, {"checkpoint": {"start_from": "runs/a"}}), state)


def test_older_checkpoints_are_read_with_the_defaults_of_what_they_do_not_name():
    saved = config_to_mapping(Config())
    del saved["train"]["encoder_dropout"], saved["guard"]
    saved["ema"]["halflife"] = 2e6
    assert resume_config(Config(), {"step": 1, "config": saved})[1] is None
    facts, older = run_facts(Config(), "x"), run_facts(Config(), "x")
    del older["flow"]["coupling"], older["data"]["bit_depth"]
    assert find_differences(older, facts) == []


@pytest.mark.parametrize("ramp", ["constant", "linear", "cosine"])
def test_a_longer_run_says_how_the_rate_jumps(ramp):
    """Old and new rate from the formula: at the end of a cosine of 100 steps 1.5e-4 of 1e-4, half of a peak when 200 are asked for."""
    old, new = (Config(train=TrainConfig(max_steps=steps, lr_ramp=ramp)) for steps in (100, 200))
    _, change = resume_config(new, {"step": 100, "images": 1, "config": config_to_mapping(old)})
    if ramp == "constant":
        assert change.rate is None and len(change_notes(change, new)) == 1
        return
    last = {"linear": 1e-6, "cosine": 1e-4 * (1 - torch.cos(torch.tensor(torch.pi * 0.01, dtype=torch.float64)).item()) / 2}[ramp]
    assert change.rate == pytest.approx((last, 5e-5), rel=1e-9)
    assert f"the learning rate jumps: step 100 was taken at {last:.3g}, the next is at 5e-05" in change_notes(change, new)[1]
    shorter = resume_config(old, {"step": 50, "images": 1, "config": config_to_mapping(new)})[1]
    assert shorter.rate == pytest.approx((learning_rate(49, new.train), learning_rate(50, old.train)))


def test_a_run_keeps_a_journal_and_its_averages_their_names(digits, trained, tmp_path, capsys):
    """Two half-lives, then the second alone: what is exported under its name is the average that the run had kept under it."""
    run = tmp_path / "run"
    words = ("--ema.ramp=2", "--train.lr_ramp=cosine")
    assert fit(digits, run, *words, "--ema.halflife", "100", "30", "--train.max_steps=4") == 0
    second = averages(run / "checkpoint-4", "halflife=30")
    shutil.copytree(run, tmp_path / "twin")
    assert not (run / JOURNAL_FILE).exists()
    capsys.readouterr()
    assert fit(digits, run, *words, "--ema.halflife=30", "--train.max_steps=8", "--train.learning_rate=2e-3") == 0
    out = capsys.readouterr().out
    assert "resumed with other settings, kept in settings.jsonl: " in out and "ema.halflife 100 30 -> 30" in out
    assert "the learning rate jumps: step 4 was taken at 0.000146, the next is at 0.001" in out
    state = load_state(run / "checkpoint-8")
    (line,) = [json.loads(text) for text in (run / JOURNAL_FILE).read_text().splitlines()]
    assert line["changed"] == {
        "train.max_steps": [4, 8], "train.learning_rate": [0.001, 0.002], "ema.halflife": [[100.0, 30.0], [30.0]],
    }  # fmt: skip
    assert state["changes"] == [line] and (line["step"], line["images"]) == (4, 64)
    assert fit(digits, tmp_path / "twin", *words, "--ema.halflife", "30", "100", "--train.max_steps=8", "--train.learning_rate=2e-3") == 0
    one, two = (averages(folder / "checkpoint-8") for folder in (run, tmp_path / "twin"))
    assert all(torch.equal(one[name], two[name]) for name in second)
    assert not all(torch.equal(one[name], value) for name, value in averages(tmp_path / "twin/checkpoint-8", "halflife=100").items())
    assert fit(digits, run, *words, "--ema.halflife=30", "--train.max_steps=8", "--train.learning_rate=2e-3") == 0
    assert len((run / JOURNAL_FILE).read_text().splitlines()) == 1, "the same command again changes nothing"
    assert sample.main(["export", "--run", str(run)]) == 0
    card = (run / "export/README.md").read_text()
    assert "Resumed with other settings: after step 4, `ema.halflife 100 30 -> 30`, `train.learning_rate 0.001 -> 0.002`" in card
    assert json.loads((run / "export/provenance.json").read_text())["settings"] == [line]
    assert fit(digits, run, *words, "--ema.halflife=30", "--train.max_steps=9", "--init_from=facebook/DiT-XL-2-256") == 2
    assert "init_from=facebook/DiT-XL-2-256: the run in" in capsys.readouterr().err
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_raw_weights_are_exported_raw_after_the_averages_were_left(digits, tmp_path):
    """`ema.enabled` false on a finished run: no step follows, and what stands in the average's place is not called raw."""
    run = tmp_path / "run"
    assert fit(digits, run, "--train.max_steps=4") == 0
    assert fit(digits, run, "--train.max_steps=5", "--ema.enabled=false") == 0
    tensors = load_tensors(run / "checkpoint-5")
    assert all(torch.equal(value, tensors[f"ema.{name[6:]}"]) for name, value in tensors.items() if name.startswith("model."))
    assert isinstance(SettingsChange(1, 1, {}), SettingsChange)


def test_a_ramp_that_would_never_end_is_refused(digits, tmp_path, capsys):
    for more in ((), ("--dry_run",)):
        assert fit(digits, tmp_path / "run", "--train.lr_warmup_steps=13", *more) == 2
        told = capsys.readouterr()
        assert "train.lr_warmup_steps=13 is more than train.max_steps=12" in told.err + told.out
    assert not (tmp_path / "run").exists()
    config_from_mapping(Config, {"train": {"lr_warmup_steps": 13, "max_steps": 12}})
