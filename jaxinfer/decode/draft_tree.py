"""Trees grown level by level, of which the likeliest nodes are kept: EAGLE-2's dynamic tree, without the model.

Each level gives every branch of the frontier its likeliest children; the likeliest of all children, by the product of
the probabilities on their path, are the next frontier; in the end the likeliest of all nodes are the draft. A node is
never likelier than its parent, and of equals the earlier one is kept, so what is kept is a tree.

Stability: internal.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.decode.types import Proposal


@struct.dataclass
class Frontier:
    """Branches to be given children: `tokens`, `node i32[B, K]`, their places among all nodes so far, log-probabilities
    `score f32[B, K]`, and `above i32[B, K]`: which branch of the frontier before is the parent (0 on the first)."""

    tokens: jax.Array
    node: jax.Array
    score: jax.Array
    above: jax.Array


@struct.dataclass
class Growing:
    """Nodes so far: `tokens`, `parent i32[B, M]` (a node's place, -1: a child of the root), `score f32[B, M]`, the
    log-probability of the path to it."""

    tokens: jax.Array
    parent: jax.Array
    score: jax.Array

    @classmethod
    def of_root(cls, logp: jax.Array, branches: int) -> tuple[Growing, Frontier]:
        """The first level: the likeliest `branches` tokens of `logp f32[B, V]`."""
        score, tokens = jax.lax.top_k(logp, branches)
        node = jnp.broadcast_to(jnp.arange(branches, dtype=jnp.int32), tokens.shape)
        return cls(tokens, jnp.full_like(tokens, -1), score), Frontier(tokens, node, score, jnp.zeros_like(node))

    def level(self, frontier: Frontier, logp: jax.Array) -> tuple[Growing, Frontier]:
        """With the likeliest children of each branch, as many as there are branches, under `logp f32[B, K or 1, V]`;
        and the likeliest of these children."""
        branches, size = frontier.node.shape[1], self.tokens.shape[1]
        more, tokens = jax.lax.top_k(logp, branches)
        grid = (logp.shape[0], branches, branches)
        score = (frontier.score[..., None] + more).reshape(grid[0], -1)
        tokens = jnp.broadcast_to(tokens, grid).reshape(grid[0], -1)
        parent = jnp.broadcast_to(frontier.node[..., None], grid).reshape(grid[0], -1)
        grown = Growing(
            jnp.concatenate([self.tokens, tokens], 1),
            jnp.concatenate([self.parent, parent], 1),
            jnp.concatenate([self.score, score], 1),
        )
        best, which = jax.lax.top_k(score, branches)
        chosen = jnp.take_along_axis(tokens, which, 1)
        return grown, Frontier(chosen, size + which, best, which // branches)

    def best(self, nodes: int, depth: int, live: jax.Array) -> Proposal:
        """The `nodes` likeliest as drafts, likeliest first, in rows `live bool[B]`; `depth` levels were grown."""
        score, kept = jax.lax.top_k(self.score, min(nodes, self.tokens.shape[1]))
        above = jnp.take_along_axis(self.parent, kept, 1)
        # A parent stands before its children: where it stands is its slot (0, the root, is before all).
        slot = (kept[:, None, :] == above[..., None]).argmax(-1) + 1
        parent = jnp.where(above < 0, 0, slot)
        valid = live[:, None] & jnp.isfinite(score)
        tokens = jnp.take_along_axis(self.tokens, kept, 1)
        proposal = Proposal.of_tree(tokens, parent, valid, depth=depth)
        short = nodes - tokens.shape[1]
        if short <= 0:
            return proposal
        pad = ((0, 0), (0, short))
        return dataclasses.replace(
            proposal,
            tokens=jnp.pad(tokens, pad),
            parent=jnp.pad(proposal.parent, pad),
            valid=jnp.pad(proposal.valid, pad),
        )


def most_nodes(branches: int, depth: int) -> int:
    """Nodes of a tree of `depth` levels before any is dropped."""
    return branches + (depth - 1) * branches**2
