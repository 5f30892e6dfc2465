"""Tars may be called anything that is a file's name: local, and behind every kind of URL, where some signs must be written otherwise."""

import io
import json
import tarfile
from urllib.parse import quote

import fsspec
import pytest
from PIL import Image
from servers import serving

from condot.core.data_config import DataConfig
from condot.data.format.index import index_tar
from condot.data.format.index_record import index_path
from condot.data.format.manifest import Manifest, Tally, parse_manifest, write_manifest
from condot.data.storage.cache import Cache
from condot.data.storage.remote import RemoteFolder, _cached
from condot.data.storage.resolve import open_shard_folder
from condot.data.storage.shard_reader import Shards

NAMES = (
    *("a b.tar", " .tar", "~a.tar", "a~b.tar", "#1.tar", "100%.tar", "100%25.tar", "what?.tar", "a?b=c&d.tar", "a+b.tar", "é.tar"),
    *("e\u0301.tar", "写真.tar", "(x).tar", ".hidden.tar", ".tar", "..tar", "a@b.tar", "'q'.tar", '"q".tar', "a:b.tar", "[x].tar"),
    *("{x}.tar", "{1..2}.tar", "-x.tar", "a;b.tar", "a,b.tar", "$x.tar", "a|b.tar", "a\u202eb.tar", "x" * 251 + ".tar", "é" * 125 + ".tar"),
    *("train.tar", "manifest.json.tar", "a.tar.tar", ".lock.tar", "b.npy.tar"),
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tar of one image under each name, its caption the name's number."""
    folder = tmp_path_factory.mktemp("named")
    shards, tally = [], Tally()
    for number, name in enumerate(NAMES):
        image = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(image, "PNG")
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for extension, body in (("png", image.getvalue()), ("txt", str(number).encode())):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        shard, found = index_tar(folder / name, "train")
        shards.append(shard)
        tally += found
    write_manifest(folder, Manifest(shards=tuple(shards), tally=tally))
    return folder


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache", 10**8)
    yield cache
    cache.close()


def check(folder, packed, cache):
    """Every tar's bytes, with its index beside it, in the cache and nowhere else."""
    for shard in folder.manifest.shards:
        tar = folder.file(shard)
        assert tar.parent == cache.folder and tar.read_bytes() == (packed / shard.name).read_bytes(), shard.name
        assert index_path(tar).read_bytes() == index_path(packed / shard.name).read_bytes()
    assert len(list(cache.folder.glob("[!.]*"))) == 2 * len(NAMES)
    images = Shards([folder])
    assert [images.read(number, 0).files["txt"] for number in range(len(NAMES))] == [str(n).encode() for n in range(len(NAMES))]


def test_on_this_machine(packed):
    images = Shards(packed)
    assert [images.read(number, 0).files["txt"] for number in range(len(NAMES))] == [str(n).encode() for n in range(len(NAMES))]


@pytest.mark.parametrize("place", ["", "my shards/100%25 #1 (é)/"])
def test_from_a_web_server(packed, cache, monkeypatch, place):
    """It sees each name written as RFC 3986 has it, and the query with not a byte changed."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    query = "X-Amz-Credential=AKIA%2F2026%2Fs3&sig=a%2Bb%3D+c~%7e=="
    with serving() as server:
        server.files = {quote(place, safe="/()") + quote(path.name, safe=""): path.read_bytes() for path in packed.iterdir()}
        url = f"{server.url}/{place.replace('%', '%25').replace('#', '%23')}?{query}"
        check(RemoteFolder(url, cache=cache, retry_seconds=1), packed, cache)
        assert server.queries == {query}


@pytest.mark.parametrize("kind", ["memory", "file", "uri", "blank"])
def test_from_other_kinds_of_url(packed, cache, tmp_path, kind):
    copy = tmp_path / "my shards 100%25"
    copy.symlink_to(packed)
    url = {"memory": "memory://named shards/#1", "file": f"file://{packed}", "uri": copy.as_uri(), "blank": f"file://{copy}"}[kind]
    if kind == "memory":
        for path in packed.iterdir():
            fsspec.filesystem("memory").pipe_file(f"/named shards/#1/{path.name}", path.read_bytes())
    check(RemoteFolder(url, cache=cache, retry_seconds=1), packed, cache)


def test_each_can_be_named_alone(packed, cache, monkeypatch, tmp_path):
    """In a URL as URLs have it or, where nothing forbids it, as it is."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    options = DataConfig(cache_dir=str(tmp_path / "cache"), retry_seconds=1)
    with serving() as server:
        server.files = {quote(path.name, safe=""): path.read_bytes() for path in packed.iterdir()}
        for name in NAMES:
            assert open_shard_folder(f"{server.url}/{quote(name, safe='')}", options)[1] == (name,)
        assert open_shard_folder(f"{server.url}/a b.tar?sig=1", options)[1] == ("a b.tar",)
        with pytest.raises(ValueError, match=r"has no absent%20one\.tar"):
            open_shard_folder(f"{server.url}/absent%20one.tar", options)
    assert open_shard_folder(f"file://{packed}/what?.tar", options)[1] == ("what?.tar",)
    assert open_shard_folder(f"{packed}/100%25.tar", options)[1] == ("100%25.tar",), "a path is no URL"


def test_names_in_the_cache(packed):
    """Those of before stay, so that a filled cache is not filled again; others are hashes; none is too long."""
    shards = parse_manifest((packed / "manifest.json").read_bytes(), "m").shards
    names = {shard.name: _cached(shard) for shard in shards}
    by_name = {shard.name: shard for shard in shards}
    hashes = f"{by_name['a b.tar'].sha256[:32]}.{by_name['a b.tar'].index_sha256[:16]}"
    assert names["a b.tar"] == f"a b.{hashes}.tar" and names["#1.tar"].startswith("shard.")
    assert len(set(names.values())) == len(NAMES)
    for name in names.values():
        assert len(f".{name}.{10**13}.part".encode()) <= 255 and name[0] not in ".~-" and "/" not in name and name.isprintable()


BAD = ("evil", "", ".", "..", "a/b.tar", "../a.tar", "/a.tar", "a\\b.tar", "a\0.tar", "a\n.tar", "a\x1b.tar", "a\x7f.tar", "a\x9b.tar")


LEADING = ("", "..", "../a.tar", "/a.tar", "a\0.tar", "a/../../b.tar", "a/..")
"""Out of the folder."""


@pytest.mark.parametrize("name", [*BAD, *LEADING[-2:], "x" * 252 + ".tar", "é" * 126 + ".tar", "a.tar/", "a.tar\0", "a.TAR"])
def test_what_is_no_name(packed, tmp_path, name):
    """Refused wherever the folder lies: what encodes it would write there."""
    raw = json.loads((packed / "manifest.json").read_text())
    text = json.dumps(raw | {"shards": [raw["shards"][0] | {"name": name}]})
    (tmp_path / "manifest.json").write_text(text)
    for place in (tmp_path.as_uri(), *[str(tmp_path)] * (name in LEADING)):
        with pytest.raises(ValueError, match="is no shard") as caught:
            open_shard_folder(place, DataConfig(cache_dir=str(tmp_path / "cache"), retry_seconds=1))
        assert str(caught.value).isprintable(), "what it quotes is escaped"


def test_the_hub_is_asked_for_the_file_and_no_revision(packed, cache, monkeypatch):
    """Without a revision in the URL the first @ would begin one."""
    from huggingface_hub import HfFileSystem

    seen = []
    real = fsspec.filesystem("file")

    def opened(self, path, mode="rb", **more):
        assert path.startswith("datasets/ann/photos@"), path
        seen.append(path)
        return real.open(f"{packed}/{path.split('/', 2)[2].partition('/')[2]}", mode)

    monkeypatch.setattr(HfFileSystem, "open", opened)
    check(RemoteFolder("hf://datasets/ann/photos", cache=cache, retry_seconds=1), packed, cache)
    assert "datasets/ann/photos@main/a@b.tar" in seen
    seen.clear()
    RemoteFolder("hf://datasets/ann/photos@v2", cache=cache, retry_seconds=1)
    assert seen == ["datasets/ann/photos@v2/manifest.json"]
