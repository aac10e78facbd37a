"""Lightning Attention-2 in XLA: chunks as matrix products, a state between them; runs anywhere, fast on CPU.

Qin et al., 2024 (arXiv 2401.04658), algorithms 1 and 2. Inside a chunk the scores are masked by powers of the decay;
a partial last chunk decays the state by its true length.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.linear import chunked
from jaxinfer.pallas_kernels.linear.arguments import padded, power_of_two_up_to
from jaxinfer.pallas_kernels.linear.chunked import Decays, Rule, Sizes, product

Array = jax.Array
CHUNK = 64  # measured on 1x8x2048x64 to 1x8x32768x64: 32 and 128 are within 20 %, 256 takes twice as long
GROUP = 4  # chunks worked on at a time


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, *, scale: float, block: int | None
) -> tuple[Array, Array]:
    """out [B, H, T, V] and state f32 [B, H, K, V]. Tokens from `lengths` on must have k = 0; their out is undefined."""
    length = q.shape[2]
    sizes = _sizes(length, block)
    q, k, v = (padded(x, sizes.tokens) for x in (q, k, v))
    out, state = chunked.forward(_rule(log_decay, lengths, sizes, scale), q, k, v, state, sizes)
    return out[:, :, :length], state


def backward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, d_out: Array, d_state: Array,
    *, scale: float, block: int | None,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Gradients of q, k, v (in their dtype), log_decay f32 [H] and state, from those of the two outputs."""
    length = q.shape[2]
    sizes = _sizes(length, block)
    q, k, v, d_out = (padded(x, sizes.tokens) for x in (q, k, v, d_out))
    rule = _rule(log_decay, lengths, sizes, scale)
    *grads, d_first, d_decay = chunked.backward(rule, q, k, v, state, d_out, d_state, sizes)
    dq, dk, dv = (x[:, :, :length] for x in grads)
    return dq, dk, dv, d_decay.sum(0), d_first


def _sizes(length: int, block: int | None) -> Sizes:
    return Sizes.of(length, block or power_of_two_up_to(length, CHUNK), GROUP)


def _rule(log_decay: Array, lengths: Array, sizes: Sizes, scale: float) -> Rule:
    """`gate` is the number of true tokens in each chunk, [B, 1, G, 1]."""
    chunk, group = sizes.chunk, sizes.group
    row = jnp.arange(chunk)
    age = row[:, None] - row
    slope = log_decay[:, None, None]
    mask = jnp.where(age >= 0, scale * jnp.exp(slope * jnp.maximum(age, 0)), 0.0)[:, None]  # [H, 1, C, C]

    def gates(i: Array) -> Array:
        start = (i * group + jnp.arange(group)) * chunk
        return jnp.clip(lengths[:, None, None, None] - start[:, None], 0, chunk)

    def decays(count: Array) -> Decays:
        passed = jnp.minimum(row + 1, count)  # [B, 1, G, C]: steps of decay up to a token
        into = jnp.exp(slope * passed)[..., None]
        return Decays(scale * into, jnp.exp(slope * (count - passed))[..., None], jnp.exp(slope * count)[..., None])

    def inside(q: Array, k: Array, v: Array, count: Array) -> Array:
        scores = product(q, k, 1, 1) * mask
        return product(scores.astype(v.dtype), v, 1, 0)

    def inside_grad(q: Array, k: Array, v: Array, count: Array, d_out: Array) -> tuple[Array, Array, Array]:
        scores = (product(q, k, 1, 1) * mask).astype(v.dtype)
        d_scores = (product(d_out, v, 1, 1) * mask).astype(v.dtype)
        return product(d_scores, k, 1, 0), product(d_scores, q, 0, 0), product(scores, d_out, 0, 0)

    def gate_grad(count: Array, x: Array, boundary: Array) -> Array:
        passed = jnp.minimum(row + 1, count)
        return (passed * x.sum(-1)).sum((0, 2, 3)) + (count[..., 0] * boundary.sum(-1)).sum((0, 2))

    return Rule(gates, decays, inside, inside_grad, gate_grad)
