"""Shared folders: what another user planted under a name of ours is neither followed, nor waited for, nor deleted."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from shardmaker import make, png, samples

from condot.core.atomic_files import open_regular, write_whole
from condot.core.file_lock import open_lock, remove_unused
from condot.data.encode import work_claims
from condot.data.format.file_stamps import hash64
from condot.data.prepare import command
from condot.data.prepare.generated import GeneratedShards
from condot.data.storage.cache import Cache, CacheItem
from condot.data.storage.shard_reader import Shards
from condot.pipeline.launch.folder_lock import lock_folder
from condot.pipeline.sampling.image_grid import save_image
from condot.pipeline.tracking.jsonl import JsonlWriter, read_lines
from condot.pipeline.training.status import Status, read_status

KINDS = ("link", "dangling", "folder", "fifo", "device")


def plant(path: Path, kind: str) -> Path:
    """Something that is no file at `path`; the file that it would lead to."""
    victim = path.parent.parent / "victim"
    victim.write_text("precious")
    target = {"link": victim, "dangling": victim.with_name("new"), "device": Path("/dev/full")}.get(kind)
    if target:
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
        (path / "precious").write_text("precious")
    else:
        os.mkfifo(path)
    return victim


def soon(act, seconds=10):
    """What an action gives or raises; it must end."""
    found = []

    def run():
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


def untouched(victim, planted, kind):
    assert victim.read_text() == "precious" and not victim.with_name("new").exists() and os.path.lexists(planted)
    if kind == "folder":
        assert (planted / "precious").exists()


def fill(cache, name="file-0"):
    return cache.fetch(CacheItem(name, 1000, 1000), lambda file: file.write(bytes(1000)), patience=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".lock", "file-0", ".file-0.1000.part"])
def test_in_a_cache(tmp_path, kind, name):
    folder = tmp_path / "cache"
    folder.mkdir()
    victim = plant(folder / name, kind)
    error = soon(lambda: fill(Cache(folder, 10_000)))
    assert isinstance(error, ValueError) and str(folder / name) in str(error) and "move it" in str(error)
    untouched(victim, folder / name, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["old", ".other.5.part", "x.part", ".odd..part"])
def test_beside_what_a_cache_keeps(tmp_path, kind, name):
    """It is not counted, not evicted, and keeps nobody from the cache."""
    folder = tmp_path / "cache"
    folder.mkdir()
    victim = plant(folder / name, kind)
    cache = Cache(folder, 1500)
    for number in range(3):
        assert soon(lambda n=number: fill(cache, f"file-{n}")) == folder / f"file-{number}"
        cache.close()
    untouched(victim, folder / name, kind)


def test_the_lock_of_an_older_release_keeps_its_content(tmp_path):
    (tmp_path / ".lock").write_text("x")
    os.close(open_lock(tmp_path / ".lock"))
    assert (tmp_path / ".lock").read_text() == "x"


@pytest.mark.parametrize(("folder", "mode"), [(0o755, 0o644), (0o775, 0o664), (0o2770, 0o664), (0o1777, 0o666), (0o777, 0o666)])
def test_who_may_write_the_folder_may_lock_it(tmp_path, folder, mode):
    """Whatever the umask of who came first; a file that is there keeps its mode."""
    tmp_path.chmod(folder)
    before = os.umask(0o022)
    try:
        os.close(open_lock(tmp_path / ".lock"))
        (tmp_path / "mine").touch(0o600)
        os.close(open_lock(tmp_path / "mine"))
    finally:
        os.umask(before)
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == mode and (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


OTHER = """
import os, sys, random, secrets
sys.path.insert(0, sys.argv[1])
from condot.data.storage.cache import Cache, CacheItem
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # after the imports: it may read nothing of ours
cache = Cache(sys.argv[2], 2500)
for number in (0, 1, 5, 6):
    print(cache.fetch(CacheItem(f"file-{number}", 1000, 1000), lambda file: file.write(bytes(1000)), patience=5).name, flush=True)
    cache.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_users_share_a_cache(tmp_path_factory, mode):
    """Another user reads what is there and adds to it; in a sticky folder nobody can evict another's, so that one keeps what is there."""
    folder = Path(f"/tmp/condot-shared-{os.getpid()}-{mode:o}")
    folder.mkdir()
    folder.chmod(mode)
    try:
        mine = Cache(folder, 10_000)
        fill(mine, "file-0")
        mine.close()
        done = subprocess.run([sys.executable, "-c", OTHER, str(ROOT), str(folder)], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["file-0", "file-1", "file-5", "file-6"], done.stderr
        assert (folder / "file-0").exists() == bool(mode & 0o1000)
        for number in range(3):
            fill(Cache(folder, 10_000), f"file-{number}")
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("kind", KINDS)
def test_claims(tmp_path, kind):
    """Planted beside a claim or in its place: an error, or another's claim; never a hang, never a write elsewhere."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "claim-a").write_text("[]")
    victim = plant(work / "takeover.lock", kind)
    error = soon(lambda: work_claims.claim_work(work / "claim-a"))
    assert isinstance(error, ValueError) and "takeover.lock" in str(error)
    untouched(victim, work / "takeover.lock", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_claim(tmp_path, kind):
    work = tmp_path / "work"
    work.mkdir()
    victim = plant(work / "claim-a", kind)
    error = soon(lambda: work_claims.claim_work(work / "claim-a"))
    assert isinstance(error, ValueError) and "claim-a" in str(error)
    untouched(victim, work / "claim-a", kind)


@pytest.mark.parametrize("text", ["[]", "{}", "5", "", '{"host": 3, "pid": "x", "started": null}'])
def test_a_claim_that_is_none_is_taken_over(tmp_path, text):
    (tmp_path / "claim-a").write_text(text)
    os.utime(tmp_path / "claim-a", (0, 0))
    with soon(lambda: work_claims.claim_work(tmp_path / "claim-a")) as mine:
        assert mine.is_held


@pytest.mark.parametrize("kind", KINDS)
def test_the_lock_of_a_run(tmp_path, kind):
    run = tmp_path / "run"
    run.mkdir()
    victim = plant(run / ".lock", kind)
    error = soon(lambda: lock_folder(run))
    assert isinstance(error, ValueError) and "output_dir" in str(error) and "move it" in str(error)
    untouched(victim, run / ".lock", kind)


def test_the_lock_of_a_run_still_locks(tmp_path):
    first = lock_folder(tmp_path)
    with pytest.raises(ValueError, match="in use by another run"):
        lock_folder(tmp_path)
    first.close()
    lock_folder(tmp_path).close()


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_run(tmp_path, kind, capfd):
    """A link is replaced by the file; a folder is an error; metrics wait in memory."""
    run = tmp_path / "run"
    run.mkdir()
    victim = plant(run / "status.json", kind)
    assert soon(lambda: read_status(run)) is None
    soon(lambda: Status(run).write("running", step=3))
    if kind == "folder":
        untouched(victim, run / "status.json", kind)
        assert "could not be written" in capfd.readouterr().err
    else:
        assert read_status(run)["step"] == 3 and victim.read_text() == "precious" and not victim.with_name("new").exists()
    assert not list(run.glob(".*")), "nothing is left half-written"
    victim = plant(run / "metrics.jsonl", kind)
    assert "cannot be written" in soon(lambda: JsonlWriter(run / "metrics.jsonl").append([{"step": 1}]))
    untouched(victim, run / "metrics.jsonl", kind)


def test_a_reason_in_the_status_is_one_line_that_may_be_printed(tmp_path):
    Status(tmp_path).write("failed", reason="http://u:p@h/x?sig=1\n\x1b[2J")
    assert read_status(tmp_path)["reason"] == "http://h/x?… \\x1b[2J"


def test_what_is_no_file_of_ours_is_not_deleted(tmp_path):
    for kind in KINDS:
        victim = plant(tmp_path / "x" if (tmp_path / "x").mkdir(exist_ok=True) else tmp_path / "x" / kind, kind)
        assert not remove_unused(tmp_path / "x" / kind)
        untouched(victim, tmp_path / "x" / kind, kind)


def test_a_lock_is_one_file_for_all(tmp_path):
    """Two that make it at once lock the same."""
    fds = [open_lock(tmp_path / ".lock") for _ in range(2)]
    fcntl.flock(fds[0], fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    for fd in fds:
        os.close(fd)


def test_both_rooms_open_files_by_one_rule(tmp_path):
    write_whole(tmp_path / "a", json.dumps({}))
    assert os.read(open_regular(tmp_path / "a", os.O_RDONLY), 9) == b"{}"
    with pytest.raises(OSError, match="move it"):
        open_regular(tmp_path, os.O_RDONLY)


def sources(folder):
    """A folder of two images."""
    (folder / "a").mkdir(parents=True)
    for number in range(2):
        (folder / f"a/{number}.png").write_bytes(png(number))
    return folder


@pytest.mark.parametrize("kind", ["link", "dangling"])
@pytest.mark.parametrize(
    "name",
    [
        ".packing/tmp-{pid}-request.json",
        ".packing/tmp-{pid}-train-000000.tar",
        ".packing/tmp-{pid}-train-000000.inputs",
        ".packing/tmp-{pid}-train-000000.json",
        ".packing/.{pid}-{hash}.npy",
        ".packed/tmp-{pid}.npz",
        "tmp-{pid}-report.json",
        ".{pid}-summary.png",
        ".manifest.json.{pid}",
    ],
)
def test_packing_writes_through_no_link(tmp_path, kind, name):
    """Names of temporary files can be foreseen: a link planted there is replaced."""
    index = hash64(f"tmp-{os.getpid()}-train-000000.npy".encode())
    planted = tmp_path / "shards" / name.format(pid=os.getpid(), hash=f"{index:016x}")
    planted.parent.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted.symlink_to(victim if kind == "link" else tmp_path / "new")
    words = ["imagefolder", str(sources(tmp_path / "photos")), "--output", str(tmp_path / "shards"), "--workers", "0"]
    assert command.main(words) == 0
    assert victim.read_text() == "precious" and not (tmp_path / "new").exists() and not os.path.lexists(planted)
    assert sum(Shards(str(tmp_path / "shards"), "train").counts) == 2


@pytest.mark.parametrize("name", [".packing", ".packed"])
def test_packing_writes_into_no_linked_folder(tmp_path, capfd, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tmp-1").write_text("precious")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).symlink_to(elsewhere)
    assert command.main(["imagefolder", str(sources(tmp_path / "photos")), "--output", str(tmp_path / "shards"), "--workers", "0"]) == 2
    assert "move it" in capfd.readouterr().err and [path.name for path in elsewhere.iterdir()] == ["tmp-1"]


def test_indexing_writes_through_no_link(tmp_path):
    make(tmp_path / "made", samples([2]))
    tars = tmp_path / "tars"
    tars.mkdir()
    os.replace(tmp_path / "made/train-000000.tar", tars / "a.tar")
    (tmp_path / "victim").write_text("precious")
    (tars / f".{os.getpid()}-{hash64(b'a.npy'):016x}.npy").symlink_to(tmp_path / "victim")
    assert command.main(["webdataset", str(tars), "--workers", "0"]) == 0
    assert (tmp_path / "victim").read_text() == "precious" and sum(Shards(str(tars), "train").counts) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_written_through_no_link(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    victim = plant(folder / ".tmp-grid.png", kind)
    error = soon(lambda: save_image(torch.zeros(3, 4, 4), folder / "grid.png"))
    if kind == "folder":
        assert isinstance(error, OSError)
        untouched(victim, folder / ".tmp-grid.png", kind)
    else:
        assert error is None and (folder / "grid.png").is_file() and not list(folder.glob(".*"))
        assert victim.read_text() == "precious" and not victim.with_name("new").exists()


def test_made_shards_are_written_through_no_link(tmp_path):
    making = tmp_path / "out/.making"
    making.mkdir(parents=True)
    (tmp_path / "victim").write_text("precious")
    (making / ".tmp-train-000000.tar").symlink_to(tmp_path / "victim")
    keeper = GeneratedShards(tmp_path / "out", 2)
    for number in range(2):
        keeper.put(number, {"png": png(number)})
    keeper.close(range(2))
    keeper.finish()
    assert (tmp_path / "victim").read_text() == "precious"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.making").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="move it"):
        GeneratedShards(tmp_path / "linked", 2)


def test_a_log_that_is_a_link_or_a_pipe_is_neither_cut_nor_waited_for(tmp_path):
    """A link at metrics.jsonl had the file that it leads to cut to its lines; a pipe held the run for ever."""
    (tmp_path / "other").write_text('{"step": 1}\n{"step": 9}\n')
    os.symlink(tmp_path / "other", tmp_path / "link.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("link.jsonl", "pipe.jsonl"):
        assert "cannot be written" in JsonlWriter(tmp_path / name).filter(lambda line: line["step"] < 5)
    assert read_lines(tmp_path / "pipe.jsonl") == []
    assert (tmp_path / "other").read_text() == '{"step": 1}\n{"step": 9}\n'
