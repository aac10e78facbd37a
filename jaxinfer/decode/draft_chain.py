"""What drafters with a small model share: a chain of tokens from the model's own law, and a cache that may lag.

Every draft length is data: the loop runs as long as some row still drafts, so one compilation serves all of them and a
short draft costs no more forwards than it has tokens.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draw import draw, first_max
from jaxinfer.decode.prefill import commit_chunk
from jaxinfer.decode.types import Sequence, Slots, Step, WarpLike

CATCH_UP = 16  # tokens a forward where a lagging cache is brought up


@dataclasses.dataclass(frozen=True)
class Law:
    """A draft model's choice of one token. `key[B]`: the stream that it draws from, by the number of the draft.

    `before i32[B, P]`, of which the first `n_before i32[B]` count: tokens after the row's end that drafts follow.
    """

    step: Step
    params: Any
    warp: WarpLike
    key: jax.Array
    before: jax.Array
    n_before: jax.Array

    @classmethod
    def of(cls, step: Step, params: Any, warp: WarpLike, key: jax.Array) -> Law:
        """The law of drafts that follow the row itself."""
        none = jnp.zeros(key.shape, jnp.int32)
        return cls(step, params, warp, key, none[:, None][:, :0], none)

    def choose(self, logits: jax.Array, drafts: jax.Array, i: jax.Array | int) -> tuple[jax.Array, jax.Array | None]:
        """The token i32[B] after `logits f32[B, 1, V]`, given the first `i` of `drafts i32[B, N]`; and its law
        f32[B, V] where the warp samples."""
        early = jnp.arange(self.before.shape[1])[None] < self.n_before[:, None]
        late = jnp.broadcast_to(jnp.arange(drafts.shape[1])[None] < i, drafts.shape)
        tokens, seen = jnp.concatenate([self.before, drafts], 1), jnp.concatenate([early, late], 1)
        slots = Slots((self.n_before + i)[:, None].astype(jnp.int32), tokens, seen[:, None])
        if not self.warp.sampled:
            return first_max(self.warp.scores(logits, slots)[:, 0])[1], None
        q = self.warp(logits, slots)[:, 0]
        return draw(jnp.exp(q), key_streams.slot(self.key, i)), q


@struct.dataclass
class Drafts:
    """`tokens i32[B, N]`, `valid bool[B, N]`, `q_logp f32[B, N, V]` or None, and the Blocks that hold their keys."""

    tokens: jax.Array
    valid: jax.Array
    q_logp: jax.Array | None
    blocks: Any


def chain(
    law: Law,
    cache: kv.Cache,
    blocks: Any,
    logits: jax.Array,
    *,
    at: int,
    last: jax.Array,
    want: jax.Array,
    most: int,
    confidence: float = 0.0,
) -> Drafts:
    """Up to `want i32[B]` drafts a row, `most` at most; the first comes from `logits f32[B, 1, V]`.

    The model's last token fed stood at position `last i32[B]` (-1: a row that drafts nothing); draft i is fed into
    Block slot `at + i`. A row stops before the first draft where the model's largest probability, raw, is below
    `confidence`: a function of the tokens before the draft alone, since a stop that saw the draft would bend its law.
    """
    batch = logits.shape[0]
    tokens = jnp.zeros((batch, most), jnp.int32)
    valid = jnp.zeros((batch, most), bool)

    def sure(logits):
        x = logits[:, 0].astype(jnp.float32)
        return 1 / jnp.exp(x - x.max(-1, keepdims=True)).sum(-1) >= confidence

    def add(i, logits, tokens, valid, q_logp, alive):
        alive &= want > i
        if confidence > 0:
            alive &= sure(logits)
        token, q = law.choose(logits, tokens, i)
        tokens, valid = tokens.at[:, i].set(token), valid.at[:, i].set(alive)
        q_logp = None if q is None else q_logp.at[:, i].set(q)
        return tokens, valid, q_logp, alive

    q_logp = jnp.zeros((batch, most, logits.shape[-1])) if law.warp.sampled else None
    tokens, valid, q_logp, alive = add(0, logits, tokens, valid, q_logp, last >= 0)

    def going(carry):
        i, alive = carry[0], carry[4]
        return (i < most) & (alive & (want > i)).any()

    def body(carry):
        i, tokens, valid, q_logp, alive, blocks = carry
        token = jnp.take_along_axis(tokens, jnp.full((batch, 1), i - 1), 1)
        position = jnp.where(alive & (want > i), last + i, -1)[:, None]
        output, blocks = law.step(law.params, token, position, cache, blocks, at + i - 1)
        logits = law.step.head(law.params, output.hidden)
        tokens, valid, q_logp, alive = add(i, logits, tokens, valid, q_logp, alive)
        return i + 1, tokens, valid, q_logp, alive, blocks

    carry = (jnp.int32(1), tokens, valid, q_logp, alive, blocks)
    if most > 1:
        carry = jax.lax.while_loop(going, body, carry)
    return Drafts(carry[1], carry[2], carry[3], carry[5])


def last_two(seq: Sequence, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last two tokens of each row and their positions, `i32[B, 2]`; -1 where none is and outside of `rows`."""
    last = seq.length - 1
    tokens = jnp.stack([seq.token_at(jnp.maximum(last - 1, 0)), seq.root], 1)
    positions = jnp.stack([last - 1, last], 1)
    return tokens, jnp.where(rows[:, None], jnp.maximum(positions, -1), -1)


def catch_up(step: Step, params: Any, cache: kv.Cache, seq: Sequence, rows: jax.Array) -> kv.Cache:
    """Commit what the cache of `rows bool[B]` lacks up to two tokens before their end."""
    size = min(CATCH_UP, seq.tokens.shape[1])
    behind = jnp.where(rows, seq.length - 2 - cache.t, 0)

    def feed(_, cache):
        at = cache.t[:, None] + jnp.arange(size, dtype=jnp.int32)
        positions = jnp.where(rows[:, None] & (at < seq.length[:, None] - 2), at, -1)
        return commit_chunk(step, params, cache, jnp.take_along_axis(seq.tokens, at, 1, mode="clip"), positions)[0]

    # Counted beforehand: a row whose output is not finite commits nothing and would never be up.
    return jax.lax.fori_loop(0, -(-behind.max() // size), feed, cache)
