"""One step of a blocked pass in XLA: rows of queries meet a panel of keys that `flash` or `block_sparse` has picked.

FlashAttention-2's arithmetic (Dao 2023, arXiv 2307.08691). Arrays may lead with an axis of blocks that are worked on
together; products then are batched ones. Of keys and values each function says in which order it wants them: XLA's CPU
products are a quarter to a half slower on operands that do not lie as they are read.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.attention.flash.call import Call
from jaxinfer.pallas_kernels.attention.flash.scores import NO_PEAK, UNSEEN


class Rows:
    """Rows of queries: `numbers i32[..., rows, 1]` within their head, the lengths of their batch row, ALiBi's slopes.

    `padded`: keys may lie behind the last one, in a ragged row or not.
    """

    def __init__(self, call: Call, numbers: jax.Array, lengths, slope: jax.Array | None, padded: bool = False):
        self.call, self.numbers, self.slope = call, numbers, slope
        self.q_length, self.kv_length = (call.queries, call.keys) if lengths is None else lengths
        self.positions = numbers + (self.kv_length - self.q_length)
        self.padded = padded or call.ragged

    def scores(self, product: jax.Array, keys: jax.Array) -> jax.Array:
        """Base-2 scores of products with the keys numbered `keys i32[..., 1, n]`; unseen ones far below all others."""
        distance = self.positions - keys
        score = self.call.rules.scores(product, distance, self.slope)
        seen = self.call.rules.visible(distance)
        if self.padded:
            inside = keys < self.kv_length
            seen = inside if seen is None else seen & inside
        if self.call.ragged:
            real = self.numbers < self.q_length
            seen = real if seen is None else seen & real
        return score if seen is None else jnp.where(seen, score, UNSEEN)


def start(rows: tuple[int, ...], value_dim: int) -> Any:
    """The carry of `attend` for rows that have seen nothing: running peak, sum and weighted values."""
    return jnp.full(rows, NO_PEAK), jnp.zeros(rows), jnp.zeros((*rows, value_dim))


def attend(carry: Any, score: jax.Array, values: jax.Array) -> Any:
    """The carry after a panel of scores `f32[..., rows, keys]` and `values[..., keys, e]`."""
    peak, total, acc = carry
    new = jnp.maximum(peak, score.max(-1))
    shrink, weight = jnp.exp2(peak - new), jnp.exp2(score - new[..., None])
    acc = acc * shrink[..., None] + dot(weight.astype(values.dtype), values, 1, 0)
    return new, total * shrink + weight.sum(-1), acc


def weights(rows: Rows, product: jax.Array, keys: jax.Array, dweight: jax.Array, lse: jax.Array, delta: jax.Array):
    """`(weights, gradients of the scores over the scale)` of a panel, f32[..., rows, keys], for a backward pass.

    `product` of queries and keys, `dweight` of the output's cotangent and values; `lse`, `delta` from `backward_rows`.
    """
    weight = jnp.exp2(rows.scores(product, keys) - lse[..., None])
    return weight, weight * (dweight - delta[..., None]) * rows.call.rules.slope_of_cap(product)


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """The float32 product over axes 0 or 1 of the last two of each; axes before those are batches."""
    lead = tuple(range(a.ndim - 2))
    numbers = (((contract_a + len(lead),), (contract_b + len(lead),)), (lead, lead))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)
