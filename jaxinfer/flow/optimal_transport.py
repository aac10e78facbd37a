"""Minibatch optimal transport: each batch's sources are given to its data so that they travel least.

Tong et al. (2023), "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport", arXiv
2302.00482; Pooladian et al. (2023), 2304.14772. Straighter paths, so fewer steps. With labels, transport over the whole
batch ties sources to classes, and a sampler that draws its source independently of the class then starts off the
trained path; `across` is the price of a pair whose source came with another class (Cheng, Schwing 2025, 2503.10636):
infinite, the default, is transport within each class, 0 forgets the classes.

Guarantee: exact in distribution for the marginals of a batch by `assignment` (a permutation); `sinkhorn` draws each
datum's source from the entropic plan and so repeats sources: approximate. Of a batch of B, not of the whole law.
State: none. Paper's defaults: squared Euclidean cost, exact plan.

Departures: the sources are permuted and the data are not, so conditions stay with what they describe; an exact plan is
an assignment, so nothing is drawn from it. The assignment is scipy's, on the host (under jit a callback); the entropic
plan is ott-jax's, on the device.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.flow.couple import check

METHODS = ("assignment", "sinkhorn")


@dataclasses.dataclass(frozen=True)
class MinibatchOT:
    """The coupling `(key, x0[B, ...], x1[B, ...], cond) -> (x0, x1, cond, log_w f32[B])`.

    method: "assignment" or "sinkhorn". across: added, in units of the mean cost, to a pair of two classes, which are
    `cond.labels i32[B]`; infinite forbids it. epsilon: of sinkhorn, relative to the mean cost.
    Raises ConfigError for an unknown method, a negative price, an epsilon that is not positive, and where the
    `flow` extra is needed (sinkhorn) and not installed.
    """

    method: str = "assignment"
    across: float = float("inf")
    epsilon: float = 0.05

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"method: got {self.method!r}, accepts {', '.join(METHODS)}")
        if not self.across >= 0:
            raise ConfigError(f"across: got {self.across}, accepts 0 or more")
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon: got {self.epsilon}, accepts a positive number")

    def __call__(self, key: jax.Array, x0: jax.Array, x1: jax.Array, cond: Any):
        check(x0, x1)
        cost = costs(x0, x1)
        labels = getattr(cond, "labels", None)
        if labels is not None and self.across:
            # A finite stand-in for infinity: more than any assignment within the classes can cost.
            price = self.across * cost.mean() if np.isfinite(self.across) else cost.max() * (len(cost) + 1)
            cost += jnp.where(labels[:, None] != labels[None], price, 0.0)
        chosen = assignment(cost) if self.method == "assignment" else entropic_draw(key, cost, self.epsilon)
        return x0[chosen], x1, cond, jnp.zeros(len(cost))


def costs(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """|x0_i - x1_j|^2, f32[B, B], up to terms that no assignment depends on (kept, so that it is not negative)."""
    a, b = (x.astype(jnp.float32).reshape(x.shape[0], -1) for x in (x0, x1))
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None]
    return jnp.maximum(squares - 2 * jnp.matmul(a, b.T, precision="highest"), 0)


def assignment(cost: jax.Array) -> jax.Array:
    """The source of each datum, i32[B], a permutation of least total `cost f32[B, B]` (sources by data)."""

    def solve(table: Any) -> np.ndarray:
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(np.asarray(table).T)[1].astype(np.int32)

    return jax.pure_callback(solve, jax.ShapeDtypeStruct(cost.shape[:1], jnp.int32), cost, vmap_method="sequential")


def entropic_draw(key: jax.Array, cost: jax.Array, epsilon: float) -> jax.Array:
    """The source of each datum, i32[B], drawn from the column of the entropic plan at `epsilon` times the mean cost."""
    try:
        with warnings.catch_warnings():  # its first import warns of a library that it brings along
            warnings.simplefilter("ignore", DeprecationWarning)
            from ott.geometry import geometry
            from ott.problems.linear import linear_problem
            from ott.solvers.linear import sinkhorn
    except ImportError as error:
        raise ConfigError("sinkhorn needs ott-jax: pip install 'jaxinfer[flow]', or use 'assignment'") from error
    finite = cost / cost.mean()
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=finite, epsilon=epsilon))
    found = sinkhorn.Sinkhorn(max_iterations=500)(problem)
    log_plan = (found.f[:, None] + found.g[None] - finite) / epsilon
    return jax.random.categorical(key, log_plan, axis=0).astype(jnp.int32)
