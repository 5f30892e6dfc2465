"""A manifest read line by line into columns is what json reads of the whole file, or ends in the same error."""

import hashlib
import io
import json
import random
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest

from condot.core.hashing import sha256_of_file
from condot.data.format import manifest as reading
from condot.data.format import shard_table
from condot.data.format.index import NO_LABEL
from condot.data.format.index_record import RECORD
from condot.data.format.manifest import VERSION, Manifest, Tally, parse_manifest, write_manifest
from condot.data.format.shard_table import Shard, ShardTable
from condot.data.loader.shuffle import ShuffledOrder, permutation
from condot.data.loader.survey import ManifestFolder
from condot.data.storage import local
from condot.data.storage.local import LocalFolder
from condot.data.storage.shard_reader import Shards

NAMES = ("train-{}.tar", "späte Ernte {}.tar", "日本-{}", '"{}\\".tar', "a\n b{},\t.tar", "\ud800{}.tar", "{}\x00", "", "{} ]\n}}\n")


def a_shard(rng, number, split="train"):
    name = rng.choice(NAMES).format(number)
    hashes = [rng.randbytes(32).hex() for _ in range(2)]
    sizes = [rng.choice([0, 1, 1000, 2**40, 2**63 - 1]) for _ in range(2)]
    return Shard(name=name, split=split, samples=sizes[0], bytes=sizes[1], sha256=hashes[0], index_sha256=hashes[1])


def lines_of(count, seed=0, splits=("train", "val", "prüf")):
    rng = random.Random(seed)
    return [a_shard(rng, number, rng.choice(splits)) for number in range(count)]


def head_of(rng):
    """What else a manifest says; some of it looks like the list of shards."""
    return {
        "class_names": tuple(rng.choice(["a", "ü", ' "shards": [\n', "]"]) for _ in range(rng.randrange(4))),
        "tally": Tally(sizes={"8x8": 3, "other": 1}, labels={"0": 2}, captions=rng.randrange(5)),
        "source": rng.choice(["", "0" * 64]),
        "encoding": rng.choice([{}, {"shards": [{"name": 1}], "bad": [], "statistics": {"shards": [[1.5]]}}]),
    }


def old_text(shards, head):
    """The file as it was written before there were columns."""
    raw = {**head, "tally": asdict(head["tally"]), "decoder": 2, "version": VERSION}
    lines = ",\n  ".join(json.dumps(asdict(shard)) for shard in shards)
    return (json.dumps(raw, indent=1)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n').encode()


def old_reading(text):
    """The manifest's fields as they were read before there were columns, or the error."""
    try:
        raw = json.loads(text)
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, this release reads {VERSION}")
        shards = [Shard(**shard) for shard in raw.pop("shards")]
        names, tally = tuple(raw.pop("class_names")), Tally(**raw.pop("tally"))
        manifest = Manifest(**{"decoder": 1, **raw}, shards=(), class_names=names, tally=tally)
        return shards, manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"x/manifest.json cannot be read ({error}): run `condot prepare` again."


def new_reading(text):
    try:
        manifest = parse_manifest(text, "x/manifest.json")
        return list(manifest.shards), replace(manifest, shards=())
    except ValueError as error:
        return str(error)


def old_fingerprint(shards):
    return hashlib.sha256("".join(f"{s.split}:{s.sha256};" for s in shards).encode()).hexdigest()


@pytest.fixture
def few_at_once(monkeypatch):
    """Small pieces, so that few shards have many."""
    monkeypatch.setattr(reading, "READ_BYTES", 600)
    for module in (shard_table, reading, local):
        monkeypatch.setattr(module, "AT_ONCE", 3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 50])
def test_what_is_written_and_read_is_what_json_says(few_at_once, tmp_path, count):
    """Byte for byte the file of old, and every field of every shard, whatever the names."""
    for seed in range(20):
        rng = random.Random(seed)
        shards, head = lines_of(count, seed), head_of(rng)
        manifest = Manifest(shards=shards, **head)
        write_manifest(tmp_path, manifest)
        text = (tmp_path / "manifest.json").read_bytes()
        assert text == old_text(shards, head)
        assert new_reading(text) == old_reading(text) == (shards, replace(manifest, shards=()))
        assert parse_manifest(text, "x") == manifest and [vars(s) for s in parse_manifest(text, "x").shards] == json.loads(text)["shards"]


def test_lines_are_read_a_few_at_a_time(few_at_once, monkeypatch):
    """json sees no more than so many bytes at once; the whole file is never asked for."""
    shards, seen, loads = [replace(s, name="a.tar") for s in lines_of(200)], [], json.loads
    text = old_text(shards, {"class_names": (), "tally": Tally(), "source": "", "encoding": {}})
    monkeypatch.setattr(reading.json, "loads", lambda piece: seen.append(len(piece)) or loads(piece))
    assert list(parse_manifest(text, "x").shards) == shards and len(seen) > 50 and max(seen) < 2000 < len(text)


@pytest.mark.parametrize(
    "layout", [{}, {"indent": 1}, {"indent": 2}, {"separators": (",", ":")}, {"sort_keys": True, "ensure_ascii": False}]
)
def test_another_layout_of_the_same_json_is_read_alike(few_at_once, layout):
    shards = [replace(s, name=s.name.replace("\ud800", "")) for s in lines_of(9)]
    text = json.dumps(json.loads(old_text(shards, head_of(random.Random(3)))), **layout).encode()
    assert new_reading(text) == old_reading(text) and new_reading(text)[0] == shards


def test_a_damaged_manifest_ends_as_it_did(few_at_once):
    """Cut anywhere, with any byte gone or another, and lines lost, doubled or without their comma: the manifest or the message of old.

    One thing is refused that was not: a field that no shard can have.
    """
    text = old_text([replace(s, name=f"t{i}.tar") for i, s in enumerate(lines_of(6))], head_of(random.Random(5)) | {"encoding": {}})
    lines = text.splitlines(keepends=True)
    damaged = [text[:end] for end in range(len(text))]
    damaged += [text[:at] + byte + text[at + 1 :] for at in range(len(text)) for byte in (b"", b" ", b",", b"}", b'"', b"\n", b"\xff")]
    damaged += [b"".join(lines[:i] + some + lines[i + 1 :]) for i in range(len(lines)) for some in ([], [lines[i]] * 2, [b"  \n"], [b"{}"])]
    damaged += [text.replace(b"},\n", other) for other in (b"}\n", b"} \n", b"},\n\n", b"},,\n", b"}\n,")]
    damaged += [text.replace(b"}\n ]", b"},\n ]"), text.replace(b"}\n ]", b"},\n  \n ]"), text + b"]", text + b" ", b"", b"[]", b"null"]
    refused = 0
    for some in damaged:
        new, old = new_reading(some), old_reading(some)
        if new != old:
            refused += 1
            assert "is no shard: a name, a split, two sha256 and two counts are needed" in new and not isinstance(old, str), some
    assert refused < len(damaged) / 3


@pytest.mark.parametrize(
    "field, value",
    [
        *[("samples", value) for value in (-1, 1.0, "1", True, None, 2**63)],
        *[("sha256", value) for value in ("a" * 63, "A" * 64, "g" * 64, "a" * 32 + " " + "a" * 31, 5, "é" * 64)],
        *[("index_sha256", "a" * 65), ("bytes", -1), ("name", 7), ("split", None)],
    ],
)
def test_a_shard_that_cannot_be_is_named(field, value):
    raw = json.loads(old_text(lines_of(5), head_of(random.Random(1))))
    raw["shards"][3] |= {"name": "here.tar"} | {field: value}
    with pytest.raises(ValueError, match=r"x cannot be read \(Shard\(name=('here.tar'|7), .*\) is no shard: a name, .*run `condot"):
        parse_manifest(json.dumps(raw).encode(), "x")


def test_a_list_is_a_sequence(few_at_once):
    """As a list of objects would be: numbers from both ends, slices, iteration, search, equality."""
    shards = lines_of(11)
    columns = ShardTable.of(shards)
    assert len(columns) == 11 and list(columns) == shards and [columns[i] for i in range(-11, 11)] == shards * 2
    for part in (slice(3, 8), slice(None, None, -2), slice(20, 30), slice(-4, None)):
        assert list(columns[part]) == shards[part] and columns[part] == ShardTable.of(shards[part])
        assert list(columns[part].names) == [s.name for s in shards[part]]
        assert columns[part].samples.tolist() == [s.samples for s in shards[part]]
        assert columns[part].bytes.tolist() == [s.bytes for s in shards[part]]
        assert columns[part].fingerprint == old_fingerprint(shards[part])
    assert shards[4] in columns and columns.index(shards[4]) == 4 and not ShardTable.of([]) and columns[np.int64(2)] == shards[2]
    with pytest.raises(IndexError):
        columns[11]
    for field, value in (
        ("name", "other"),
        ("split", "other"),
        ("samples", 5),
        ("bytes", 5),
        ("sha256", "0" * 64),
        ("index_sha256", "0" * 64),
    ):
        assert columns != ShardTable.of([*shards[:7], replace(shards[7], **{field: value}), *shards[8:]])
    assert columns != ShardTable.of(shards[:10]) and columns != columns[::-1] and columns == columns[:]


def test_parts_are_those_of_a_list(few_at_once):
    """A split, chosen names, their fingerprints: as from objects."""
    shards = [replace(shard, name=f"{i}-é.tar") for i, shard in enumerate(lines_of(20))]
    manifest = Manifest(shards=shards)
    assert manifest.shards.splits == sorted({s.split for s in shards}) and manifest.fingerprint == old_fingerprint(shards)
    for split in ("train", "val", "prüf"):
        part = [s for s in shards if s.split == split]
        assert list(manifest.split(split)) == part and manifest.split(split).fingerprint == old_fingerprint(part)
        assert (
            manifest.split(split).splits == [split]
            and manifest.split(split)[1] == part[1]
            and list(manifest.split(split)[1:3]) == part[1:3]
        )
    with pytest.raises(ValueError, match="split 'test' has no shard: the manifest has prüf, train, val"):
        manifest.split("test")
    found, missing = manifest.shards.select_names(["7-é.tar", "x", "0-é.tar", "19-é.tar", "y"])
    assert list(found) == [shards[7], shards[0], shards[19]] and missing == ["x", "y"]
    renamed = ShardTable.of([replace(s, sha256="0" * 64) for s in shards])
    assert (
        renamed.has_same_names(manifest.shards)
        and not renamed[:-1].has_same_names(manifest.shards)
        and not renamed[::-1].has_same_names(manifest.shards)
    )
    assert list(renamed.take([3, 1])) == [renamed[3], renamed[1]]


def test_a_shard_takes_little_memory():
    """16 bytes of name, two hashes and what numbers need; while it is read, a few pieces of the file more."""
    count = 30_000
    lines = [
        Shard(name=f"train-{i:06d}.tar", split="train", samples=1, bytes=1, sha256="0" * 64, index_sha256="f" * 64) for i in range(count)
    ]
    file = io.BytesIO(old_text(lines, {"class_names": (), "tally": Tally(), "source": "", "encoding": {}}))
    tracemalloc.start()
    held = reading.read_manifest(file, "x")
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held.shards) == count and now < 140 * count and peak < now + 10 * reading.READ_BYTES < 800 * count


# --- folders


def folder_of(path, names, split="train"):
    """Shards of no content but their own length, each with an index."""
    path.mkdir(parents=True)
    shards = []
    for number, name in enumerate(names):
        tar = path / name
        tar.parent.mkdir(exist_ok=True)
        tar.write_bytes(bytes(number))
        index = tar.with_suffix(".npy")
        np.save(index, np.full(number, np.array((0, 0, 0, 0, 0, 0, NO_LABEL, 1, 1), RECORD)))
        shards.append(replace(lines_of(1)[0], name=name, split=split, samples=number, bytes=number, index_sha256=sha256_of_file(index)))
    write_manifest(path, Manifest(shards=shards))
    return path


def test_every_shard_is_looked_for(few_at_once, tmp_path):
    """Names of any kind pass; the first that is gone, cut or without its index is named, and `ManifestFolder` names all."""
    names = [*(f"train-{i}.tar" for i in range(8)), "no suffix", "ü.b.tar", ".tar", "inside/x.tar", "x.tgz", "last.tar"]
    good = folder_of(tmp_path / "good", names)
    assert list(LocalFolder(good).manifest.shards.names) == names
    for number, (spoil, message) in enumerate(
        [
            (lambda tar: tar.unlink(), "missing, the manifest says"),
            (lambda tar: tar.write_bytes(b"longer than it was"), "18 bytes, the manifest says"),
            (lambda tar: tar.with_suffix(".npy").unlink(), " is missing: copy it"),
        ]
    ):
        folder = folder_of(tmp_path / f"bad{number}", names)
        for name in (names[7], names[13]):
            spoil(folder / name)
        with pytest.raises(ValueError, match=rf"/train-7\..*{message}"):
            LocalFolder(folder)
        faults = ManifestFolder(folder).faults
        assert len(faults) == 2 and "train-7." in faults[0] and "/last." in faults[1] and all(message in fault for fault in faults)


def test_shards_of_several_folders_are_counted_through(tmp_path):
    """Number by number as the parts one behind the other; each folder is told of its own."""
    sizes = {"a": 4, "b": 1, "c": 5}
    folders = [LocalFolder(folder_of(tmp_path / key, [f"{key}{i}.tar" for i in range(size)])) for key, size in sizes.items()]
    shards = Shards(folders, "train", [("a3.tar", "a1.tar"), None, folders[2].manifest.shards[1:4]])
    wanted = ["a/a3.tar", "a/a1.tar", "b/b0.tar", "c/c1.tar", "c/c2.tar", "c/c3.tar"]
    assert [shards.name(i).removeprefix(f"{tmp_path}/") for i in range(6)] == wanted
    assert [f"{s.name[0]}/{s.name}" for s in shards.shards] == wanted and shards.counts == [3, 1, 0, 1, 2, 3] == shards.samples.tolist()
    assert [len(shards.records(i)) for i in range(6)] == shards.counts
    assert shards.fingerprint == "+".join(old_fingerprint(part) for part in shards.parts)
    with pytest.raises(ValueError, match=r"/b has no c1\.tar: its manifest does not list it"):
        Shards(folders[1:2], "train", [("b0.tar", "c1.tar")])
    told = {}
    for folder in folders:
        folder.prefetch = lambda some, name=folder.path.name: told.update({name: [s.name for s in some]})
    shards.prefetch([5, 0, 3, 1])
    assert told == {"a": ["a3.tar", "a1.tar"], "b": [], "c": ["c3.tar", "c1.tar"]}


def test_shards_near_a_position_are_its_block_and_the_next():
    """From the definition: an epoch permutes the shards, blocks of so many follow one another, the last is shorter."""
    counts, seed, size = np.array([3, 0, 4, 2, 5, 1, 2]), 8, 3
    order = ShuffledOrder(counts, seed, size)
    for epoch in range(3):
        now, later = (permutation(7, seed, 1, e).tolist() for e in (epoch, epoch + 1))
        blocks = [now[:3], now[3:6], now[6:], later[:3]]
        for within in range(17):
            b = next(b for b in range(3) if within < counts[now[: 3 * b + 3]].sum())
            assert order.upcoming_shards(17 * epoch + within) == blocks[b] + blocks[b + 1]
            assert order(np.array([17 * epoch + within]))[0][0] in blocks[b]
