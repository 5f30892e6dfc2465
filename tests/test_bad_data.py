"""Damage: what is bad is replaced by what (seed, position) names, counted and listed; what is lost is named; nothing is silent."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from condot.core.data_config import DataConfig
from condot.data.format.index import index_shard
from condot.data.format.index_record import RECORD, index_path
from condot.data.format.tar_reader import members
from condot.data.loader.batch import MAX_SUBSTITUTES
from condot.data.loader.build import build
from condot.data.loader.stream import Share
from condot.data.storage.local import LocalFolder
from condot.data.storage.shard_reader import BadSample, LostShard, Shards
from tests.shardmaker import flat, jpeg, make, png, samples


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "shards", samples([30, 50, 20]))


def stream(folder, rank=0, ranks=1, workers=0, start=0, captions=False, **more):
    options = DataConfig(**{"shards": (str(folder),), "resolution": 4, "channels": 1, "workers": workers, **more})
    return build(options, seed=1, share=Share(batch_size=8, rank=rank, ranks=ranks), start=start, captions=captions)


def flip(path, at, mask=1):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def payload_of(folder, shard, number):
    """Where a sample's image begins and ends in its tar."""
    record = Shards(folder).records(shard)[number]
    return int(record["payload"]) * 512, int(record["payload"]) * 512 + int(record["bytes"])


def run(folder, steps, ranks=1, workers=0, **more):
    """Samples and images of every global batch, and all faults."""
    streams = [stream(folder, r, ranks, workers, **more) for r in range(ranks)]
    batches = [[next(s) for s in streams] for _ in range(steps)]
    faults = sorted(flat(s.take_faults() for s in streams))
    for s in streams:
        s.close()
    return [(torch.cat([p.samples for p in b]).tolist(), torch.cat([p.images for p in b]).tolist()) for b in batches], faults


def test_a_record_is_24_bytes():
    assert RECORD.itemsize == 24


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_a_bad_sample_is_replaced_alike_whoever_reads_it(folder, ranks, workers):
    whole, none = run(folder, 25)
    assert not none
    for shard, number in ((1, 7), (1, 8), (2, 19)):
        flip(folder / f"train-{shard:06d}.tar", payload_of(folder, shard, number)[0] + 30)
    batches, faults = run(folder, 25)
    assert run(folder, 25, ranks, workers) == (batches, faults), "never silently different between ranks"
    assert len({f.position for f in faults}) == 6, "three bad samples in each of two epochs"
    for fault in faults:
        step, place = divmod(fault.position, 8)
        assert whole[step][0][place] in ([1, 7], [1, 8], [2, 19]) and batches[step][0][place] not in ([1, 7], [1, 8], [2, 19])
        assert "bytes changed" in fault.error and fault.key in ("000037", "000038", "000099") and fault.shard.endswith(".tar")
    bad = {f.position for f in faults}
    assert len({tuple(batches[p // 8][0][p % 8]) for p in bad}) > 3, "substitutes differ from position to position"
    for step in range(25):
        for place in range(8):
            if 8 * step + place not in bad:
                assert batches[step][0][place] == whole[step][0][place] and batches[step][1][place] == whole[step][1][place]


def test_a_substitute_brings_its_own_label_size_and_caption(tmp_path):
    folder = make(tmp_path / "s", samples([60], lambda n: (4 + n % 3, 4)))
    flip(folder / "train-000000.tar", payload_of(folder, 0, 5)[0] + 30)
    shards, s = Shards(folder), stream(folder, captions=True)
    for _ in range(8):
        batch = next(s)
        for i, key in enumerate(s.keys(batch)):
            number = int(key)
            assert batch.labels[i] == number % 3 and batch.captions[i] == f"caption {number}" and int(batch.images[i].max()) == number
            assert batch.sizes[i, 1] == 4 + number % 3
    assert len(s.take_faults()) == 1 and shards.counts == [60]


def test_a_damaged_caption_or_class_is_not_silent(folder):
    """Only what is read is checked: captions when they are wanted; the class lies in the index."""
    text = next(m for m in members(folder / "train-000000.tar") if m.name == "000003.txt")
    flip(folder / "train-000000.tar", text.offset + 2)
    with pytest.raises(BadSample, match="sample 3: its bytes changed"):
        Shards(folder).read(0, 3)
    assert len(run(folder, 13)[1]) == 0 and len(run(folder, 12, captions=True)[1]) == 1


def test_an_image_that_cannot_be_decoded_is_listed_with_shard_and_key(tmp_path):
    good = [{"__key__": f"{i:03d}", "jpg": jpeg(i, (8, 8))} for i in range(20)]
    good[4]["jpg"] = good[4]["jpg"][:-40]  # indexed from its header, cut in its pixels
    s = stream(make(tmp_path / "s", [good], classes=()), channels=3, resolution=8)
    for _ in range(5):
        next(s)
    faults = s.take_faults()
    assert {f.key for f in faults} == {"004"} and all(f.shard.endswith("train-000000.tar") and "truncated" in f.error for f in faults)


def test_nothing_but_bad_samples_is_an_error(tmp_path):
    folder = make(tmp_path / "s", samples([12]))
    for number in range(12):
        flip(folder / "train-000000.tar", payload_of(folder, 0, number)[0] + 30)
    with pytest.raises(ValueError, match=rf"{MAX_SUBSTITUTES} bad samples in a row at position 0.*condot inspect"):
        next(stream(folder, workers=1))


def test_a_shard_that_vanishes_is_named_or_skipped(folder):
    """At the start it is refused; later it stops the stream, unless data.lost_shards=skip replaces its samples."""
    open_one, other = stream(folder), stream(folder, lost_shards="skip")
    tar = folder / "train-000001.tar"
    os.rename(tar, folder / "elsewhere")
    with pytest.raises(ValueError, match=r"train-000001\.tar: missing, the manifest says \d+"):
        stream(folder)
    with pytest.raises(LostShard, match=r"train-000001\.tar: missing.*goes on once it is back; data\.lost_shards=skip"):
        for _ in range(20):
            next(open_one)
    for _ in range(12):
        assert 1 not in next(other).samples[:, 0].tolist()
    assert len(other.take_faults()) >= 45, "each of its 50 samples among the first 96 of 100 positions, and substitutes from it"
    os.rename(folder / "elsewhere", tar)
    assert not run(folder, 13)[1]


def test_a_shard_cut_while_it_is_read(folder):
    """Samples before the cut are well; those behind are bad, each named."""
    s = stream(folder)
    while 1 not in next(s).samples[:, 0].tolist():
        pass
    tar = folder / "train-000001.tar"
    cut = payload_of(folder, 1, 25)[0]
    os.truncate(tar, cut)
    for _ in range(12):
        next(s)
    faults = s.take_faults()
    assert 15 <= len({f.key for f in faults}) <= 26 and all(f.shard.endswith("train-000001.tar") for f in faults)
    with pytest.raises(ValueError, match=rf"train-000001.tar: {cut} bytes, the manifest says"):
        stream(folder)


def test_damaged_folders_are_refused_at_the_start(folder, tmp_path):
    def broken(name, damage):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        damage(copy)
        return copy

    cases = {
        r"index has 29 samples, the manifest says 30": lambda f: np.save(f / "train-000000.npy", np.load(f / "train-000000.npy")[:-1]),
        r"train-000000\.npy is missing": lambda f: index_path(f / "train-000000.tar").unlink(),
        r"no manifest\.json, so packing never finished": lambda f: (f / "manifest.json").unlink(),
        r"manifest\.json cannot be read": lambda f: (f / "manifest.json").write_text("{"),
        r"version 1, this release reads 2": lambda f: (f / "manifest.json").write_text(json.dumps({"version": 1})),
    }
    for number, (message, damage) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            next(stream(broken(f"b{number}", damage)))
    with pytest.raises(ValueError, match=r"split 'test' has no shard: the manifest has train"):
        stream(folder, split="test")
    with pytest.raises(ValueError, match=r"is no folder: make it with `condot prepare"):
        LocalFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"data\.shards is empty"):
        build(DataConfig(), seed=0, share=Share(batch_size=1))


# --- the tar itself


def tar_of(path, *files):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def test_a_bad_header_in_the_middle_is_an_error_and_not_the_end(folder, tmp_path):
    """Python's tarfile stops there without a word and loses the rest."""
    tar = folder / "train-000000.tar"
    whole = tar.read_bytes()
    found = list(members(tar))
    at = found[len(found) // 2].header
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole[:at] + b"\7" * 512 + whole[at + 512 :])
    with pytest.raises(ValueError, match=f"damaged tar header at byte {at}"):
        list(members(broken))
    broken.write_bytes(whole[: at + 3] + bytes([whole[at + 3] ^ 1]) + whole[at + 4 :])  # another name: only the checksum tells
    with pytest.raises(ValueError, match=f"damaged tar header at byte {at}"):
        list(members(broken))
    broken.write_bytes(whole[:at])
    with pytest.raises(ValueError, match="end-of-archive block is missing"):
        list(members(broken))
    broken.write_bytes(whole[: found[len(found) // 2].offset + 1])
    with pytest.raises(ValueError, match="cut inside"):
        list(members(broken))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("../../evil.png", png(1))], "leads out of its folder"),
        ([("/etc/evil.png", png(1))], "leads out of its folder"),
        ([("a/../../b.png", png(1))], "leads out of its folder"),
        ([("a.txt", b"words")], "no image: one of png"),
        ([("a.png", b"no image")], "cannot identify"),
        ([("a.png", png(1)), ("a.cls", b"cat")], "class 'cat' is no whole number"),
        ([("a.png", png(1)), ("a.cls", b"-2")], r"class -2 is not in 0 to 65534"),
        ([("a.png", png(1)), ("a.cls", b"65535")], r"class 65535 is not in 0"),
        ([("a.png", png(1)), ("a.json", b" " * (2 << 20))], "its .json has 2097152 bytes"),
        ([("a.png", png(1)), ("a.txt", b" " * (2 << 20))], "its .txt has 2097152 bytes"),
        ([("a.png", png(1)), ("a.png", png(2))], "is there twice"),
    ],
)
def test_samples_that_cannot_be_indexed(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        index_shard(tar_of(tmp_path / "t.tar", *files))


def test_samples_that_cannot_be_indexed_may_be_left_out_and_named(tmp_path):
    tar = tar_of(tmp_path / "t.tar", ("a.png", png(1)), ("b.png", b"no"), ("b.cls", b"1"), ("c.txt", b"no image"), ("d.png", png(4)))
    faults = []
    records, _ = index_shard(tar, faults=faults)
    assert len(records) == 2 and len(faults) == 2 and "t.tar: b (" in faults[0] and "t.tar: c (" in faults[1]
