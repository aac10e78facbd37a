"""Dense attention as block-sparse attention over the blocks that the masks leave: how `flash` uses those kernels.

A causal mask or a window leaves each block of queries a run of key blocks; the kernels of `block_sparse` walk it, and
so skip all others in both directions.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.attention.flash.call import Call, cdiv


def forward(run: Callable[..., Any], block: tuple[int, int], call: Call, q, k, v, q_lengths, kv_lengths, slopes):
    """`(out, lse)` by `run`, the forward pass of a form of block_sparse, in blocks of this size."""
    sparse, padded, lists, lengths = _as_lists(call, block, (q,), (k, v), q_lengths, kv_lengths)
    out, lse = run(sparse, *padded, *lists, *lengths, slopes)
    return out[:, :, : call.queries], lse[:, :, : call.queries]


def backward(
    run: Callable[..., Any], block: tuple[int, int], call: Call,
    q, k, v, q_lengths, kv_lengths, slopes, out, lse, dout, dlse,
):  # fmt: skip
    """`(dq, dk, dv)` by `run`, the backward pass of a form of block_sparse."""
    sparse, padded, lists, lengths = _as_lists(call, block, (q, out, lse, dout, dlse), (k, v), q_lengths, kv_lengths)
    q, out, lse, dout, dlse, k, v = padded
    dq, dk, dv = run(sparse, q, k, v, *lists, *lengths, slopes, out, lse, dout, dlse)
    return dq[:, :, : call.queries], dk[:, :, : call.keys], dv[:, :, : call.keys]


def sparse_call(call: Call, block: tuple[int, int]) -> Any:
    """The block_sparse call that serves `call`: lengths padded to blocks, and then told as lengths of rows."""
    from jaxinfer.pallas_kernels.attention.block_sparse.call import Call as SparseCall

    queries, keys = (cdiv(n, size) * size for n, size in zip((call.queries, call.keys), block, strict=True))
    whole = (queries, keys) == (call.queries, call.keys)
    flash = dataclasses.replace(call, queries=queries, keys=keys, ragged=call.ragged or not whole)
    return SparseCall(flash, *block, listed=keys // block[1], turned=0)


def _as_lists(call: Call, block: tuple[int, int], rows: tuple, columns: tuple, q_lengths, kv_lengths) -> Any:
    """The sparse call, `rows` and `columns` padded to whole blocks, the four lists, and both lengths."""
    from jaxinfer.pallas_kernels.attention.block_sparse.call import turn

    sparse = sparse_call(call, block)
    padded = [_pad(x, n) for xs, n in ((rows, sparse.flash.queries), (columns, sparse.flash.keys)) for x in xs]
    lengths = (q_lengths, kv_lengths)
    if sparse.flash.ragged and not call.ragged:
        lengths = tuple(jnp.full(call.batch, n, jnp.int32) for n in (call.queries, call.keys))
    indices, counts = runs(call, block, q_lengths, kv_lengths)
    turned, turned_counts = turn(indices, counts, call.group, call.group, sparse.k_blocks)
    lists = tuple(jnp.asarray(x, jnp.int32) for x in (indices, counts, turned, turned_counts))
    return dataclasses.replace(sparse, listed=indices.shape[-1], turned=turned.shape[-1]), padded, lists, lengths


def runs(call: Call, block: tuple[int, int], q_lengths=None, kv_lengths=None) -> tuple[Any, Any]:
    """Each query block's run of key blocks: `indices i32[b, 1, q_blocks, n]`, `counts i32[b, 1, q_blocks]`.

    numpy arrays for b = 1, known while tracing; of ragged rows arrays that the program computes, for b = B.
    """
    xp: Any = jnp if call.ragged else np
    if q_lengths is None or kv_lengths is None:
        q_lengths, kv_lengths = np.full(1, call.queries), np.full(1, call.keys)
    block_q, block_k = block
    first = xp.arange(cdiv(call.queries, block_q)) * block_q
    offset = (kv_lengths - q_lengths)[:, None]
    rules, keys = call.rules, kv_lengths[:, None]
    low = 0 * offset + xp.zeros_like(first)
    if rules.window is not None:
        low = xp.maximum(first + offset - rules.window + 1, 0) // block_k
    end = keys + xp.zeros_like(first)
    last = first + offset + block_q - 1
    if rules.causal:
        end = xp.minimum(end, last + 1)
    elif rules.window is not None:
        end = xp.minimum(end, last + rules.window)
    counts = xp.where(first < q_lengths[:, None], xp.maximum(cdiv(end, block_k) - low, 0), 0)
    longest = cdiv(call.keys, block_k)
    if not call.ragged:
        longest = max(1, int(counts.max()))
    elif rules.window is not None:
        reach = block_q + rules.window * (1 if rules.causal else 2)
        longest = min(longest, cdiv(reach, block_k) + 1)
    indices = xp.minimum(low[..., None] + xp.arange(longest), cdiv(call.keys, block_k) - 1)
    return indices[:, None].astype(xp.int32), counts[:, None].astype(xp.int32)


def _pad(x: jax.Array, length: int) -> jax.Array:
    extra = length - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra), *[(0, 0)] * (x.ndim - 3)]) if extra else x
