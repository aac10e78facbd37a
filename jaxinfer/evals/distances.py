"""Distances between two sets of samples: Fréchet's, precision and recall by neighbours, exact Wasserstein-2.

Fréchet distance of Gaussian fits (Heusel et al. 2017, arXiv:1706.08500), k-nearest-neighbour precision and recall
(Kynkäänniemi et al. 2019, arXiv:1904.06991, k = 3), and the optimal assignment of equal numbers of points. On the
host, in float64; all grow with the number of samples, so compare equal numbers.

Stability: experimental.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from jaxinfer.errors import InputError


def _points(x: Any, name: str, least: int = 2) -> np.ndarray:
    points = np.asarray(x, np.float64)
    points = points.reshape(len(points), -1)
    if len(points) < least:
        raise InputError(f"{name}: at least {least} samples are needed, got {len(points)}")
    if not np.isfinite(points).all():
        raise InputError(f"{name}: {int((~np.isfinite(points)).any(1).sum())} samples are not finite")
    return points


def _pair(real: Any, samples: Any, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = _points(real, "real", least), _points(samples, "samples", least)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"real has {a.shape[1]} numbers a sample, samples have {b.shape[1]}")
    return a, b


def frechet_distance(real: Any, samples: Any) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of feature sets [N, D] and [M, D], covariances A, B.

    Raises `InputError` for fewer than two samples, other widths or values that are not finite.
    """
    a, b = _pair(real, samples)
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


class PrecisionRecall(NamedTuple):
    """The share of samples within the real set's neighbourhoods, and of the real set within the samples'."""

    precision: float
    recall: float


def precision_recall(real: Any, samples: Any, *, neighbours: int = 3) -> PrecisionRecall:
    """A set's neighbourhood is balls around its points that reach to the k-th neighbour. [N, D] and [M, D].

    Raises `InputError` as `frechet_distance` does, and for fewer than k + 1 samples.
    """
    a, b = _pair(real, samples, neighbours + 1)

    def radii(points):  # the nearest point to a point is itself
        return np.partition(cdist(points, points), neighbours, axis=1)[:, neighbours]

    between = cdist(a, b)
    precision = (between <= radii(a)[:, None]).any(0).mean()
    recall = (between <= radii(b)[None]).any(1).mean()
    return PrecisionRecall(float(precision), float(recall))


def wasserstein2(real: Any, samples: Any) -> float:
    """The exact Wasserstein-2 distance between two sets of equally many points [N, D]: by assignment, O(N^3)."""
    a, b = _pair(real, samples)
    if len(a) != len(b):
        raise InputError(f"equal numbers of points are needed, got {len(a)} and {len(b)}")
    cost = cdist(a, b, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))
