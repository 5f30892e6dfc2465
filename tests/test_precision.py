"""The precision that is measured: the faster of two, float32 unless bf16 gains, one answer for all ranks and for a resumed run."""

import pytest
import torch
from torch import nn

from condot.pipeline.launch.precision import pick_faster_precision, resolve_precision


class Timed(nn.Module):
    """A network on a clock of its own: so many seconds a pass, by precision, the first passes ten times as long."""

    def __init__(self, plain, half):
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
        self.costs, self.now, self.passes = {False: plain, True: half}, 0.0, []

    def forward(self, x):
        low = torch.is_autocast_enabled("cpu")
        seen = self.passes.count(low)
        cost = self.costs[low]
        self.now += (cost(seen) if callable(cost) else cost) * (1 if seen else 10)
        self.passes.append(low)
        return self.weight * x + torch.rand(())

    def choice(self, **options):
        return pick_faster_precision(self, (torch.ones(3),), clock=lambda: self.now, **options)


@pytest.mark.parametrize(("plain", "half", "answer"), [(1.0, 0.5, "bf16"), (1.0, 0.94, "bf16"), (1.0, 0.96, "no"), (1.0, 5.0, "no")])
def test_the_faster_one_and_float32_where_bf16_gains_less_than_a_twentieth(plain, half, answer):
    assert Timed(plain, half).choice() == answer


def test_turns_are_interleaved_and_a_busy_moment_changes_nothing():
    """One pass of five takes a hundred times as long: medians do not see it; nor the first, which warms up."""
    network = Timed(1.0, lambda seen: 80.0 if seen == 3 else 0.8)
    assert network.choice(max_seconds=1e6) == "bf16"
    assert network.passes == [False, True] * 6


def test_a_long_first_pass_does_not_count():
    assert Timed(1.0, lambda seen: 0.5 if seen else 1000.0).choice(rounds=1) == "bf16"


def test_large_networks_do_not_wait_long():
    """A warm-up and one round where those take longer than patience."""
    network = Timed(60.0, 20.0)
    assert network.choice(max_seconds=10) == "bf16" and len(network.passes) == 4


def test_what_does_not_fit_is_not_chosen():
    def full(seen):
        raise torch.OutOfMemoryError

    assert Timed(full, 1.0).choice() == "bf16" and Timed(1.0, full).choice() == "no"


def test_nothing_is_changed():
    """Weights, gradients and the generator are those of a run that did not measure."""
    network, before = Timed(1.0, 1.0), torch.random.get_rng_state()
    network.choice()
    assert torch.equal(torch.random.get_rng_state(), before) and network.weight.grad is None and network.weight.tolist() == [1, 1, 1]


def test_other_devices_compute_in_float32():
    assert pick_faster_precision(nn.Linear(2, 2, device="meta"), (torch.ones(1, 2, device="meta"),)) == "no"


def test_a_resumed_run_takes_the_saved_answer_and_others_what_they_ask():
    def never():
        raise AssertionError("nothing is measured")

    assert [resolve_precision(asked, None, never) for asked in ("no", "bf16", "fp16", None)] == ["no", "bf16", "fp16", None]
    assert resolve_precision("auto", "bf16", never) == "bf16" and resolve_precision("auto", "no", never) == "no"
    assert resolve_precision("auto", None, lambda: "bf16") == "bf16"


def test_rank_0_decides(monkeypatch):
    """Of two ranks that measured differently, the second takes the first's answer."""
    monkeypatch.setattr("condot.pipeline.launch.precision.broadcast_object_list", lambda answer: answer.__setitem__(0, "no"))
    assert resolve_precision("auto", None, lambda: "bf16") == "no"


def test_real_networks_are_measured():
    answer = pick_faster_precision(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), (torch.ones(2, 8),), rounds=2)
    assert answer in ("no", "bf16")
