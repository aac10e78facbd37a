"""Routing of tokens to their top experts, as the sorted groups that `ragged_dot` takes.

Sources: Mixtral (Jiang et al. 2024, 2401.04088); the top-k gate of Shazeer et al. (2017, 1701.06538).

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.ops.precision import widen


@struct.dataclass
class Routing:
    """`M = tokens * k` rows sorted by expert.

    `token i32[M]` says which token a sorted row reads, `group_sizes i32[E]` how many rows each expert has,
    `weight [tokens, k]` and `place i32[tokens, k]` how a token's rows come back together.
    """

    token: jax.Array
    group_sizes: jax.Array
    weight: jax.Array
    place: jax.Array

    def gather(self, rows: jax.Array) -> jax.Array:
        """Weighted sum of each token's expert outputs: `rows[M, D] -> [tokens, D]`."""
        return jnp.einsum("nkd,nk->nd", rows[self.place], self.weight.astype(rows.dtype))


def route(logits: jax.Array, k: int, *, normalize: bool) -> Routing:
    """Top-k of the softmax over experts; `normalize` makes a token's kept weights sum to one.

    `logits[tokens, E]`. Ties go to the lower expert.
    """
    tokens, experts = logits.shape
    probability = jax.nn.softmax(widen(logits), -1)
    weight, expert = jax.lax.top_k(probability, k)
    if normalize:
        weight = weight / weight.sum(-1, keepdims=True)
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=order.dtype)).reshape(tokens, k)
    sizes = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    return Routing(order // k, sizes, weight, place)
