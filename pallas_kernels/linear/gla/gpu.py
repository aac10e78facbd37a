"""Gated linear attention on Hopper (Yang et al., 2023, arXiv 2312.06635): linear/gpu.py with per-channel gates.

The levels of gla/levels.py, a block of 128 threads a chunk. Sums of gates within blocks are products with matrices of
zeros and ones: a gate's logarithm in two bfloat16 parts has 16 bits, a relative 2**-17 off, and its sums, being of one
sign, lose nothing more. So decays are only ever multiplied, as everywhere in this op.

Stability: experimental.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu
from jaxinfer.pallas_kernels.linear import gpu
from jaxinfer.pallas_kernels.linear.arguments import padded
from jaxinfer.pallas_kernels.linear.gpu import CHUNK, LOG2_E, product, put, tile

Array = jax.Array
SHUT = -1e4  # exp2 of it is 0, and products of zeros with it are not NaN, as with -inf
LEVELS = 6  # halves of 1 to 32 tokens


def forward(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, *, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """As blocked.forward, for shapes that linear/gpu.py serves."""
    count = gpu.pieces_of(q, v)
    qs, ks, vs = (gpu.flat(padded(x, CHUNK * count), count) for x in (q, k, v))
    parts = _parts(log_gate, count)
    a, read, write = _inside(qs, ks, *parts, scale, interpret)
    over = _over(*parts)
    first = gpu.firsts(write, vs, over, state.reshape(-1, *state.shape[2:]), count, interpret=interpret)
    met, last, _ = gpu.states(write, vs, over, first, interpret=interpret)
    assert met is not None
    out = gpu.read(a, vs, read, met, dtype=q.dtype, interpret=interpret)
    return gpu.whole(out, v), gpu.piece(last, count, -1).reshape(state.shape)


def backward(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, d_out: Array, d_state: Array,
    *, scale: float, interpret: bool,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """As blocked.backward."""
    count = gpu.pieces_of(q, v)
    qs, ks, vs, ds = (gpu.flat(padded(x, CHUNK * count), count) for x in (q, k, v, d_out.astype(q.dtype)))
    parts = _parts(log_gate, count)
    a, read, write = _inside(qs, ks, *parts, scale, interpret)
    over = _over(*parts)
    met, _, d_met, d_first, sums = gpu.both_ways(read, write, vs, ds, over, state, d_state, count, interpret)
    dv = gpu.read(a, ds, write, d_met, dtype=v.dtype, a_turned=True, interpret=interpret)
    dq, dk = _grads(qs, ks, vs, ds, parts, met, d_met, scale, interpret)
    # A gate scales what crosses it: all that later tokens read and earlier ones did not write, and the new state.
    crossing = (qs * dq - ks * dk).reshape(*sums.shape[:2], CHUNK, -1)
    d_gate = (lax.cumsum(crossing, 2, reverse=True) + sums[:, :, None]).reshape(qs.shape)
    dq, dk, d_gate = (gpu.whole(x, q) for x in (dq.astype(q.dtype), dk.astype(q.dtype), d_gate.astype(log_gate.dtype)))
    return dq, dk, gpu.whole(dv, v), d_gate, d_first


def _parts(log_gate: Array, count: int) -> tuple[Array, Array]:
    """The gates' base-2 logarithms as the sum of two bfloat16 arrays [B H pieces, T / pieces, K]."""
    gate = jnp.maximum(gpu.flat(padded(log_gate, CHUNK * count), count).astype(jnp.float32), SHUT) * LOG2_E
    # The rounding is spelled out: XLA takes a conversion there and back for nothing.
    high = lax.reduce_precision(gate, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (gate - high).astype(jnp.bfloat16)


def _over(high: Array, low: Array) -> Array:
    """The decay across every chunk, f32 [R, N, K]."""
    rows, length, size = high.shape
    gate = high.astype(jnp.float32) + low.astype(jnp.float32)
    return jnp.exp2(gate.reshape(rows, length // CHUNK, CHUNK, size).sum(2))


def _inside(
    q: Array, k: Array, high: Array, low: Array, scale: float, interpret: bool
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Scores among the tokens of a chunk [R, T, 64], q decayed from its start (and scaled), k decayed to its end."""
    rows, length, size = q.shape
    buffers = _buffers(q.dtype, size // 64) | {
        "q2_s": tile(q.dtype, CHUNK, 64),
        "k2_s": tile(q.dtype, CHUNK, 64),
        "here": mosaic_gpu().Barrier(num_arrivals=size // 16),
    }
    found = gpu.run(
        functools.partial(_inside_kernel, scale=scale),
        {"q": q, "k": k, "high": high, "low": low},
        {
            "a": jax.ShapeDtypeStruct((rows, length, CHUNK), q.dtype),
            "read": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "write": jax.ShapeDtypeStruct(q.shape, q.dtype),
        },
        buffers, {"chunk": length // CHUNK, "row": rows}, interpret,
    )  # fmt: skip
    return found["a"], found["read"], found["write"]


def _buffers(dtype: Any, tiles: int) -> dict[str, Any]:
    """q, k and the gates' parts in tiles of 64 channels; the masks of sums."""
    inputs = {f"{name}_s": tile(dtype, CHUNK, 64, tiles) for name in ("q", "k")}
    inputs |= {f"{name}_s": tile("bfloat16", CHUNK, 64, tiles) for name in ("high", "low")}
    masks = {f"{name}_s": tile("bfloat16", CHUNK, CHUNK) for name in ("before", "behind")}
    return inputs | masks


def _inside_kernel(r: dict[str, Any], *, scale: float) -> None:
    plgpu = mosaic_gpu()
    row, tokens = lax.axis_index("row"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)
    tiles = r["q_s"].shape[0]
    _fetch(r, {(name, t): pl.ds(t * 64, 64) for name in ("q", "k", "high", "low") for t in range(tiles)}, row, tokens)
    down, across = gpu.numbers(0), gpu.numbers(1)

    def scores(decayed: bool) -> Array:
        total = None
        for t in range(tiles):
            q, k = r["q_s"].at[t], r["k_s"].at[t]
            if decayed:
                q = _times(r["q2_s"], q, _decay(r, "before", t))
                k = _times(r["k2_s"], k, _decay(r, "behind", t))
            part = product(q, k.transpose((1, 0)), (CHUNK, CHUNK))
            total = part if total is None else total + part
        assert total is not None
        return total

    a = jnp.where(down == across, scores(decayed=False), 0.0)
    a = _over_levels(r, lambda pairs, a: jnp.where(pairs, scores(decayed=True), a), a)
    gpu.store(scale * a, r["q2_s"], r["a"].at[row, tokens])
    _masks(r, CHUNK)
    for t in range(tiles):
        columns = pl.ds(t * 64, 64)
        _times(r["q2_s"], r["q_s"].at[t], scale * _decay(r, "before", t))
        _times(r["k2_s"], r["k_s"].at[t], _decay(r, "behind", t))
        plgpu.copy_smem_to_gmem(r["q2_s"], r["read"].at[row, tokens, columns])
        plgpu.copy_smem_to_gmem(r["k2_s"], r["write"].at[row, tokens, columns])
        plgpu.wait_smem_to_gmem(0)


def _times(buffer: Any, x: Any, decay: Array) -> Any:
    return put(buffer, x[...].astype(jnp.float32) * decay)


def _grads(
    q: Array, k: Array, v: Array, d_out: Array, parts: tuple[Array, Array], met: Array, d_met: Array, scale: float,
    interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """dq and dk, f32 [R, T, K]; met and d_met [R, N(+ 1), K, V] are the states and gradients that the chunks meet."""
    (rows, length, size), values = q.shape, v.shape[-1]
    buffers = _buffers(q.dtype, 1) | {
        "v_s": tile(v.dtype, CHUNK, values),
        "d_out_s": tile(v.dtype, CHUNK, values),
        "met_s": tile(met.dtype, 64, values),
        "d_met_s": tile(met.dtype, 64, values),
        "scores_s": tile(q.dtype, CHUNK, CHUNK),
        "level_s": tile(q.dtype, CHUNK, CHUNK),
        "decayed_s": tile(q.dtype, CHUNK, 64),
        "wide_s": tile("float32", CHUNK, 64),
        "here": mosaic_gpu().Barrier(num_arrivals=8),
    }
    found = gpu.run(
        functools.partial(_grads_kernel, scale=scale),
        {"q": q, "k": k, "high": parts[0], "low": parts[1], "v": v, "d_out": d_out, "met": met, "d_met": d_met},
        {name: jax.ShapeDtypeStruct(q.shape, jnp.float32) for name in ("dq", "dk")},
        buffers, {"channels": size // 64, "chunk": length // CHUNK, "row": rows}, interpret,
    )  # fmt: skip
    return found["dq"], found["dk"]


def _grads_kernel(r: dict[str, Any], *, scale: float) -> None:
    plgpu = mosaic_gpu()
    row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
    tokens, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(lax.axis_index("channels") * 64, 64)
    for name in ("met", "d_met"):
        plgpu.copy_gmem_to_smem(r[name].at[row, chunk, columns], r[f"{name}_s"], r["here"])
    for name in ("v", "d_out"):
        plgpu.copy_gmem_to_smem(r[name].at[row, tokens], r[f"{name}_s"], r["here"])
    _fetch(r, {(name, 0): columns for name in ("q", "k", "high", "low")}, row, tokens)
    q, k, v, d_out, shape = r["q_s"].at[0], r["k_s"].at[0], r["v_s"], r["d_out_s"], (CHUNK, 64)

    d_scores = put(r["scores_s"], scale * product(d_out, v.transpose((1, 0)), (CHUNK, CHUNK)))

    def gradient(scores: Any, x: Any, state: Any, of: Any, mine: str, other: str, factor: float) -> Array:
        """One level after the other, for dq or dk alone: both at once take more registers than there are."""
        _masks(r, CHUNK)
        total = product(x, state.transpose((1, 0)), shape) * (factor * _decay(r, mine))
        total += product(_masked(r, d_scores, gpu.numbers(0) == gpu.numbers(1)), of, shape)

        def level(pairs: Array, total: Array) -> Array:
            _masked(r, d_scores, pairs)
            decayed = _times(r["decayed_s"], of, _decay(r, other))
            return total + product(scores, decayed, shape) * _decay(r, mine)

        return _over_levels(r, level, total)

    level = r["level_s"]
    dq = gradient(level, d_out, r["met_s"], k, "before", "behind", scale)
    gpu.store(dq, r["wide_s"], r["dq"].at[row, tokens, columns])
    dk = gradient(level.transpose((1, 0)), v, r["d_met_s"], q, "behind", "before", 1.0)
    gpu.store(dk, r["wide_s"], r["dk"].at[row, tokens, columns])


def _masked(r: dict[str, Any], scores: Any, pairs: Array) -> Any:
    return put(r["level_s"], jnp.where(pairs, scores[...].astype(jnp.float32), 0.0))


def _fetch(r: dict[str, Any], tiles: dict[tuple[str, int], Any], row: Any, tokens: Any) -> None:
    """Fetch (name, tile): columns, and wait for all that is on the way."""
    plgpu = mosaic_gpu()
    for (name, t), columns in tiles.items():
        plgpu.copy_gmem_to_smem(r[name].at[row, tokens, columns], r[f"{name}_s"].at[t], r["here"])
    plgpu.barrier_wait(r["here"])


def _over_levels(r: dict[str, Any], step: Callable[[Array, Any], Any], start: Any) -> Any:
    """`step(pairs, carry)` for h = 1, 2, .., 32: who meets whom there, bool [64, 64], the masks of sums in place."""

    def level(i: Any, carry: Any) -> Any:
        h = lax.shift_left(1, i)
        _masks(r, h)
        down, across = gpu.numbers(0), gpu.numbers(1)
        return step(((down & -2 * h) == (across & -2 * h)) & ((down & h) != 0) & ((across & h) == 0), carry)

    return lax.fori_loop(0, LEVELS, level, start)


def _masks(r: dict[str, Any], h: Any) -> None:
    """Which gates lie between a token and the start or the end of its block of h tokens."""
    down, across = gpu.numbers(0), gpu.numbers(1)
    block = (down & -h) == (across & -h)
    put(r["before_s"], jnp.where(block & (across <= down), 1.0, 0.0))
    put(r["behind_s"], jnp.where(block & (across > down), 1.0, 0.0))


def _decay(r: dict[str, Any], mask: str, t: int = 0) -> Array:
    """The decays from the start of a token's block up to it (`before`), from it on to the block's end (`behind`)."""
    return jnp.exp2(product(r[f"{mask}_s"], (r["high_s"].at[t], r["low_s"].at[t]), (CHUNK, 64)))
