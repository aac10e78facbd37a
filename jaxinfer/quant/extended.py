"""Added rows: a vocabulary grown by new tokens without touching, or copying, the weight that it grows.

Guarantee: exact: the same function as the concatenated weight. State: none.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import InputError
from jaxinfer.quant.tree import map_axes


@struct.dataclass
class ExtendedRows:
    """`base` (any weight) followed by the array `extra` along `axis`: -2 adds rows to a table `[V, D]`, -1 adds
    output columns to an untied head `[D, V]`. The model's `vocab_size` grows with it."""

    base: Any
    extra: jax.Array
    axis: int = struct.field(pytree_node=False, default=-2)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        shape = list(self.base.shape)
        shape[self.axis] += self.extra.shape[self.axis]
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.base.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the base."""
        return self.base.dtype

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> ExtendedRows:
        """The same leaf with logical axis names in place of arrays; the few added rows are not split."""
        extra = list(logical_axes)
        extra[self.axis] = None
        return dataclasses.replace(self, base=map_axes(self.base, logical_axes), extra=tuple(extra))

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        base, extra = list(self.base.shape), list(self.extra.shape)
        if self.axis not in (-1, -2) or len(base) < 2 or len(base) != len(extra):
            raise InputError(f"base {tuple(base)} cannot be extended by {tuple(extra)} along axis {self.axis}")
        base[self.axis] = extra[self.axis]
        if base != extra:
            raise InputError(f"added rows {tuple(extra)} must be {tuple(base)} to extend axis {self.axis}")


def _materialize(w: ExtendedRows) -> jax.Array:
    return jnp.concatenate([ops.materialize(w.base), w.extra.astype(w.dtype)], w.axis)


def _dot(x: jax.Array, w: ExtendedRows) -> jax.Array:
    if w.axis == -2:
        return x @ _materialize(w).astype(x.dtype)
    return jnp.concatenate([ops.dot(x, w.base), ops.dot(x, w.extra)], -1)


def _dot_transposed(x: jax.Array, w: ExtendedRows) -> jax.Array:
    if w.axis == -1:
        return x @ _materialize(w).astype(x.dtype).T
    return jnp.concatenate([ops.dot_transposed(x, w.base), ops.dot_transposed(x, w.extra)], -1)


def _take(w: ExtendedRows, ids: jax.Array) -> jax.Array:
    if w.axis == -1:
        return jnp.concatenate([ops.take(w.base, ids), ops.take(w.extra, ids).astype(w.dtype)], -1)
    first = w.base.shape[0]
    old, new = ops.take(w.base, jnp.minimum(ids, first - 1)), ops.take(w.extra, ids - first)
    return jnp.where((ids < first)[..., None], old, new.astype(old.dtype))


ops.register(ExtendedRows, ops.Rules(materialize=_materialize, dot=_dot, dot_transposed=_dot_transposed, take=_take))
