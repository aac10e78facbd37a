"""Candidate scoring: the log-probability of every given answer to a context, with the context read once.

Song et al. 2021 (Uni-Encoder, arXiv:2106.01263): candidates stand side by side after one context, each at the same
positions, and see the context and themselves but never each other. Here for a causal model, as a ranking of answers by
their likelihood instead of by a trained head. Guarantee: exact, equal to scoring each pair of context and answer alone.
No state.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.loop import check_prompts
from jaxinfer.decode.prefill import prefill
from jaxinfer.decode.types import Sequence, Step
from jaxinfer.errors import InputError


def score_candidates(
    step: Step,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    candidates: jax.Array,
    candidate_lengths: jax.Array,
    *,
    prefill_chunk: int = 256,
) -> jax.Array:
    """Log-probability f32[B, K, L] of each token of `candidates i32[B, K, L]` after `tokens i32[B, P]`.

    Both are right-padded, with `lengths i32[B]` and `candidate_lengths i32[B, K]` (0: no such candidate); padding
    scores 0, so a sum over the last axis is an answer's log-probability. Raises InputError for shapes and types.
    """
    check_prompts(tokens, lengths, tokens.shape[1])
    _check(tokens, candidates, candidate_lengths)
    batch, width = tokens.shape
    count, size = candidates.shape[1:]
    length = jnp.clip(jnp.asarray(lengths, jnp.int32), 1, width)
    none = jnp.zeros(batch, jnp.int32)
    seq = Sequence(jnp.asarray(tokens, jnp.int32), length, length, length, none > 0, none, none)
    cache, _, _ = prefill(
        step, params, step.new_cache(batch, width), seq, width=width, chunk=prefill_chunk, drafter=Autoregressive(),
        draft_params=None, state=(),
    )  # fmt: skip
    live = jnp.arange(size)[None, None] < candidate_lengths[..., None]
    positions = jnp.where(live, length[:, None, None] + jnp.arange(size), -1).reshape(batch, -1)
    positions = jnp.concatenate([length[:, None] - 1, positions], 1)
    fed = jnp.concatenate([seq.root[:, None], candidates.reshape(batch, -1)], 1)
    mask = jnp.broadcast_to(_side_by_side(count, size), (batch, fed.shape[1], fed.shape[1]))
    blocks = kv.new_blocks(cache, fed.shape[1])
    output, _ = step(params, fed, positions, cache, blocks, 0, mask)
    logp = jax.nn.log_softmax(step.head(params, output.hidden), -1)
    first = jnp.broadcast_to(logp[:, :1, None], (batch, 1, count, logp.shape[-1]))[:, 0, :, None]
    after = logp[:, 1:].reshape(batch, count, size, -1)[:, :, :-1]
    law = jnp.concatenate([first, after], 2)
    own = jnp.take_along_axis(law, candidates[..., None], 3)[..., 0]
    return jnp.where(live, own, 0.0)


def _side_by_side(count: int, size: int) -> jax.Array:
    """bool[1, R, R]: slot 0 is the context's last token, which all see; a candidate's slots see its earlier ones."""
    index = jnp.arange(count * size)
    same = index[:, None] // size == index[None] // size
    own = same & (index[:, None] >= index[None])
    return jnp.pad(own, ((1, 0), (1, 0))).at[:, 0].set(True)[None]


def _check(tokens: jax.Array, candidates: jax.Array, lengths: jax.Array) -> None:
    if candidates.ndim != 3 or not jnp.issubdtype(candidates.dtype, jnp.integer) or 0 in candidates.shape[1:]:
        raise InputError(
            f"candidates: got {candidates.dtype}{list(candidates.shape)}, accepts integers [batch, count, length]"
        )
    if candidates.shape[0] != tokens.shape[0]:
        raise InputError(f"candidates: got {candidates.shape[0]} rows, accepts {tokens.shape[0]}, as tokens has")
    if lengths.shape != candidates.shape[:2]:
        raise InputError(f"candidate_lengths: got shape {list(lengths.shape)}, accepts {list(candidates.shape[:2])}")
