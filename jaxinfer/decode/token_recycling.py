"""Token Recycling: drafts a tree from what the target found likely after each token when it last scored that token.

Luo et al. 2024 (arXiv:2408.08696); paper: 8 candidates a token, a fixed tree of 80 nodes, 8/21/25/15/8/3 of them at
depths 1 to 6. Guarantee: greedy output equal to plain greedy; sampled output of the target's law (with the tree
verifier). State: a row's adjacency matrix i32[B, V, 8], 32 V bytes a row (131 KB for 4096 tokens, 4 MB for 128k).

Rules that the paper leaves open. Every scored slot teaches, accepted or not; where several slots hold one token the
last slot counts. The tree holds, at each depth, the nodes with the smallest sums of ranks, as is best where a
candidate's chance falls geometrically with its rank (for depths 1, 2 and 4 these counts leave no ties; elsewhere the
path that comes first in order is taken).

Departures: an entry that was never written proposes nothing (published code: token 0, eight times). The matrix begins
empty for each row and is the row's own, so that no row depends on its neighbours or on what ran before; published code
carries one from request to request. `prompt` (off, as in the paper) first learns which tokens followed each token of
the prompt, latest first: prefill reads no logits. The nodes stand best first, in order of depth plus three times the
sum of ranks (as measured on code: 12 nodes give 3.3 tokens a forward where 80 give 3.8), so the first few are a good
tree too: fewer `nodes` are faster where a scored slot is not free, as on a CPU.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.types import Proposal, Sequence
from jaxinfer.errors import ConfigError

CANDIDATES = 8
NODES_BY_DEPTH = (8, 21, 25, 15, 8, 3)


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed tree, best nodes first: each draft's `parent` slot, its `rank` among the parent's candidates, its
    `level` (0 for children of the root)."""

    parent: np.ndarray
    rank: np.ndarray
    level: np.ndarray


@functools.cache
def template(nodes: int) -> Template:
    """The `nodes` most promising of the paper's 80."""
    paths = []
    for depth, count in enumerate(NODES_BY_DEPTH, 1):
        # A path outside the first `count` sums cannot have a rank of `count` or more.
        ranks = range(min(CANDIDATES, count))
        every = (path for path in itertools.product(ranks, repeat=depth) if sum(path) < CANDIDATES)
        paths += sorted(every, key=lambda path: (sum(path), path))[:count]
    paths = sorted(paths, key=lambda path: (len(path) + 3 * sum(path), len(path), path))[:nodes]
    slot = {path: i for i, path in enumerate(paths, 1)} | {(): 0}
    return Template(
        np.array([slot[path[:-1]] for path in paths], np.int32),
        np.array([path[-1] for path in paths], np.int32),
        np.array([len(path) - 1 for path in paths], np.int32),
    )


@dataclasses.dataclass(frozen=True)
class TokenRecycling(DrafterBase):
    """`nodes`: drafts in the tree, up to 80; `prompt`: learn from the prompt too."""

    nodes: int = 80
    prompt: bool = False

    def __post_init__(self):
        if not 1 <= self.nodes <= sum(NODES_BY_DEPTH):
            raise ConfigError(f"nodes: got {self.nodes}, accepts 1 to {sum(NODES_BY_DEPTH)}")

    @property
    def width(self) -> int:
        """N."""
        return self.nodes

    @property
    def depth(self) -> int:
        """D."""
        return int(template(self.nodes).level.max()) + 1

    def init(self, params, target_params, seq: Sequence, cache) -> jax.Array:
        """The matrix i32[B, V, 8]: -1 is unknown."""
        if not seq.vocab_size:
            raise ConfigError("TokenRecycling needs Sequence.vocab_size, which decode.start sets")
        empty = jnp.full((seq.length.shape[0], seq.vocab_size, CANDIDATES), -1, jnp.int32)
        return followers(empty, seq) if self.prompt else empty

    def idle(self, params, state: jax.Array, seq):
        """Rows whose last token the target has never scored."""
        return jax.vmap(lambda matrix, token: matrix[token, 0] < 0)(state, seq.root)

    def propose(self, params, state: jax.Array, seq, cache, key, *, target_params, warp):
        """The template with each node's token read from its parent's row of the matrix."""
        tree = template(self.nodes)
        tokens = jnp.full((seq.length.shape[0], self.nodes + 1), -1, jnp.int32).at[:, 0].set(seq.root)
        for level in range(self.depth):
            here = np.flatnonzero(tree.level == level)
            above = tokens[:, tree.parent[here]]
            found = jax.vmap(lambda matrix, token, rank=tree.rank[here]: matrix[jnp.maximum(token, 0), rank])
            tokens = tokens.at[:, here + 1].set(jnp.where(above < 0, -1, found(state, above)))
        tokens = tokens[:, 1:]
        proposal = Proposal.of_tree(
            jnp.maximum(tokens, 0), jnp.asarray(tree.parent)[None], tokens >= 0, depth=self.depth
        )
        return proposal, state

    def observe(self, params, state: jax.Array, seq, proposal, scored, verdict, n, cache) -> jax.Array:
        """For each token that was scored: the tokens that the target found likeliest after it."""
        root = jnp.ones((n.shape[0], 1), bool)
        live = jnp.concatenate([root, proposal.valid], 1) & (n > 0)[:, None]
        vocab = state.shape[1]
        known = min(CANDIDATES, vocab)
        likely = jax.lax.top_k(scored.logits, known)[1]
        likely = jnp.pad(likely, ((0, 0), (0, 0), (0, CANDIDATES - known)), constant_values=-1)
        index = jnp.where(last_of_each(scored.tokens, live), scored.tokens, vocab)
        return jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(state, index, likely)


def last_of_each(tokens: jax.Array, live: jax.Array) -> jax.Array:
    """Which live slots hold a token that no later live slot holds, bool[B, R]: the writers of a scatter in order."""
    slots = jnp.arange(tokens.shape[1])
    later = (slots[None, :] > slots[:, None]) & live[:, None, :] & (tokens[:, None, :] == tokens[:, :, None])
    return live & ~later.any(2)


def followers(matrix: jax.Array, seq: Sequence) -> jax.Array:
    """The matrix with each prompt token's distinct followers, the latest in front."""
    rank = jnp.arange(CANDIDATES)

    def learn(row, token, follower, live):
        old = row[token]
        hit = old == follower
        last = jnp.where(hit.any(), jnp.argmax(hit), CANDIDATES - 1)
        moved = jnp.where(rank <= last, jnp.roll(old, 1), old).at[0].set(follower)
        return row.at[token].set(jnp.where(live, moved, old))

    def at(i, matrix):
        live = i + 1 < seq.prompt_length
        return jax.vmap(learn)(matrix, seq.tokens[:, i], seq.tokens[:, i + 1], live)

    return jax.lax.fori_loop(0, seq.prompt_length.max() - 1, at, matrix)
