"""Lightning Attention-2 as TPU kernels (Qin et al., 2024, arXiv 2401.04658): linear/tpu.py with a constant decay.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.linear import tpu
from jaxinfer.pallas_kernels.linear.arguments import padded
from jaxinfer.pallas_kernels.linear.chunked import Decays, product

Array = jax.Array


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array,
    *, scale: float, block: int | None, interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """As blocked.forward."""
    chunk = block or tpu.CHUNK
    qs, ks, vs = (tpu.flat(padded(x, chunk)) for x in (q, k, v))
    gates = _gates(log_decay, lengths, qs, chunk)
    out, last = tpu.forward(_rule(chunk, scale), qs, ks, vs, gates, tpu.flat(state), chunk, interpret)
    return out.reshape(*v.shape[:2], *out.shape[1:])[:, :, : v.shape[2]], last.reshape(state.shape)


def backward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, d_out: Array, d_state: Array,
    *, scale: float, block: int | None, interpret: bool,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """As blocked.backward."""
    chunk = block or tpu.CHUNK
    qs, ks, vs, ds = (tpu.flat(padded(x, chunk)) for x in (q, k, v, d_out))
    gates = _gates(log_decay, lengths, qs, chunk)
    *grads, d_first, d_gate = tpu.backward(
        _rule(chunk, scale), qs, ks, vs, gates, tpu.flat(state), ds, tpu.flat(d_state), chunk, interpret
    )
    dq, dk, dv = (x.reshape(*q.shape[:2], *x.shape[1:])[:, :, : q.shape[2]] for x in grads)
    return dq, dk, dv, d_gate.reshape(*q.shape[:2], -1).sum((0, 2)), d_first.reshape(state.shape)


def _gates(log_decay: Array, lengths: Array, q: Array, chunk: int) -> tuple[Array, Array]:
    """(log_decay [B H, 1, 1], true tokens a chunk [B H, N, 1, 1]), f32: vectors, since scalars have no exp."""
    start = jnp.arange(q.shape[1] // chunk) * chunk
    count = jnp.clip(lengths[:, None] - start, 0, chunk).astype(jnp.float32)
    heads = log_decay.shape[0]
    count = jnp.repeat(count, heads, 0)[..., None, None]
    return jnp.tile(log_decay, lengths.shape[0])[:, None, None], count


def _rule(chunk: int, scale: float) -> tpu.TileRule:
    def mask(slope: Array) -> Array:
        row, column = (lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
        age = (row - column).astype(jnp.float32)
        return jnp.where(age >= 0, scale * jnp.exp(slope * jnp.maximum(age, 0.0)), 0.0)

    def passed(count: Array) -> Array:
        row = lax.broadcasted_iota(jnp.int32, (chunk, 1), 0).astype(jnp.float32)
        return jnp.minimum(row + 1, count)

    def decays(gate: tuple[Array, Array]) -> Decays:
        slope, count = gate
        steps = passed(count)
        return Decays(scale * jnp.exp(slope * steps), jnp.exp(slope * (count - steps)), jnp.exp(slope * count))

    def inside(q: Array, k: Array, v: Array, gate: tuple[Array, Array]) -> Array:
        scores = product(q, k, 1, 1) * mask(gate[0])
        return product(scores.astype(v.dtype), v, 1, 0)

    def inside_grad(
        q: Array, k: Array, v: Array, gate: tuple[Array, Array], d_out: Array
    ) -> tuple[Array, Array, Array]:
        weights = mask(gate[0])
        scores = (product(q, k, 1, 1) * weights).astype(v.dtype)
        d_scores = (product(d_out, v, 1, 1) * weights).astype(v.dtype)
        return product(d_scores, k, 1, 0), product(d_scores, q, 0, 0), product(scores, d_out, 0, 0)

    def gate_grad(gate: tuple[Array, Array], x: Array, boundary: Array) -> Array:
        rows = (passed(gate[1]) * x).sum(-1, keepdims=True).sum(0, keepdims=True)
        return rows + gate[1] * boundary.sum(-1, keepdims=True).sum(0, keepdims=True)

    return tpu.TileRule(decays, inside, inside_grad, gate_grad)
