"""Samples by number are those of the shards, in order, however the shards are cut."""

import frozen
import torch
from shardmaker import make, png

from condot.data.images.decode import decode_image
from condot.data.loader.read_samples import locate_samples, read_captions, read_images
from condot.data.loader.stream import to_unit
from condot.data.storage.shard_reader import Shards


def test_numbers_count_through_all_shards(tmp_path):
    shards = Shards(frozen.shards(tmp_path / "shards", (5, 3, 4)), "train")
    every = [(0, n) for n in range(5)] + [(1, n) for n in range(3)] + [(2, n) for n in range(4)]
    assert locate_samples(shards) == every
    assert locate_samples(shards, [11, 0, 5, 7, 8, 4]) == [every[i] for i in (11, 0, 5, 7, 8, 4)]


def test_images_classes_and_captions_are_the_samples_own(tmp_path):
    """The pictures are numbered through: class and pixels tell which one it is."""
    shards = Shards(frozen.shards(tmp_path / "shards", (5, 3, 4)), "train")
    numbers = [7, 2, 11]
    images, labels = read_images(shards, 3, 16, numbers)
    assert labels.tolist() == [1, 0, 1]
    for image, number in zip(images, numbers, strict=True):
        sample = shards.read(*locate_samples(shards, [number])[0])
        assert int(sample.key) == number
        assert torch.equal(image, to_unit(torch.from_numpy(decode_image(sample.files["png"], 3, 16))))
    assert len(read_images(shards, 3, 8)[0]) == 12
    captions = read_captions(shards, "txt", numbers)
    assert captions[1] == "" and captions[0] == shards.read(1, 2).files["txt"].decode() and captions[2] != captions[0]


def test_captions_are_those_of_the_named_field(tmp_path):
    """Two captions a sample, and the second shard without one of them."""
    shard = [{"__key__": f"{n}", "png": png(n), "txt": f"plain {n}", "json": {"title": f"title {n}"}} for n in range(3)]
    other = [{"__key__": "3", "png": png(3), "txt": "plain 3", "json": {"name": "x"}}]
    shards = Shards(make(tmp_path / "shards", [shard, other]), "train")
    assert read_captions(shards, "json.title", [2, 3, 0]) == ["title 2", "", "title 0"]
    assert read_captions(shards, "txt", [2, 3, 0]) == ["plain 2", "plain 3", "plain 0"]
