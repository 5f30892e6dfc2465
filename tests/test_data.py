"""Shards, index, order, stream: every sample once, in one order, whoever reads it."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from data.decode import DECODE_ERRORS, decode_image, upright
from data.index import RECORD, index_path, members, read_manifest
from data.order import Order, keys, permutation
from data.pack import Packing, pack
from data.prepare import bytes_of, imagefolder, main
from data.stream import Shards, Share, Stream, to_unit


def folder_of_images(root, classes=("cat", "dog"), count=5, size=(9, 7)):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (40 * c + i, 10, 200)).save(root / name / f"image {i}.png")
    return root


def stream(shards, start=0, rank=0, ranks=1, accumulation=1, workers=0, batch_size=8, seed=3, **more):
    share = Share(batch_size=batch_size, accumulation=accumulation, rank=rank, ranks=ranks)
    return Stream(shards, channels=1, resolution=8, seed=seed, share=share, start=start, workers=workers, **more)


# --- packing and the index


def test_digits_come_back_exactly(digits):
    """The 17 grays of the scans survive PNG, tar and index; every scan is there once, a fifth of them held out."""
    bunch = load_digits()
    shards = {split: Shards(digits, split) for split in ("train", "val")}
    seen = []
    for split in shards.values():
        for s, count in enumerate(split.counts):
            for n in range(count):
                sample = split.read(s, n)
                number = int(json.loads(sample.files["json"])["source"].split("/")[1])
                pixels, label = split.pixels(s, n, 1, 8)
                assert label == bunch.target[number] and np.array_equal(np.round(pixels[0] * (16 / 255)), bunch.images[number])
                seen.append(number)
    assert sorted(seen) == list(range(1797))
    assert sum(shards["val"].counts) == 359 and len(shards["train"].counts) > 3


def test_webdataset_reads_our_shards(digits):
    """The reference reader finds the same samples in the same order."""
    shards = Shards(digits, "train")
    tars = [str(digits / s.name) for s in shards.shards]
    theirs = [(s["__key__"], s["cls"]) for s in webdataset.WebDataset(tars, shardshuffle=False)]
    ours = [(sample.key, sample.files["cls"]) for s, n in enumerate(shards.counts) for sample in (shards.read(s, i) for i in range(n))]
    assert ours == theirs and len(ours) == 1438


def test_we_read_webdatasets_shards(tmp_path):
    """Its writer's tars, with long names and keys in folders, are walked like tarfile walks them."""
    buffer = io.BytesIO()
    Image.new("L", (3, 5)).save(buffer, "PNG")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(4):
            sink.write({"__key__": f"{'long/' * 30}{i:03d}", "png": buffer.getvalue(), "cls": i, "txt": "ü" * i})
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in members(tmp_path / "a.tar")] == theirs and len(theirs) == 12


def test_a_record_is_24_bytes():
    assert RECORD.itemsize == 24


def test_the_index_says_what_the_images_are(tmp_path):
    root = folder_of_images(tmp_path / "images")
    (root / "cat" / "image 0.txt").write_text("a cat\n")
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "shards")]) == 0
    shards = Shards(tmp_path / "shards", "train")
    records = shards.records(0)
    assert (
        set(records["width"].tolist()) == {9}
        and set(records["height"].tolist()) == {7}
        and sorted(records["label"].tolist()) == [0] * 5 + [1] * 5
    )
    captions = {json.loads(s.files["json"])["source"]: s.files.get("txt") for s in (shards.read(0, i) for i in range(10))}
    assert captions["cat/image 0.png"] == b"a cat" and sum(c is not None for c in captions.values()) == 1
    assert shards.manifest.class_names == ("cat", "dog") and shards.manifest.sizes == {"9x7": 10}
    stored = shards.read(0, 0)
    assert stored.files["png"] == (root / json.loads(stored.files["json"])["source"]).read_bytes(), "files are copied byte for byte"


def test_packing_twice_is_packing_once(tmp_path, capsys):
    root = folder_of_images(tmp_path / "images")
    words = ["imagefolder", str(root), "--output", str(tmp_path / "shards")]
    assert main(words) == main(words) == 0
    assert main([*words, "--seed", "1"]) == 2 and "other images or settings" in capsys.readouterr().err
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/train-000000.tar").read_bytes() == (tmp_path / "shards/train-000000.tar").read_bytes()


def test_an_interrupted_packing_leaves_nothing_that_passes_for_whole(tmp_path, monkeypatch):
    samples, names = imagefolder(folder_of_images(tmp_path / "images"))
    for point in ("write_manifest", "describe"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data.pack.{point}", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                pack(samples, names, tmp_path / "shards", Packing(10**6))
        with pytest.raises(ValueError, match=r"no manifest.json, so packing never finished"):
            read_manifest(tmp_path / "shards")
    assert len(pack(samples, names, tmp_path / "shards", Packing(10**6)).shards) == 1
    assert not list((tmp_path / "shards").glob(".packing*"))


@pytest.mark.parametrize(("text", "value"), [("256MB", 256_000_000), ("1GB", 10**9), ("1.5kB", 1500), ("77", 77), ("2k", 2000)])
def test_sizes(text, value):
    assert bytes_of(text) == value


def test_sources_that_cannot_be_packed(tmp_path, capsys):
    def error(*words):
        assert main([*words, "--output", str(tmp_path / "shards")]) == 2
        assert not (tmp_path / "shards" / "manifest.json").exists()
        return capsys.readouterr().err

    assert "is no folder" in error("imagefolder", str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    assert "holds no image" in error("imagefolder", str(tmp_path / "empty"))
    root = folder_of_images(tmp_path / "images")
    (root / "dog" / "broken.jpg").write_bytes(b"no image at all")
    (root / "dog" / "cut.png").write_bytes((root / "dog" / "image 1.png").read_bytes()[:48])
    message = error("imagefolder", str(root))
    assert (
        "2 of 12 images cannot be read" in message
        and "dog/broken.jpg" in message
        and "dog/cut.png" in message
        and "--skip_corrupt" in message
    )
    assert "is no size" in error("imagefolder", str(root), "--shard_size", "many")
    assert "at least 0 and below 1" in error("imagefolder", str(root), "--holdout", "1")
    assert main(["imagefolder", str(root), "--output", str(tmp_path / "shards"), "--skip_corrupt"]) == 0
    assert "left out: dog/broken.jpg" in capsys.readouterr().out
    (root / "loose.png").write_bytes((root / "dog" / "image 1.png").read_bytes())
    assert (
        main(["imagefolder", str(root), "--output", str(tmp_path / "other")]) == 2 and "beside the class folders" in capsys.readouterr().err
    )


# --- damage


def copy_of(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "copy")
    return tmp_path / "copy"


def test_damaged_shards_are_named(digits, tmp_path):
    folder = copy_of(digits, tmp_path)
    tar = folder / "train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-5000])
    with pytest.raises(ValueError, match=r"train-000001.tar: \d+ bytes, the manifest says"):
        read_manifest(folder)
    tar.unlink()
    with pytest.raises(ValueError, match=r"train-000001.tar: missing"):
        read_manifest(folder)
    at = len(whole) // 1024 * 512 + 100
    tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    shards = Shards(folder, "train")
    with pytest.raises(ValueError, match=r"train-000001.tar, sample \d+: its bytes changed"):
        for number in range(shards.counts[1]):
            shards.read(1, number)
    index_path(tar).unlink()
    with pytest.raises(ValueError, match=r"train-000001.npy is missing"):
        read_manifest(folder)
    with pytest.raises(ValueError, match=r"split 'test' has no shard: the manifest has train, val"):
        Shards(digits, "test")


def test_a_bad_header_in_the_middle_is_an_error_and_not_the_end(digits, tmp_path):
    """Python's tarfile stops there without a word and loses the rest."""
    whole = (digits / "train-000000.tar").read_bytes()
    offsets = [m.header for m in members(digits / "train-000000.tar")]
    at = offsets[len(offsets) // 2]
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


def test_a_stream_names_the_sample_it_cannot_decode(digits, tmp_path, monkeypatch):
    shards = Shards(digits, "train")
    monkeypatch.setattr("data.stream.decode_image", lambda *a: (_ for _ in ()).throw(OSError("image file is truncated")))
    with pytest.raises(ValueError, match=r"image '\d+' cannot be decoded \(image file is truncated\)"):
        next(stream(shards, workers=2))


# --- order


@pytest.mark.parametrize("counts", [[1], [40], [5, 1, 0, 7, 3], [1] * 40, [100, 2, 50]])
@pytest.mark.parametrize("block", [1, 2, 16])
def test_an_epoch_is_a_permutation(counts, block):
    order = Order(counts, seed=1, block=block)
    epochs = []
    for epoch in range(3):
        shards, numbers = order(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
        epochs.append(list(zip(shards.tolist(), numbers.tolist(), strict=True)))
        assert sorted(epochs[-1]) == [(s, n) for s, count in enumerate(counts) for n in range(count)]
    assert order.samples < 10 or (epochs[0] != epochs[1] and epochs[1] != epochs[2])


def test_a_position_does_not_depend_on_how_it_is_reached():
    order = Order([37, 5, 90, 18, 64], seed=9, block=2)
    whole = np.stack(order(np.arange(1000)))
    for positions in (np.array([999]), np.array([3, 700, 215, 4]), np.arange(200, 460)):
        fresh = Order([37, 5, 90, 18, 64], seed=9, block=2)
        assert np.array_equal(np.stack(fresh(positions)), whole[:, positions])


def test_the_order_is_fixed_for_ever():
    """No library's generator has a say: these numbers are SplitMix64's, worked out by hand in Python integers."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    start = 0
    for part in (7, 2, 0):
        start = mix((start ^ part) + 0x9E3779B97F4A7C15 & mask)
    expected = [mix(start + i * 0x9E3779B97F4A7C15 & mask) for i in range(1, 6)]
    assert keys(5, 7, 2, 0).tolist() == expected
    assert permutation(5, 7, 2, 0).tolist() == sorted(range(5), key=expected.__getitem__)
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first output of SplitMix64 seeded with 0, as its authors give it"


def test_the_shuffle_leaves_no_trace_of_storage():
    """Rank correlation with storage order and the share of neighbours from one shard, against uniform; 5 sigma."""
    counts = [50] * 16
    shards, numbers = Order(counts, seed=0, block=16)(np.arange(800))
    stored = shards * 50 + numbers
    correlation = np.corrcoef(np.arange(800), stored)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(800)
    together = (shards[1:] == shards[:-1]).mean()
    assert abs(together - 49 / 799) < 5 * np.sqrt(1 / 16 / 800)


# --- stream


def sequence(shards, steps, ranks, accumulation, workers, start=0):
    """Positions, labels and pixels of each global batch, put together from all ranks."""
    streams = [stream(shards, start, rank, ranks, accumulation, workers) for rank in range(ranks)]
    batches = []
    for _ in range(steps):
        parts = [next(s) for s in streams for _ in range(accumulation)]
        batches.append([torch.cat([getattr(p, name) for p in parts]) for name in ("places", "positions", "labels", "pixels")])
    for s in streams:
        s.close()
    return batches


@pytest.mark.parametrize(("ranks", "accumulation", "workers"), [(1, 1, 1), (1, 4, 2), (2, 1, 0), (2, 2, 2), (4, 2, 1), (8, 1, 0)])
def test_one_order_for_any_ranks_and_workers(digits, ranks, accumulation, workers):
    """8 ranks are more than some splits have shards; uneven shards; an epoch ends inside."""
    shards = Shards(digits, "val")
    reference = sequence(shards, 50, 1, 1, 0)
    for ours, wanted in zip(sequence(shards, 50, ranks, accumulation, workers), reference, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    positions = torch.cat([batch[1] for batch in reference])
    assert torch.equal(positions, torch.arange(400))


@pytest.mark.parametrize("start", [8, 360, 10**9])
def test_a_stream_goes_on_where_another_stopped(digits, start):
    shards = Shards(digits, "val")
    first = start // 8 * 8
    for ours, wanted in zip(sequence(shards, 3, 2, 1, 1, first), sequence(shards, 3, 1, 1, 0, first), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    if start == 8:
        whole = sequence(shards, 4, 1, 1, 0)
        assert torch.equal(whole[1][3], sequence(shards, 1, 1, 1, 0, 8)[0][3])


def test_mirroring_is_a_function_of_the_position(digits):
    shards = Shards(digits, "train")
    plain, flipped, again = (stream(shards, workers=w, batch_size=512, flip=f) for w, f in ((0, False), (0, True), (2, True)))
    a, b, c = next(plain).pixels, next(flipped).pixels, next(again).pixels
    same = (a == b).flatten(1).all(1)
    mirrored = (a.flip(3) == b).flatten(1).all(1)
    assert torch.equal(b, c) and bool((same | mirrored).all()) and 150 < int((~same).sum()) < 362


@pytest.mark.parametrize(
    ("batch", "ranks", "accumulation", "remedy"), [(10, 4, 1, "Use 12 or 8"), (3, 2, 2, "Use 4"), (9, 1, 2, "Use 10 or 8")]
)
def test_a_batch_that_ranks_do_not_divide(batch, ranks, accumulation, remedy):
    with pytest.raises(ValueError, match=remedy):
        Share(batch_size=batch, ranks=ranks, accumulation=accumulation)


# --- decoding


def test_images_arrive_upright_opaque_and_in_eight_bits():
    turned = Image.new("RGB", (2, 1), "red")
    turned.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert upright(buffer.getvalue(), 3).size == (1, 2)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(clear, "PNG")
    assert np.all(decode_image(clear.getvalue(), 3, 2) == 255), "transparency lies on white"
    deep = io.BytesIO()
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(deep, "PNG")
    assert np.asarray(upright(deep.getvalue(), 1)).tolist() == [[0, 128, 255]]


def test_resizing_keeps_the_middle_and_the_mean():
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), 1, 4).tolist() == [[[200] * 4] * 4]
    mirrored = decode_image(buffer.getvalue(), 3, 2, mirror=True)
    assert mirrored.shape == (3, 2, 2)
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_files_decode_or_are_refused(shared_data):
    """80 real odd files that a viewer opens arrive upright, as their manifest says; 19 damaged ones raise one of DECODE_ERRORS."""
    facts = {f["file"]: f["pillow"] for f in json.loads((shared_data / "odd" / "manifest.json").read_text())["files"]}
    with tarfile.open(shared_data / "odd" / "odd-000000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    opened = 0
    for name, body in files.items():
        if name.endswith((".txt", ".json")):
            continue
        fact = facts[json.loads(files[name.split(".")[0] + ".json"])["file"]]
        if fact.get("to_rgb"):
            assert list(upright(body, 3).size) == fact["upright_size"] and decode_image(body, 3, 16).shape == (3, 16, 16), name
            opened += 1
        else:
            with pytest.raises(DECODE_ERRORS):
                upright(body, 3)
    assert opened == 80
