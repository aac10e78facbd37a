"""The shape of a proposal: depths and ancestors of its slots.

Stability: internal.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxinfer.decode.types import Proposal, Slots


def slots_of(proposal: Proposal) -> Slots:
    """Depth of every slot and the drafts on its path, its own included; slot 0 is the root.

    A chain's are constants of shape `[1, ...]`; a tree's follow `parent`, at most `depth + beyond` steps up.
    """
    n = proposal.tokens.shape[1]
    if proposal.chain:
        index = jnp.arange(n + 1, dtype=jnp.int32)
        ancestors = jnp.arange(1, n + 1)[None, :] <= index[:, None]
        return Slots(index[None], proposal.tokens, ancestors[None])
    slot = jnp.arange(n + 1, dtype=jnp.int32)[None]
    parent = jnp.concatenate([jnp.zeros_like(proposal.parent[:, :1]), proposal.parent], 1)
    at = jnp.broadcast_to(slot, parent.shape)
    depth = jnp.zeros_like(parent)
    ancestors = jnp.zeros((*parent.shape, n + 1), bool)
    for _ in range(proposal.depth + proposal.beyond):
        ancestors |= at[..., None] == slot[:, None]
        depth += at > 0
        at = jnp.take_along_axis(parent, at, 1)
    return Slots(depth, proposal.tokens, ancestors[..., 1:])


def visibility(slots: Slots) -> jnp.ndarray:
    """Which slots each slot attends to, bool[B, R, R]: the root and its own path."""
    root = jnp.ones((*slots.ancestors.shape[:2], 1), bool)
    return jnp.concatenate([root, slots.ancestors], 2)
