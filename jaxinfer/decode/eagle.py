"""EAGLE: a one-layer head continues the target's features, and drafts a chain or a tree whose shape follows its trust.

Li et al. 2024 (arXiv:2401.15077; dynamic trees arXiv:2406.16858; inner layers arXiv:2503.01840: the head's `layers`).
Guarantee: greedy output equal to plain greedy; sampled output of the target's law, for trees (with the tree verifier)
and for chains, whose drafts are sampled and come with their law. State: the head's own cache of one layer, and one
feature a row.

A tree grows by `depth` levels of `branches` nodes that each get `branches` children; of all nodes the `nodes` likeliest
are scored. EAGLE-2: depth 7 (code: 5 to 7), branches 10, nodes 60; here 5, 4 and 12 by default, as a scored slot is not
free on small machines. `branches=1` drafts a chain.

An entry needs the embedding of the token after its feature, while `observe` is not given the target: so `draft_params`
are those of `bind`, the head's arrays beside the target's embedding (the same array, not a copy). Entries of accepted
drafts are made anew from the target's true features, as in the published code.

Departure: the first step after a prompt of one token drafts nothing, as no feature is known.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.decode import draft_chain
from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draft_chain import Law
from jaxinfer.decode.draft_tree import Frontier, Growing
from jaxinfer.decode.head_drafter import GrowingHead, last_of_chunk
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.types import Proposal
from jaxinfer.errors import ConfigError
from jaxinfer.models.heads.eagle import EagleHead


@struct.dataclass
class EagleState:
    """`cache`: entries 0 to length - 2 of each row; `feature [B, D]`: what they predict at position length - 1;
    `hidden [B, D]`: during prefill, the last true feature so far."""

    cache: kv.Cache
    feature: jax.Array
    hidden: jax.Array


@struct.dataclass
class _Output:
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class _ChainStep:
    """The head as a Step for `draft_chain`: params are (bound head, target), Blocks carry the feature along."""

    eagle: EagleHead
    target: Any

    def __call__(self, params, tokens, positions, cache, blocks, at):
        own, feature = blocks
        embedding = self.target.embed(params[0], tokens).astype(feature.dtype)
        feature, own = self.eagle(params[0], feature, embedding, positions, cache, own, at)
        return _Output(feature), (own, feature)

    def head(self, params, hidden):
        return self.target.head(params[1], hidden)


@dataclasses.dataclass(frozen=True)
class Eagle(GrowingHead):
    """`head`, `target`: see `HeadDrafter`; `draft_params`: `bind(params, target_params)`. The rest: `GrowingHead`."""

    head: EagleHead
    target: Any
    depth: int = 5
    branches: int = 4
    nodes: int = 12
    kind: ClassVar[str] = "eagle"

    def bind(self, params: Any, target_params: Any) -> Any:
        """The head's params with the target's embedding, as `draft_params`."""
        return {**params, "embedding": target_params["embedding"]}

    def init(self, params, target_params, seq, cache) -> EagleState:
        """An empty cache of the row's capacity."""
        self.check_head(params)
        if "embedding" not in params:
            raise ConfigError("Eagle: draft_params lack the target's embedding; accepted: what `bind` returns")
        batch, capacity = seq.tokens.shape
        empty = jnp.zeros((batch, self.head.target.hidden_size), params["fuse"].dtype)
        return EagleState(self.head.new_cache(batch, capacity, str(empty.dtype)), empty, empty)

    def prefill(self, params, state: EagleState, chunk, output) -> EagleState:
        """The entries of the chunk's tokens, each with the feature before it."""
        features = self.head.features(params, output).astype(state.hidden.dtype)
        before = jnp.concatenate([state.hidden[:, None], features[:, :-1]], 1)
        first = (chunk.positions[:, :1] == 0).astype(jnp.int32)  # the first token of all has no feature before it
        positions = jnp.maximum(chunk.positions - 1, -1)
        state = self._enter(
            params, state, before, chunk.tokens, positions, chunk.n - (chunk.n > 0) * first[:, 0], first
        )
        return dataclasses.replace(state, hidden=last_of_chunk(state.hidden, chunk, features))

    def ready(self, params, state: EagleState, seq, cache, *, target_params) -> EagleState:
        """The entry of the root, from the prompt's last feature but one."""
        at = jnp.where(seq.done, -1, jnp.maximum(seq.length - 2, -1))[:, None]
        return self._enter(params, state, state.hidden[:, None], seq.root[:, None], at, (at >= 0).sum(1), 0)

    def observe(self, params, state: EagleState, seq, proposal, scored, verdict, n, cache) -> EagleState:
        """The entries of the tokens that were emitted, from the target's true features."""
        features = self.head.features(params, scored.output).astype(state.hidden.dtype)
        path = jnp.maximum(verdict.path, 0)
        features = jnp.take_along_axis(features, path[..., None], 1)
        index = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
        start = (seq.length - n)[:, None]
        tokens = jnp.take_along_axis(seq.tokens, start + index, 1, mode="clip")
        positions = jnp.where(index < n[:, None], start - 1 + index, -1)
        return self._enter(params, state, features, tokens, positions, n, 0)

    def _enter(self, params, state: EagleState, features, tokens, positions, n, skip) -> EagleState:
        """Commit entries `skip` to `skip + n` of `(features [B, T, D], tokens i32[B, T])` at `positions i32[B, T]`."""
        size = tokens.shape[1]
        embedding = self.target.embed(params, tokens).astype(features.dtype)
        blocks = kv.new_blocks(state.cache, size)
        out, blocks = self.head(params, features, embedding, positions, state.cache, blocks)
        last = jnp.take_along_axis(out, jnp.clip(skip + n[:, None] - 1, 0, size - 1)[..., None], 1)[:, 0]
        path = jnp.minimum(jnp.arange(size, dtype=jnp.int32)[None] + skip, size - 1)
        path = jnp.broadcast_to(path, tokens.shape)
        # A feature that is not finite commits nothing; it also keeps every read of the cache before its write.
        n = jnp.where(jnp.isfinite(last.astype(jnp.float32).sum(1)), n, 0)
        feature = jnp.where((n > 0)[:, None], last, state.feature)
        return dataclasses.replace(state, cache=kv.commit(state.cache, blocks, path, n), feature=feature)

    def propose(self, params, state: EagleState, seq, cache, key, *, target_params, warp):
        """A chain, sampled where rows sample, or a tree of the likeliest nodes."""
        live = (seq.length > 1) & ~seq.done
        last = jnp.where(live, seq.length - 2, -1)
        logits = self.target.head(target_params, state.feature[:, None])
        if self.branches > 1:
            return self._tree(params, state, logits[:, 0], last, live, target_params), state
        step: Any = _ChainStep(self.head, self.target)
        law = Law.of(step, (params, target_params), warp, key_streams.stream(key, Stream.DRAFT))
        blocks = (kv.new_blocks(state.cache, self.depth), state.feature[:, None])
        drafts = draft_chain.chain(
            law, state.cache, blocks, logits, at=0, last=last, want=jnp.where(live, self.depth, 0), most=self.depth
        )
        return Proposal.of_chain(drafts.tokens, drafts.valid, drafts.q_logp), state

    def _tree(self, params, state: EagleState, logits, last, live, target_params) -> Proposal:
        """`logits f32[B, V]` of the first level; `last i32[B]`: the position of the last entry."""
        grown, frontier = Growing.of_root(jax.nn.log_softmax(logits), min(self.branches, logits.shape[-1]))
        k = frontier.tokens.shape[1]
        slots = (self.depth - 1) * k
        blocks = kv.new_blocks(state.cache, slots)
        feature = jnp.broadcast_to(state.feature[:, None], (*frontier.tokens.shape, state.feature.shape[-1]))
        seen = jnp.zeros((*frontier.tokens.shape, slots), bool)
        for level in range(1, self.depth):
            own = jnp.arange(slots)[None] == (level - 1) * k + jnp.arange(k)[:, None]
            seen = seen | own
            positions = jnp.where(live, last + level, -1)[:, None]
            positions = jnp.broadcast_to(positions, frontier.tokens.shape)
            embedding = self.target.embed(params, frontier.tokens).astype(feature.dtype)
            feature, blocks = self.head(
                params, feature, embedding, positions, state.cache, blocks, (level - 1) * k, seen
            )
            logp = jax.nn.log_softmax(self.target.head(target_params, feature))
            grown, frontier = grown.level(frontier, logp)
            seen, feature = _rows(seen, frontier), _rows(feature, frontier)
        return grown.best(self.width, self.depth, live)


def _rows(x: jax.Array, frontier: Frontier) -> jax.Array:
    """What each branch of a new frontier has from its parent, of `x [B, K, ...]`."""
    return jnp.take_along_axis(x, frontier.above[..., None], 1)
