"""Couplings: which noise is led to which datum.

Independent pairs need nothing. Mini-batch optimal transport pairs the noises
and data of a batch so that the sum of squared distances is least: paths cross
less and sampling takes fewer steps. It is solved exactly as an assignment, so
every noise is used once. The noise moves and the data stay: labels, captions
and masks remain with their images. With labels, noise moves within a class
only; else the noise a class is given would not be N(0, I), which is what it
is sampled from.
Source: Pooladian et al., Multisample Flow Matching; Tong et al., Improving and
Generalizing Flow-Based Generative Models with Minibatch Optimal Transport;
Crouse, On Implementing 2D Rectangular Assignment Algorithms (shortest
augmenting paths); docs/mathematics.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def solve_assignment(cost: Tensor) -> Tensor:
    """Return the cheapest one-to-one assignment of rows to columns, by scipy's shortest augmenting paths: O(n^3), on the CPU.

    A function of the cost alone, also where several assignments cost the same.

    Args:
        cost: (n, n), finite.

    Returns:
        (n,), int64: the column of each row.

    Raises:
        ValueError: a matrix that is not square, or not finite.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"cost has shape {tuple(cost.shape)}: a square matrix of finite numbers. Look for NaN in data or noise.")
    _, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.from_numpy(columns).long()


def couple_by_optimal_transport(
    data: Tensor, noise: Tensor, labels: Tensor | None = None, assignment: Callable[[Tensor], Tensor] = solve_assignment
) -> Tensor:
    """Return the noise of each datum under mini-batch optimal transport.

    Args:
        data: z, (B, *S).
        noise: eps, (B, *S).
        labels: whole numbers, (B,): noise moves only among data of one label.
            None for an unconditional model.
        assignment: of a cost (n, n) to the column of each row, (n,).

    Returns:
        The same noises in another order, (B, *S).

    Raises:
        ValueError: shapes that differ; values that are not finite.
    """
    if data.shape != noise.shape:
        raise ValueError(f"data {tuple(data.shape)} and noise {tuple(noise.shape)} differ: one noise per datum, of its shape.")
    if labels is not None and labels.shape != data.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} beside {len(data)} data: one whole number per datum, (B,).")
    groups = torch.zeros(len(data), dtype=torch.int64) if labels is None else labels.cpu()
    order = torch.arange(len(data))
    z, eps = data.detach().flatten(1).double(), noise.detach().flatten(1).double()
    for label in sorted(set(groups.tolist())):
        members = (groups == label).nonzero()[:, 0]
        if len(members) > 1:
            here = members.to(data.device)
            cost = -(z[here] @ eps[here].T)  # the squares of |z - eps|^2 are the same in every pairing
            order[members] = members[assignment(cost).cpu()]
    return noise[order.to(noise.device)]
