"""An index that is not the one that the manifest means is a lost shard, for whoever opens it; one that is right is hashed once."""

import hashlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from shardmaker import make, samples

from condot.core.data_config import DataConfig
from condot.data.format import index_record as indexing
from condot.data.format.manifest import parse_manifest
from condot.data.inspect import main as inspect
from condot.data.loader.build import build
from condot.data.loader.stream import Share
from condot.data.prepare.verify import _sample
from condot.data.storage.shard_reader import LostShard, Shards


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "shards", samples([30, 50, 20]))


def reverse_labels(folder, shard=1):
    path = folder / f"train-{shard:06d}.npy"
    records = np.load(path)
    records["label"] = records["label"][::-1].copy()
    np.save(path, records)


def stream(folder, **more):
    options = DataConfig(**{"shards": (str(folder),), "resolution": 4, "channels": 1, "workers": 0, **more})
    return build(options, seed=1, share=Share(batch_size=10))


def test_reversed_labels_stop_training_and_are_named(folder):
    assert len(next(stream(folder)).labels) == 10
    reverse_labels(folder)
    with pytest.raises(LostShard, match=r"train-000001\.tar: its index is not the one that the manifest means.*pack again.*skip"):
        for _ in range(10):
            next(stream(folder))


def test_a_wrong_index_may_be_skipped_as_a_lost_tar_is(folder):
    right = {tuple(sample) for sample in (next(stream(folder))).samples.tolist()}
    reverse_labels(folder)
    skipping = stream(folder, lost_shards="skip")
    batches = [next(skipping) for _ in range(10)]
    assert right and all(1 not in batch.samples[:, 0].tolist() for batch in batches)
    assert len({fault.position for fault in skipping.take_faults()}) == 50, "each sample of the shard once in an epoch"
    labels = np.concatenate([batch.labels for batch in batches])
    numbers = np.concatenate([batch.samples[:, 1] + 80 * (batch.samples[:, 0] == 2) for batch in batches])
    assert np.array_equal(labels, numbers % 3), "substitutes bring their own class"


def test_with_several_shapes_a_wrong_index_stops_even_when_skipping(tmp_path):
    """Batches are planned from all indexes: ranks that see other ones would plan others."""
    folder = make(tmp_path / "s", samples([40, 40], lambda n: (4 + 4 * (n % 2), 4)))
    reverse_labels(folder)
    with pytest.raises(LostShard, match=r"train-000001\.tar"):
        next(stream(folder, lost_shards="skip", aspect_ratios=(1.0, 2.0), bucket_step=2))


def test_inspect_names_it_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condot.data.inspect.SECONDS", 0.05)
    words = [str(folder), "--resolution", "4", "--channels", "1", "--output", str(tmp_path / "x.png")]
    assert inspect(words) == 0
    capsys.readouterr()
    reverse_labels(folder)
    assert inspect(words) != 0
    shown = capsys.readouterr()
    assert "train-000001.npy: its index is not the one that the manifest means" in shown.out and ", 1 bad" in shown.out
    assert "train-000001.tar" in shown.err and "Traceback" not in shown.err


def test_side_shards_are_checked_alike(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "side")
    reverse_labels(tmp_path / "side", 2)
    shards = Shards(tmp_path / "side")
    assert len(shards.records(0)) == 30
    with pytest.raises(LostShard, match=r"side/train-000002\.tar"):
        shards.records(2)


@pytest.mark.parametrize("label", [3, 700])
def test_a_class_that_the_manifest_does_not_name(folder, label):
    """Hashes that are right do not make it a class: never an IndexError in a loop."""
    path = folder / "train-000001.npy"
    records = np.load(path)
    records["label"][7] = label
    np.save(path, records)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["shards"][1]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert parse_manifest((folder / "manifest.json").read_bytes(), "m").class_names == ("a", "b", "c")
    with pytest.raises(LostShard, match=rf"train-000001\.tar: its index has class {label}, the manifest names 3 classes"):
        Shards(folder).records(1)


def test_an_index_is_hashed_once_as_long_as_it_is_the_same_file(folder, monkeypatch):
    hashed, real = [], indexing.sha256_of
    monkeypatch.setattr(indexing, "sha256_of", lambda body: hashed.append(len(body)) or real(body))
    for _ in range(3):
        Shards(folder).records(0)
    assert len(hashed) == 1
    np.save(folder / "train-000000.npy", np.load(folder / "train-000000.npy"))
    Shards(folder).records(0)
    assert len(hashed) == 2, "written again, with the same bytes"


def test_a_sample_whose_headers_no_longer_can_be_read_is_a_bad_one_without_a_name(tmp_path):
    """As a release with other rules for headers may have indexed it: its bytes are unchanged, and no walk takes them."""
    info = tarfile.TarInfo("name")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    body = info.tobuf(tarfile.GNU_FORMAT) + bytes(512)
    (tmp_path / "shard.tar").write_bytes(body)
    record = np.array([(*indexing.index_payload(body, 512, 1, 0), 0, 1, 1)], indexing.RECORD)[0]
    with open(tmp_path / "shard.tar", "rb") as file:
        key, why = _sample(file.fileno(), record, "", np.empty((4, 4, 3), np.uint8))
    assert key == "" and "a long name of no length" in why


@pytest.mark.parametrize("body", [b"", b"x" * 100, b"\x93NUMPY\1\0\x76\0{'descr': [", None])
def test_an_index_that_is_cut_or_none_is_a_lost_shard(folder, body):
    path = folder / "train-000001.npy"
    path.write_bytes(path.read_bytes()[:-24] if body is None else body)
    with pytest.raises(LostShard, match=r"train-000001\.tar: its index is cut or no index \(\d+ bytes\)\. Copy both or pack again\."):
        Shards(folder).records(1)


def test_an_index_that_is_cut_while_it_is_read_ends_no_process(folder):
    """It was mapped, and a page of a mapped file that is not there any more is SIGBUS: here that kills a child."""
    shards = Shards(folder)
    wanted = [shards.records(n).copy() for n in range(2)]
    child = os.fork()
    if child == 0:
        for path in folder.glob("*.npy"):
            os.truncate(path, 0)
        os._exit(0 if all(np.array_equal(shards.records(n), wanted[n]) for n in range(2)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_indexes_take_bounded_memory(folder, monkeypatch):
    """720, 1200 and 480 bytes: as many of a size are kept as fit into a thousand, and one."""
    monkeypatch.setattr("condot.data.storage.shard_reader.INDEX_BYTES", 1000)
    shards = Shards(folder)
    for number in range(3):
        shards.records(number)
    assert list(shards._indexes) == [1, 2]


def test_an_index_that_claims_more_than_it_holds_takes_no_room(folder):
    path = folder / "train-000001.npy"
    body = path.read_bytes()
    path.write_bytes(body.replace(b"(50,), }" + b" " * 12, b"(5" + b"0" * 12 + b",), }"))
    assert path.read_bytes() != body
    with pytest.raises(LostShard, match=r"its index is cut or no index"):
        Shards(folder).records(1)
