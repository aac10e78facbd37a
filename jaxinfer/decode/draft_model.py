"""Draft model: a small model of the same vocabulary drafts a chain, the target scores it in one forward.

Leviathan et al. 2022 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318); paper default gamma 4 to 5. Guarantee:
greedy output equal to plain greedy, sampled output of the target's law (with the chain verifier). State: the draft's
own cache, and a draft length for each row.

Departure: published codes run gamma + 1 draft forwards, or leave a hole where the last draft's keys should be. Here the
draft's cache stays two tokens behind the row, and each round begins with one forward over the last two tokens: gamma
forwards, and nothing is missing after full acceptance.

Stability: experimental.
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
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.prefill import commit_chunk
from jaxinfer.decode.types import Proposal, Slots, Step
from jaxinfer.errors import ConfigError


@struct.dataclass
class DraftState:
    """`cache`: holds `length - 2` tokens of each row; `gamma i32[B]`: drafts to propose, up to the static width."""

    cache: kv.Cache
    gamma: jax.Array
    blocks: Any = None


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """`step`: the draft, a model of the target's vocabulary; its weights come as `draft_params`.

    `gamma` is the most that a step drafts and fixes the shapes; `DraftState.gamma` is data, so one compilation serves
    every shorter length.
    """

    step: Step
    gamma: int = 4
    taps: tuple[int, ...] = dataclasses.field(default=(), init=False)

    def __post_init__(self):
        if self.gamma < 1:
            raise ConfigError(f"gamma: got {self.gamma}, accepts 1 or more")

    @property
    def vocab_size(self) -> int:
        """The draft's vocabulary, which must be the target's."""
        return self.step.vocab_size

    @property
    def width(self) -> int:
        """N."""
        return self.gamma

    @property
    def depth(self) -> int:
        """D."""
        return self.gamma

    def init(self, params, target_params, seq, cache) -> DraftState:
        """An empty draft cache of the row's capacity."""
        if params is None:
            raise ConfigError("DraftModel needs its weights: pass draft_params")
        batch, capacity = seq.tokens.shape
        return DraftState(self.step.new_cache(batch, capacity), jnp.full(batch, self.gamma, jnp.int32))

    def prefill(self, params, state: DraftState, chunk, output) -> DraftState:
        """Commit the chunk up to two tokens before the prompt's end."""
        positions = jnp.where(chunk.positions < chunk.length[:, None] - 2, chunk.positions, -1)
        return dataclasses.replace(
            state, cache=commit_chunk(self.step, params, state.cache, chunk.tokens, positions)[0]
        )

    def propose(
        self, params, state: DraftState, seq, cache, key, *, target_params, warp
    ) -> tuple[Proposal, DraftState]:
        """Draft up to gamma tokens, each from the draft's own warped law."""
        key = key_streams.stream(key, Stream.DRAFT)
        last = seq.length - 1
        pair = jnp.stack([seq.token_at(jnp.maximum(last - 1, 0)), seq.root], 1)
        positions = jnp.stack([last - 1, last], 1)
        positions = jnp.where(seq.done[:, None], -1, jnp.maximum(positions, -1))
        blocks = kv.new_blocks(state.cache, self.gamma + 1)
        output, blocks = self.step(params, pair, positions, state.cache, blocks, 0)
        tokens = jnp.zeros((pair.shape[0], self.gamma), jnp.int32)
        law = _Law(self, params, warp, key)
        token, q = law.next(output.hidden[:, 1:], tokens, 0)
        tokens = tokens.at[:, 0].set(token)

        def body(carry, i):
            token, tokens, blocks = carry
            at = jnp.where(seq.done, -1, last + i)[:, None]
            output, blocks = self.step(params, token[:, None], at, state.cache, blocks, i + 1)
            token, q = law.next(output.hidden, tokens, i)
            return (token, tokens.at[:, i].set(token), blocks), q

        (_, tokens, blocks), rest = jax.lax.scan(body, (token, tokens, blocks), jnp.arange(1, self.gamma))
        q_logp = None if q is None or rest is None else jnp.concatenate([q[:, None], jnp.moveaxis(rest, 0, 1)], 1)
        valid = jnp.arange(self.gamma)[None] < state.gamma[:, None]
        return Proposal.of_chain(tokens, valid, q_logp), dataclasses.replace(state, blocks=blocks)

    def observe(self, params, state: DraftState, seq, proposal, scored, verdict, n, cache) -> DraftState:
        """Commit what the target kept, so that the draft's cache is two tokens behind again."""
        first = (seq.length - n == 1) & (n > 0)  # a one-token prompt has no token before its root: that slot is empty
        path = jnp.arange(self.gamma + 1, dtype=jnp.int32)[None] + first[:, None]
        path = jnp.minimum(path, self.gamma)
        return dataclasses.replace(state, cache=kv.commit(state.cache, state.blocks, path, n - first), blocks=None)


@dataclasses.dataclass(frozen=True)
class _Law:
    """The draft's own choice of one token."""

    drafter: DraftModel
    params: Any
    warp: Any
    key: jax.Array

    def next(self, hidden, tokens, i) -> tuple[jax.Array, jax.Array | None]:
        """The token i32[B] after `hidden[B, 1, D]`, given the first `i` of `tokens i32[B, N]`, and its law [B, V]."""
        logits = self.drafter.step.head(self.params, hidden)
        depth = jnp.full((1, 1), i, jnp.int32)
        slots = Slots(depth, tokens, jnp.arange(tokens.shape[1])[None, None] < i)
        if not self.warp.sampled:
            return first_max(self.warp.scores(logits, slots)[:, 0])[1], None
        q = self.warp(logits, slots)[:, 0]
        return draw(jnp.exp(q), key_streams.slot(self.key, i)), q
