"""Couplings: the assignment is the cheapest, uses every noise once, and keeps to its class."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array

from condot.pipeline.flow import couple_by_optimal_transport, solve_assignment


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 96])
@pytest.mark.parametrize("kind", ["normal", "integer", "line"])
def test_no_assignment_is_cheaper_by_the_linear_program_it_is(n, kind):
    """Duality: prices of rows and columns that no cost undercuts sum to the least cost. They come from a solver of linear programs."""
    cost = {"normal": draw(n, n), "integer": (draw(n, n) * 2).round(), "line": (draw(n, 1) - draw(1, n, seed=1)) ** 2}[kind]
    columns = solve_assignment(cost)
    assert columns.dtype == torch.int64 and sorted(columns.tolist()) == list(range(n))
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n)).reshape(-1, 2)
    members = torch.cat([torch.nn.functional.one_hot(pairs[:, 0], n), torch.nn.functional.one_hot(pairs[:, 1], n)], 1)
    best = linprog(-torch.ones(2 * n).numpy(), csr_array(members.numpy()), cost.flatten().numpy(), bounds=(None, None))
    assert best.success and abs(cost[torch.arange(n), columns].sum().item() + best.fun) < 1e-7


@pytest.mark.parametrize("cost", [torch.zeros(9, 9), (draw(12, 12) > 0).double(), torch.ones(8, 8).half(), draw(7, 7).float().T])
def test_ties_are_decided_alike_each_time(cost):
    """Of assignments that cost the same the choice is a function of the cost; dtype, strides and gradients make no other."""
    chosen = solve_assignment(cost)
    assert sorted(chosen.tolist()) == list(range(len(cost)))
    for same in (cost.clone(), cost.double().requires_grad_(), cost.T.contiguous().T):
        assert torch.equal(solve_assignment(same), chosen)


def test_assignment_is_the_best_of_all_permutations():
    for seed in range(20):
        cost = draw(6, 6, seed=seed)
        best = min(sum(cost[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
        assert abs(cost[torch.arange(6), solve_assignment(cost)].sum().item() - best) < 1e-12


def test_coupling_on_a_line_sorts():
    """In one dimension optimal transport keeps the order."""
    data, noise = draw(33, 1), draw(33, 1, seed=1)
    coupled = couple_by_optimal_transport(data, noise)
    assert torch.equal(coupled[data[:, 0].argsort(), 0], noise[:, 0].sort().values)


def test_every_noise_is_used_once_and_travel_is_shorter():
    data, noise = draw(40, 3, 2, 5), draw(40, 3, 2, 5, seed=1)
    coupled = couple_by_optimal_transport(data, noise)
    assert {tuple(row) for row in coupled.flatten(1).tolist()} == {tuple(row) for row in noise.flatten(1).tolist()}
    assert (data - coupled).square().sum() < (data - noise).square().sum()


def test_noise_stays_in_its_class():
    """Then the noise of a class is what it was: a conditional model starts from N(0, I)."""
    data, noise, labels = draw(30, 2), draw(30, 2, seed=1), torch.arange(30) % 3
    coupled = couple_by_optimal_transport(data, noise, labels)
    for label in range(3):
        mine = labels == label
        assert {tuple(row) for row in coupled[mine].tolist()} == {tuple(row) for row in noise[mine].tolist()}
        assert torch.equal(coupled[mine], couple_by_optimal_transport(data[mine], noise[mine]))


def test_the_assignment_can_be_given():
    data, noise = draw(20, 2), draw(20, 2, seed=1)
    theirs = couple_by_optimal_transport(data, noise, assignment=lambda cost: torch.as_tensor(linear_sum_assignment(cost.numpy())[1]))
    assert torch.equal(theirs, couple_by_optimal_transport(data, noise))


BAD = {
    "shapes": (lambda: couple_by_optimal_transport(draw(3, 2), draw(3, 1)), r"\(3, 2\) and noise \(3, 1\) differ"),
    "labels": (lambda: couple_by_optimal_transport(draw(3, 2), draw(3, 2), torch.zeros(2)), r"labels \(2,\)"),
    "square": (lambda: solve_assignment(draw(3, 2)), r"\(3, 2\): a square matrix"),
    "nan": (lambda: couple_by_optimal_transport(draw(3, 2) * torch.nan, draw(3, 2)), r"finite numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
