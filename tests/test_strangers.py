"""What servers and manifests of strangers answer: no escape reaches the screen, no redirect leads elsewhere, no number breaks anything."""

import json
import re
import socket
import threading
from contextlib import contextmanager

import frozen
import pytest
from conftest import fit
from servers import serving

import condot.data.encode.command
import condot.data.inspect
from condot.core.data_config import DataConfig
from condot.data.loader.build import open_shards
from condot.data.storage.cache import Cache
from condot.data.storage.download import _get
from condot.data.storage.remote import RemoteFolder
from condot.data.storage.resolve import open_shard_folders
from condot.data.storage.retry import HttpError, one_line, warn_limited

ESCAPES = "\x1b[2J\x1b]52;c;aGk=\x07\r\x9b31m\u202egnp.exe\x00"


def safe(text):
    """Whether a terminal does nothing but show a text; a bar's own carriage returns and its colours aside."""
    plain = re.sub(r"\r[^\n]*(?:it|image|step|sample)[^\n]*", "", text).replace("\n", "")
    return not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain.replace("\x1b[A", ""))


@contextmanager
def answering(*answers):
    """A server of raw answers, one a connection, the last for ever; and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for number in range(10**6):
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answers[min(number, len(answers) - 1)])

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The error in which a raw answer for a manifest ends, soon and on one line."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    cache = Cache(tmp_path / "cache", 10**8)

    def error(*answers):
        with answering(*answers) as url, pytest.raises(ValueError) as caught:
            RemoteFolder(f"{url}/x?sig=5ECRET", cache=cache, retry_seconds=0.3)
        text = str(caught.value)
        assert safe(text) and len(text) < 1500 and "5ECRET" not in text
        return text

    return error


def head(status, *lines):
    return b"\r\n".join([b"HTTP/1.1 " + status, *lines, b"Content-Length: 0", b"Connection: close", b"", b""])


def test_reasons_and_headers(refused, capfd):
    assert "HTTP 403" in refused(head(b"403 No \x1b]52;c;aGk=\x07 \xc2\x9b31m \xe2\x80\xae"))
    assert "HTTP 500" in refused(head(b"500 \x1b[2J"))
    assert "cannot be read" in refused(head(b"206 OK", b"Content-Range: bytes \x1b[2J"))
    assert "cannot be read" in refused(head(b"200 OK", b"X: " + b"\x1b[2J" * 50_000))
    assert "cannot be read" in refused(head(b"200 OK", *(b"X-%d: y" % n for n in range(100_000))))
    assert "cannot be read" in refused(b"\x1b[2J\r\n\r\n") and "cannot be read" in refused(b"")
    assert "HTTP 503" in refused(head(b"503 x", b"Retry-After: 999999999"))
    assert safe(capfd.readouterr().err)


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "gopher://127.0.0.1/x", "//", "http://", "/x" * 5000, "javascript:alert(1)", "http://u:5ECRET@[/x"]
)
def test_redirects_that_lead_nowhere(refused, place):
    assert "cannot be read" in refused(head(b"302 Found", b"Location: " + place.encode()))


def test_a_redirect_to_another_server_gets_no_signature_and_is_followed(tmp_path, monkeypatch):
    """As data sets on the Hub and releases on GitHub are served; what is not in the way has no password of ours."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    images = frozen.shards(tmp_path / "images")
    with serving() as server:
        server.files = {"manifest.json": (images / "manifest.json").read_bytes()}
        with answering(head(b"302 Found", b"Location: " + f"{server.url}/manifest.json".encode())) as url:
            url = url.replace("http://", "http://ann:5ECRET@")
            folder = RemoteFolder(f"{url}?sig=5ECRET", cache=Cache(tmp_path / "cache", 10**8), retry_seconds=0.5)
        assert len(folder.manifest.shards) == 3 and server.queries == {""} and server.authorisations == {None}


def test_a_redirect_from_https_to_http_is_refused():
    """Anybody on the way could change what comes."""
    import asyncio
    from types import SimpleNamespace

    from yarl import URL

    closed = []
    response = SimpleNamespace(url=URL("http://h/x?sig=5ECRET"), status=200, headers={}, close=lambda: closed.append(True))

    class Session:
        async def get(self, url, **more):
            return response

    async def session():
        return Session()

    with pytest.raises(ValueError, match=r"redirected from https to http://h/x\?…, where anybody"):
        asyncio.run(_get(SimpleNamespace(set_session=session), "https://h/x", 0, 1.0))
    assert closed


def test_what_is_said(capfd, monkeypatch):
    monkeypatch.setattr("condot.data.storage.retry._said_at", -1e9)
    warn_limited(f"http://u:5ECRET@h/x {ESCAPES}")
    text = capfd.readouterr().err
    assert safe(text) and "5ECRET" not in text and "\\x1b[2J" in text and "\\u202e" in text
    assert safe(str(HttpError(500, ESCAPES * 1000, ""))) and len(str(HttpError(500, "x" * 10**6, ""))) < 1100
    assert (
        safe(one_line(ValueError(ESCAPES)))
        and len(one_line(ValueError("x" * 10**6), 1000)) < 1100
        and one_line(ValueError()) == "ValueError"
    )


def evil(tmp_path):
    """Shards whose classes, keys and captions are full of escapes, one of them cut."""
    folder = frozen.shards(tmp_path / "images", (6, 6), broken=(3,))
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"class_names": [f"even{ESCAPES}", f"odd{ESCAPES}"]}))
    return folder


def test_names_of_classes_reach_no_screen_raw(tmp_path, capfd):
    folder = evil(tmp_path)
    assert condot.data.inspect.main([str(folder), "--resolution=32", "--batch_size=2", "--output", str(tmp_path / "x.png")]) == 1
    shown = capfd.readouterr()
    assert safe(shown.out) and safe(shown.err) and "even\\x1b[2J" in shown.out
    assert fit(folder, tmp_path / "run", "--data.channels=3", "--data.max_bad_share=0", "--data.split=\x1b[2J") == 2
    shown = capfd.readouterr()
    assert safe(shown.out) and safe(shown.err) and "\\x1b[2J" in shown.err
    assert fit(folder, tmp_path / "run", "--data.channels=3", "--data.max_bad_share=0") == 5
    shown = capfd.readouterr()
    assert safe(shown.out) and safe(shown.err) and "bad sample" in shown.err


def test_splits_of_strangers_reach_no_screen_raw(tmp_path, capfd):
    folder = frozen.shards(tmp_path / "images")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"split": "train"', f'"split": {json.dumps(ESCAPES)}'))
    recipe = frozen.recipe(
        tmp_path / "r.yaml", shards=folder, encoded=tmp_path / "e", autoencoder=frozen.kl(tmp_path / "vae"), resolution=32
    )
    assert condot.data.encode.command.main(["--config", str(recipe), "--splits", "val"]) == 2
    assert condot.data.inspect.main([str(folder)]) == 2 and fit(folder, tmp_path / "run") == 2
    shown = capfd.readouterr()
    assert safe(shown.err) and shown.err.count("\\x1b[2J") == 3


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 2**62},
        {"samples": 2**62},
        {"bytes": 2**63},
        {"bytes": 0},
        {"samples": 0},
        {"samples": 10**18, "bytes": 10**18},
        {"bytes": 1e300},
        {"bytes": True},
        {"samples": None},
    ],
    ids=lambda change: str(change)[:40],
)
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_absurd_numbers_in_a_manifest(tmp_path, change, kind):
    """Of every shard, or of one: an error on one line before anything is read, however a sum of them overflows."""
    folder = frozen.shards(tmp_path / "images")
    raw = json.loads((folder / "manifest.json").read_text())
    for shards in ([shard | change for shard in raw["shards"]], [*raw["shards"][:-1], raw["shards"][-1] | change]):
        (folder / "manifest.json").write_text(json.dumps(raw | {"shards": shards}))
        place = str(folder) if kind == "local" else folder.as_uri()
        options = DataConfig(shards=(place,), cache_dir=str(tmp_path / "cache"), retry_seconds=0.2, resolution=32)
        with pytest.raises(ValueError) as caught:
            opened = open_shards(options)
            for number in range(len(opened.counts)):
                opened.records(number), opened.read(number, 0)
        assert safe(str(caught.value)) and "negative" not in str(caught.value), str(caught.value)[:200]


@pytest.mark.parametrize(
    "change",
    [
        {"tally": {"sizes": {"9" * 5000 + "x1": 1}, "labels": {}, "captions": 0}},
        {"tally": {"sizes": {"ax b": "x"}, "labels": {"9" * 5000: 1}, "captions": 0}},
        {"tally": {"sizes": [], "labels": 5, "captions": "x"}},
        {"class_names": 5},
        {"class_names": [5]},
        {"class_names": "even"},
        {"version": 10**400},
        {"source": 5},
        {"encoding": []},
        {"shards": 5},
        {"shards": [5]},
        {"more": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_what_is_no_manifest(tmp_path, change):
    folder = frozen.shards(tmp_path / "images")
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError) as caught:
        open_shards(DataConfig(shards=(str(folder),), resolution=32))
    assert safe(str(caught.value)) and len(str(caught.value)) < 2000


def test_a_depth_bomb_is_no_manifest(tmp_path):
    folder = frozen.shards(tmp_path / "images")
    (folder / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        open_shard_folders(DataConfig(shards=(str(folder),)))
