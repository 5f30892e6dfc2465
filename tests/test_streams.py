"""Streams that webdataset opens become shards with our index: the same samples, or an error and nothing half-written."""

import functools
import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pytest

from condot.core.data_config import DataConfig
from condot.data.format.index_record import index_path, slice_image
from condot.data.prepare.command import main
from condot.data.prepare.tar_streams import display_stream, expand_streams, is_stream
from condot.data.storage.resolve import open_shard_folder
from tests.shardmaker import png

SECRET = "5ECRET"


def write_tar(path, first, count, more=b""):
    """Samples of a `.image.png`, a `.caption` and a `.cls`; returns the images by key."""
    images = {f"d/{first + i:04d}": png(first + i) for i in range(count)}
    with tarfile.open(path, "w") as tar:
        for i, (key, image) in enumerate(images.items()):
            for extension, body in (("caption", f"number {i}".encode()), ("image.png", image), ("cls", str(i % 3).encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return images


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Two tars, `a-0.tar` and `a-1.tar`, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    return write_tar("a-0.tar", 0, 9) | write_tar("a-1.tar", 100, 9)


def prepare(source, *more):
    return main(["webdataset", source, "--output", "out", "--rename", "txt=caption", "png=image.png", "--workers", "1", *more])


def packed(folder):
    """Images by key, as tarfile reads the shards, checked against what the index points at."""
    found = {}
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        path = folder / shard["name"]
        with tarfile.open(path) as tar:
            bodies = {info.name: tar.extractfile(info).read() for info in tar}
        images = {name.removesuffix(".png"): body for name, body in bodies.items() if name.endswith(".png")}
        whole = path.read_bytes()
        for record, image in zip(np.load(index_path(path)), images.values(), strict=True):
            start = (int(record["payload"]) - int(record["before"])) * 512
            assert slice_image(whole[start:], int(record["before"]), int(record["bytes"])) == image
        found |= images
    return found


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        """Print nothing: the URLs of this server hold secrets."""


def records(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_commands_output_becomes_shards_of_the_same_samples(tars, tmp_path, capsys):
    assert prepare("pipe:cat a-{0..1}.tar", "--shard_size", "10kB") == 0
    out = tmp_path / "out"
    assert packed(out) == tars and list(packed(out)) == list(tars)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["shards"]) > 4 and manifest["tally"]["captions"] == 18 and manifest["class_names"] == ["0", "1", "2"]
    assert not (out / ".packing").exists()
    before = records(out)
    assert prepare("pipe:cat a-{0..1}.tar", "--shard_size", "10kB") == 0 and records(out) == before
    assert prepare("pipe:cat a-0.tar", "--shard_size", "10kB") == 2 and "other images or settings" in capsys.readouterr().err


def test_bytes_do_not_depend_on_clock_or_place(tars, tmp_path):
    assert main(["webdataset", "pipe:cat a-0.tar", "--output", "one", "--rename", "png=image.png"]) == 0
    assert main(["webdataset", f"file://{tmp_path}/a-0.tar", "--output", "two", "--rename", "png=image.png"]) == 0
    one, two = (tmp_path / name / "train-00000-00000.tar" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_filters_choose_files_and_samples(tars, tmp_path):
    assert prepare("pipe:cat a-0.tar::pipe:gzip -c a-1.tar", "--select_files", "*.png", "*.caption", "--select_keys", "d/0*3", "*5") == 0
    assert list(packed(tmp_path / "out")) == ["d/0003", "d/0005", "d/0103", "d/0105"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tally"]["captions"] == 4 and manifest["class_names"] == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat a-0.tar; exit 3", "ended with status 3"),
        ("cat a-0.tar | head -c 5120", "no whole tar"),  # between two files
        ("cat a-0.tar | head -c 5000", "no whole tar"),
        ("gzip -c a-0.tar | head -c 500", "no whole tar"),
        ("cat a-0.tar a-1.tar", "behind its end"),
        ("echo hello", "no whole tar"),
        ("true", "no whole tar"),
        ("nosuchcommand", "ended with status 127"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error_and_leaves_no_shard(tars, tmp_path, capsys, command, message):
    assert prepare(f"pipe:{command}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error or (message == "no whole tar" and "is no whole tar" in error)
    assert not list((tmp_path / "out").iterdir())


def test_the_same_command_goes_on_and_reads_no_finished_stream_again(tars, tmp_path, capsys):
    source = "pipe:echo 0 >> log; cat a-0.tar::pipe:echo 1 >> log; cat a-1.tar | if test -e ok; then cat; else head -c 5120; fi"
    assert prepare(source, "--shard_size", "10kB") == 2
    (tmp_path / "ok").touch()
    assert prepare(source, "--shard_size", "10kB") == 0
    assert packed(tmp_path / "out") == tars and (tmp_path / "log").read_text().split() == ["0", "1", "1"]


def test_names_that_do_not_fit_are_left_out_whole(tars, tmp_path, capsys):
    with tarfile.open("long.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("a", "b" * 99, "c"):
            for extension, body in (("png", png(len(key))), ("txt", b"x")):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    assert prepare("pipe:cat long.tar") == 2 and "a name of 103 bytes" in (tmp_path / "out" / "report.json").read_text()
    assert prepare("pipe:cat long.tar", "--skip_corrupt") == 0
    assert list(packed(tmp_path / "out")) == ["a", "c"]


def test_secrets_are_in_no_record_and_no_message(tars, tmp_path, capsys):
    assert prepare(f"pipe:TOKEN={SECRET} cat --header={SECRET} a-0.tar") == 2
    assert prepare(f"pipe:cat a-0.tar # {SECRET}") == 0
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        more = ["--rename", "png=image.png", "--workers=1"]
        place = f"http://ann:{SECRET}@127.0.0.1:{server.server_port}"
        assert main(["webdataset", f"{place}/a-{{0..1}}.tar?sig={SECRET}", "--output=web", *more]) == 0
        assert main(["webdataset", f"{place}/a-7.tar?sig={SECRET}", "--output", "web7"]) == 2
        assert main(["webdataset", f"{place}/a-{{0..1}}.tar?sig=another", "--output=web", *more]) == 0
        server.shutdown()
    assert packed(tmp_path / "web") == tars
    said = capsys.readouterr()
    assert SECRET not in said.err and SECRET not in said.out
    for folder in ("out", "web", "web7"):
        assert SECRET.encode() not in records(tmp_path / folder)


def test_a_command_is_run_for_nobody_but_the_command_line(tars, tmp_path):
    """Neither a recipe nor a packed folder can name one."""
    with pytest.raises((ValueError, OSError)):
        open_shard_folder("pipe:touch ran", DataConfig())
    assert main(["imagefolder", "pipe:touch ran", "--output", "x"]) == 2
    assert main(["parquet", "pipe:touch ran", "--output", "x"]) == 2
    assert not (tmp_path / "ran").exists()


def test_what_is_a_stream():
    sources = ("pipe:cat a", "https://h/a.tar", "a-{0..1}.tar", "/x/pipe:y", "C:a")
    assert [is_stream(text) for text in sources] == [True, True, False, False, False]
    assert expand_streams("https://h/{a,b}.tar::file:///c") == ["https://h/a.tar", "https://h/b.tar", "file:///c"]
    with pytest.raises(ValueError, match="'pipe:aws s3 cp s3://BUCKET/"):
        is_stream("s3://bucket/a.tar")
    with pytest.raises(ValueError, match="no URL beside URLs"):
        expand_streams("file:///c::d.tar")
    assert display_stream(f"pipe:A={SECRET} curl -u a:{SECRET} x") == "pipe:curl ..."
    assert display_stream(f"https://a:{SECRET}@h/x?sig={SECRET}") == "https://h/x?…"
