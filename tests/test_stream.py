"""The stream: one sequence of global batches whoever reads it, from any position, whatever dies."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from condot.core.data_config import DataConfig
from condot.data.loader.build import build
from condot.data.loader.stream import Share, to_unit
from condot.data.storage.shard_reader import Shards
from tests.shardmaker import flat, jpeg, make, samples

UNEVEN = [37, 1, 64, 5, 20, 1]
SINGLE = [1] * 9
FEW = [50]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    kinds = {"uneven": UNEVEN, "single": SINGLE, "few": FEW}
    return {name: make(root / name, samples(counts)) for name, counts in kinds.items()}


def options(folder, **more):
    return DataConfig(**{"shards": (str(folder),), "resolution": 4, "channels": 1, "workers": 0, **more})


def stream(folder, start=0, rank=0, ranks=1, accumulation=1, workers=0, batch_size=8, seed=3, captions=False, **more):
    share = Share(batch_size=batch_size, accumulation=accumulation, rank=rank, ranks=ranks)
    return build(options(folder, workers=workers, **more), seed=seed, share=share, start=start, captions=captions)


def sequence(folder, steps, ranks, accumulation, workers, start=0, **more):
    """The keys, places, positions, labels and pixels of each global batch, put together from all ranks."""
    streams = [stream(folder, start, rank, ranks, accumulation, workers, **more) for rank in range(ranks)]
    batches = []
    for _ in range(steps):
        parts = [(s, next(s)) for s in streams for _ in range(accumulation)]
        names = flat(s.keys(part) for s, part in parts)
        tensors = [torch.cat([getattr(p, name) for _, p in parts]).tolist() for name in ("batch_indices", "positions", "labels", "images")]
        batches.append((names, *tensors))
    for s in streams:
        assert not s.take_faults(), "nothing was replaced"
        s.close()
    return batches


@pytest.mark.parametrize("kind", ["uneven", "single", "few"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_one_order_for_any_ranks_and_workers(folders, kind, ranks, workers):
    """Uneven shards, shards of one sample, more ranks than shards; epochs end inside batches; the same keys everywhere."""
    reference = sequence(folders[kind], 20, 1, 1, 0)
    assert sequence(folders[kind], 20, ranks, 1, workers) == reference
    keys = flat(batch[0] for batch in reference)
    size = {"uneven": 128, "single": 9, "few": 50}[kind]
    for epoch in range(len(keys) // size):
        assert len(set(keys[epoch * size : (epoch + 1) * size])) == size, "every sample once an epoch"
    assert flat(batch[2] for batch in reference) == list(range(160))


def test_accumulation_changes_nothing_either(folders):
    assert sequence(folders["uneven"], 12, 2, 4, 2) == sequence(folders["uneven"], 12, 1, 1, 0)


@pytest.mark.parametrize("start", [8, 120, 10**9])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (4, 2), (2, 1)])
def test_a_stream_goes_on_where_another_stopped(folders, start, ranks, workers):
    there = sequence(folders["uneven"], 6, ranks, 1, workers, start)
    assert there == sequence(folders["uneven"], 6, 1, 1, 0, start)
    if start < 10**6:
        assert there == sequence(folders["uneven"], start // 8 + 6, 1, 1, 0)[start // 8 :]


def test_every_rank_has_as_many_batches_and_none_waits(folders):
    """Four ranks, nine samples in an epoch: each has a full micro-batch at every step, for ever."""
    for rank in range(4):
        some = stream(folders["single"], rank=rank, ranks=4)
        assert [len(next(some).labels) for _ in range(50)] == [2] * 50


@pytest.mark.parametrize(
    ("batch", "ranks", "accumulation", "remedy"), [(10, 4, 1, "Use 12 or 8"), (3, 2, 2, "Use 4"), (9, 1, 2, "Use 10 or 8")]
)
def test_a_batch_that_ranks_do_not_divide(batch, ranks, accumulation, remedy):
    with pytest.raises(ValueError, match=remedy):
        Share(batch_size=batch, ranks=ranks, accumulation=accumulation)


def test_pixels_labels_and_captions_belong_together(folders):
    shards = Shards(folders["uneven"])
    for batch in (next(stream(folders["uneven"], captions=True, workers=w, batch_size=32)) for w in (0, 2)):
        assert batch.images.shape == (32, 1, 4, 4) and batch.images.dtype == torch.uint8
        for key, image, label, caption in zip(
            [shards.key(*s) for s in batch.samples.tolist()], batch.images, batch.labels.tolist(), batch.captions, strict=True
        ):
            assert set(image.flatten().tolist()) == {int(key) % 251} and label == int(key) % 3 and caption == f"caption {int(key)}"
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_captions_may_come_from_json(tmp_path):
    body = {"jpg": jpeg(0, (4, 4)), "json": {"long": "a longer caption", "n": 3}}
    folder = make(tmp_path / "s", [[{"__key__": "0", **body}, {"__key__": "1", **body, "json": [1, 2]}]], classes=())
    batch = next(stream(folder, captions=True, caption="json.long", batch_size=2, channels=3))
    assert sorted(batch.captions) == ["", "a longer caption"] and batch.labels.tolist() == [-1, -1]


def test_mirroring_and_cropping_are_functions_of_the_position(tmp_path):
    folder = make(tmp_path / "s", [[{"__key__": f"{i}", "jpg": jpeg(i, (12, 8))} for i in range(40)]], classes=())

    def images(start=0, **more):
        some = stream(folder, start, channels=3, resolution=8, **more)
        return torch.cat([next(some).images for _ in range(64 - start // 8)])

    plain, flipped = images(), images(horizontal_flip=True)
    same, mirrored = ((a == flipped).flatten(1).all(1) for a in (plain, plain.flip(3)))
    assert bool((same | mirrored).all()) and 180 < int((~same).sum()) < 332
    cropped = images(horizontal_flip=True, random_crop=True)
    assert torch.equal(cropped, images(horizontal_flip=True, random_crop=True, workers=2)), "whoever decodes"
    assert torch.equal(cropped[24:], images(24, horizontal_flip=True, random_crop=True)), "wherever it begins"
    one = stream(folder, channels=3, resolution=8, random_crop=True, batch_size=64)
    sizes = torch.cat([next(one).sizes for _ in range(8)])
    assert sizes[:, :3].unique(dim=0).tolist() == [[8, 12, 0]] and sorted(sizes[:, 3].unique().tolist()) == [0, 1, 2, 3, 4]


def test_two_sources_are_mixed_by_weight(tmp_path):
    """The keys tell the source: 3 of 10 from the first; the order is still one for all ranks, workers and starts."""
    a = make(tmp_path / "a", samples([20, 30], prefix="a"))
    b = make(tmp_path / "b", samples([7], prefix="b"))
    both = {"shards": (str(a), str(b)), "weights": (0.3, 0.7)}
    reference = sequence(a, 125, 1, 1, 0, **both)
    keys = flat(batch[0] for batch in reference)
    first = [k for k in keys if k[0] == "a"]
    assert abs(len(first) - 300) < 5 * np.sqrt(210) and len(set(first[:50])) == 50 and len({k for k in keys if k[0] == "b"}) == 7
    assert sequence(a, 25, 4, 1, 2, 800, **both) == reference[100:]
    together = sequence(a, 8, 1, 1, 0, shards=both["shards"])
    assert len(set(flat(batch[0] for batch in together)[:57])) == 57, "without weights all shards are one set"


def test_a_class_map_that_disagrees_is_refused(tmp_path):
    a = make(tmp_path / "a", samples([4]))
    b = make(tmp_path / "b", samples([4]), classes=("a", "c", "b"))
    with pytest.raises(ValueError, match=r"class 1 is 'b' in .*/a and 'c' in .*/b"):
        stream(a, shards=(str(a), str(b)))
    with pytest.raises(ValueError, match=r"holds class 2, its manifest names 2"):
        stream(make(tmp_path / "c", samples([4]), classes=("a", "b")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": (0.5,), "shards": ("a", "b")}, "data.weights has 1 numbers for 2 sources"),
        ({"weights": (0.5, 0.6), "shards": ("a", "b")}, "sum to 1.1: positive shares that sum to 1. Use 0.454545, 0.545455"),
        ({"weights": (-1.0, 2.0), "shards": ("a", "b")}, "positive shares that sum to 1"),
        ({"resolution": 0}, "at least 1 pixel"),
        ({"aspect_ratios": (1.0, -2.0)}, "positive"),
        ({"aspect_ratios": (1.0,), "bucket_step": 512}, "1 pixel to data.resolution"),
        ({"cache_size": "huge"}, "is no size"),
        ({"encoding": "cached"}, "data.encoding=cached without data.encoded"),
        ({"lost_shards": "ignore"}, "choose `stop` or `skip`"),
        ({"max_bad_share": 1.0}, "a share below 1"),
        ({"caption": "text"}, "choose `txt`, `json.KEY`"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)


READER = """
import sys, time
from condot.data.loader.build import build
from condot.core.data_config import DataConfig
from condot.data.loader.stream import Share
folder, start, rank, ranks, workers, pace, more = sys.argv[1], *map(int, sys.argv[2:6]), float(sys.argv[6]), eval(sys.argv[7])
s = build(DataConfig(**{"shards": (folder,), "resolution": 4, "channels": 1, "workers": workers, **more}), seed=3, start=start,
          share=Share(batch_size=8, rank=rank, ranks=ranks))
for step in range(start // 8, 60):
    print(step, rank, *s.keys(next(s)), flush=True)
    time.sleep(pace)
s.close()
"""


@pytest.mark.parametrize("kind", ["plain", pytest.param("buckets and sources", marks=pytest.mark.faults)])
def test_killed_at_random_moments_none_lost_and_none_twice(tmp_path, kind):
    """kill -9 of all readers in mid-epoch, then other numbers of ranks and workers: the sequence of keys is the uninterrupted one."""
    sizes = [(4, 4), (8, 4), (4, 8)]
    folder, more = make(tmp_path / "s", samples(UNEVEN, lambda n: sizes[n % 3])), {}
    if kind != "plain":
        other = make(tmp_path / "o", samples([23], lambda n: sizes[n % 3], prefix="o"))
        more = {"aspect_ratios": (0.5, 1.0, 2.0), "bucket_step": 1, "shards": (str(folder), str(other)), "weights": (0.75, 0.25)}
    wanted = [batch[0] for batch in sequence(folder, 60, 1, 1, 0, **more)]
    found, draw = [], random.Random(0)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for ranks, workers in ((2, 2), (1, 0), (4, 1)):
        last = ranks == 4
        words = [
            [str(folder), str(8 * len(found)), str(r), str(ranks), str(workers), "0" if last else "0.02", repr(more)] for r in range(ranks)
        ]
        readers = [subprocess.Popen([sys.executable, "-c", READER, *w], stdout=subprocess.PIPE, text=True, env=env) for w in words]
        if not last:
            readers[0].stdout.readline()
            time.sleep(draw.uniform(0.1, 0.4))
            for reader in readers:
                reader.send_signal(signal.SIGKILL)
        lines = [reader.communicate()[0].splitlines() for reader in readers]
        if not last:  # the first line was read above: rank 0's step is taken from the others' count or lost with it
            lines[0].insert(0, f"{len(found)} 0 " + " ".join(wanted[len(found)][: 8 // ranks]))
        done = min(len(part) for part in lines)
        for step in range(done):
            found.append([key for part in lines for key in part[step].split()[2:]])
    assert found == wanted
