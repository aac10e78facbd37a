"""Plain autoregression: the empty proposal.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxinfer.decode.types import Proposal


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """One token a forward. Guarantee: the definition of the target's output. No state."""

    width: int = dataclasses.field(default=0, init=False)
    depth: int = dataclasses.field(default=0, init=False)
    taps: tuple[int, ...] = dataclasses.field(default=(), init=False)

    def init(self, params, target_params, seq, cache):
        """No state."""
        return ()

    def prefill(self, params, state, chunk, output):
        """Nothing to learn from a prompt."""
        return state

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        """No drafts."""
        empty = jnp.zeros((seq.length.shape[0], 0), jnp.int32)
        return Proposal.of_chain(empty, empty.astype(bool)), state

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        """Nothing to learn."""
        return state
