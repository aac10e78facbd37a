"""Products with weights: the one door through which every model touches a parameter.

A weight is a `jax.Array` or any registered pytree with a logical `.shape` (quantized formats, `LoraArray`,
`ExtendedRows`). Each leaf type registers its rules here and `ops` knows none of them; a rule that a type does not
register falls back to the reference: materialize the weight, then use the array rule.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import InputError
from jaxinfer.pallas_kernels.matmul.dense import dense, dense_transposed

Weight = Any  # jax.Array or a registered leaf type


@dataclasses.dataclass(frozen=True)
class Rules:
    """How one leaf type is used. Every rule but `materialize` is optional."""

    materialize: Callable[[Weight], jax.Array]
    dot: Callable[[jax.Array, Weight], jax.Array] | None = None
    dot_transposed: Callable[[jax.Array, Weight], jax.Array] | None = None
    take: Callable[[Weight, jax.Array], jax.Array] | None = None
    ragged_dot: Callable[[jax.Array, Weight, jax.Array], jax.Array] | None = None


_RULES: dict[type, Rules] = {}


def register(leaf_type: type, rules: Rules) -> None:
    """Register the rules of a weight type, once, at import of the module that defines it."""
    if leaf_type in _RULES:
        raise InputError(f"weight type {leaf_type.__name__} is registered already")
    _RULES[leaf_type] = rules


def is_weight(x: Any) -> bool:
    """True for an array and for any registered leaf type; meant as `is_leaf` of tree maps over params."""
    return type(x) in _RULES or isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def materialize(w: Weight) -> jax.Array:
    """The weight as one dense array of its logical shape."""
    rules = _RULES.get(type(w))
    return w if rules is None else rules.materialize(w)


def dot(x: jax.Array, w: Weight) -> jax.Array:
    """`x[..., K] @ w[K, N] -> [..., N]`."""
    _check("dot", x.shape[-1], w, 0, 2)
    rules = _RULES.get(type(w))
    if rules is not None and rules.dot is not None:
        return rules.dot(x, w)
    return dense(x, materialize(w).astype(x.dtype))


def dot_transposed(x: jax.Array, w: Weight) -> jax.Array:
    """`x[..., K] @ w[N, K].T -> [..., N]`: the output head of tied embeddings."""
    _check("dot_transposed", x.shape[-1], w, 1, 2)
    rules = _RULES.get(type(w))
    if rules is not None and rules.dot_transposed is not None:
        return rules.dot_transposed(x, w)
    return dense_transposed(x, materialize(w).astype(x.dtype))


def take(w: Weight, ids: jax.Array) -> jax.Array:
    """Rows `w[ids]`: `w[V, D]`, `ids[...] -> [..., D]`. Ids out of range read the nearest row."""
    rules = _RULES.get(type(w))
    if rules is not None and rules.take is not None:
        return rules.take(w, ids)
    return jnp.take(materialize(w), ids, axis=0, mode="clip")


def ragged_dot(x: jax.Array, w: Weight, group_sizes: jax.Array) -> jax.Array:
    """Rows grouped by expert: `x[M, K]`, `w[E, K, N]`, `group_sizes i32[E]` (sum M) `-> [M, N]`."""
    _check("ragged_dot", x.shape[-1], w, 1, 3)
    rules = _RULES.get(type(w))
    if rules is not None and rules.ragged_dot is not None:
        return rules.ragged_dot(x, w, group_sizes)
    return jax.lax.ragged_dot(x, materialize(w).astype(x.dtype), group_sizes)


def einsum(subscripts: str, x: jax.Array, w: Weight) -> jax.Array:
    """`jnp.einsum` with a weight as second operand; always through the dense form."""
    return jnp.einsum(subscripts, x, materialize(w).astype(x.dtype))


def _check(name: str, got: int, w: Weight, axis: int, ndim: int) -> None:
    if len(w.shape) != ndim or w.shape[axis] != got:
        raise InputError(f"{name}: the last axis of x has {got} entries, the weight has shape {tuple(w.shape)}")
