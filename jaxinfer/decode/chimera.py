"""Chimera: trigram states and one layer over the target's hidden states draft a chain or a tree.

Zeng et al. 2024 (arXiv:2402.15758). Guarantee: greedy output equal to plain greedy; sampled output of the target's
law, for trees (with the tree verifier) and for chains, whose drafts are sampled and come with their law; the published
code accepts a draft of probability zero and takes the argmax after full acceptance. State: the head's cache of one
layer over the target's hidden states, and the newest of these.

The head is iterated `depth` times (paper: 4, code also 5). A tree grows as EAGLE-2's: `branches` nodes a level with as
many children each, of which the `nodes` likeliest are scored; the paper's tree is fixed. `branches=1` drafts a chain.

Departure: the first step after a prompt of one token drafts nothing, as no hidden state is known.

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
from jaxinfer.decode.draft_tree import Growing
from jaxinfer.decode.head_drafter import GrowingHead, last_of_chunk, last_of_step
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.types import Proposal, Sequence
from jaxinfer.models.heads.chimera import ChimeraHead


@struct.dataclass
class ChimeraState:
    """`cache`: the target's hidden states at positions 0 to length - 2 of each row; `hidden [B, D]`: the last."""

    cache: kv.Cache
    hidden: jax.Array


@struct.dataclass
class _Output:
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class _ChainStep:
    """The head as a Step for `draft_chain`: params are (head, target, newest hidden state [B, 1, D]); Blocks carry the
    two tokens before along, i32[B, T, 2] (-1: before the text)."""

    chimera: ChimeraHead
    target: Any

    def __call__(self, params, tokens, positions, cache, blocks, at, mask=None):
        own, before = blocks
        trigram = jnp.concatenate([before, tokens[..., None]], -1)
        states = encode(self.chimera, self.target, params[0], params[1], trigram, params[2].dtype)
        states, own = self.chimera(params[0], states, positions, cache, own, at, mask)
        return _Output(states), (own, trigram[..., 1:])

    def head(self, params, hidden):
        return self.chimera.logits(params[0], params[2], hidden, self.target, params[1])


@dataclasses.dataclass(frozen=True)
class Chimera(GrowingHead):
    """`head`, `target`: see `HeadDrafter`; the head's arrays come as `draft_params`. The rest: `GrowingHead`."""

    head: ChimeraHead
    target: Any
    depth: int = 4
    branches: int = 4
    nodes: int = 12
    kind: ClassVar[str] = "chimera"

    def init(self, params, target_params, seq, cache) -> ChimeraState:
        """An empty cache of the row's capacity."""
        self.check_head(params)
        empty = self.empty_hidden(params, seq)
        batch, capacity = seq.tokens.shape
        return ChimeraState(self.head.new_cache(batch, capacity, str(empty.dtype)), empty)

    def prefill(self, params, state: ChimeraState, chunk, output) -> ChimeraState:
        """The chunk's hidden states."""
        path = jnp.broadcast_to(jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32), chunk.tokens.shape)
        cache = self._enter(params, state, output.hidden, chunk.positions, path, chunk.n)
        return ChimeraState(cache, last_of_chunk(state.hidden, chunk, output.hidden))

    def observe(self, params, state: ChimeraState, seq, proposal, scored, verdict, n, cache) -> ChimeraState:
        """The hidden states of the tokens that were kept."""
        hidden = scored.output.hidden
        path = jnp.maximum(verdict.path, 0)
        index = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
        positions = jnp.where(index < n[:, None], (seq.length - n)[:, None] - 1 + index, -1)
        kept = jnp.take_along_axis(hidden, path[..., None], 1)
        own = self._enter(params, state, kept, positions, jnp.broadcast_to(index, path.shape), n)
        return ChimeraState(own, last_of_step(state.hidden, verdict, n, hidden))

    def _enter(self, params, state: ChimeraState, hidden, positions, path, n) -> kv.Cache:
        blocks = kv.new_blocks(state.cache, hidden.shape[1])
        _, blocks = self.head(params, hidden.astype(state.hidden.dtype), positions, state.cache, blocks)
        return kv.commit(state.cache, blocks, path, n)

    def propose(self, params, state: ChimeraState, seq, cache, key, *, target_params, warp):
        """A chain, sampled where rows sample, or a tree of the likeliest nodes."""
        live = (seq.length > 1) & ~seq.done
        last = jnp.where(live, seq.length - 1, -1)
        known = (params, target_params, state.hidden[:, None])
        step: Any = _ChainStep(self.head, self.target)
        if self.branches > 1:
            return self._tree(step, known, state, seq, last), state
        blocks = (kv.new_blocks(state.cache, self.depth), before(seq))
        output, blocks = step(known, seq.root[:, None], last[:, None], state.cache, blocks, 0)
        law = Law.of(step, known, warp, key_streams.stream(key, Stream.DRAFT))
        drafts = draft_chain.chain(
            law, state.cache, blocks, step.head(known, output.hidden), at=1, last=last,
            want=jnp.where(live, self.depth, 0), most=self.depth,
        )  # fmt: skip
        return Proposal.of_chain(drafts.tokens, drafts.valid, drafts.q_logp), state

    def _tree(self, step, known, state: ChimeraState, seq, last) -> Proposal:
        """`last i32[B]`: the root's position, -1 in rows that draft nothing."""
        k = min(self.branches, self.head.target.vocab_size)
        slots = 1 + (self.depth - 1) * k
        blocks = (kv.new_blocks(state.cache, slots), before(seq))
        seen = jnp.zeros((last.shape[0], 1, slots), bool).at[:, :, 0].set(True)
        output, blocks = step(known, seq.root[:, None], last[:, None], state.cache, blocks, 0, seen)
        logp = jax.nn.log_softmax(step.head(known, output.hidden))
        grown, frontier = Growing.of_root(logp[:, 0], k)
        carried = (seen, blocks[1])
        for level in range(1, self.depth):
            seen, two = (jnp.take_along_axis(x, frontier.above[..., None], 1) for x in carried)
            at = 1 + (level - 1) * k
            seen = seen | (jnp.arange(slots)[None] == at + jnp.arange(k)[:, None])
            positions = jnp.broadcast_to(jnp.where(last < 0, -1, last + level)[:, None], frontier.tokens.shape)
            output, blocks = step(known, frontier.tokens, positions, state.cache, (blocks[0], two), at, seen)
            grown, frontier = grown.level(frontier, jax.nn.log_softmax(step.head(known, output.hidden)))
            carried = (seen, blocks[1])
        return grown.best(self.width, self.depth, last >= 0)


def before(seq: Sequence) -> jax.Array:
    """The two tokens before each row's root, i32[B, 1, 2]; -1 before the text."""
    at = seq.length[:, None] + jnp.array([-3, -2])
    return jnp.where(at >= 0, jnp.take_along_axis(seq.tokens, jnp.maximum(at, 0), 1), -1)[:, None]


def encode(head: ChimeraHead, target: Any, params: Any, target_params: Any, trigrams: jax.Array, dtype) -> jax.Array:
    """Trigram states f[B, T, D] of `trigrams i32[B, T, 3]`, -1 where a token stands before the text."""
    embeddings = target.embed(target_params, jnp.maximum(trigrams, 0)).astype(dtype)
    return head.encode(params, jnp.where(trigrams[..., None] < 0, jnp.zeros((), dtype), embeddings))
