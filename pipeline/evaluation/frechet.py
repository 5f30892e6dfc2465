"""The Frechet distance between two sets of features, exact, in float64.

Each set is taken for the Gaussian of its mean and covariance; the distance is
the squared 2-Wasserstein distance of the two, which is 0 for equal moments and
says nothing of what lies beyond them.
Source: Frechet, Sur la distance de deux lois de probabilite; Dowson and
Landau, The Frechet distance between multivariate normal distributions; used on
features by Heusel et al., GANs trained by a two time-scale update rule (FID).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and scatter of features; two of them add up to those of both sets, in any order.

    Args:
        count: samples, N.
        mean: (D,), float64.
        scatter: sum of (f - mean)(f - mean)^T, (D, D), float64; kept instead of
            raw second moments, whose difference loses the digits of a mean far from 0.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm
    for computing sample variances, section 2.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureMoments:
        """Return the moments of features, (N, D).

        Raises:
            ValueError: another shape, no rows, or values that are not finite.
        """
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features of shape {tuple(features.shape)}: rows of numbers, (N, D), at least one.")
        x = features.double()
        if not bool(torch.isfinite(x).all()):
            raise ValueError("features are not all finite: look for samples that are not, or for a network that overflows.")
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    @classmethod
    def from_batches(cls, batches: Iterable[Tensor]) -> FeatureMoments:
        """Return the moments of batches of features, (N_i, D) each, without keeping them.

        Raises:
            ValueError: no batch, or as `from_features`.
        """
        total: FeatureMoments | None = None
        for batch in batches:
            total = cls.from_features(batch) if total is None else total + cls.from_features(batch)
        if total is None:
            raise ValueError("no features were given: at least one batch.")
        return total

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both sets together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and of {len(other.mean)} numbers cannot be one set: use one network for both.")
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return FeatureMoments(count, mean, scatter)

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by N - 1, as every published FID is (numpy.cov); 0 for one sample."""
        return self.scatter / max(1, self.count - 1)

    @property
    def is_singular(self) -> bool:
        """Too few samples for the dimension: N of them span at most N - 1 directions."""
        return self.count <= len(self.mean)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """`|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)`, at least 0.

    The last trace is the sum of the singular values of `S1^(1/2) S2^(1/2)`,
    both roots symmetric, by eigenvalues. That is the same number as by the
    eigenvalues of the product in the middle, whose rounding errors of 1e-16
    the last root would make 1e-8; it needs no inverse, so that singular
    covariances are exact too.

    Estimated from N samples it is too large by about a constant over N: compare
    figures of the same N only, and read each beside real against real.

    Raises:
        ValueError: features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers have no distance: use one network for both.")
    one, other = a.covariance, b.covariance
    shared = torch.linalg.svdvals(_root(one) @ _root(other)).sum()
    distance = (a.mean - b.mean).square().sum() + one.trace() + other.trace() - 2 * shared
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root, (D, D); eigenvalues that rounding cannot tell from 0 are 0, as in a matrix's rank."""
    values, vectors = torch.linalg.eigh(covariance)
    known = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = (vectors * (values * known).sqrt()) @ vectors.T
    return root
