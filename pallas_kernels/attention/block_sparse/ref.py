"""The oracle of `block_sparse`: the whole score matrix in float32, with the blocks that are not listed unseen.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.block_sparse.call import Call, dense_blocks
from jaxinfer.pallas_kernels.attention.flash import ref


def forward(call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes):
    """`(out[B, H, T, e], lse f32[B, H, T])` by a softmax over all keys; differentiable by jax itself."""
    flash = call.flash
    k, v = (jnp.repeat(x.astype(jnp.float32), flash.group, 1) for x in (k, v))
    score = jnp.einsum("bhtd,bhsd->bhts", q.astype(jnp.float32), k, precision="highest") * flash.rules.scale
    if flash.rules.softcap is not None:
        score = flash.rules.softcap * jnp.tanh(score / flash.rules.softcap)
    seen, distance = ref.visibility(flash, q_lengths, kv_lengths)
    if slopes is not None:
        score = score - slopes[:, None, None] * jnp.abs(distance)
    return ref.softmax(score, seen & listed(call, indices, counts), v, q.dtype)


def listed(call: Call, indices: jax.Array, counts: jax.Array) -> jax.Array:
    """Whether the pair's block is listed, bool[b, h, T, S]."""
    blocks = dense_blocks(indices, counts, call.k_blocks)
    return jnp.repeat(jnp.repeat(blocks, call.block_q, 2), call.block_k, 3)
