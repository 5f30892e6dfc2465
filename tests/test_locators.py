"""Places as people write them: their secrets are cut wherever they stand, and the environment may hold them."""

import unicodedata

import pytest
from conftest import launch

from condot.core.data_config import DataConfig
from condot.core.printable import printable, redact, redact_url
from condot.core.urls import display_url, expand_path, last_name
from condot.data.storage.resolve import open_shard_folder
from condot.pipeline.config.parse import config_from_mapping, config_to_mapping, parse
from condot.pipeline.config.schema import Config

CASES = {
    "https://user:pass@host/x?X-Amz-Signature=abc": "https://host/x?…",
    "see 'https://token@host/x?sig=a': it": "see 'https://host/x?…': it",
    "(http://h/x?sig=a), so.": "(http://h/x?…), so.",
    "http://127.0.0.1:9: cannot connect": "http://127.0.0.1:9: cannot connect",
    "url: /p?X=1&y=2 (Caused by": "url: /p?… (Caused by",
    "http://ann:5E/5E@127.0.0.1/x": "http://127.0.0.1/x",
    "http://ann:5?E@h/x": "http://h/x",
    "http://ann:5#E@h/x": "http://h/x",
    "http://ann:5'E@h/x": "http://h/x",
    "http://ann:p@ss@h/x": "http://h/x",
    "'http://a','http://u:p@b'": "'http://a','http://b'",
    "http://[::1]:80/x?a": "http://[::1]:80/x?…",
    "http://u:p@[::1]:80/x": "http://[::1]:80/x",
    "file:///a/x@2.tar and hf://datasets/u/n@rev/x.tar": "file:///a/x@2.tar and hf://datasets/u/n@rev/x.tar",
    "http://h/{a,b}/t-{0..1}.tar?sig=1": "http://h/{a,b}/t-{0..1}.tar?…",
    "s3://key:secret@b/x": "s3://b/x",
    "simplecache::https://u:p@h/x?s=1": "simplecache::https://h/x?…",
    "https://h/x?sig=${SIG}&e=${E}": "https://h/x?sig=${SIG}&e=${E}",
    "https://ann:${PW}@h/x?sig=${SIG}&e=5": "https://ann:${PW}@h/x?…",
    "https://h/x?…": "https://h/x?…",
    "http:/ann:pw@h/x?z": "http:/h/x?…",  # as Path makes it
    "URL('http://u:p@h/x')": "URL('http://h/x')",
    "invalid token hf_abcdefghijklmnopqrst.": "invalid token hf_….",
    "what? is it? x=1": "what? is it? x=1",
    "http://h/x#token=1": "http://h/x#…",
    "http://h/x#1.tar": "http://h/x#1.tar",
    "http://h/a=1/x;sig=5E&t=1": "http://h/a=1/x;…",
    "http://h/x&sig=5E?y": "http://h/x&…?…",
    "http://h/x%3Fsig=5E": "http://h/x%3F…",
    "http://h/x;sig=${SIG}": "http://h/x;sig=${SIG}",
    "http://h/R&D/x;1.tar": "http://h/R&D/x;1.tar",
    "C:/Users/a@b": "C:/Users/a@b",
    "http://ann:5E is wrong": "http://ann:… is wrong",
    "gopher:// is not read": "gopher:// is not read",
    "sv=2024&sig=x": "sv=2024&sig=x",  # no URL
}


@pytest.mark.parametrize("text", CASES)
def test_a_text_keeps_its_sense_and_loses_its_secrets(text):
    assert redact(text) == CASES[text]
    assert redact(CASES[text]) == CASES[text], "and once is enough"


def test_signs_that_a_terminal_obeys_are_written_out():
    kinds = {unicodedata.category(sign) for sign in map(chr, range(0x11000)) if printable(sign) != sign}
    assert kinds == {"Cc", "Cs", "Zl", "Zp", "Cf"}, "of Cf the marks of direction"


def test_a_place_that_is_a_whole_text():
    assert redact_url("http://h/a b/x?5ECRET") == "http://h/a b/x?…" and redact_url("runs/a?b=1") == "runs/a?b=1"
    for odd in " '\"<>`\t\n\u2003":
        assert redact_url(f"http://ann:5{odd}E@h/x?5{odd}E") == redact_url(f"http://h/x?5{odd}E") == "http://h/x?…"
    assert redact_url("https:/ann:5E@h/x?sig=5E") == "https:/h/x?…", "as Path makes it"
    assert redact_url("pipe:curl http://u:5E@h/x?5E | cat") == "pipe:curl http://h/x?… | cat"
    assert display_url("http://u:p@h/x/?sig=1") == "http://h/x/" and display_url("/data/x?y") == "/data/x?y"
    assert last_name("http://u:p@h/x/photos.parquet?sig=1") == "photos.parquet" and last_name("/a/b?.parquet") == "b?.parquet"


def test_what_the_environment_holds(monkeypatch, tmp_path):
    monkeypatch.setenv("SIG", "a%2Fb==")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("http://h/x?sig=${SIG}&y") == "http://h/x?sig=a%2Fb==&y" and expand_path("~/shards") == f"{tmp_path}/shards"
    assert expand_path("a$b{c}~/d") == "a$b{c}~/d"
    with pytest.raises(ValueError, match=r"the environment has no LACKING. Set it: `export LACKING="):
        expand_path("http://h/x?sig=${LACKING}")
    with pytest.raises(ValueError, match=r"^data.shards='http://h/x\?…' comes .* give the URL again"):
        expand_path("http://h/x?…")
    with pytest.raises(ValueError, match=r"^--output='\$\{LACKING\}/x': the environment"):
        expand_path("${LACKING}/x", "--output")


def test_a_recipe_keeps_the_name_and_not_the_value(monkeypatch):
    monkeypatch.setenv("SIG", "5ECRET")
    config = parse(Config, ["--data.shards", "http://h/a b/x?sig=${SIG}", "http://u:p@h/x?sig=5ECRET", "/local?a=1", "hf://datasets/u/n"])
    kept = config_to_mapping(config)["data"]["shards"]
    assert kept == ["http://h/a b/x?sig=${SIG}", "http://h/x?…", "/local?a=1", "hf://datasets/u/n"]
    assert config_from_mapping(Config, config_to_mapping(config)).data.shards == tuple(kept)


def test_the_home_folder_may_be_written_short(digits, monkeypatch, tmp_path):
    """In a recipe, where no shell expands it; `~` within a name is a name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").symlink_to(digits)
    folder, _ = open_shard_folder("~/shards", DataConfig())
    assert folder.name == f"{tmp_path}/shards"
    config = parse(Config, ["--data.shards=~/shards", "--output_dir=~/runs/a~", "--data.encoded", "~/e"])
    assert (config.data.shards, config.output_dir, config.data.encoded) == ((f"{tmp_path}/shards",), f"{tmp_path}/runs/a~", f"{tmp_path}/e")


PROGRAM = """
import logging, sys, threading, warnings
from {module} import guard_output
guard_output()
url = "http://u:5ECRET@h/x?sig=5ECRET"
warnings.warn(f"bad {{url}} \\x1b[2J")
logging.getLogger("fsspec").warning("bad %s \\x1b[2J", url)
thread = threading.Thread(target=lambda: 1 / len(url[:0]) if False else (_ for _ in ()).throw(RuntimeError(f"bad {{url}}")))
thread.start(); thread.join()
try:
    raise OSError(f"bad {{url}} \\x1b]52;c;aGk=\\x07")
except OSError as error:
    raise RuntimeError("\\u202ebad") from error
"""


def test_what_python_prints_by_itself_is_guarded():
    """Warnings, log lines, tracebacks of threads and of the program with all their causes; the status stays 1."""
    done = launch("-W", "always", "-c", PROGRAM.format(module="condot.core.printable"))
    assert done.returncode == 1 and done.stderr.count("bad http://h/x?…") == 4 and "\\x1b]52" in done.stderr and "\\u202ebad" in done.stderr
    source = [line for line in done.stderr.splitlines() if "5ECRET" in line]
    assert not source and "\x1b" not in done.stderr


@pytest.mark.parametrize("place", ["", " ", "s3://bucket/shards", "https://user:secret@host/x"])
def test_shards_are_packed_into_a_folder_of_this_machine(place, tmp_path, monkeypatch, capsys):
    """`--output ''` packed into the working directory, and a URL into folders named like it."""
    from condot.data.prepare.command import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["digits", "--output", place])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert "is no folder of this machine" in error and "secret" not in error
