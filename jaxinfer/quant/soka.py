"""SoKA: the leading Kronecker products of a matrix are trained, found by a singular value decomposition.

`W[m p, n q]` rearranged so that each `p x q` block is a row (Van Loan and Pitsianis) turns a sum of Kronecker products
into a sum of outer products, so its SVD gives `W = sum_k s_k U_k (x) V_k`, best first. The first `rank` terms are
trained, the rest is frozen. The rank is given, or follows the spectrum: the smaller of what holds `energy` of the
squared singular values and of the elbow of their curve.
Guarantee: a different model; at the start exactly the base's function; with all terms the decomposition is exact.
State: the start of the factors beside the trained ones. The paper's defaults: a rank from energy and elbow.
Source: Chong, Qu 2025, SoKA, 2506.15251.
Departures: `sqrt(s_k)` goes into both factors. The frozen rest is not stored: the weight is `base` plus what the
factors have moved since their start, so that the base stays the very same array and may be quantized. The paper's
thresholds and its elbow are not in the text that we could read: ours (energy 0.9, the value most below the chord, at
most 16) stand in, so its ranks are not reproduced. Products go through the dense weight, made anew in the backward
pass: with the start to subtract, factored ones cost as much from a rank of a fourth of sqrt(K) on.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.quant.adapter import AdapterLeaf, added, check_fits, check_rank, frozen
from jaxinfer.quant.tree import map_axes


@struct.dataclass
class SokaArray(AdapterLeaf):
    """`base[..., m p, n q]` plus `sum_k u_k (x) v_k` less the same of the start.

    `u, u_start f[..., r, m, n]`, `v, v_start f[..., r, p, q]`; base is any weight, or None for an adapter alone.
    """

    TRAINED: ClassVar[tuple[str, ...]] = ("u", "v")

    base: Any
    u: jax.Array
    v: jax.Array
    u_start: jax.Array
    v_start: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        *lead, _, m, n = self.u_start.shape
        return (*lead, m * self.v_start.shape[-2], n * self.v_start.shape[-1])

    def update(self) -> jax.Array:
        """What is added to the base, f32[..., K, N]; exactly zero at the start."""
        u_start, v_start = jax.lax.stop_gradient((self.u_start, self.v_start))
        # u (x) v - u_start (x) v_start without the cancellation: both halves are zero while nothing has moved.
        u = jnp.concatenate([self.u - u_start, u_start], axis=-3)
        v = jnp.concatenate([self.v, self.v - v_start], axis=-3)
        return kronecker_sum(u, v)

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> SokaArray:
        """The same leaf with logical axis names in place of arrays; the small factors are not split."""
        *lead, _, _ = logical_axes
        base = None if self.base is None else map_axes(self.base, logical_axes)
        whole = (*lead, None, None, None)
        return dataclasses.replace(self, base=base, u=whole, v=whole, u_start=whole, v_start=whole)

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        u, v = tuple(self.u.shape), tuple(self.v.shape)
        starts = tuple(self.u_start.shape), tuple(self.v_start.shape)
        if len(u) < 3 or len(u) != len(v) or u[:-2] != v[:-2] or starts != (u, v):
            raise InputError(f"factors u {u} and v {v} and their start {starts} do not fit together")
        if self.base is not None and tuple(self.base.shape) != self.shape:
            raise InputError(f"base {tuple(self.base.shape)} and its adapter {self.shape} differ")


@dataclasses.dataclass(frozen=True)
class Soka:
    """Fresh Kronecker factors: `rank` terms, or (None) what `choose_rank` says of each matrix, at most `max_rank`."""

    rank: int | None = None
    energy: float = 0.9
    max_rank: int = 16
    dtype: str = "float32"

    def __post_init__(self):
        if self.rank is not None:
            check_rank("soka", self.rank)
        if type(self.max_rank) is not int or self.max_rank < 1:
            raise ConfigError(f"soka: max_rank must be a positive integer, got {self.max_rank!r}")
        if not 0 < self.energy <= 1:
            raise ConfigError(f"soka: energy must be in (0, 1], got {self.energy!r}")

    def adapt(self, weight: Any, key: jax.Array, *, axis: int = -2) -> SokaArray:
        """The leaf over `weight[..., K, N]`; the key is not used. Without a rank the values must be known."""
        *lead, rows, columns = weight.shape
        m, n = balanced(rows), balanced(columns)
        if self.rank is not None:
            check_fits("soka", self.rank, min(m * n, rows * columns // (m * n)), "Kronecker terms", weight)
        dense = ops.materialize(weight).astype(jnp.float32).reshape(-1, rows, columns)
        s, u, v = jax.vmap(lambda w: kronecker_svd(w, m, n))(dense)
        rank = self.rank if self.rank is not None else self._rank(s)
        root = jnp.sqrt(s[:, :rank, None, None])
        u, v = (x.astype(self.dtype).reshape(*lead, *x.shape[1:]) for x in (u[:, :rank] * root, v[:, :rank] * root))
        # Two arrays each, since a training step may give the buffers of the trained ones away.
        return SokaArray(weight, u, v, jnp.copy(u), jnp.copy(v))

    def _rank(self, s: jax.Array) -> int:
        if isinstance(s, Tracer):
            raise ConfigError("soka: a rank from the spectrum needs the weight's values: give a rank under jax.jit")
        ranks = [choose_rank(one, energy=self.energy, max_rank=self.max_rank) for one in np.asarray(s)]
        return max(ranks)


def balanced(size: int) -> int:
    """The largest divisor of `size` that is at most its square root."""
    return next(m for m in range(int(size**0.5 + 1e-9), 0, -1) if size % m == 0)


def rearrange(weight: jax.Array, m: int, n: int) -> jax.Array:
    """`W[m p, n q] -> R[m n, p q]`: row (i, j) is block (i, j), so that `u (x) v` becomes `vec(u) vec(v)^T`."""
    rows, columns = weight.shape
    p, q = rows // m, columns // n
    return weight.reshape(m, p, n, q).transpose(0, 2, 1, 3).reshape(m * n, p * q)


def kronecker_svd(weight: jax.Array, m: int, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`s[R]` falling, `u[R, m, n]` and `v[R, p, q]` with `weight[m p, n q] = sum_k s_k u_k (x) v_k`.

    R is the smaller of m n and p q.
    """
    rows, columns = weight.shape
    left, s, right = jnp.linalg.svd(rearrange(weight, m, n), full_matrices=False)
    return s, left.T.reshape(-1, m, n), right.reshape(-1, rows // m, columns // n)


def kronecker_sum(u: jax.Array, v: jax.Array) -> jax.Array:
    """`sum_k u_k (x) v_k`, f32[..., m p, n q], of `u[..., r, m, n]` and `v[..., r, p, q]`."""
    *lead, _, m, n = u.shape
    p, q = v.shape[-2:]
    blocks = jnp.einsum("...rij,...rkl->...ikjl", u.astype(jnp.float32), v.astype(jnp.float32))
    return blocks.reshape(*lead, m * p, n * q)


def choose_rank(s: Any, *, energy: float, max_rank: int) -> int:
    """How many of the falling singular values `s[R]` to keep, at least one and at most `max_rank`.

    The smaller of two numbers: the fewest that hold `energy` of the sum of squares, and the elbow: the values up to the
    one most below the straight line from the first to the last.
    """
    s = np.asarray(s, np.float64)
    total = float(np.sum(s**2))
    if total == 0:
        return 1
    enough = int(np.searchsorted(np.cumsum(s**2) / total, energy * (1 - 1e-9))) + 1
    line = np.linspace(s[0], s[-1], len(s))
    elbow = int(np.argmax(line - s)) + 1 if np.max(line - s) > 1e-9 * s[0] else len(s)
    return max(1, min(enough, elbow, max_rank, len(s)))


def _materialize(w: SokaArray) -> jax.Array:
    return added(w.base, w.update())


def _dot(x: jax.Array, w: SokaArray) -> jax.Array:
    # Made anew in the backward pass: otherwise a second copy of every adapted weight would be kept until then.
    @jax.checkpoint
    def product(x, w):
        if isinstance(w.base, jax.Array):
            return ops.dot(x, _materialize(w))
        return ops.dot(x, frozen(w.base)) + ops.dot(x, w.update())

    return product(x, w)


ops.register(SokaArray, ops.Rules(materialize=_materialize, dot=_dot))
