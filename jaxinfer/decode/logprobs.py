"""Log-probabilities of the output: the chosen token's and the most likely ones', under the model's own logits.

They are a log-softmax of the raw logits, before bias, penalties, temperature and filters; never the draft's, and for a
corrected token never the residual's.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.decode.emit import append
from jaxinfer.decode.types import Emission, Proposal, Verdict


@struct.dataclass
class TokenLogprobs:
    """By output index: `chosen f32[B, M]`; `top_ids i32[B, M, n]`, `top f32[B, M, n]` of the n most likely tokens."""

    chosen: jax.Array
    top_ids: jax.Array
    top: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, n: int) -> TokenLogprobs:
        """Room for `length` tokens a row."""
        top = jnp.zeros((batch, length, n))
        return cls(jnp.zeros((batch, length)), top.astype(jnp.int32), top)

    def extend(
        self, logits: jax.Array, proposal: Proposal, verdict: Verdict, emission: Emission, at: jax.Array
    ) -> TokenLogprobs:
        """With the emitted tokens' rows of raw `logits f32[B, R, V]` written from output index `at i32[B]` on."""
        if not proposal.chain:
            logits = jnp.take_along_axis(logits, jnp.maximum(verdict.path, 0)[..., None], 1)
        total = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, emission.tokens[..., None], 2)[..., 0] - total
        top, ids = jax.lax.top_k(logits, self.top.shape[-1])
        return TokenLogprobs(
            append(self.chosen, chosen, at, emission.n),
            append(self.top_ids, ids, at, emission.n),
            append(self.top, top - total[..., None], at, emission.n),
        )
