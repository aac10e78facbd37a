"""Walking a proposal's tree: down along chosen tokens, up from a slot, and what holds along a path.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.decode.draw import first_max
from jaxinfer.decode.types import Proposal


def usable(proposal: Proposal) -> jax.Array:
    """Which drafts may be accepted: valid ones that are no probes, bool[B, N]."""
    return proposal.valid if proposal.probe is None else proposal.valid & ~proposal.probe


def walk(chosen: jax.Array, proposal: Proposal) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the root, step by step, to the first child whose token is its parent's `chosen i32[B, R]`.

    The path `i32[B, D + 1]` (-1 after its end), how many drafts are on it `i32[B]`, and its last slot `i32[B]`.
    """
    at = jnp.zeros_like(chosen[:, 0])
    fits = usable(proposal)
    alive, n, path = jnp.ones(at.shape, bool), at, [at]
    for _ in range(proposal.depth):
        wanted = jnp.take_along_axis(chosen, at[:, None], 1)
        hit = fits & (proposal.parent == at[:, None]) & (proposal.tokens == wanted)
        alive &= hit.any(1)
        at = jnp.where(alive, first_max(hit.astype(jnp.int32))[1] + 1, at)
        n += alive
        path.append(jnp.where(alive, at, -1))
    return jnp.stack(path, 1), n, at


def path_to(end: jax.Array, n: jax.Array, proposal: Proposal) -> jax.Array:
    """The path i32[B, D + 1] from the root to slot `end i32[B]`, which is `n i32[B]` drafts deep; -1 after it."""
    parent = jnp.concatenate([jnp.zeros_like(proposal.parent[:, :1]), proposal.parent], 1)
    climbed = [end]
    for _ in range(proposal.depth):
        climbed.append(jnp.take_along_axis(parent, climbed[-1][:, None], 1)[:, 0])
    index = n[:, None] - jnp.arange(proposal.depth + 1, dtype=jnp.int32)
    path = jnp.take_along_axis(jnp.stack(climbed, 1), jnp.maximum(index, 0), 1)
    return jnp.where(index >= 0, path, -1)


def along(path: jax.Array, holds: jax.Array) -> jax.Array:
    """`holds bool[B, R]` at the slots of `path i32[B, K]`, True past its end: bool[B, K]."""
    return jnp.take_along_axis(holds, jnp.maximum(path, 0), 1) | (path < 0)
