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
augmenting paths); mathematics.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COUPLINGS = ("independent", "optimal")


def assign(cost: Tensor) -> Tensor:
    """The cheapest one-to-one assignment of rows to columns, by shortest augmenting paths: O(n^3), on the CPU.

    Args:
        cost: (n, n), finite.

    Returns:
        (n,), int64: the column of each row.

    Raises:
        ValueError: a matrix that is not square, or not finite.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"cost has shape {tuple(cost.shape)}: a square matrix of finite numbers. Look for NaN in data or noise.")
    cost = cost.detach().double().cpu()
    n = len(cost)
    price_row, price_column = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    row_of, column_of = [-1] * n, [-1] * n
    for start in range(n):
        distance = torch.full((n,), torch.inf, dtype=torch.float64)
        done = torch.zeros(n, dtype=torch.bool)
        before = torch.full((n,), -1)
        row, reached, rows = start, 0.0, [start]
        while True:  # Dijkstra over columns; an edge back along the matching is free
            through = reached + cost[row] - price_row[row] - price_column
            closer = (through < distance) & ~done
            distance, before = torch.where(closer, through, distance), torch.where(closer, row, before)
            open_distance = torch.where(done, torch.inf, distance)
            column = int(open_distance.argmin())
            reached = float(open_distance[column])
            done[column] = True
            if row_of[column] < 0:
                break
            row = row_of[column]
            rows.append(row)
        price_row[start] += reached
        for other in rows[1:]:
            price_row[other] += reached - distance[column_of[other]]
        price_column -= torch.where(done, reached - distance, 0.0)
        while column >= 0:  # turn the path around
            row = int(before[column])
            row_of[column], column_of[row], column = row, column, column_of[row]
    return torch.tensor(column_of)


def couple(data: Tensor, noise: Tensor, labels: Tensor | None = None, assignment: Callable[[Tensor], Tensor] = assign) -> Tensor:
    """The noise of each datum under mini-batch optimal transport.

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
