"""Prefill: commit a prompt chunk by chunk, reading no logits.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.decode.types import Chunk, Drafter, Sequence, Step


def commit_chunk(
    step: Step, params: Any, cache: kv.Cache, tokens: jax.Array, positions: jax.Array, taps: tuple[int, ...] = ()
) -> tuple[kv.Cache, Any, jax.Array]:
    """Feed `tokens i32[B, C]` at `positions i32[B, C]` (-1 after a row's last) and commit them.

    Returns the cache, the model's output, and the count committed `i32[B]`: 0 where the row's output is not finite.
    That the count depends on the output keeps every read of the cache before its write, so that XLA makes no copy.
    """
    size = tokens.shape[1]
    output, blocks = step(params, tokens, positions, cache, kv.new_blocks(cache, size), taps=taps)
    n = (positions >= 0).sum(1, dtype=jnp.int32)
    last = jnp.take_along_axis(output.hidden, jnp.maximum(n - 1, 0)[:, None, None], 1)
    n = jnp.where(jnp.isfinite(last.astype(jnp.float32).sum((1, 2))), n, 0)
    path = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), positions.shape)
    return kv.commit(cache, blocks, path, n, notes_of(output)), output, n


def prefill(
    step: Step,
    params: Any,
    cache: kv.Cache,
    seq: Sequence,
    *,
    width: int,
    chunk: int,
    drafter: Drafter,
    draft_params: Any,
    state: Any,
) -> tuple[kv.Cache, Any, jax.Array]:
    """Commit the first `length - 1` tokens of each row, of at most `width`, in chunks: the cache, the drafter's state,
    and `finite bool[B]`. The number of chunks run follows the longest row."""
    read_prompt = getattr(step, "read_prompt", None)  # a step that decides from the whole prompt, as `first.First` does
    if read_prompt is not None:
        cache = read_prompt(params, cache, seq.tokens[:, :width], seq.length)
    finite = jnp.ones_like(seq.done)
    if width == 1:
        return cache, state, finite
    size = min(chunk, width - 1)
    chunks = -(-(width - 1) // size)
    padded = jnp.pad(seq.tokens[:, : width - 1], ((0, 0), (0, chunks * size - width + 1)))

    def feed(i, carry):
        cache, state, finite = carry
        tokens = jax.lax.dynamic_slice_in_dim(padded, i * size, size, 1)
        positions = i * size + jnp.arange(size, dtype=jnp.int32)[None]
        positions = jnp.where((positions < seq.length[:, None] - 1) & finite[:, None], positions, -1)
        cache, output, n = commit_chunk(step, params, cache, tokens, positions, drafter.taps)
        finite &= n == (positions >= 0).sum(1)
        return cache, drafter.prefill(draft_params, state, Chunk(tokens, positions, n, seq.length), output), finite

    if chunks == 1:
        return feed(0, (cache, state, finite))
    return jax.lax.fori_loop(0, -(-(seq.length.max() - 1) // size), feed, (cache, state, finite))


def notes_of(output: Any) -> tuple | None:
    """What the caches want to hear at commit; a brought model's output may have none."""
    return getattr(output, "notes", None) or None
