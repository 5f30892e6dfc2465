"""The order: each sample once an epoch, well mixed, the same for ever, in constant time; mixtures in exact proportions."""

import time
from collections import Counter

import numpy as np
import pytest

from condot.data.loader.shuffle import SLOTS, ShuffledOrder, WeightedMixture, hash_at, hash_keys, permutation, uniform_at


@pytest.mark.parametrize("counts", [[1], [40], [5, 1, 0, 7, 3], [1] * 40, [100, 2, 50]])
@pytest.mark.parametrize("block", [1, 2, 16])
def test_an_epoch_is_a_permutation(counts, block):
    order = ShuffledOrder(counts, seed=1, block=block)
    epochs = []
    for epoch in range(3):
        shards, numbers = order(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
        epochs.append(list(zip(shards.tolist(), numbers.tolist(), strict=True)))
        assert sorted(epochs[-1]) == [(s, n) for s, count in enumerate(counts) for n in range(count)]
    assert order.samples < 10 or (epochs[0] != epochs[1] and epochs[1] != epochs[2])


def test_a_position_does_not_depend_on_how_it_is_reached():
    order = ShuffledOrder([37, 5, 90, 18, 64], seed=9, block=2)
    whole = np.stack(order(np.arange(1000)))
    for positions in (np.array([999]), np.array([3, 700, 215, 4]), np.arange(200, 460)):
        fresh = ShuffledOrder([37, 5, 90, 18, 64], seed=9, block=2)
        assert np.array_equal(np.stack(fresh(positions)), whole[:, positions])


def test_the_order_is_fixed_for_ever():
    """No library's generator has a say: these numbers are SplitMix64's, worked out by hand in Python integers."""
    mask = 2**64 - 1

    def splitmix64(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    start = 0
    for part in (7, 2, 0):
        start = splitmix64((start ^ part) + 0x9E3779B97F4A7C15 & mask)
    expected = [splitmix64(start + i * 0x9E3779B97F4A7C15 & mask) for i in range(1, 6)]
    assert hash_keys(5, 7, 2, 0).tolist() == expected
    assert permutation(5, 7, 2, 0).tolist() == sorted(range(5), key=expected.__getitem__)
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first output of SplitMix64 seeded with 0, as its authors give it"


def test_many_positions_are_hashed_as_one_is():
    positions = np.array([0, 1, 7, 10**12, 2**40 + 3])
    assert hash_at(positions, 5, 3).tolist() == [int(hash_keys(1, 5, 3, p)[0]) for p in positions.tolist()]
    shares = uniform_at(np.arange(100_000), 1, 2)
    assert shares.min() >= 0 and shares.max() < 1 and abs(shares.mean() - 0.5) < 5 / np.sqrt(12 * 100_000)


@pytest.mark.parametrize("block", [16, 64])
def test_the_shuffle_leaves_no_trace_of_storage(block):
    """What docs/data.md states: rank correlation with storage order, and neighbours from one shard, against uniform; 5 sigma."""
    counts = [50] * 64
    order = ShuffledOrder(counts, seed=0, block=block)
    shards, numbers = order(np.arange(order.samples))
    stored = shards * 50 + numbers
    n = order.samples
    correlation = np.corrcoef(np.arange(n), stored)[0, 1]
    blocks = n / (50 * block)
    assert abs(correlation) < 5 / np.sqrt(n if blocks == 1 else 64), "shards are permuted, so at worst like 64 random numbers"
    together = (shards[1:] == shards[:-1]).mean()
    assert abs(together - 1 / block) < 5 * np.sqrt(1 / block / n) + 1 / (50 * block), (
        "two neighbours share a shard as often as chance has it"
    )


def test_a_billion_samples_cost_what_ten_do():
    """100,000 shards of 10,000: any position within a second, at 90 % of an epoch as at 1 %, in memory that knows one block."""
    counts = [10_000] * 100_000
    spent = {}
    for position in (10, 10_000_000, 900_000_000, 5_400_000_123):
        order = ShuffledOrder(counts, seed=3, block=16)
        began = time.perf_counter()
        shards, numbers = order(np.arange(position, position + 256))
        order.upcoming_shards(position)
        spent[position] = time.perf_counter() - began
        assert len(set(zip(shards.tolist(), numbers.tolist(), strict=True))) == 256
        assert sum(p.nbytes for p in order._mixed.values()) <= 2 * 16 * 10_000 * 8
    assert max(spent.values()) < 1, spent


def test_what_is_read_ahead_is_what_comes():
    order = ShuffledOrder([10] * 40, seed=2, block=4)
    for position in (0, 39, 40, 340, 361, 395, 400, 790):
        ahead = order.upcoming_shards(position)
        soon, _ = order(np.arange(position, position + 40))
        assert set(soon.tolist()) <= set(ahead) and len(ahead) == 8
        assert set(order(np.array([position]))[0].tolist()) <= set(ahead[:4])


# --- mixtures


def mixture(weights, counts=((30, 20), (7,), (100, 1, 1)), seed=4):
    parts, first = [], 0
    for part in counts[: len(weights)]:
        parts.append((ShuffledOrder(list(part), seed, 16), first))
        first += len(part)
    return WeightedMixture(parts, weights, seed)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.0001, 0.9999)])
def test_a_mixture_keeps_its_proportions_exactly(weights):
    """So many of every 10,000 positions, and of every hundred about so many: slots are drawn without replacement."""
    mixed = mixture(weights)
    which, _ = mixed.locate(np.arange(3 * SLOTS))
    for cycle in which.reshape(3, SLOTS):
        counts = np.bincount(cycle, minlength=len(weights))
        assert np.abs(counts - np.array(weights) * SLOTS).max() <= 1 and counts.sum() == SLOTS
    assert not np.array_equal(which[:SLOTS], which[SLOTS : 2 * SLOTS]), "each cycle has its own order of slots"
    share = (which[: SLOTS // 2] == 0).mean()
    assert abs(share - weights[0]) < 5 * np.sqrt(weights[0] * (1 - weights[0]) / SLOTS)


def test_each_part_of_a_mixture_has_its_own_epochs():
    """The samples of a part come in that part's own order, none lost and none twice."""
    mixed = mixture((0.6, 0.3, 0.1))
    which, within = mixed.locate(np.arange(2 * SLOTS + 77))
    for i in range(3):
        assert np.array_equal(within[which == i], np.arange((which == i).sum()))
    shards, numbers = mixed(np.arange(5000))
    seven = [(s, n) for s, n in zip(shards.tolist(), numbers.tolist(), strict=True) if s == 2]
    assert set(Counter(seven[:7]).values()) == {1} and {n for _, n in seven[:7]} == set(range(7)), (
        "the second part's only shard is number 2"
    )
    later = mixture((0.6, 0.3, 0.1))
    positions = np.array([4999, 3, 2 * SLOTS + 5])
    assert np.array_equal(np.stack(later(positions))[:, :2], np.stack([shards, numbers])[:, [4999, 3]])


def test_a_weight_without_a_slot_is_refused():
    with pytest.raises(ValueError, match=r"1e-05 is less than 1 / 10000"):
        mixture((0.99999, 0.00001))
