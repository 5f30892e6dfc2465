"""The table of commands: how they are named, found, helped with, and started by each launcher's way."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import yaml
from conftest import ROOT

from condot import cli
from condot.cli import COMMANDS, Command, recipes, sample, usage
from condot.core.plugins import split_plugin_words
from condot.core.recipe_file import load_recipe
from condot.pipeline.config.parse import config_from_mapping
from condot.pipeline.config.schema import Config

SLOW = ("torch", "numpy", "diffusers", "transformers", "accelerate")


def python(*words, cwd=ROOT, **env):
    """What another process prints, and its status."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_of_the_table_leads_to_a_function_and_helps_in_one_line(name):
    command = COMMANDS[name]
    module, _, function = command.target.partition(":")
    assert callable(getattr(import_module(module), function))
    assert command.help and "\n" not in command.help and len(command.help) < 60 and not command.help.endswith(".")
    assert [line.split()[0] for line in usage().splitlines() if command.help in line] == [name]


def test_help_names_the_commands_by_group():
    heads = [line.rstrip(":") for line in usage().splitlines() if line.endswith(":")]
    assert heads == ["data", "training", "models", "figures"]


def test_help_and_version_and_a_mistyped_command_wait_for_nothing_slow():
    program = "import sys; from condot.cli import _find; _find(sys.argv[1])(sys.argv[2:]); print(*sys.modules)"
    for word in ("--help", "--version", "smaple"):
        status, out, err = python("-c", program, word)
        assert status == 0 and not set(SLOW) & set(out.splitlines()[-1].split()), err
    for word, name in (("smaple", "sample"), ("evalute", "evaluate"), ("recipe", "recipes")):
        status, _, err = python("-m", "condot", word)
        assert (status, err) == (2, f"error: {word!r} is no command of condot: did you mean {name!r}?\n")
    assert "choose one of prepare, encode," in python("-m", "condot", "xyz")[2]


def test_the_checkouts_files_are_the_commands(tmp_path):
    """As users call them, from another folder where that can be: `python sample.py VERB`, `python -m data.prepare`."""
    assert "--push_to_hub" in python(str(ROOT / "sample.py"), "export", "--help", cwd=tmp_path)[1]
    assert "imagefolder" in python("-m", "data.prepare", "--help")[1]
    for name in ("prepare", "encode", "inspect"):
        assert f'start("{name}", sys.argv[1:])' in (ROOT / "data" / "commands" / f"{name}.py").read_text()
    assert 'start("train", sys.argv[1:])' in (ROOT / "train.py").read_text()


def test_a_verb_that_is_none_is_refused(capsys):
    assert sample.main(["evaluat"]) == 2
    assert "verb 'evaluat' is unknown: choose one of images, evaluate" in capsys.readouterr().err


def test_plugins_are_taken_out_of_the_words_wherever_they_stand():
    assert split_plugin_words(["--plugin", "a.py", "train", "--config", "b.yaml", "--plugin=c.py"]) == (
        ["a.py", "c.py"],
        ["train", "--config", "b.yaml"],
    )
    assert split_plugin_words(["prepare", "digits"]) == ([], ["prepare", "digits"])


def test_a_command_of_a_users_own_file(tmp_path):
    """In the help beside ours, started like ours, its errors in one line; and nothing of it where it is not named."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from condot.cli import COMMANDS, Command\n"
        "def greet(words):\n"
        "    if not words:\n"
        "        raise ValueError('nobody is named: give a name.')\n"
        "    print('hello', *words)\n"
        "    return 0\n"
        "COMMANDS.add('greet', Command(greet, 'greet somebody'))\n"
    )
    plugin = ("-m", "condot", "--plugin", str(file))
    assert python(*plugin, "greet", "you")[1] == "hello you\n"
    assert python(*plugin, "greet")[::2] == (2, "error: nobody is named: give a name.\n")
    assert "your own:\n  greet       greet somebody" in python(*plugin, "--help")[1]
    assert "greet" not in python("-m", "condot", "--help")[1]


def test_a_command_that_stands_already_is_not_replaced():
    with pytest.raises(ValueError, match="command 'train' is registered already"):
        COMMANDS.add("train", Command("a:b", "another"))


def test_an_interruption_during_the_slow_imports_says_what_is_left(monkeypatch):
    taken = []
    monkeypatch.setattr(cli, "take_signals", taken.append)
    monkeypatch.setattr(cli, "restart_with_allocator", lambda: taken.append("restart"))
    monkeypatch.setattr(cli, "guard_streams", lambda: None)
    monkeypatch.setattr(cli, "guard_output", lambda: None)
    for name in ("train", "sample", "encode", "prepare"):
        cli._prepare_process(COMMANDS[name])
    assert taken == [cli.RESUMES, "restart", cli.WHOLE, cli.AGAIN]


@pytest.mark.parametrize("name", recipes.recipes())
def test_recipes_say_what_they_are_and_can_be_copied(name, tmp_path, monkeypatch, capsys):
    """A copy is the same recipe, with those that it extends; a second copy is refused."""
    monkeypatch.chdir(tmp_path)
    assert recipes.first_sentence(recipes.recipes()[name])
    assert recipes.main([name]) == 0
    copy, said = f"{name.rpartition('/')[2]}.yaml", capsys.readouterr().out
    if name.startswith("accelerate/"):
        assert f"accelerate launch --config_file {copy}" in said
        assert yaml.safe_load((tmp_path / copy).read_text()) == yaml.safe_load(recipes.recipes()[name].read_text())
    else:
        assert f"condot train --config {copy}" in said
        assert config_from_mapping(Config, load_recipe(copy)) == config_from_mapping(Config, load_recipe(recipes.recipes()[name]))
    assert recipes.main([name]) == 2
    assert "is there already: give another --output" in capsys.readouterr().err


def test_stages_that_extend_one_another_are_copied_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [recipes.main([f"stages/{side}"]) for side in ("1024",)] == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1024.yaml", "256.yaml", "512.yaml"]
    (tmp_path / "512.yaml").unlink()
    assert recipes.main(["stages/512"]) == 0, "256.yaml is the same"
    (tmp_path / "512.yaml").unlink()
    (tmp_path / "256.yaml").write_text("seed: 3\n")
    assert recipes.main(["stages/512"]) == 2 and (tmp_path / "256.yaml").read_text() == "seed: 3\n"
    assert recipes.main(["stages/250"]) == 2 and "'stages/250' is no recipe: choose one of" in capsys.readouterr().err
