"""Block-sparse attention for NVIDIA Hopper, in Mosaic GPU: a warpgroup walks the list of its 64 rows.

Tiles of keys and values come by TMA, one ahead of the products; scores stay in registers, where they become the left
operand of the next product. Several blocks share a multiprocessor, so one's softmax overlaps another's products. The
backward pass is two kernels, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691): rows of queries for dq, rows of keys
with transposed scores for dk and dv.

Compiled for the H200 without spills (tests/budgets/block_sparse.json); not run on one yet.

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

from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses
from jaxinfer.pallas_kernels.attention import io
from jaxinfer.pallas_kernels.attention.block_sparse.call import Call
from jaxinfer.pallas_kernels.attention.block_sparse.walk import NAMES, ROWS, STAGES, Walk
from jaxinfer.pallas_kernels.attention.flash.scores import LN2, NO_PEAK, UNSEEN, backward_rows

BUFFERS = ("own_a", "own_b", "streamed_a", "streamed_b", "own_here", "here")  # of a backward kernel


def refuses(call: Call) -> str | None:
    """Why these kernels cannot serve, or None."""
    flash = call.flash
    if reason := mosaic_gpu_refuses():
        return reason
    if flash.interpret:
        return "Mosaic GPU's interpreter does not take left operands from registers"
    if flash.dtype == "float32":
        return "Hopper's matrix units take bfloat16 and float16, not float32"
    if {flash.dim, flash.value_dim} - {64, 128} or flash.dim != flash.value_dim:
        return f"head sizes {flash.dim} and {flash.value_dim} are not both 64 or both 128"
    if call.block_q % ROWS or call.block_k % ROWS:
        return f"blocks of {call.block_q} queries and {call.block_k} keys are not multiples of {ROWS}"
    return None


def forward(call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes):
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    plgpu = mosaic_gpu()
    del turned, turned_counts
    flash = call.flash
    tile = tile_of(call)
    walk = Walk(call, tile)
    buffers = dict(
        q_s=_tile(ROWS, flash.dim, flash.dtype),
        k_s=_tile(tile, flash.dim, flash.dtype, STAGES),
        v_s=_tile(tile, flash.value_dim, flash.dtype, STAGES),
        lse_s=plgpu.SMEM((ROWS,), jnp.float32),
        q_here=plgpu.Barrier(),
        k_here=plgpu.Barrier(num_barriers=STAGES),
        v_here=plgpu.Barrier(num_barriers=STAGES),
    )
    run = plgpu.kernel(
        functools.partial(_forward_kernel, walk),
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], flash.value_dim), q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        grid=walk.grid,
        grid_names=NAMES,
        scratch_types=buffers,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out, lse = run(q, k, v, indices, counts, *_scalars(call, q_lengths, kv_lengths, slopes))
    return out, lse


def backward(
    call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes, out, lse, dout, dlse
):
    """`(dq, dk, dv)`; weights are computed again, from the log-sum-exp."""
    plgpu = mosaic_gpu()
    flash = call.flash
    rows = (dout.astype(v.dtype), *backward_rows(out, lse, dout, dlse))
    scalars = _scalars(call, q_lengths, kv_lengths, slopes)
    own, streamed = (functools.partial(_tile, ROWS, flash.dim, flash.dtype, stages) for stages in (None, STAGES))
    own_here = plgpu.Barrier(num_arrivals=2)
    here = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    buffers: dict[str, Any] = dict(zip(BUFFERS, (own(), own(), streamed(), streamed(), own_here, here), strict=True))
    params = plgpu.CompilerParams(approx_math=True)
    of_queries, of_keys = Walk(call, ROWS), Walk(call, ROWS, turned=True)
    dq = plgpu.kernel(
        functools.partial(_queries_kernel, of_queries),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=of_queries.grid,
        grid_names=NAMES,
        scratch_types=buffers,
        compiler_params=params,
    )(q, k, v, *rows, indices, counts, *scalars)
    dk, dv = plgpu.kernel(
        functools.partial(_keys_kernel, of_keys),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        grid=of_keys.grid,
        grid_names=NAMES,
        scratch_types=buffers,
        compiler_params=params,
    )(q, k, v, *rows, turned, turned_counts, *scalars)
    return dq, dk, dv


def tile_of(call: Call) -> int:
    """Rows of keys of a forward tile: the table's, or as many as the machine has room for."""
    flash = call.flash
    sizes = (call.block_q, call.block_k, flash.dim)

    def serves(block: tuple[int, ...]) -> bool:
        return len(block) == 1 and block[0] % ROWS == 0 and call.block_k % block[0] == 0

    def rule() -> tuple[int]:
        return (io.choose_tile(call.block_k, flash.dim, flash.value_dim),)

    return tuning.block("block_sparse", flash.dtype, sizes, rule, device="NVIDIA H200", serves=serves)[0]


def _scalars(call: Call, q_lengths, kv_lengths, slopes) -> tuple[jax.Array, ...]:
    """Lengths and slopes, zeros where a call has none, so that every kernel has the same operands."""
    none = jnp.zeros(1, jnp.int32)
    lengths = (q_lengths, kv_lengths) if call.flash.ragged else (none, none)
    return *lengths, slopes.astype(jnp.float32) if call.flash.alibi else none.astype(jnp.float32)


def _tile(rows: int, size: int, dtype: str, stages: int | None = None) -> Any:
    """Shared memory for tiles of 16-bit numbers, in the swizzled order that TMA writes and wgmma reads."""
    plgpu = mosaic_gpu()
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    shape = (rows, size) if stages is None else (stages, rows, size)
    return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=transforms)


class _Pair:
    """Scores of a tile: who sees whom. `turned`: keys run down, queries across."""

    def __init__(self, call: Call, scalars, batch, head, first_query, first_key, shape, turned: bool = False):
        plgpu = mosaic_gpu()
        self.call, flash = call, call.flash
        q_lengths, kv_lengths, slopes = scalars
        self.q_length = q_lengths[batch] if flash.ragged else flash.queries
        self.kv_length = kv_lengths[batch] if flash.ragged else flash.keys
        self.slope = slopes[head] if flash.alibi else None
        down, across = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in range(2))
        self.rows = first_query + (across if turned else down)
        self.keys = first_key + (down if turned else across)
        self.distance = self.rows - self.keys + (self.kv_length - self.q_length)

    def masked(self, product: jax.Array) -> jax.Array:
        """Base-2 scores, those that are not seen far below all others."""
        flash = self.call.flash
        score = flash.rules.scores(product, self.distance, self.slope)
        seen = flash.rules.visible(self.distance)
        if flash.ragged:
            real = (self.keys < self.kv_length) & (self.rows < self.q_length)
            seen = real if seen is None else seen & real
        return score if seen is None else jnp.where(seen, score, UNSEEN)


def _forward_kernel(walk: Walk, q, k, v, lists, counts, *refs, **buffers) -> None:
    plgpu = mosaic_gpu()
    call, tile = walk.call, walk.tile
    scalars, (out, lse) = refs[:3], refs[3:]
    q_s, k_s, v_s, lse_s, q_here, k_here, v_here = (
        buffers[name] for name in ("q_s", "k_s", "v_s", "lse_s", "q_here", "k_here", "v_here")
    )
    layout = plgpu.Layout.WGMMA
    program = tuple(lax.axis_index(name) for name in NAMES)
    batch, head, first_row = walk.own(program)
    own = pl.ds(first_row, ROWS)
    steps = walk.steps(program, counts)

    def fetch(j):
        at_batch, kv_head, first = walk.streamed(program, lists, j)
        at, slot = pl.ds(first, tile), j % STAGES
        plgpu.copy_gmem_to_smem(k.at[at_batch, kv_head, at], k_s.at[slot], k_here.at[slot])
        plgpu.copy_gmem_to_smem(v.at[at_batch, kv_head, at], v_s.at[slot], v_here.at[slot])

    plgpu.copy_gmem_to_smem(q.at[batch, head, own], q_s, q_here)
    pl.when(steps > 0)(lambda: fetch(0))
    plgpu.barrier_wait(q_here)

    def step(j, carry):
        acc, peak, total = carry
        slot = j % STAGES
        _fetch_next(fetch, j + 1, steps)
        plgpu.barrier_wait(k_here.at[slot])
        _, _, first = walk.streamed(program, lists, j)
        pair = _Pair(call, scalars, batch, head, first_row, first, (ROWS, tile))
        score = pair.masked(_product(q_s, k_s.at[slot].transpose((1, 0)), (ROWS, tile)))
        new = jnp.maximum(peak, score.max(axis=1))
        shrink = jnp.exp2(peak - new)
        weight = jnp.exp2(score - lax.broadcast_in_dim(new, score.shape, [0]))
        total = total * shrink + weight.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        plgpu.barrier_wait(v_here.at[slot])
        return _add_product(acc, weight.astype(v.dtype), v_s.at[slot]), new, total

    start = (
        plgpu.layout_cast(jnp.zeros((ROWS, call.flash.value_dim), jnp.float32), layout),
        plgpu.layout_cast(jnp.full((ROWS,), NO_PEAK, jnp.float32), layout.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1)),
    )
    acc, peak, total = lax.fori_loop(0, steps, step, start)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    lse_s[...] = jnp.where(empty, -jnp.inf, (peak + jnp.log2(divisor)) * LN2)
    q_s[...] = (acc / lax.broadcast_in_dim(divisor, acc.shape, [0])).astype(q_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_s, out.at[batch, head, own])
    plgpu.copy_smem_to_gmem(lse_s, lse.at[batch, head, own])
    plgpu.wait_smem_to_gmem(0)


def _queries_kernel(walk: Walk, q, k, v, dout, lse, delta, lists, counts, *refs, **buffers) -> None:
    plgpu = mosaic_gpu()
    call = walk.call
    scalars, (dq,) = refs[:3], refs[3:]
    q_s, dout_s, k_s, v_s, own_here, here = (buffers[name] for name in BUFFERS)
    layout = plgpu.Layout.WGMMA
    program = tuple(lax.axis_index(name) for name in NAMES)
    batch, head, first_row = walk.own(program)
    own = pl.ds(first_row, ROWS)
    steps = walk.steps(program, counts)

    def fetch(j):
        at_batch, kv_head, first = walk.streamed(program, lists, j)
        at, slot = pl.ds(first, ROWS), j % STAGES
        plgpu.copy_gmem_to_smem(k.at[at_batch, kv_head, at], k_s.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(v.at[at_batch, kv_head, at], v_s.at[slot], here.at[slot])

    plgpu.copy_gmem_to_smem(q.at[batch, head, own], q_s, own_here)
    plgpu.copy_gmem_to_smem(dout.at[batch, head, own], dout_s, own_here)
    pl.when(steps > 0)(lambda: fetch(0))
    lse_rows, delta_rows = (_load(x.at[batch, head, own], layout.reduce(1)) for x in (lse, delta))
    plgpu.barrier_wait(own_here)

    def step(j, acc):
        slot = j % STAGES
        _fetch_next(fetch, j + 1, steps)
        plgpu.barrier_wait(here.at[slot])
        _, _, first = walk.streamed(program, lists, j)
        pair = _Pair(call, scalars, batch, head, first_row, first, (ROWS, ROWS))
        product = _product(q_s, k_s.at[slot].transpose((1, 0)), (ROWS, ROWS))
        weight = jnp.exp2(pair.masked(product) - lax.broadcast_in_dim(lse_rows, product.shape, [0]))
        dweight = _product(dout_s, v_s.at[slot].transpose((1, 0)), (ROWS, ROWS))
        dscore = weight * (dweight - lax.broadcast_in_dim(delta_rows, product.shape, [0]))
        dscore = dscore * call.flash.rules.slope_of_cap(product)
        return _add_product(acc, dscore.astype(k.dtype), k_s.at[slot])

    acc = plgpu.layout_cast(jnp.zeros((ROWS, call.flash.dim), jnp.float32), layout)
    acc = lax.fori_loop(0, steps, step, acc)
    q_s[...] = (acc * call.flash.rules.scale).astype(q_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_s, dq.at[batch, head, own])
    plgpu.wait_smem_to_gmem(0)


def _keys_kernel(walk: Walk, q, k, v, dout, lse, delta, lists, counts, *refs, **buffers) -> None:
    plgpu = mosaic_gpu()
    call = walk.call
    scalars, (dk, dv) = refs[:3], refs[3:]
    k_s, v_s, q_s, dout_s, own_here, here = (buffers[name] for name in BUFFERS)
    layout = plgpu.Layout.WGMMA
    program = tuple(lax.axis_index(name) for name in NAMES)
    batch, kv_head, first_key = walk.own(program)
    own = pl.ds(first_key, ROWS)
    steps = walk.steps(program, counts)

    def fetch(j):
        at_batch, head, first = walk.streamed(program, lists, j)
        at, slot = pl.ds(first, ROWS), j % STAGES
        plgpu.copy_gmem_to_smem(q.at[at_batch, head, at], q_s.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(dout.at[at_batch, head, at], dout_s.at[slot], here.at[slot])

    plgpu.copy_gmem_to_smem(k.at[batch, kv_head, own], k_s, own_here)
    plgpu.copy_gmem_to_smem(v.at[batch, kv_head, own], v_s, own_here)
    pl.when(steps > 0)(lambda: fetch(0))
    plgpu.barrier_wait(own_here)

    def step(j, carry):
        dk_acc, dv_acc = carry
        slot = j % STAGES
        _fetch_next(fetch, j + 1, steps)
        _, head, first = walk.streamed(program, lists, j)
        shape = (ROWS, ROWS)
        lse_row, delta_row = (
            lax.broadcast_in_dim(_load(x.at[batch, head, pl.ds(first, ROWS)], layout.reduce(0)), shape, [1])
            for x in (lse, delta)
        )
        plgpu.barrier_wait(here.at[slot])
        pair = _Pair(call, scalars, batch, head, first, first_key, shape, turned=True)
        product = _product(k_s, q_s.at[slot].transpose((1, 0)), shape)
        weight = jnp.exp2(pair.masked(product) - lse_row)
        dv_acc = _add_product(dv_acc, weight.astype(v.dtype), dout_s.at[slot])
        dscore = weight * (_product(v_s, dout_s.at[slot].transpose((1, 0)), shape) - delta_row)
        dscore = dscore * call.flash.rules.slope_of_cap(product)
        return _add_product(dk_acc, dscore.astype(q.dtype), q_s.at[slot]), dv_acc

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, call.flash.dim), jnp.float32), layout)
    dk_acc, dv_acc = lax.fori_loop(0, steps, step, (zeros, zeros))
    k_s[...] = (dk_acc * call.flash.rules.scale).astype(k_s.dtype)
    v_s[...] = dv_acc.astype(v_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_s, dk.at[batch, kv_head, own])
    plgpu.copy_smem_to_gmem(v_s, dv.at[batch, kv_head, own])
    plgpu.wait_smem_to_gmem(0)


def _fetch_next(fetch: Callable[[Any], None], j, count) -> None:
    """Begin to fetch tile j, if there is one, into the place of tile j - STAGES."""
    plgpu = mosaic_gpu()
    plgpu.commit_smem()  # one thread fetches: the warps must all be past their products of what it overwrites
    pl.when(j < count)(lambda: fetch(j))


def _load(ref, layout) -> jax.Array:
    """Numbers from memory into registers, where each thread finds those of its own rows or columns."""
    plgpu = mosaic_gpu()
    return plgpu.load(ref, layout=layout, optimized=False)


def _product(a, b, shape: tuple[int, int]) -> jax.Array:
    """The float32 product of two tiles in shared memory."""
    plgpu = mosaic_gpu()

    def run(acc):
        plgpu.wgmma(acc, a, b)
        plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _add_product(acc: jax.Array, a: jax.Array, b) -> Any:
    """`acc` and the product of a tile in registers with one in shared memory."""
    plgpu = mosaic_gpu()
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.WGMMAAccumulatorRef.init(acc))
