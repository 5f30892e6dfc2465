"""Signatures, tokens and passwords of URLs stand in nothing that is printed or kept, whatever command was given them."""

import io
from pathlib import Path

import frozen
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import fit
from PIL import Image
from servers import Fault, serving

import condot.data.encode.command
import condot.data.inspect
import condot.data.prepare.command
from condot.cli import sample

SIGNATURE, PASSWORD, TOKEN = "5ECRETsignature01", "5ECRETpassword02", "hf_5ECRETtokenTokenTokenToken"
SECRETS = ("5ECRET",)
"""What all of them hold."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CONDOT_CACHE", "")
    monkeypatch.setattr("condot.data.storage.retry._said_at", -1e9)
    with serving() as server:
        yield server


def signed(server, path="", signature=SIGNATURE):
    """A URL of the server with a password before the host, and a signature and a token behind it."""
    host = server.url.removeprefix("http://")
    return f"http://ann:{PASSWORD}@{host}/{path}?X-Amz-Signature={signature}&token={TOKEN}"


def clean(text):
    """Whether a text holds no secret, and is not empty."""
    return text.strip() != "" and not any(secret in text for secret in SECRETS)


def holding(folder: Path) -> list[str]:
    """Files below a folder that hold a secret in their bytes or in their name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files, folder
    return [str(p) for p in files if any(secret.encode() in p.read_bytes() or secret in str(p) for secret in SECRETS)]


def remote(server, folder):
    server.files |= {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_keeps_and_prints_no_secret(digits, tmp_path, server, capfd):
    """Trained, resumed by another signature (they expire), exported, sampled."""
    remote(server, digits)
    run, common = tmp_path / "run", (f"--data.cache_dir={tmp_path / 'cache'}", "--log.report_to=tensorboard")
    first = (*common, "--train.max_steps=4", "--log.sample_every=4", "--log.sample_steps=2", "--export=true")
    assert fit(signed(server), run, *first) == 0
    assert SIGNATURE in str(server.queries)
    server.queries.clear()
    assert fit(signed(server, signature="5ECRETanother"), run, *common, "--train.max_steps=8") == 0, "another signature, the same data"
    assert all("5ECRETanother" in query for query in server.queries)
    for words in (["export", f"--run={run}"], [f"--run={run}", f"--output={tmp_path / 'run/grid.png'}", "--num_inference_steps=1"]):
        assert sample.main(words) == 0
    shown = capfd.readouterr()
    assert clean(shown.out + shown.err) and holding(tmp_path) == []
    kept = yaml.safe_load((run / "config.yaml").read_text())["data"]["shards"]
    assert kept == [f"{server.url}/?…"], "a person can still tell the source"
    assert fit(kept[0], tmp_path / "again") == 2
    assert "give the URL again" in capfd.readouterr().err


def test_encoding_and_looking_print_no_secret(tmp_path, server, capfd):
    images = frozen.shards(tmp_path / "images")
    remote(server, images)
    recipe = frozen.recipe(
        tmp_path / "recipe.yaml",
        shards=signed(server),
        autoencoder=frozen.kl(tmp_path / "vae"),
        encoded=tmp_path / "encoded",
        resolution=32,
        cache_dir=str(tmp_path / "cache"),
    )
    assert condot.data.encode.command.main(["--config", str(recipe)]) == 0
    recipe.rename(tmp_path.parent / f"{tmp_path.name}.yaml")  # the user's own
    assert condot.data.inspect.main([signed(server), "--output", str(tmp_path / "inspect.png"), "--resolution=32", "--batch_size=2"]) == 0
    shown = capfd.readouterr()
    assert clean(shown.out + shown.err) and holding(tmp_path) == []


def test_packing_from_a_url_prints_and_keeps_no_secret(tmp_path, server, capfd):
    random = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    file = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "text": ["a", "b", "c", "d"]}), file)
    server.files["photos.parquet"] = file.getvalue()
    condot.data.prepare.command.main(["parquet", signed(server, "photos.parquet"), "--output", str(tmp_path / "out")])
    shown = capfd.readouterr()
    assert clean(shown.out + shown.err) and holding(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("fault", "url"),
    [
        (Fault(status=403), ""),
        (Fault(status=404), ""),
        (Fault(status=500), ""),
        (Fault(cut_at=10), ""),
        (Fault(stall_at=10), ""),
        (None, "http://ann:5ECRET@127.0.0.1:9/x?sig=5ECRET"),
        (None, "http://ann:5ECRET@127.0.0.1:99999/x?sig=5ECRET"),
        (None, "http://ann:5ECRET/5ECRET@127.0.0.1/x?sig=5ECRET"),
        (None, "http://ann:5ECRET@5ECRET@127.0.0.1:9/x?5ECRET"),
        (None, "http://[5ECRET@127.0.0.1/x?sig=5ECRET"),
        (None, "http://ann:[5ECRET]@127.0.0.1/x?sig=5ECRET"),
        (None, "http://127.0.0.1:9/a b/x?5ECRET"),
        (None, "http://127.0.0.1:9/{a,b}/train-{0..1}.tar?sig=5ECRET"),
        (None, "http://127.0.0.1:9/train-{1,1}.tar?sig=5ECRET"),
        (None, "http://127.0.0.1:9/*.tar?sig=5ECRET"),
        (None, "http://127.0.0.1:9/{a?sig=5ECRET"),
        (None, "gopher://ann:5ECRET@host/x?sig=5ECRET"),
        (None, "gs://5ECRET@host/x?sig=5ECRET"),
        (None, "hf://datasets/user/name?token=hf_5ECRETtokenTokenTokenToken"),
        (None, "file:///tmp/missing?sig=5ECRET"),
        (None, "memory://missing?sig=5ECRET"),
        (None, "http://127.0.0.1:9/x#token=5ECRET"),
    ],
)
def test_errors_name_the_source_and_no_secret(digits, tmp_path, server, capfd, monkeypatch, fault, url):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    remote(server, digits)
    if fault:
        server.always["manifest.json"] = fault
    url = url or signed(server)
    more = (f"--data.cache_dir={tmp_path / 'cache'}", "--data.retry_seconds=0.3")
    assert fit(url, tmp_path / "run", *more) == 2
    assert fit(url, tmp_path / "run", *more, "--dry_run=true") == 2
    recipe = frozen.recipe(
        tmp_path.parent / f"{tmp_path.name}.yaml",
        shards=url,
        cache_dir=str(tmp_path / "cache"),
        encoded="x",
        retry_seconds=0.3,
        autoencoder="x",
    )
    assert condot.data.inspect.main([url, "--config", str(recipe), "--output", str(tmp_path / "inspect.png")]) == 2
    assert condot.data.encode.command.main(["--config", str(recipe)]) == 2
    assert condot.data.prepare.command.main(["parquet", url.replace(" ", ""), "--output", str(tmp_path / "out")]) == 2
    shown = capfd.readouterr()
    assert clean(shown.out + shown.err), [line for line in (shown.out + shown.err).splitlines() if not clean(line)]
    assert all(len(line) < 1000 for line in shown.err.splitlines())
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"5ECRET" in path.read_bytes() or "5ECRET" in str(path) for path in kept)


@pytest.mark.parametrize("command", [condot.data.prepare.command.main, condot.data.inspect.main])
def test_what_was_mistyped_is_repeated_without_secrets(command, capsys):
    """argparse repeats words that it does not know."""
    with pytest.raises(SystemExit):
        command(["digits", "--config=x", "--output=x", "--nosuch", "http://ann:5ECRET@h/x?sig=5ECRET", "\x1b[2J", "a\nb"])
    told = capsys.readouterr().err
    assert clean(told) and "\x1b" not in told and "http://h/x?…" in told.splitlines()[-1]


def test_no_name_begins_a_line_of_its_own(tmp_path, capsys):
    """What is packed is told in lines, and a name holds none."""
    for name in ("a\nFORGED", "b\rFORGED"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name / f"{name}.png")
        (tmp_path / "in" / name / f"{name}.odd\nFORGED").touch()
    assert condot.data.prepare.command.main(["imagefolder", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert r"a\x0aFORGED" in told and not any(line.startswith("FORGED") for line in told.splitlines())
