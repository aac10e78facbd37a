"""Hydra: a parallel and a sequential low-rank branch around a frozen matrix, merged into it for inference.

`y = y0 + scale * (x @ a) @ b + scale * (y0 @ c) @ d` with `y0 = x @ W`: the parallel branch learns from the input as
LoRA does, the sequential one recombines what the matrix already computes. Merged: `W + scale * (a @ b + W @ c @ d)`.
Guarantee: a different model; at the start exactly the base's function; `quant.merge` is exact up to one rounding.
State: none. The paper's defaults: rank 2 to 8 for each branch, a and c random, b and d zero.
Source: Kim et al. 2023, Hydra, 2309.06922.
Departures: a bias is added after the leaf, so the sequential branch sees the product without it and the bias is left as
it is (the released code feeds it through). One leaf merges into its own base, so the released merge's slip (attention
reparameterised with the MLP's branch) has no place. Embedding tables are refused: a look-up computes nothing to
recombine.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import InputError
from jaxinfer.quant.adapter import AdapterLeaf, added, check_alpha, check_fits, check_rank, frozen, only_kernels
from jaxinfer.quant.tree import map_axes


@struct.dataclass
class HydraArray(AdapterLeaf):
    """`base[..., K, N]`, parallel factors `a[..., K, r]`, `b[..., r, N]`, sequential `c[..., N, r]`, `d[..., r, N]`."""

    TRAINED: ClassVar[tuple[str, ...]] = ("a", "b", "c", "d")

    base: Any
    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> HydraArray:
        """The same leaf with logical axis names in place of arrays; the ranks are not split."""
        *lead, rows, columns = logical_axes
        base = None if self.base is None else map_axes(self.base, logical_axes)
        wide = (*lead, None, columns)
        return dataclasses.replace(self, base=base, a=(*lead, rows, None), b=wide, c=(*lead, columns, None), d=wide)

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        a, b, c, d = (tuple(array.shape) for array in (self.a, self.b, self.c, self.d))
        fits = len(a) >= 2 and len(a) == len(b) and a[-1] == b[-2] and a[:-2] == b[:-2]
        if not fits or d[:-2] != a[:-2] or c != (*d[:-2], d[-1], d[-2]) or d[-1] != b[-1]:
            raise InputError(f"factors a {a}, b {b}, c {c} and d {d} do not fit together")
        if self.base is not None and tuple(self.base.shape) != self.shape:
            raise InputError(f"base {tuple(self.base.shape)} and its adapter {self.shape} differ")


@dataclasses.dataclass(frozen=True)
class Hydra:
    """Fresh branches of one rank each; `scale = alpha / rank`, 1 by default."""

    rank: int = 8
    alpha: float | None = None
    dtype: str = "float32"

    def __post_init__(self):
        check_rank("hydra", self.rank)
        check_alpha("hydra", self.alpha)

    def adapt(self, weight: Any, key: jax.Array, *, axis: int = -2) -> HydraArray:
        """The leaf over `weight[..., K, N]`."""
        only_kernels("hydra", weight, axis)
        *lead, rows, columns = weight.shape
        check_fits("hydra", self.rank, min(rows, columns), "of the shorter side", weight)
        one, two = jax.random.split(key)
        a = jax.random.normal(one, (*lead, rows, self.rank), self.dtype) * rows**-0.5
        c = jax.random.normal(two, (*lead, columns, self.rank), self.dtype) * columns**-0.5
        b, d = (jnp.zeros((*lead, self.rank, columns), self.dtype) for _ in range(2))  # never one buffer for two
        scale = 1.0 if self.alpha is None else float(self.alpha) / self.rank
        return HydraArray(weight, a, b, c, d, scale)


def _materialize(w: HydraArray) -> jax.Array:
    a, b, c, d = (array.astype(jnp.float32) for array in (w.a, w.b, w.c, w.d))
    base = ops.materialize(frozen(w.base)).astype(jnp.float32)
    return added(w.base, w.scale * (a @ b + (base @ c) @ d))


def _dot(x: jax.Array, w: HydraArray) -> jax.Array:
    y = ops.dot(x, frozen(w.base))
    return y + w.scale * (ops.dot(ops.dot(x, w.a), w.b) + ops.dot(ops.dot(y, w.c), w.d))


def _ragged_dot(x: jax.Array, w: HydraArray, group_sizes: jax.Array) -> jax.Array:
    thin = lambda x, one, two: ops.ragged_dot(ops.ragged_dot(x, one, group_sizes), two, group_sizes)  # noqa: E731
    y = ops.ragged_dot(x, frozen(w.base), group_sizes)
    return y + w.scale * (thin(x, w.a, w.b) + thin(y, w.c, w.d))


ops.register(HydraArray, ops.Rules(materialize=_materialize, dot=_dot, ragged_dot=_ragged_dot))
