"""Aspect-ratio buckets: one shape a batch, no sample lost or repeated for it, shares that follow the data, constant time."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from condot.core.data_config import DataConfig
from condot.data.loader.buckets import Buckets, Windows
from condot.data.loader.build import build
from condot.data.loader.shuffle import hash_at
from condot.data.loader.stream import Share
from condot.data.storage.shard_reader import Shards
from tests.shardmaker import flat, make, samples

SIZES = [(40, 60), (60, 40), (50, 50), (52, 48), (30, 60)]


def nearest_by_hand(ratios, width, height):
    return int(np.argmin(np.abs(np.log(np.array(ratios)) - np.log(width / height))))


def test_shapes_have_the_wanted_area_and_ratio():
    buckets = Buckets((0.5, 0.75, 1.0, 1.333, 2.0), 256, 16)
    assert buckets.shapes == [(368, 176), (288, 224), (256, 256), (224, 288), (176, 368)]
    for h, w in buckets.shapes:
        assert h % 16 == w % 16 == 0 and abs(h * w / 256**2 - 1) < 0.05
    assert Buckets((), 250, 32).shapes == [(250, 250)], "squares alone need no step"


def test_the_nearest_bucket_is_the_one_of_least_distance():
    buckets = Buckets((0.5, 0.75, 1.0, 1.333, 2.0), 256, 16)
    ratios = [w / h for h, w in buckets.shapes]
    rng = np.random.default_rng(0)
    width, height = rng.integers(1, 3000, (2, 500))
    expected = [nearest_by_hand(ratios, w, h) for w, h in zip(width, height, strict=True)]
    assert buckets.nearest(width, height).tolist() == expected


def test_what_no_image_fits_is_refused():
    buckets = Buckets((0.5, 1.0, 2.0), 64, 8)
    buckets.check({"10x20": 1, "10x10": 1, "40x20": 3})
    with pytest.raises(ValueError, match=r"no image is nearest to 1.83 \(48 x 88\). Leave it out"):
        buckets.check({"10x20": 1, "10x10": 1})
    buckets.check({"10x20": 1, "10x10": 1, "other": 5})  # beyond what the manifest lists nobody knows
    with pytest.raises(ValueError, match="two of them are 64 x 64"):
        Buckets((1.0, 1.02), 64, 32)


@pytest.mark.parametrize(("epoch", "batch"), [(1000, 8), (1000, 16), (37, 4), (0, 8), (5000, 64), (10, 16)])
def test_every_position_comes_once_in_a_batch_of_one_bucket(epoch, batch):
    """Windows are permutations of their positions; an epoch's whole batches hold its own samples only."""

    def bucket_of(positions):
        return (hash_at(positions, 99) % np.uint64(3)).astype(np.int64)

    windows = Windows(bucket_of, epoch=epoch, batch_size=batch, seed=1)
    windows.length = 10
    count = 70
    rows = [windows.batch(n) for n in range(count)]
    start = 0
    while start < count:
        window = windows.window(start)
        taken = np.concatenate([rows[n][0] for n in window if n < count])
        if window.stop <= count:
            assert sorted(taken.tolist()) == list(range(window.start * batch, window.stop * batch))
        start = window.stop
    if epoch >= batch:
        whole = [rows[n][0] for n in range(epoch // batch) if n < count]
        assert len(set(np.concatenate(whole).tolist())) == len(whole) * batch and max(map(max, whole)) < epoch
    fresh = Windows(bucket_of, epoch=epoch, batch_size=batch, seed=1)
    fresh.length = 10
    for n in (69, 3, 41):
        assert np.array_equal(fresh.batch(n)[0], rows[n][0]) and fresh.batch(n)[1] == rows[n][1]


def test_shares_follow_the_data_and_few_samples_are_moved():
    """Three buckets of 60, 30 and 10 %: of 256 batches as many, within the one that straddles; at most 2 * 64 / 2 moved of 16,384."""

    def bucket_of(positions):
        return np.searchsorted([0.6, 0.9], (hash_at(positions, 7) >> np.uint64(11)) * 2.0**-53)

    windows = Windows(bucket_of, epoch=0, batch_size=64, seed=1)
    assert windows.length == 1024
    windows.length = 256
    rows = [windows.batch(n) for n in range(256)]
    found = Counter(bucket for _, bucket in rows)
    true = np.bincount(bucket_of(np.arange(256 * 64)), minlength=3) / 64
    assert all(abs(found[i] - true[i]) <= 1 for i in range(3))
    moved = sum(int((bucket_of(positions) != bucket).sum()) for positions, bucket in rows)
    assert moved <= 2 * 32
    order = [bucket for _, bucket in rows]
    runs = sum(a != b for a, b in pairwise(order))
    assert runs > 80, "buckets come shuffled, not one after the other"


@pytest.fixture(scope="module")
def mixed_sizes(tmp_path_factory):
    return make(tmp_path_factory.mktemp("mixed") / "shards", samples([33, 20, 1, 47], lambda n: SIZES[n % 5]))


def options(folder, **more):
    ratios = {"aspect_ratios": (0.5, 0.667, 1.0, 1.5), "bucket_step": 2}
    return DataConfig(**{"shards": (str(folder),), "resolution": 8, "channels": 1, "workers": 0, **ratios, **more})


def test_a_batch_has_one_shape_and_says_how_each_image_was_cropped(mixed_sizes):
    shards = Shards(mixed_sizes)
    stream = build(options(mixed_sizes), seed=0, share=Share(batch_size=10))
    shapes, seen = Counter(), []
    for _ in range(10):
        batch = next(stream)
        h, w = batch.images.shape[2:]
        shapes[h, w] += 1
        for image, size, sample, label in zip(
            batch.images, batch.sizes.tolist(), batch.samples.tolist(), batch.labels.tolist(), strict=True
        ):
            number = int(shards.read(*sample).key)
            seen.append(number)
            width, height = SIZES[number % 5]
            assert size[:2] == [height, width] and label == number % 3 and int(image.min()) == int(image.max()) == number % 251
            scale = max(h / height, w / width)
            assert size[2:] == [round((height * scale - h) / 2), round((width * scale - w) / 2)], "the crop is in the middle"
    assert len(shapes) == 4 and sum(shapes.values()) == 10
    assert len(set(seen)) == 100, "an epoch of 101 samples: its ten whole batches repeat none"


@pytest.mark.parametrize(("ranks", "workers", "accumulation"), [(2, 0, 1), (4, 2, 1), (1, 2, 2)])
def test_buckets_do_not_depend_on_ranks_and_workers(mixed_sizes, ranks, workers, accumulation):
    def batches(ranks, workers, accumulation, start=0):
        streams = [
            build(
                options(mixed_sizes, workers=workers, random_crop=True, horizontal_flip=True),
                seed=5,
                share=Share(batch_size=8, ranks=ranks, rank=r, accumulation=accumulation),
                start=start,
            )
            for r in range(ranks)
        ]
        for _ in range(30 - start // 8):
            parts = [next(s) for s in streams for _ in range(accumulation)]
            assert len({p.images.shape[2:] for p in parts}) == 1, "all ranks have one shape at one step"
            yield [torch_list(p) for p in parts]
        for s in streams:
            s.close()

    def torch_list(batch):
        return list(zip(batch.positions.tolist(), batch.samples.tolist(), batch.images.flatten(1).tolist(), strict=True))

    wanted = [flat(parts) for parts in batches(1, 0, 1)]
    assert [flat(parts) for parts in batches(ranks, workers, accumulation)] == wanted
    assert [flat(parts) for parts in batches(ranks, workers, accumulation, start=80)] == wanted[10:]


def test_a_start_between_batches_is_refused_with_buckets(mixed_sizes):
    with pytest.raises(ValueError, match=r"17 images were seen, which is no multiple of train\.batch_size=8"):
        build(options(mixed_sizes), seed=0, share=Share(batch_size=8), start=17)
    with pytest.raises(ValueError, match=r"no image is nearest to 3\.5"):
        build(options(mixed_sizes, aspect_ratios=(0.5, 1.0, 3.0)), seed=0, share=Share(batch_size=8))


def test_ten_million_samples_in_are_as_near_as_ten():
    """Buckets over a billion positions: a window is arranged in well under a second, wherever it lies."""

    def bucket_of(positions):
        return (hash_at(positions, 99) % np.uint64(9)).astype(np.int64)

    for number in (0, 10_000_000 // 256, 900_000_000 // 256):
        windows = Windows(bucket_of, epoch=10**9, batch_size=256, seed=1)
        began = time.perf_counter()
        windows.batch(number)
        assert time.perf_counter() - began < 1
