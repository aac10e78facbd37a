"""Plain autoregression: the empty proposal.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.types import Proposal


@dataclasses.dataclass(frozen=True)
class Autoregressive(DrafterBase):
    """One token a forward. Guarantee: the definition of the target's output. No state."""

    width: int = dataclasses.field(default=0, init=False)
    depth: int = dataclasses.field(default=0, init=False)

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        """No drafts."""
        empty = jnp.zeros((seq.length.shape[0], 0), jnp.int32)
        return Proposal.of_chain(empty, empty.astype(bool)), state
