"""A run's folder: known to have room before the first step, its own wherever it is moved, without leftovers of what was killed."""

import errno
import json
import os
import resource
import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import fit

from condot.core import atomic_files
from condot.core.atomic_files import exchange, folder_for, put_in_place, sweep, write_whole
from condot.pipeline.checkpoint import disk_space
from condot.pipeline.checkpoint.store import CheckpointManager
from condot.pipeline.launch.folder_lock import lock_folder
from condot.pipeline.training import loop

# --- room, before any work


def untrained(run):
    return not list(run.glob("checkpoint-*")) and not (run / "metrics.jsonl").exists() and not list(run.glob(".tmp*"))


def test_a_limit_on_files_is_known_before_the_first_step(digits, tmp_path, capsys):
    """`ulimit -f`: the checkpoint of this run has 0.8 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))
    try:
        assert fit(digits, tmp_path / "run") == 2
        assert fit(digits, tmp_path / "run", "--dry_run=true") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, error = capsys.readouterr()
    assert "cannot hold the checkpoints of this run" in error and "`ulimit -f` allows 0.7 MB: raise it. Nothing was trained." in error
    assert "`ulimit -f` allows 0.7 MB" in out and untrained(tmp_path / "run"), out[-1500:]


@pytest.mark.parametrize("dry", [False, True])
def test_a_disk_that_can_never_hold_a_checkpoint_is_known_before_the_first_step(digits, tmp_path, capsys, monkeypatch, dry):
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=200, f_frsize=1000, f_blocks=real(place).f_blocks))
    assert fit(digits, tmp_path / "run", f"--dry_run={str(dry).lower()}") == 2
    said = "".join(capsys.readouterr())
    assert "has 0.2 MB free" in said and "or lower checkpoint.keep" in said and untrained(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_first_checkpoint_that_cannot_be_written_ends_the_run_untrained(digits, tmp_path, capsys, monkeypatch, number):
    """Whatever the reason, and however much seemed to be free: the first save is the proof."""
    monkeypatch.setattr(
        "condot.pipeline.checkpoint.saving.write_file", lambda *a: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    )
    assert fit(digits, tmp_path / "run") == 2
    out, error = capsys.readouterr()
    assert "the first checkpoint could not be written" in error and os.strerror(number) in out and untrained(tmp_path / "run")


def test_what_is_kept_and_what_is_written_must_fit_together(tmp_path, monkeypatch):
    """Of ten units a checkpoint: three more need thirty and their small files, whatever else is there."""
    small = disk_space.METADATA_BYTES
    for free, fits in ((30 + 3 * small, True), (29 + 3 * small, False)):
        monkeypatch.setattr(os, "statvfs", lambda place, free=free: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1))
        assert (disk_space.disk_shortage(tmp_path / "not" / "there", 10, 10, 3) == "") == fits
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=0, f_frsize=0, f_blocks=0))
    assert disk_space.disk_shortage(tmp_path, 10, 10, 3) == "", "a disk that does not say how large it is"


def test_a_quota_is_asked_by_taking_the_room(tmp_path, monkeypatch):
    """More than any disk has is refused, and nothing of it stays."""
    assert disk_space.try_reserve(tmp_path, 1 << 20) == "" and not list(tmp_path.iterdir())
    said = disk_space.try_reserve(tmp_path, 1 << 60)
    assert said == "" or (("free some space, or raise your quota" in said and "No space left" in said) or "too large" in said)
    assert not list(tmp_path.iterdir())


# --- whose folder


def moved_at(step, monkeypatch, act):
    train_step = loop.train_step

    def advancing(run):
        seen = train_step(run)
        if run.step == step:
            act()
        return seen

    monkeypatch.setattr(loop, "train_step", advancing)


@pytest.mark.parametrize("other", [False, True])
def test_a_run_whose_folder_is_moved_ends_and_writes_to_nobody_elses(digits, tmp_path, capsys, monkeypatch, other):
    """Its status is in its own folder, wherever that is; what stands in the old place is untouched; the run goes on at the new place."""
    run, away = tmp_path / "run", tmp_path / "away"

    def move():
        os.rename(run, away)
        if other:
            held.append(lock_folder(run))
            (run / "status.json").write_text("another's")

    held = []
    with monkeypatch.context() as patch:
        moved_at(6, patch, move)
        assert fit(digits, run, "--checkpoint.asynchronous=false") == 2
    error = capsys.readouterr().err
    assert "was moved or replaced while it was in use" in error and "give the same command its new place" in error
    assert sorted(p.name for p in run.rglob("*")) == ([".lock", "status.json"] if other else [])
    assert not other or (run / "status.json").read_text() == "another's"
    said = json.loads((away / "status.json").read_text())
    assert said["state"] == "failed" and "moved or replaced" in said["reason"] and said["step"] == 6
    assert CheckpointManager(away, 1).latest().name == "checkpoint-4"
    for one in held:
        one.close()
    assert fit(digits, away) == 0 and CheckpointManager(away, 1).latest().name == "checkpoint-12" and not list(away.glob(".tmp*"))


def test_a_run_ends_when_what_it_pruned_is_gone(digits, tmp_path, monkeypatch):
    """However slow a disk removes: a process that ends kills its threads, and an old checkpoint would stay for ever."""
    remove = shutil.rmtree

    def slowly(*args, **kwargs):
        time.sleep(0.5)
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    assert fit(digits, tmp_path / "run") == 0
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_a_moved_folder_stays_locked(tmp_path):
    held = lock_folder(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "away")
    assert held.current_path() == tmp_path / "away" and "it is not there any more" in held.lock_error()
    with pytest.raises(ValueError, match="in use by another run"):
        lock_folder(tmp_path / "away")
    lock_folder(tmp_path / "run").close()
    assert "another folder stands there now" in held.lock_error()
    os.rename(tmp_path / "run", tmp_path / "third")
    os.rename(tmp_path / "away", tmp_path / "run")
    assert held.lock_error() == "" and held.current_path() == tmp_path / "run", "moved back, it is its own again"
    held.close()


# --- folders put in place, and what killed processes left


def made(folder, text):
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    (folder / "inner/file").write_text(text)
    return folder


def test_two_folders_change_places_in_one_step(tmp_path):
    one, other = made(tmp_path / "one", "1"), made(tmp_path / "other", "2")
    assert exchange(one, other) and (one / "inner/file").read_text() == "2" and (other / "inner/file").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        exchange(one, tmp_path / "none")


@pytest.mark.parametrize("able", [True, False])
def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, able):
    """Each file and folder is synced once before the name changes, the parent after it; where names cannot be exchanged, too."""
    place, done, fsync = made(tmp_path / "place", "old"), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}").rpartition(".tmp-")[2][8:]), fsync(fd))[1])
    if not able:
        monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
    with folder_for(place) as folder:
        made(folder, "new")
        done.clear()
        monkeypatch.setattr(os, "rename", lambda a, b, rename=os.rename: (done.append("rename"), rename(a, b)))
        put_in_place(folder, place)
    assert done[:3] == ["/inner/file", "/inner", ""] and done[-1] not in ("rename", "/inner") and done.count("rename") == (0 if able else 2)
    assert (place / "inner/file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["place"]


def test_what_killed_processes_left_is_swept_and_what_lives_stays(tmp_path):
    place = made(tmp_path / "export", "good")
    for name in (".export.tmp-0123abcd", ".export.old-0123abcd", ".export.tmp", ".export.old", ".export.tmp-mine", ".other.tmp-0123abcd"):
        made(tmp_path / name, "left")
    (tmp_path / ".export.0123abcd").write_text("left")
    with folder_for(place) as living:
        made(living, "growing")
        sweep(place)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".export.tmp-mine", ".other.tmp-0123abcd", "export", living.name])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".export.tmp-mine", ".other.tmp-0123abcd", "export"]
    assert (place / "inner/file").read_text() == "good"


def test_a_folder_that_was_set_aside_comes_back(tmp_path):
    """Killed between two renames, where names cannot be exchanged."""
    made(tmp_path / ".export.old-0123abcd", "good")
    made(tmp_path / ".export.tmp-0123abcd", "half")
    sweep(tmp_path / "export")
    assert [p.name for p in tmp_path.iterdir()] == ["export"] and (tmp_path / "export/inner/file").read_text() == "good"


def test_small_files_leave_nothing_either(tmp_path):
    for name in (".status.json.0123abcd", ".status.json.more", "status.json.0123abcd"):
        (tmp_path / name).write_text("left")
    write_whole(tmp_path / "status.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".status.json.more", "status.json", "status.json.0123abcd"]
