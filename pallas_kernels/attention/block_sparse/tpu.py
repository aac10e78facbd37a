"""Block-sparse attention for the TPU: the lists are prefetched scalars that say which block of keys comes next.

A grid step works on one listed pair of blocks. Steps beyond a list's count name the block that is there already, so
they fetch and compute nothing. The backward pass is two kernels, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691):
one walks each query block's list for dq, one each key block's turned list for dk and dv, with scores transposed so that
log-sum-exps are rows and no product needs a transposed operand.

Stability: experimental.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels.attention.block_sparse.call import Call
from jaxinfer.pallas_kernels.attention.flash.scores import LN2, NO_PEAK, UNSEEN, backward_rows

LANES = 128


def refuses(call: Call) -> str | None:
    """Why the TPU cannot take these blocks, or None."""
    if call.flash.dtype == "float16":
        return "the TPU has no float16"
    if call.block_q % LANES and call.block_q != call.flash.queries:
        return f"blocks of {call.block_q} queries are neither a multiple of {LANES} nor all of them"
    if call.block_k % 16 and call.block_k != call.flash.keys:
        return f"blocks of {call.block_k} keys are neither a multiple of 16 nor all of them"
    return None


def forward(call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes):
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    del turned, turned_counts
    flash = call.flash
    lists = _Lists(call, indices, counts, flash.heads, call.q_blocks)
    at_q, at_k = lists.own, lists.listed
    group = flash.group
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, call, lists),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=lists.scalars,
            grid=(flash.batch, flash.heads, call.q_blocks, lists.longest),
            in_specs=[
                pl.BlockSpec((1, 1, call.block_q, flash.dim), at_q),
                pl.BlockSpec(
                    (1, 1, call.block_k, flash.dim), lambda b, h, i, j, *s: (b, h // group, at_k(b, h, i, j, *s), 0)
                ),
                pl.BlockSpec(
                    (1, 1, call.block_k, flash.value_dim),
                    lambda b, h, i, j, *s: (b, h // group, at_k(b, h, i, j, *s), 0),
                ),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, call.block_q, flash.value_dim), at_q),
                pl.BlockSpec((1, 1, 1, call.block_q), lambda b, h, i, j, *s: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((call.block_q, LANES), jnp.float32),
                pltpu.VMEM((call.block_q, LANES), jnp.float32),
                pltpu.VMEM((call.block_q, flash.value_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], flash.value_dim), q.dtype),
            jax.ShapeDtypeStruct((flash.batch, flash.heads, 1, flash.queries), jnp.float32),
        ],
        compiler_params=_params(),
        interpret=flash.interpret,
    )(*lists.arrays(q_lengths, kv_lengths, slopes), q, k, v)
    return out, lse[:, :, 0]


def backward(
    call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes, out, lse, dout, dlse
):
    """`(dq, dk, dv)`; weights are computed again, from the log-sum-exp."""
    rows = [x[:, :, None] for x in backward_rows(out, lse, dout, dlse)]
    arrays = (q, k, v, dout.astype(v.dtype), *rows)
    scalars = (q_lengths, kv_lengths, slopes)
    dq = _backward_queries(call, _Lists(call, indices, counts, call.flash.heads, call.q_blocks), scalars, arrays)
    lists = _Lists(call, turned, turned_counts, call.flash.kv_heads, call.k_blocks)
    return dq, *_backward_keys(call, lists, scalars, arrays)


def _backward_queries(call: Call, lists: _Lists, scalars: tuple, arrays: tuple) -> jax.Array:
    flash, group, at_k = call.flash, call.flash.group, lists.listed
    row = pl.BlockSpec((1, 1, 1, call.block_q), lambda b, h, i, j, *s: (b, h, 0, i))

    def keys(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, call.block_k, size), lambda b, h, i, j, *s: (b, h // group, at_k(b, h, i, j, *s), 0))

    return pl.pallas_call(
        functools.partial(_queries_kernel, call, lists),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=lists.scalars,
            grid=(flash.batch, flash.heads, call.q_blocks, lists.longest),
            in_specs=[
                pl.BlockSpec((1, 1, call.block_q, flash.dim), lists.own),
                keys(flash.dim),
                keys(flash.value_dim),
                pl.BlockSpec((1, 1, call.block_q, flash.value_dim), lists.own),
                row,
                row,
            ],
            out_specs=pl.BlockSpec((1, 1, call.block_q, flash.dim), lists.own),
            scratch_shapes=[
                pltpu.VMEM((call.block_q, LANES), jnp.float32),
                pltpu.VMEM((call.block_q, LANES), jnp.float32),
                pltpu.VMEM((call.block_q, flash.dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        compiler_params=_params(),
        interpret=flash.interpret,
    )(*lists.arrays(*scalars), *arrays)


def _backward_keys(call: Call, lists: _Lists, scalars: tuple, arrays: tuple) -> tuple[jax.Array, jax.Array]:
    flash, q_blocks = call.flash, call.q_blocks

    def query(b, g, i, j, *s):
        """Head and block of the query block that comes next."""
        entry = lists.listed(b, g, i, j, *s)
        return g * flash.group + entry // q_blocks, entry % q_blocks

    def rows(size: int) -> pl.BlockSpec:
        def at(b, g, i, j, *s):
            head, block = query(b, g, i, j, *s)
            return b, head, block, 0

        return pl.BlockSpec((1, 1, call.block_q, size), at)

    def row_at(b, g, i, j, *s):
        head, block = query(b, g, i, j, *s)
        return b, head, 0, block

    row = pl.BlockSpec((1, 1, 1, call.block_q), row_at)
    sizes = (flash.dim, flash.value_dim)
    own = [pl.BlockSpec((1, 1, call.block_k, size), lists.own) for size in sizes]
    return pl.pallas_call(
        functools.partial(_keys_kernel, call, lists),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=lists.scalars,
            grid=(flash.batch, flash.kv_heads, call.k_blocks, lists.longest),
            in_specs=[rows(flash.dim), *own, rows(flash.value_dim), row, row],
            out_specs=own,
            scratch_shapes=[pltpu.VMEM((call.block_k, size), jnp.float32) for size in sizes],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[1:3]],
        compiler_params=_params(),
        interpret=flash.interpret,
    )(*lists.arrays(*scalars), *arrays)


class _Lists:
    """Lists as prefetched scalars, flat, and what index maps and kernels read from them.

    `heads` and `blocks`: the grid's. The scalars: the lists, their counts, both lengths and the slopes (zeros where a
    call has none, so that every kernel has the same operands).
    """

    scalars = 5

    def __init__(self, call: Call, lists: jax.Array, counts: jax.Array, heads: int, blocks: int):
        self.call, self.heads, self.blocks = call, heads, blocks
        self.rows, self.each_head, _, self.longest = lists.shape
        # Beyond its count a list repeats its last entry: that block is there, so the step costs no fetch.
        last = jnp.maximum(counts - 1, 0)[..., None]
        at = jnp.minimum(jnp.arange(self.longest), last)
        self.flat = jnp.take_along_axis(lists, at, -1).reshape(-1)
        self.counts = counts.reshape(-1)

    def arrays(self, q_lengths, kv_lengths, slopes) -> tuple[jax.Array, ...]:
        """The prefetched operands."""
        flash = self.call.flash
        none = jnp.zeros(1, jnp.int32)
        lengths = (q_lengths, kv_lengths) if flash.ragged else (none, none)
        return self.flat, self.counts, *lengths, slopes.astype(jnp.float32) if flash.alibi else none.astype(jnp.float32)

    def _at(self, b, h, i):
        row = (b if self.rows > 1 else 0) * self.each_head + (h if self.each_head > 1 else 0)
        return row * self.blocks + i

    def own(self, b, h, i, j, *scalars):
        """The block that a grid step's list belongs to."""
        return b, h, i, 0

    def listed(self, b, h, i, j, flat, *scalars):
        """The block that comes next."""
        return flat[self._at(b, h, i) * self.longest + j]

    def count(self, b, h, i, flat, counts, *scalars):
        return counts[self._at(b, h, i)]


class _Pair:
    """One pair of blocks: its scores and who sees whom. With `turned`, keys run down and queries across."""

    def __init__(self, call: Call, scalars: tuple, batch, head, q_block, k_block, turned: bool = False):
        flash = call.flash
        q_lengths, kv_lengths, slopes = scalars[2:5]
        self.call = call
        self.q_length = q_lengths[batch] if flash.ragged else flash.queries
        self.kv_length = kv_lengths[batch] if flash.ragged else flash.keys
        self.slope = slopes[head] if flash.alibi else None
        shape = (call.block_k, call.block_q) if turned else (call.block_q, call.block_k)
        self.rows = q_block * call.block_q + lax.broadcasted_iota(jnp.int32, shape, int(turned))
        self.keys = k_block * call.block_k + lax.broadcasted_iota(jnp.int32, shape, 1 - int(turned))
        self.distance = self.rows + (self.kv_length - self.q_length) - self.keys

    def masked(self, product: jax.Array) -> jax.Array:
        """Base-2 scores, those that are not seen far below all others."""
        flash = self.call.flash
        score = flash.rules.scores(product, self.distance, self.slope)
        seen = flash.rules.visible(self.distance)
        if flash.ragged:
            real = (self.keys < self.kv_length) & (self.rows < self.q_length)
            seen = real if seen is None else seen & real
        return score if seen is None else jnp.where(seen, score, UNSEEN)


def _forward_kernel(call: Call, lists: _Lists, *refs) -> None:
    scalars, (q, k, v, out, lse, peak, total, acc) = refs[: lists.scalars], refs[lists.scalars :]
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    pair = _Pair(call, scalars, b, h, i, lists.listed(b, h, i, j, *scalars))

    @pl.when(j == 0)
    def _start():
        peak[...] = jnp.full_like(peak, NO_PEAK)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(j < lists.count(b, h, i, *scalars))
    def _step():
        score = pair.masked(_dot(q[0, 0], k[0, 0], 1, 1))
        old = peak[:, :1]
        new = jnp.maximum(old, score.max(-1, keepdims=True))
        shrink, weight = jnp.exp2(old - new), jnp.exp2(score - new)
        peak[...] = jnp.broadcast_to(new, peak.shape)
        total[...] = total[...] * shrink + weight.sum(-1, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(weight.astype(v.dtype), v[0, 0], 1, 0)

    @pl.when(j == lists.longest - 1)
    def _finish():
        empty = total[...] == 0
        divisor = jnp.where(empty, 1.0, total[...])
        out[0, 0] = (acc[...] / divisor[:, :1]).astype(out.dtype)
        logs = jnp.where(empty, -jnp.inf, (peak[...] + jnp.log2(divisor)) * LN2)
        lse[0, 0] = logs.T[:1]


def _queries_kernel(call: Call, lists: _Lists, *refs) -> None:
    scalars, (q, k, v, dout, lse, delta, dq, lse_column, delta_column, acc) = (
        refs[: lists.scalars],
        refs[lists.scalars :],
    )
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    pair = _Pair(call, scalars, b, h, i, lists.listed(b, h, i, j, *scalars))

    @pl.when(j == 0)
    def _start():
        for column, row in ((lse_column, lse), (delta_column, delta)):
            column[...] = jnp.broadcast_to(row[0, 0], (LANES, call.block_q)).T
        acc[...] = jnp.zeros_like(acc)

    @pl.when(j < lists.count(b, h, i, *scalars))
    def _step():
        product = _dot(q[0, 0], k[0, 0], 1, 1)
        weight = jnp.exp2(pair.masked(product) - lse_column[:, :1])
        dscore = weight * (_dot(dout[0, 0], v[0, 0], 1, 1) - delta_column[:, :1])
        dscore = dscore * call.flash.rules.slope_of_cap(product)
        acc[...] += _dot(dscore.astype(k.dtype), k[0, 0], 1, 0)

    @pl.when(j == lists.longest - 1)
    def _finish():
        dq[0, 0] = (acc[...] * call.flash.rules.scale).astype(dq.dtype)


def _keys_kernel(call: Call, lists: _Lists, *refs) -> None:
    scalars, (q, k, v, dout, lse, delta, dk, dv, dk_acc, dv_acc) = refs[: lists.scalars], refs[lists.scalars :]
    b, g, i, j = (pl.program_id(axis) for axis in range(4))
    entry = lists.listed(b, g, i, j, *scalars)
    head, q_block = g * call.flash.group + entry // call.q_blocks, entry % call.q_blocks
    pair = _Pair(call, scalars, b, head, q_block, i, turned=True)

    @pl.when(j == 0)
    def _start():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(j < lists.count(b, g, i, *scalars))
    def _step():
        product = _dot(k[0, 0], q[0, 0], 1, 1)
        weight = jnp.exp2(pair.masked(product) - lse[0, 0])
        dv_acc[...] += _dot(weight.astype(dout.dtype), dout[0, 0], 1, 0)
        dscore = weight * (_dot(v[0, 0], dout[0, 0], 1, 1) - delta[0, 0])
        dscore = dscore * call.flash.rules.slope_of_cap(product)
        dk_acc[...] += _dot(dscore.astype(q.dtype), q[0, 0], 1, 0)

    @pl.when(j == lists.longest - 1)
    def _finish():
        dk[0, 0] = (dk_acc[...] * call.flash.rules.scale).astype(dk.dtype)
        dv[0, 0] = dv_acc[...].astype(dv.dtype)


def _params() -> Any:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    # float32 operands are not to be rounded to bfloat16; bfloat16 ones need no passes that the default may ask for.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
