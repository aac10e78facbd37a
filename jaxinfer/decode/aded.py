"""ADED: drafts a tree from a tri-gram table that learns from the output while it is decoded.

Liu, Lei, Zhang, Xu 2024 (arXiv:2407.12021); paper: 12 tokens a context, sequences of 4 tokens, the 24 best of them in a
tree of 64 nodes, weights up to 3. Guarantee: greedy output equal to plain greedy; sampled output of the target's law
(with the tree verifier; the published rule is biased there). State: a row's table of `buckets` contexts (425 KB at
4096). A corpus's conditional frequencies (`table_of`) may come as `draft_params`: one table, read only, for all rows.

Departures. The search is a beam over the summed log of the tri-grams' shares, not 150 iterations of Monte Carlo tree
search. With the published constants its visits follow the product of the priors, which is what the beam maximises: on
random tables 92 % of its 24 most visited nodes are the beam's, with 99.6 % of the beam's share; and a beam is a few
vector operations. `exploration` is the weight that unseen tokens hold in every context: contexts seen
seldom keep little of a path's weight, and the tree goes wide where it knows little and deep where it knows much.
A tri-gram counts once, with `gain`; published code adds 0.04 for each step during which it is among the last 16 tokens,
about six times. The prompt is learned like output (`prompt`), where published code learns its last 16 tokens. The
table is hashed: a context that falls on another one's bucket replaces it.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.types import Proposal, Sequence
from jaxinfer.errors import ConfigError


@struct.dataclass
class Table:
    """Followers of two tokens, by hash: `context i32[..., H, 2]` (-1: empty), `tokens i32[..., H, W]`,
    `weights f32[..., H, W]` (0: no token)."""

    context: jax.Array
    tokens: jax.Array
    weights: jax.Array

    @classmethod
    def empty(cls, *shape: int, width: int) -> Table:
        """No context known; `shape` ends with the number of buckets."""
        tokens = jnp.full((*shape, width), -1, jnp.int32)
        return cls(jnp.full((*shape, 2), -1, jnp.int32), tokens, jnp.zeros(tokens.shape))

    def followers(self, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens and weights after the contexts `first, second i32[...]` of one table: `[..., W]` each."""
        at = bucket(first, second, self.context.shape[0])
        found = (self.context[at] == jnp.stack([first, second], -1)).all(-1)
        return self.tokens[at], jnp.where(found[..., None], self.weights[at], 0.0)

    def learn(self, gram: jax.Array, live: jax.Array, gain: float, cap: float) -> Table:
        """One table with the tri-gram `i32[3]` seen once more, where `live`. A full context drops its lightest token,
        a bucket its former context."""
        at = bucket(gram[0], gram[1], self.context.shape[0])
        known = (self.context[at] == gram[:2]).all()
        tokens = jnp.where(known, self.tokens[at], -1)
        weights = jnp.where(known, self.weights[at], 0.0)
        hit = tokens == gram[2]
        place = jnp.where(hit.any(), jnp.argmax(hit), jnp.argmin(weights))
        weight = jnp.where(hit.any(), jnp.minimum(weights[place] + gain, cap), gain)
        at = jnp.where(live, at, self.context.shape[0])
        return Table(
            self.context.at[at].set(gram[:2], mode="drop"),
            self.tokens.at[at].set(tokens.at[place].set(gram[2]), mode="drop"),
            self.weights.at[at].set(weights.at[place].set(weight), mode="drop"),
        )


def bucket(first, second, size: int):
    """The bucket of a context, for numpy and jax arrays alike."""
    xp = np if isinstance(first, np.ndarray) else jnp
    mixed = first.astype(xp.uint32) * xp.uint32(0x9E3779B1) ^ second.astype(xp.uint32) * xp.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> xp.uint32(15))) * xp.uint32(0xC2B2AE3D)
    return ((mixed ^ (mixed >> xp.uint32(13))) % xp.uint32(size)).astype(xp.int32)


def table_of(texts: Iterable[np.ndarray], *, buckets: int = 2**16, width: int = 12) -> Table:
    """The table of a corpus, on the host: each context's `width` likeliest followers with their shares of it.

    `texts`: token ids, an array a text. Of contexts in one bucket the most frequent stays.
    """
    grams = [np.lib.stride_tricks.sliding_window_view(np.asarray(t, np.int32), 3) for t in texts if len(t) > 2]
    table = jax.tree.map(np.array, Table.empty(buckets, width=width))
    if not grams:
        return jax.tree.map(jnp.asarray, table)
    found, count = np.unique(np.concatenate(grams), axis=0, return_counts=True)
    contexts, of, number = np.unique(found[:, :2], axis=0, return_inverse=True, return_counts=True)
    total = np.bincount(of.ravel(), count)
    order = np.lexsort((-count, of.ravel()))  # by context, the frequent followers first
    first = np.cumsum(number) - number
    at = bucket(contexts[:, 0], contexts[:, 1], buckets)
    for i in np.argsort(total, kind="stable"):
        mine = order[first[i] : first[i] + min(number[i], width)]
        table.context[at[i]] = contexts[i]
        table.tokens[at[i]], table.weights[at[i]] = -1, 0.0
        table.tokens[at[i], : len(mine)] = found[mine, 2]
        table.weights[at[i], : len(mine)] = count[mine] / total[i]
    return jax.tree.map(jnp.asarray, table)


@dataclasses.dataclass(frozen=True)
class ADED(DrafterBase):
    """`nodes` drafts in a tree of `depth` tokens, from `beams` paths a depth; `candidates` tokens kept a context in
    `buckets` contexts; each tri-gram seen adds `gain` to its weight, up to `cap`; `exploration`: see above."""

    nodes: int = 64
    depth: int = 4
    beams: int = 24
    candidates: int = 12
    buckets: int = 4096
    gain: float = 0.25
    cap: float = 3.0
    exploration: float = 0.1
    prompt: bool = True

    def __post_init__(self):
        for name in ("nodes", "depth", "beams", "candidates", "buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 1 or more")
        if not 0 < self.gain <= self.cap:
            raise ConfigError(f"gain: got {self.gain}, accepts more than 0, up to cap = {self.cap}")
        if not self.exploration >= 0:
            raise ConfigError(f"exploration: got {self.exploration}, accepts 0 or more")

    @property
    def width(self) -> int:
        """N."""
        return self.nodes

    def init(self, params, target_params, seq: Sequence, cache) -> Table:
        """A table a row, with the prompt's tri-grams where asked."""
        if params is not None and not isinstance(params, Table):
            raise ConfigError(f"draft_params: got {type(params).__name__}, accepts None or an aded.Table")
        table = Table.empty(seq.length.shape[0], self.buckets, width=self.candidates)
        if not self.prompt:
            return table
        last = seq.prompt_length.max()
        return jax.lax.fori_loop(2, last, lambda i, t: self._learn(t, seq, i, i < seq.prompt_length), table)

    def idle(self, params, state: Table, seq):
        """None: the table is asked."""
        return jnp.zeros_like(seq.done)

    def propose(self, params, state: Table, seq, cache, key, *, target_params, warp):
        """The `nodes` likeliest nodes of a beam search through the row's table and the corpus's, likeliest first."""
        tokens, parent, score = self._search(params, state, seq)
        kept = jax.lax.top_k(score, min(self.nodes, score.shape[1]))[1]
        tokens, parent, score = (jnp.take_along_axis(x, kept, 1) for x in (tokens, parent, score))
        valid = score > -jnp.inf
        # A parent outscores its children, or ties and has the lower index: it was kept, and stands before them.
        place = jnp.argmax(kept[:, None, :] + 1 == parent[..., None], 2).astype(jnp.int32) + 1
        parent = jnp.where(valid & (parent > 0), place, 0)
        short = self.nodes - kept.shape[1]
        tokens, parent, valid = (jnp.pad(x, ((0, 0), (0, short))) for x in (tokens, parent, valid))
        return Proposal.of_tree(jnp.where(valid, tokens, 0), parent, valid, depth=self.depth), state

    def observe(self, params, state: Table, seq, proposal, scored, verdict, n, cache) -> Table:
        """Learn the tri-grams that end in emitted tokens, each once."""
        for i in range(self.depth + 1):
            state = self._learn(state, seq, seq.length - n + i, i < n)
        return state

    def _learn(self, table: Table, seq: Sequence, at: jax.Array, live: jax.Array) -> Table:
        """The tri-gram that ends at position `at` of each row."""
        at = jnp.broadcast_to(at, seq.length.shape)
        gram = jnp.take_along_axis(seq.tokens, at[:, None] + jnp.arange(-2, 1), 1, mode="clip")
        return jax.vmap(lambda t, g, ok: t.learn(g, ok, self.gain, self.cap))(table, gram, live & (at >= 2))

    def _search(self, corpus: Table | None, table: Table, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All beams of all depths: `tokens`, `parent` (slot ids, breadth first) and log-share `score`, each [B, M]."""
        batch = seq.length.shape[0]
        before = jnp.where(seq.length > 1, seq.token_at(jnp.maximum(seq.length - 2, 0)), -2)
        first, second = before[:, None], seq.root[:, None]
        score, slot, levels, made = jnp.zeros((batch, 1)), jnp.zeros((batch, 1), jnp.int32), [], 0
        for _ in range(self.depth):
            tokens, share = self._shares(corpus, table, first, second)
            width = tokens.shape[2]
            total = (score[..., None] + share).reshape(batch, -1)
            score, flat = jax.lax.top_k(total, min(self.beams, total.shape[1]))
            chosen = jnp.take_along_axis(tokens.reshape(batch, -1), flat, 1)
            above = flat // width
            first, second = jnp.take_along_axis(second, above, 1), chosen
            levels.append((chosen, jnp.take_along_axis(slot, above, 1), score))
            slot = jnp.broadcast_to(jnp.arange(made + 1, made + 1 + chosen.shape[1], dtype=jnp.int32), chosen.shape)
            made += chosen.shape[1]
        tokens, parent, score = (jnp.concatenate(x, 1) for x in zip(*levels, strict=True))
        return tokens, parent, score

    def _shares(self, corpus: Table | None, table: Table, first: jax.Array, second: jax.Array):
        """Candidates after the contexts `i32[B, K]` and the log of their shares, `[B, K, C]`; -inf: no candidate."""
        tokens, weights = jax.vmap(Table.followers)(table, first, second)
        if corpus is not None:
            more, extra = corpus.followers(first, second)
            same = (tokens[..., :, None] == more[..., None, :]) & (weights[..., :, None] > 0)
            weights = weights + jnp.where(same, extra[..., None, :], 0.0).sum(-1)
            tokens = jnp.concatenate([tokens, more], -1)
            weights = jnp.concatenate([weights, jnp.where(same.any(-2), 0.0, extra)], -1)
        total = weights.sum(-1, keepdims=True) + self.exploration
        return tokens, jnp.where(weights > 0, jnp.log(weights / jnp.maximum(total, 1e-30)), -jnp.inf)
