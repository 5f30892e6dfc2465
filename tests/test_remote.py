"""Shards from elsewhere: the right bytes or an error that names them, whatever the source does, in a cache that keeps its bound."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from PIL import Image
from servers import Fault, serving

from condot.core.data_config import DataConfig
from condot.data.format.index import index_tar
from condot.data.format.index_record import index_path
from condot.data.format.manifest import Manifest, Tally, write_manifest
from condot.data.storage import resolve as opening
from condot.data.storage.cache import Cache, CacheFull, CacheItem
from condot.data.storage.local import expand_braces
from condot.data.storage.remote import RemoteFolder
from condot.data.storage.resolve import open_shard_folder, open_shard_folders

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20.0
"""Of patience: more than a busy machine needs."""
STALLING = 1.2
"""Of patience where a source stalls, which is noticed after a third."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of four shards of about 60 kB, each of another size, whose bytes no compressor could guess."""
    folder = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(0)
    shards, tally = [], Tally()
    for number in range(4):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for n in range(8 + number):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8)).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{number}-{n:04d}.png")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
        shard, found = index_tar(folder / f"train-{number:06d}.tar", "train")
        shards.append(shard)
        tally += found
    write_manifest(folder, Manifest(shards=tuple(shards), tally=tally))
    return folder


@pytest.fixture
def server(packed):
    with serving() as server:
        server.files = {path.name: path.read_bytes() for path in packed.iterdir()}
        yield server


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache", 10**8)
    yield cache
    cache.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No line said lately, no long pauses, no proxy in between."""
    monkeypatch.setattr("condot.data.storage.retry.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("condot.data.storage.retry._said_at", -1e9)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def opened(server, cache, seconds=SECONDS):
    return RemoteFolder(server.url, cache=cache, retry_seconds=seconds)


def contents(cache):
    """Bytes of every file, while nobody may evict or begin; one that gets its final name meanwhile is counted once."""
    found = {}
    with cache._exclusive():
        for path in cache.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = path.stat().st_size
    return {n: size for n, size in found.items() if n != ".lock" and n[1:].rpartition(".")[0].rpartition(".")[0] not in found}


# --- what arrives


@pytest.mark.parametrize("scheme", ["http", "file", "memory"])
def test_every_byte_arrives_and_is_asked_for_once(packed, server, cache, scheme):
    """The manifest, and each tar and each index as often as they are there: once; nothing else, and no byte more."""
    url = {"http": server.url, "file": packed.as_uri(), "memory": "memory://bucket/shards"}[scheme]
    if scheme == "memory":
        fsspec.filesystem("memory").put(f"{packed}/", "/bucket/shards/", recursive=True)
    folder = RemoteFolder(f"{url}/", cache=cache, retry_seconds=SECONDS)
    assert folder.name == url
    for _ in range(2):
        for shard in folder.manifest.shards:
            tar = folder.file(shard)
            assert tar.read_bytes() == (packed / shard.name).read_bytes()
            assert index_path(tar).read_bytes() == index_path(packed / shard.name).read_bytes() and folder.index(shard) == index_path(tar)
    if scheme == "http":
        assert sorted(server.requests) == sorted((name, 0) for name in server.files)
        assert server.sent == {name: len(body) for name, body in server.files.items()}
    assert sum(contents(cache).values()) == sum(p.stat().st_size for p in packed.iterdir() if p.name != "manifest.json")


def test_sizes_are_known_without_the_tar(packed, server, cache):
    folder = opened(server, cache)
    shard = folder.manifest.shards[2]
    assert np.array_equal(np.load(folder.index(shard), mmap_mode="r"), np.load(index_path(packed / shard.name)))
    assert server.asked(shard.name) == 0 and server.asked("train-000002.npy") == 1


def test_a_second_process_finds_what_the_first_one_fetched(server, cache):
    folder = opened(server, cache)
    first = [folder.file(shard) for shard in folder.manifest.shards]
    asked = len(server.requests)
    other = opened(server, Cache(cache.folder, 10**8))
    assert [other.file(shard) for shard in other.manifest.shards] == first and len(server.requests) == asked + 1  # the manifest


# --- a source that misbehaves, then mends


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_an_answer_that_may_pass_is_asked_for_again(packed, server, cache, status, capfd):
    server.faults["train-000000.tar"] = [Fault(status=status)] * 3
    server.faults["manifest.json"] = [Fault(status=status)] * 2
    folder = opened(server, cache)
    assert folder.file(folder.manifest.shards[0]).read_bytes() == (packed / "train-000000.tar").read_bytes()
    assert server.asked("train-000000.tar") == 4 and server.asked("manifest.json") == 3
    said = capfd.readouterr().err.splitlines()
    assert f"/manifest.json: HTTP {status}" in said[0] and "trying again in" in said[0] and len(said) < 3, "one line a second at most"


def test_a_server_says_how_long_it_wants_to_be_left_alone(server, cache):
    server.faults["train-000000.npy"] = [Fault(status=503, retry_after="1")]
    folder = opened(server, cache, 5)
    start = time.monotonic()
    folder.index(folder.manifest.shards[0])
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "fault", [Fault(cut_at=20_000), Fault(stall_at=20_000), Fault(cut_at=20_000, unsized=True)], ids=["cut", "stall", "end"]
)
def test_a_broken_download_goes_on_where_it_broke(packed, server, cache, ranges, fault):
    """By a range request where the server has them; where it has not, from the start."""
    server.ranges = ranges
    server.faults["train-000001.tar"] = [fault, fault if ranges else Fault()]
    folder = opened(server, cache, STALLING if fault.stall_at >= 0 else SECONDS)
    shard = folder.manifest.shards[1]
    assert folder.file(shard).read_bytes() == (packed / shard.name).read_bytes()
    starts = [start for name, start in server.requests if name == shard.name]
    if ranges:  # the second answer breaks at once, and brings nothing
        assert starts == [0, 20_000, 20_000] and server.sent[shard.name] == shard.bytes
    else:
        assert starts == [0, 20_000] and server.sent[shard.name] == shard.bytes + 20_000


def test_a_slow_source_that_moves_is_waited_for(packed, server, cache):
    """Each attempt brings a little; together they take longer than the patience for none."""
    server.faults["train-000000.tar"] = [Fault(stall_at=10_000 * (i + 1)) for i in range(5)]
    folder = opened(server, cache, 0.6)
    start = time.monotonic()
    assert folder.file(folder.manifest.shards[0]).read_bytes() == (packed / "train-000000.tar").read_bytes()
    assert time.monotonic() - start > 0.9


class Pieces(AsyncFileSystem):
    """A bucket as s3fs shows one: asynchronous, by ranges, an OSError behind the end; here the second request hangs."""

    cachable = False

    def __init__(self, bucket):
        super().__init__()
        self.bucket, self.spans = bucket, []

    async def _cat_file(self, path, start=None, end=None, **more):
        self.spans.append((start, end))
        if len(self.spans) == 2:
            await asyncio.sleep(30)
        if start and start >= self.bucket.size(path):
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")
        return self.bucket.cat_file(path, start, end)


def test_buckets_are_read_by_ranges(packed, cache, monkeypatch):
    """Each piece once, the one that hung twice; an object that ends early, between two pieces or within one, is named."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{packed}/", "/pieces/", recursive=True)
    folder = RemoteFolder("memory://pieces", cache=cache, retry_seconds=STALLING)
    a, b, c, _ = folder.manifest.shards
    [folder.index(shard) for shard in folder.manifest.shards]
    monkeypatch.setattr("condot.data.storage.download.PIECE", 16_384)
    folder._origin._fs = pieces = Pieces(memory)
    assert folder.file(a).read_bytes() == (packed / a.name).read_bytes()
    ends = [*range(16_384, a.bytes, 16_384), a.bytes]
    wanted = list(zip([0, *ends[:-1]], ends, strict=True))
    assert pieces.spans == [*wanted[:2], *wanted[1:]] and len(wanted) == 5
    for shard, size in ((b, 32_768), (c, 30_000)):
        memory.pipe(f"/pieces/{shard.name}", (packed / shard.name).read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{shard.name}: {size} bytes, the manifest says {shard.bytes}, 3 downloads in a row"):
            folder.file(shard)


def test_bytes_that_are_wrong_once_are_fetched_again(packed, server, cache):
    server.faults["train-000003.tar"] = [Fault(flip=33_333)]
    server.faults["train-000003.npy"] = [Fault(flip=200)]
    folder = opened(server, cache)
    tar = folder.file(folder.manifest.shards[3])
    assert tar.read_bytes() == (packed / "train-000003.tar").read_bytes()
    assert index_path(tar).read_bytes() == (packed / "train-000003.npy").read_bytes()
    assert server.asked("train-000003.tar") == server.asked("train-000003.npy") == 2


def test_a_length_that_lies_loses_no_byte(packed, server, cache):
    """Too long a promise breaks behind the last byte, too short a one before it: neither is believed before the hash is."""
    server.faults["train-000000.tar"] = [Fault(length=1000)]
    server.faults["train-000001.tar"] = [Fault(length=-1000)]
    folder = opened(server, cache)
    for number in (0, 1):
        assert folder.file(folder.manifest.shards[number]).read_bytes() == (packed / f"train-00000{number}.tar").read_bytes()
    assert server.asked("train-000000.tar") == 1 and server.asked("train-000001.tar") == 2


# --- a source that does not mend


def test_wrong_bytes_for_ever_are_named(server, cache):
    server.always["train-000002.tar"] = Fault(flip=40_000)
    folder = opened(server, cache)
    shard = folder.manifest.shards[2]
    body = bytearray(server.files[shard.name])
    body[40_000] ^= 1
    found = hashlib.sha256(body).hexdigest()
    with pytest.raises(
        ValueError, match=rf"{server.url}/train-000002.tar: .* sha256 {found}, the manifest says {shard.sha256}.* upload it again"
    ):
        folder.file(shard)
    assert server.asked(shard.name) == 3 and set(contents(cache)) == {folder.index(shard).name}, "nothing of it stays"


@pytest.mark.parametrize("size", [-512, 512])
def test_a_shard_of_another_length_is_named(server, cache, size):
    body = server.files["train-000002.tar"]
    server.files["train-000002.tar"] = body[:size] if size < 0 else bytes(size) + body
    folder = opened(server, cache)
    rule = rf"{len(body) - 512} bytes, the manifest says {len(body)}" if size < 0 else "hash to sha256"
    with pytest.raises(ValueError, match=f"train-000002.tar: .*{rule}"):
        folder.file(folder.manifest.shards[2])


@pytest.mark.parametrize(
    ("status", "rule"),
    [(404, "is not there, though the manifest lists it"), (403, "HTTP 403.*your rights"), (401, "HTTP 401"), (410, "is not there")],
)
def test_what_cannot_pass_is_an_error_at_once(server, cache, status, rule):
    folder = opened(server, cache, 60)
    server.always["train-000001.tar"] = Fault(status=status)  # it vanishes after the folder was opened
    with pytest.raises(ValueError, match=f"train-000001.tar.*{rule}"):
        folder.file(folder.manifest.shards[1])
    assert server.asked("train-000001.tar") == 1
    folder.file(folder.manifest.shards[0])


@pytest.mark.parametrize(
    ("fault", "ranges"),
    [(Fault(status=503), True), (Fault(stall_at=5000), True), (Fault(cut_at=5000), True), (Fault(cut_at=5000), False)],
    ids=["503", "stall", "cut", "cut-and-from-the-start"],
)
def test_the_deadline_holds(server, cache, fault, ranges):
    """What was had before and comes again is nothing new."""
    server.always["train-000001.tar"] = fault
    server.ranges = ranges
    folder = opened(server, cache, 0.6)
    start = time.monotonic()
    rule = r"train-000001.tar cannot be read: nothing new in 0.6 s, \d+ attempts, the last: .*raise data.retry_seconds"
    with pytest.raises(ValueError, match=rule):
        folder.file(folder.manifest.shards[1])
    assert 0.6 <= time.monotonic() - start < 2 and 3 <= server.asked("train-000001.tar") < 100


def test_a_server_that_is_not_there_is_named(server, cache):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/x/manifest.json cannot be read: nothing new in 0.2 s"):
        RemoteFolder("http://127.0.0.1:9/x", cache=cache, retry_seconds=0.2)


def test_sources_that_cannot_be_opened(server, cache, tmp_path, packed):
    def error(url, **files):
        server.files.update(files)
        with pytest.raises(ValueError) as caught:
            RemoteFolder(url, cache=cache, retry_seconds=0.2)
        return str(caught.value)

    assert "has no manifest.json" in error(f"{server.url}/elsewhere") and "upload the manifest last" in error(tmp_path.as_uri())
    assert "gopher:// is not read. Use one of s3://" in error("gopher://host/shards")
    assert "gs:// needs a package that is not installed: `pip install gcsfs`" in error("gs://bucket/shards")
    assert "manifest.json cannot be read" in error(server.url, **{"manifest.json": b"<html>Sign in</html>"})
    assert "HTTP 403" not in error("http://user:secret@127.0.0.1:9/x?sig=hidden") and "secret" not in error("http://u:secret@127.0.0.1:9/")
    manifest = json.loads((packed / "manifest.json").read_text())
    for change in (
        {"name": "../../evil.tar"},
        {"name": "/evil.tar"},
        {"sha256": "../x"},
        {"bytes": "5"},
        *({"name": name} for name in ("evil", "..", "a\\b.tar", "a/b.tar", "a\0.tar", "\x1b[2J.tar", "\x85.tar", "é" * 126 + ".tar")),
        {"samples": -1},
    ):
        shards = [manifest["shards"][0] | change]
        assert "is no shard" in error(server.url, **{"manifest.json": json.dumps(manifest | {"shards": shards}).encode()})


def test_a_signature_goes_with_every_request(server, cache):
    folder = RemoteFolder(f"{server.url}?sig=abc", cache=cache, retry_seconds=SECONDS)
    folder.file(folder.manifest.shards[0])
    assert folder.name == server.url and server.queries == {"sig=abc"}


def test_a_proxy_is_used_where_the_environment_names_one(packed, server, cache, monkeypatch):
    server.files = {f"http://nowhere.invalid/{name}": body for name, body in server.files.items()}
    monkeypatch.setenv("http_proxy", server.url)
    folder = RemoteFolder("http://nowhere.invalid", cache=cache, retry_seconds=SECONDS)
    shard = folder.manifest.shards[0]
    assert folder.file(shard).read_bytes() == (packed / shard.name).read_bytes()


def test_a_changed_shard_is_not_served_from_the_cache(packed, server, cache):
    """The same name, another content: the manifest's hash decides."""
    folder = opened(server, cache)
    old = folder.file(folder.manifest.shards[0])
    manifest = json.loads(server.files["manifest.json"])
    server.files["train-000000.tar"], server.files["train-000000.npy"] = server.files["train-000001.tar"], server.files["train-000001.npy"]
    manifest["shards"][0] = manifest["shards"][1] | {"name": "train-000000.tar"}
    server.files["manifest.json"] = json.dumps(manifest).encode()
    again = opened(server, cache)
    new = again.file(again.manifest.shards[0])
    assert new != old and new.read_bytes() == (packed / "train-000001.tar").read_bytes()


# --- the cache


def item(number, size=1000):
    return CacheItem(f"file-{number}", size, size)


def fill(cache, number, size=1000):
    return cache.fetch(item(number, size), lambda file: file.write(bytes([number]) * size), patience=0.1)


def test_the_least_recently_used_go_first(tmp_path):
    cache = Cache(tmp_path, 5000)
    for number in range(5):
        fill(cache, number)
    cache.close()
    for number in (0, 3):
        time.sleep(0.01)
        assert cache.get(item(number)) is not None
    cache.close()
    fill(cache, 5)
    fill(cache, 6)
    assert set(contents(cache)) == {"file-0", "file-3", "file-4", "file-5", "file-6"}
    for number in range(7, 40):
        fill(cache, number, 500)
        assert sum(contents(cache).values()) <= 5000


def test_what_another_process_uses_is_not_evicted(tmp_path):
    cache, other = Cache(tmp_path, 3000), Cache(tmp_path, 3000)
    fill(cache, 0)
    other.get(item(0))
    cache.close()
    for number in range(1, 6):
        fill(cache, number)
        assert "file-0" in contents(cache) and sum(contents(cache).values()) <= 3000
    held = [Cache(tmp_path, 3000) for _ in range(2)]
    cache.close()
    for holder, number in zip(held, (4, 5), strict=True):
        assert holder.get(item(number)) is not None
    with pytest.raises(CacheFull, match=r"data.cache_size=3000B: no room for 1000B .* all other files are in use"):
        fill(cache, 6)
    threading.Timer(0.05, held[0].close).start()
    cache.fetch(item(6), lambda file: file.write(bytes(1000)), patience=2)
    assert set(contents(cache)) == {"file-0", "file-5", "file-6"}


def test_no_name_changes_while_bytes_are_counted(tmp_path, monkeypatch):
    """A folder read while a file is renamed may show it under neither name: four processes went 7 % above their bound."""
    cache, rename, seen = Cache(tmp_path, 3000), os.rename, []

    def watched(old, new):
        with open(tmp_path / ".lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(new)
        rename(old, new)

    monkeypatch.setattr("condot.data.storage.cache.os.rename", watched)
    assert [fill(cache, 0)] == seen


def test_downloads_under_way_count(tmp_path):
    """Two at a time of a cache that holds one and a half: the second waits for the first, and the bound is never passed."""
    cache = Cache(tmp_path, 1500)
    began, go = threading.Event(), threading.Event()

    def slow(file):
        began.set()
        assert go.wait(5)
        file.write(bytes(1000))

    thread = threading.Thread(target=lambda: cache.fetch(item(0), slow))
    thread.start()
    assert began.wait(5)
    with pytest.raises(CacheFull):
        fill(cache, 1)
    go.set()
    thread.join()
    cache.close()
    fill(cache, 1)
    assert set(contents(cache)) == {"file-1"}


def test_a_file_cut_by_a_power_failure_is_fetched_again(tmp_path):
    cache = Cache(tmp_path, 5000)
    fill(cache, 1).write_bytes(b"\1" * 700)
    assert cache.get(item(1)) is None and fill(cache, 1).read_bytes() == b"\1" * 1000


def test_a_download_that_fails_leaves_nothing(tmp_path):
    cache = Cache(tmp_path, 5000)
    for error, kind in (
        (ValueError("no"), ValueError),
        (OSError(28, "No space left on device"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(kind) as caught:
            cache.fetch(item(1), lambda file, error=error: (_ for _ in ()).throw(error))
        assert contents(cache) == {} and (
            not isinstance(error, OSError) or "No space left on device; 1000B were wanted). Free space" in str(caught.value)
        )


def test_a_full_disk_evicts_and_then_is_named(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 10**6)
    fill(cache, 0)
    cache.close()

    def disk(folder):  # 1,500 bytes for everything
        return os.statvfs_result((1, 1, 1500, 0, 1500 - sum(p.stat().st_size for p in tmp_path.glob("file-*")), 0, 0, 0, 0, 255))

    monkeypatch.setattr("condot.data.storage.cache.os.statvfs", disk)
    fill(cache, 1)
    assert set(contents(cache)) == {"file-1"}
    with pytest.raises(ValueError, match=r"the disk is full \(1600B are wanted\)"):
        fill(cache, 2, 1600)


def test_a_cache_that_is_too_small_is_refused_at_the_start(server, tmp_path, packed):
    sizes = sorted((s.bytes for s in RemoteFolder(server.url, cache=Cache(tmp_path, 10), retry_seconds=1).manifest.shards), reverse=True)
    needed = sum(sizes[:3])
    options = DataConfig(shards=(server.url,), shuffle_block=2, cache_dir=str(tmp_path), cache_size=str(needed))
    assert open_shard_folders(options)[0][1] is None
    with pytest.raises(
        ValueError, match=r"data.cache_size=.* is less than .* that 2 shards \(data.shuffle_block\) and the next one take. Use"
    ):
        open_shard_folders(replace(options, cache_size=str(needed - 1)))
    with pytest.raises(ValueError, match=r"data.cache_dir=.*cannot be used"):
        Cache(packed / "manifest.json" / "cache", 10)


# --- several processes

CHILD = """
import sys
from condot.data.storage.cache import Cache
from condot.data.storage.remote import RemoteFolder
folder = RemoteFolder(sys.argv[1], cache=Cache(sys.argv[2], 10**8), retry_seconds=float(sys.argv[4]))
print("open", flush=True)
sys.stdin.readline()
for shard in folder.manifest.shards[: int(sys.argv[3])]:
    print(folder.file(shard), flush=True)
"""


def child(server, cache, shards, seconds):
    words = [sys.executable, "-c", CHILD, server.url, str(cache.folder), str(shards), str(seconds)]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process


def test_two_processes_fetch_a_shard_once(packed, server, cache):
    for number in range(4):
        server.always[f"train-00000{number}.tar"] = Fault(seconds=0.1)
    children = [child(server, cache, 4, 20) for _ in range(2)]
    assert [c.stdout.readline() for c in children] == ["open\n"] * 2
    outs = _both(children)
    assert outs[0] == outs[1] and len(outs[0].split()) == 4
    asked = {name: server.asked(name) for name in server.files}
    assert asked == {name: 2 if name == "manifest.json" else 1 for name in server.files}


def _both(children):
    for c in children:
        c.stdin.write("\n")
        c.stdin.flush()
    return [c.communicate(timeout=30)[0] for c in children]


def test_a_killed_download_leaves_nothing_that_passes_for_whole(packed, server, cache):
    server.faults["train-000000.tar"] = [Fault(stall_at=30_000)]
    process = child(server, cache, 1, 1.5)
    process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not any(name.endswith(".part") and size >= 16_384 for name, size in contents(cache).items()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(name.endswith(".part") for name in contents(cache)) and not any(name.endswith(".tar") for name in contents(cache))
    swept = Cache(cache.folder, 10**8)
    assert not any(name.endswith(".part") for name in contents(swept))
    folder = opened(server, swept)
    assert folder.file(folder.manifest.shards[0]).read_bytes() == (packed / "train-000000.tar").read_bytes()


def test_a_download_of_a_living_process_is_not_swept(tmp_path):
    cache = Cache(tmp_path, 5000)

    def write(file):
        Cache(tmp_path, 5000)
        assert [name for name in contents(cache) if name.endswith(".part")]
        file.write(bytes(1000))

    assert cache.fetch(item(1), write).stat().st_size == 1000


def test_another_process_that_stands_still_is_named(tmp_path):
    cache = Cache(tmp_path, 5000)
    with open(tmp_path / ".file-1.1000.part", "w") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another process has been downloading it for 0.1 s without a byte"):
            fill(cache, 1)
        assert cache.fetch(item(1), lambda file: None, wait=False) is None


# --- ahead


def settled(folder):
    deadline = time.monotonic() + 10
    while folder._threads:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_was_asked_for_ahead_is_here(server, cache):
    folder = opened(server, cache)
    for name in server.files:
        server.always[name] = Fault(seconds=0.1)
    start = time.monotonic()
    folder.prefetch(list(folder.manifest.shards))
    assert time.monotonic() - start < 0.1, "it returns at once"
    settled(folder)
    assert 2 <= server.most_at_once <= 4
    before = len(server.requests)
    for shard in folder.manifest.shards:
        folder.file(shard)
    assert len(server.requests) == before == 9


def test_a_download_under_way_is_joined(packed, server, cache):
    server.always["train-000000.tar"] = Fault(seconds=0.3)
    folder = opened(server, cache)
    shard = folder.manifest.shards[0]
    folder.prefetch([shard])
    while server.asked(shard.name) == 0:
        time.sleep(0.005)
    assert folder.file(shard).read_bytes() == (packed / shard.name).read_bytes() and server.asked(shard.name) == 1


def test_order_is_kept_and_the_rest_forgotten(server, cache, monkeypatch):
    monkeypatch.setattr("condot.data.storage.remote.THREADS", 1)
    for name in server.files:
        server.always[name] = Fault(seconds=0.05)
    folder = opened(server, cache)
    a, b, c, d = folder.manifest.shards
    folder.prefetch([d, a, b])
    while server.asked(d.name) == 0:
        time.sleep(0.002)
    folder.prefetch([c, a])
    settled(folder)
    assert [name for name, _ in server.requests if name.endswith(".tar")] == [d.name, c.name, a.name]


def test_no_more_than_half_the_cache_is_fetched_ahead(server, tmp_path):
    probe = opened(server, Cache(tmp_path, 10**8)).manifest.shards
    cache = Cache(tmp_path / "small", 2 * (probe[0].bytes + probe[1].bytes))
    folder = opened(server, cache)
    folder.prefetch(list(folder.manifest.shards))
    settled(folder)
    assert {name for name, _ in server.requests if name.endswith(".tar")} == {probe[0].name, probe[1].name}


def test_a_failure_ahead_is_reported_once(server, cache):
    """The folder's `file` raises what the thread met; asked again, it tries again."""
    server.faults["train-000001.tar"] = [Fault(status=403)]
    folder = opened(server, cache)
    shard = folder.manifest.shards[1]
    folder.prefetch([shard])
    settled(folder)
    with pytest.raises(ValueError, match=r"train-000001.tar cannot be read: HTTP 403"):
        folder.file(shard)
    assert server.asked(shard.name) == 1
    assert folder.file(shard).stat().st_size == shard.bytes and server.asked(shard.name) == 2


def test_many_threads_ask_for_much_at_once(packed, server, tmp_path):
    """Prefetching, asking and evicting against one another in a cache of three shards: always the right bytes, never above the bound."""
    shards = opened(server, Cache(tmp_path, 10**8)).manifest.shards
    limit = sum(s.bytes for s in shards[1:]) + 6000
    cache = Cache(tmp_path / "small", limit)
    folder = opened(server, cache, 10)
    wrong = []

    def ask(seed):
        for n in np.random.default_rng(seed).integers(0, 4, 30).tolist():
            folder.prefetch([shards[(n + 1) % 4], shards[(n + 2) % 4]])
            for _ in range(5):
                try:
                    body = folder.file(shards[n]).read_bytes()
                    break
                except FileNotFoundError:  # evicted between the answer and the opening, by others that hold more than the cache has
                    continue
            if body != (packed / shards[n].name).read_bytes():
                wrong.append(n)
            if sum(contents(cache).values()) > limit:
                wrong.append(contents(cache))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# --- names


def test_brace_patterns():
    assert expand_braces("s3://b/train-{008..011}.tar") == [f"s3://b/train-{n:03d}.tar" for n in (8, 9, 10, 11)]
    assert (
        expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
        and expand_braces("plain") == ["plain"]
        and expand_braces(r"C:\x") == [r"C:\x"]
    )
    for pattern, rule in (("a{b", "Unbalanced"), ("", "empty name"), ("train-*.tar", "wildcards are not expanded")):
        with pytest.raises(ValueError, match=rule):
            expand_braces(pattern)


def test_sources_as_they_are_written(packed, server, tmp_path):
    options = DataConfig(cache_dir=str(tmp_path / "cache"), cache_size="100MB", retry_seconds=SECONDS)
    for place in (str(packed), server.url):
        folder, names = open_shard_folder(place, options)
        assert names is None and len(folder.manifest.shards) == 4
        assert open_shard_folder(f"{place}/train-{{000002..000001}}.tar", options)[1] == ("train-000002.tar", "train-000001.tar")
        with pytest.raises(
            ValueError, match=r"has no train-000004.tar and 1 more of those named: its manifest lists train-000000.tar to .*, 4 shards"
        ):
            open_shard_folder(f"{place}/train-{{000003..000005}}.tar", options)
        with pytest.raises(ValueError, match=r"names train-000001.tar twice"):
            open_shard_folder(f"{place}/train-00000{{1,1}}.tar", options)
    (tmp_path / "other").symlink_to(packed)
    (tmp_path / "more").symlink_to(packed)
    two = open_shard_folders(replace(options, shards=(f"{tmp_path}/{{other,more}}", server.url)))
    assert [f.name for f, _ in two] == [f"{tmp_path}/other", f"{tmp_path}/more", server.url]
    with pytest.raises(ValueError, match="names 2 folders where one is wanted"):
        open_shard_folder(f"{tmp_path}/{{other,more}}", options)
    with pytest.raises(ValueError, match="is no folder"):
        open_shard_folder(str(tmp_path / "missing"), options)


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("CONDOT_CACHE", "/tmp/elsewhere")
    assert opening.cache_folder(DataConfig()) == Path("/tmp/elsewhere") and opening.cache_folder(DataConfig(cache_dir="/x")) == Path("/x")
    monkeypatch.delenv("CONDOT_CACHE")
    assert opening.cache_folder(DataConfig()) == Path.home() / ".cache/condot/shards"
