"""Emit: what of a verdict becomes output. End tokens, the length limit, and rows that are already done.

Emission comes before commit, so a row cut short by an end token or a limit commits only what it emitted.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.decode.types import Emission, Proposal, Reason, Sequence, Verdict


def emit(seq: Sequence, proposal: Proposal, verdict: Verdict, eos: jax.Array) -> tuple[Sequence, Emission]:
    """The accepted drafts and the token after them, cut at the first of `eos i32[B, E]` (kept; -1: none) and at the
    limit: `n <= n_accepted + 1`, 0 for rows that are done. A row whose law is not finite ends with `Reason.ERROR`.
    """
    tokens = emitted_tokens(proposal, verdict)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    n = jnp.minimum(verdict.n_accepted + 1, seq.limit - seq.length)
    n = jnp.where(seq.done | ~verdict.finite, 0, n)
    ended = jnp.zeros_like(seq.done)
    if eos.shape[1]:
        is_end = (tokens[..., None] == eos[:, None]).any(-1) & (index < n[:, None])
        ended = is_end.any(1)
        n = jnp.where(ended, jnp.where(is_end, index, tokens.shape[1]).min(1) + 1, n)
    length = seq.length + n
    reason = jnp.where(length >= seq.limit, jnp.int32(Reason.LENGTH), jnp.int32(Reason.RUNNING))
    reason = jnp.where(ended, jnp.int32(Reason.EOS), reason)
    reason = jnp.where(verdict.finite, reason, jnp.int32(Reason.ERROR))
    reason = jnp.where(seq.done, seq.reason, reason)
    buffer = append(seq.tokens, tokens, seq.length, n)
    return dataclasses.replace(seq, tokens=buffer, length=length, done=reason != 0, reason=reason), Emission(tokens, n)


def emitted_tokens(proposal: Proposal, verdict: Verdict) -> jax.Array:
    """The path's drafts and then the next token, i32[B, D + 1]; what follows is arbitrary."""
    next_token = verdict.next_token[:, None]
    if proposal.tokens.shape[1] == 0:
        return next_token
    if proposal.chain:
        drafts = proposal.tokens
    else:
        drafts = jnp.take_along_axis(proposal.tokens, jnp.maximum(verdict.path[:, 1:] - 1, 0), 1)
    drafts = jnp.concatenate([drafts, next_token], 1)
    index = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None]
    return jnp.where(index == verdict.n_accepted[:, None], next_token, drafts)


def append(buffer: jax.Array, values: jax.Array, at: jax.Array, n: jax.Array) -> jax.Array:
    """Write `values[B, K, ...][:, :n]` to `buffer[B, T, ...]` from index `at i32[B]` on; what does not fit is dropped.

    vmapped, so that batch stays a batching dimension and a sharded batch needs no all-gather.
    """
    index = jnp.arange(values.shape[1], dtype=jnp.int32)[None]
    slots = jnp.where(index < n[:, None], at[:, None] + index, buffer.shape[1])
    return jax.vmap(lambda row, slot, value: row.at[slot].set(value, mode="drop"))(buffer, slots, values)
