"""First weights: each a function of (seed, name), of its rule's law, whoever holds which part of it."""

import hashlib
import math

import pytest
import torch
from conftest import launch

from condot.models import registry
from condot.models.common.init import initialise

SIZE = {"channels": 3, "resolution": 8, "num_classes": 5, "patch_size": 2, "width": 48, "depth": 2, "heads": 4}
MODERN = {**SIZE, "style": "modern", "registers": 3, "positions": "learned", "shared_modulation": True, "micro_conditions": True}
CASES = [{**SIZE, "own_conditions": True, "micro_conditions": True}, MODERN]
SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, "tests")
from test_initialise import CASES, SIZE, digest
from condot.models import registry
from condot.models.common.init import initialise
dist.init_process_group("gloo")
with open(sys.argv[1] + str(dist.get_rank()), "w", buffering=1) as file:
    for options in CASES:
        network = registry.build("dit", device="meta", **options)
        for block in network.blocks:
            fully_shard(block)
        fully_shard(network)
        assert all(parameter.is_meta for parameter in network.parameters())
        network.to_empty(device="cpu")
        initialise(network, 7)
        held = sum(parameter.to_local().numel() for parameter in network.parameters())
        whole = {name: parameter.full_tensor() for name, parameter in network.named_parameters()}
        assert held < 0.6 * sum(value.numel() for value in whole.values()), "a rank holds about half"
        network(torch.ones(2, 3, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 5]), torch.ones(2, 6)).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        print(digest(whole), file=file)
        dist.barrier()
os._exit(0)  # gloo's threads abort where one process is gone before the other
"""


def digest(weights):
    return hashlib.sha256(b"".join(name.encode() + weights[name].detach().numpy().tobytes() for name in sorted(weights))).hexdigest()


def begun(seed=None, **options):
    return digest(dict(registry.build("dit", seed=seed, **options).named_parameters()))


@pytest.mark.faults
def test_a_sharded_network_begins_as_a_whole_one(tmp_path):
    """Built on meta, sharded over two processes, given memory and values: bit for bit the one that is built whole; and it runs."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path / "digest"))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [begun(7, **options) for options in CASES]
    assert [(tmp_path / f"digest{rank}").read_text().split() for rank in range(2)] == [expected] * 2
    assert expected != [begun(8, **options) for options in CASES]


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(3)
    first, state = begun(1, **SIZE), torch.get_rng_state()
    assert begun(1, **SIZE) == first and torch.equal(torch.get_rng_state(), state)
    assert begun(**SIZE) != begun(**SIZE), "without a seed each is new"


class Line(torch.nn.Module):
    """Two maps, made in one order or the other."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, torch.nn.Linear(5, 7))


def test_the_order_of_modules_does_not_matter():
    first, second = Line("a", "b"), Line("b", "a")
    for network in (first, second):
        initialise(network, lambda name: "torch", 0)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.a.weight, first.b.weight)


@pytest.mark.parametrize(
    "option",
    [
        {"qk_norm": True}, {"rope": True}, {"rms_norm": True}, {"registers": 4}, {"positions": "learned"}, {"micro_conditions": True},
        {"swiglu": True}, {"shared_modulation": True}, {"own_conditions": True}, {"depth": 3},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_leaves_the_other_weights_alone(option):
    plain = registry.build("dit", seed=4, **SIZE).state_dict()
    with_it = registry.build("dit", seed=4, **{**SIZE, **option}).state_dict()
    common = [name for name in plain if name in with_it and plain[name].shape == with_it[name].shape]
    assert all(torch.equal(plain[name], with_it[name]) for name in common)
    gone = {"swiglu": 6, "shared_modulation": 4, "own_conditions": 5}.get(next(iter(option)), 0)  # tensors that have another shape, or none
    assert len(common) == len(plain) - gone


def test_rules_have_their_laws():
    """Bounds and moments of a large matrix, to 5 standard errors; what is zero or one is so exactly."""
    network = registry.build("dit", seed=0, **{**MODERN, "width": 256, "shared_modulation": False})
    state = network.state_dict()

    def moments(x, std, kurtosis):
        n = x.numel()
        assert abs(x.mean()) < 5 * std / n**0.5
        assert abs(x.var() / std**2 - 1) < 5 * ((kurtosis - 1) / n) ** 0.5
        assert abs((x**4).mean() / std**4 - kurtosis) < 0.2 * kurtosis

    for name in ("blocks.0.attention.qkv.weight", "blocks.1.feed_forward.leave.weight"):
        bound = math.sqrt(6 / sum(state[name].shape))
        assert 0.999 * bound < state[name].abs().max() <= bound, "Xavier's, over fan-in and fan-out"
        moments(state[name], bound / 3**0.5, 9 / 5)
    for name in ("time.enter.weight", "time.leave.weight", "classes.weight", "sizes.enter.weight", "positions"):
        moments(state[name], 0.02, 3)
    assert state["registers"].std() > 0.01
    ones = [name for name in state if bool((state[name] == 1).all())]
    assert ones == [f"blocks.{i}.attention.{which}_norm.weight" for i in range(2) for which in ("query", "key")]
    zeros = {name for name in state if bool((state[name] == 0).all())}
    assert zeros == {
        name for name in state if name.endswith("bias") or "modulation" in name or name in ("leave.weight", "sizes.leave.weight")
    }


def test_torchs_rule_is_torchs():
    """Uniform over fan-in, the bias too; an embedding normal; a norm one and zero."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(400, 300), torch.nn.GroupNorm(2, 6)
            self.convolution, self.table = torch.nn.Conv2d(16, 64, 3), torch.nn.Embedding(200, 50)

    layers = Layers()
    initialise(layers, lambda name: "torch", 0)
    for layer, fan in ((layers.linear, 400), (layers.convolution, 144)):
        bound = 1 / fan**0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound and 0.9 * bound < layer.bias.abs().max() <= bound
        assert abs(layer.weight.var() * 3 / bound**2 - 1) < 0.05
    assert abs(layers.table.weight.std() - 1) < 0.05
    assert bool((layers.norm.weight == 1).all()) and bool((layers.norm.bias == 0).all())
