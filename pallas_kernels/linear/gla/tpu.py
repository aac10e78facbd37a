"""Gated linear attention as TPU kernels (Yang et al., 2023, arXiv 2312.06635): linear/tpu.py with per-channel gates.

The levels of gla/levels.py, all of them masked products of a whole chunk: what that wastes, the matrix unit does not
notice. Sums of gates within blocks are products with matrices of zeros and ones (a TPU kernel has no cumulative sum),
in logarithms, whose sums of numbers of one sign lose nothing.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.linear import tpu
from jaxinfer.pallas_kernels.linear.arguments import padded
from jaxinfer.pallas_kernels.linear.chunked import Decays, product

Array = jax.Array
SHUT = -1e4  # exp of it is 0, and products of zeros with it are not NaN, as with -inf


def forward(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, *, scale: float, block: int | None, interpret: bool
) -> tuple[Array, Array]:
    """As blocked.forward."""
    chunk = block or tpu.CHUNK
    qs, ks, vs, gate = (tpu.flat(padded(x, chunk)) for x in (q, k, v, log_gate))
    out, last = tpu.forward(_rule(chunk, scale), qs, ks, vs, [gate], tpu.flat(state), chunk, interpret)
    return out.reshape(*v.shape[:2], *out.shape[1:])[:, :, : v.shape[2]], last.reshape(state.shape)


def backward(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, d_out: Array, d_state: Array,
    *, scale: float, block: int | None, interpret: bool,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """As blocked.backward."""
    chunk = block or tpu.CHUNK
    qs, ks, vs, gate, ds = (tpu.flat(padded(x, chunk)) for x in (q, k, v, log_gate, d_out))
    dq, dk, dv, d_first, d_gate = tpu.backward(
        _rule(chunk, scale), qs, ks, vs, [gate], tpu.flat(state), ds, tpu.flat(d_state), chunk, interpret
    )
    dq, dk, dv, d_gate = (x.reshape(*q.shape[:2], *x.shape[1:])[:, :, : q.shape[2]] for x in (dq, dk, dv, d_gate))
    return dq, dk, dv, d_gate.astype(log_gate.dtype), d_first.reshape(state.shape)


def _rule(chunk: int, scale: float) -> tpu.TileRule:
    def gates(gate: tuple[Array]) -> Array:
        return jnp.maximum(gate[0].astype(jnp.float32), SHUT)

    def decays(gate: tuple[Array]) -> Decays:
        into, out = _within(gates(gate), chunk)
        total = _exact(gates(gate), jnp.ones((chunk, 1), jnp.float32), 0, 0)
        return Decays(scale * into, out, jnp.exp(total))

    def inside(q: Array, k: Array, v: Array, gate: tuple[Array]) -> Array:
        scores = jnp.zeros((chunk, chunk), jnp.float32)
        for pairs, _, _, q2, k1 in _levels(q, k, gates(gate)):
            scores += jnp.where(pairs, product(q2, k1, 1, 1), 0.0)
        own = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1, keepdims=True)
        return scale * (product(scores.astype(v.dtype), v, 1, 0) + own * v.astype(jnp.float32))

    def inside_grad(q: Array, k: Array, v: Array, gate: tuple[Array], d_out: Array) -> tuple[Array, Array, Array]:
        q32, k32, v32, d32 = (x.astype(jnp.float32) for x in (q, k, v, d_out))
        d_scores = scale * product(d_out, v, 1, 1)
        d_own = scale * (d32 * v32).sum(-1, keepdims=True)
        scores = jnp.zeros((chunk, chunk), jnp.float32)
        dq, dk = d_own * k32, d_own * q32
        for pairs, prefix, suffix, q2, k1 in _levels(q, k, gates(gate)):
            scores += jnp.where(pairs, product(q2, k1, 1, 1), 0.0)
            d_level = jnp.where(pairs, d_scores, 0.0).astype(q.dtype)
            dq += product(d_level, k1, 1, 0) * prefix
            dk += product(d_level, q2, 0, 0) * suffix
        own = (q32 * k32).sum(-1, keepdims=True)
        return dq, dk, scale * (product(scores.astype(v.dtype), d_out, 0, 0) + own * d32)

    def gate_grad(gate: tuple[Array], x: Array, boundary: Array) -> Array:
        row, column = _numbers(chunk)
        sums = _exact((column >= row).astype(jnp.float32), x, 1, 0)
        return sums + _exact(jnp.ones((1, boundary.shape[1]), jnp.float32), boundary, 1, 1)

    return tpu.TileRule(decays, inside, inside_grad, gate_grad)


def _levels(q: Array, k: Array, gate: Array) -> Iterator[tuple[Array, Array, Array, Array, Array]]:
    """For h = 1, 2, .., C / 2: (the pairs that meet there, prefix, suffix, decayed q, decayed k)."""
    chunk = gate.shape[0]
    row, column = _numbers(chunk)
    h = 1
    while h < chunk:
        late, early = row // h % 2 == 1, column // h % 2 == 0
        pairs = (row // (2 * h) == column // (2 * h)) & late & early
        prefix, suffix = _within(gate, h)
        yield pairs, prefix, suffix, (q * prefix).astype(q.dtype), (k * suffix).astype(k.dtype)
        h *= 2


def _within(gate: Array, h: int) -> tuple[Array, Array]:
    """The decays from the start of a token's block of h up to it, and from it (exclusive) to the block's end."""
    row, column = _numbers(gate.shape[0])
    block = row // h == column // h
    before = (block & (column <= row)).astype(jnp.float32)
    behind = (block & (column > row)).astype(jnp.float32)
    return jnp.exp(_exact(before, gate, 1, 0)), jnp.exp(_exact(behind, gate, 1, 0))


def _numbers(size: int) -> tuple[Array, Array]:
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row, column


def _exact(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """A product in full float32: sums of gates must not be rounded to bfloat16."""
    numbers = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision="highest", preferred_element_type=jnp.float32)
