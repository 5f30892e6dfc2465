"""Streams of noise for solvers, and the statistic that compares their samples with the mixture."""

import math

import torch
from oracles import kolmogorov, three
from torch import Tensor

from condot.pipeline.flow import Purpose, normal


def stream(seed: int, count: int = 4000, size: int = 2):
    """Normal numbers for step k of a solve, (count, size), float64, from the package's own named draws."""
    index = torch.arange(count)
    return lambda k: normal(seed, Purpose.DIFFUSION, k, index, (size,)).double()


def worst_statistic(x: Tensor) -> float:
    """The largest of: both coordinates' Kolmogorov statistic; mean and covariance in standard errors, over 3; for `three`."""
    law = three()
    mean, covariance, n = law.mean(), law.covariance(), len(x)
    statistics = [kolmogorov(*(lambda s: (s, law.cdf(s, axis)))(x[:, axis].sort().values)) for axis in (0, 1)]
    centred = x - mean
    statistics.append(((x.mean(0) - mean).abs() / torch.sqrt(covariance.diag() / n)).max().item() / 3)
    products = centred[:, :, None] * centred[:, None, :]
    statistics.append(((products.mean(0) - covariance).abs() / (products.std(0) / math.sqrt(n))).max().item() / 3)
    return max(statistics)
