"""CopySpec with a draft model: copies where the last tokens occurred before, and lets a small model draft elsewhere.

Dumitru et al. 2025 (arXiv:2502.08923); paper: gamma 3, 10 copied tokens, 5 drafted ones. Guarantee: greedy output equal
to plain greedy; sampled output of the target's law (copies count as certain, drafts are of the draft model's law).
State: the draft model's, whose cache falls behind while a row copies and is brought up, a chunk of tokens a forward,
when the row drafts again; a step in which every row copies runs no draft forward.

Departures: the published code runs one row, so a step either copies or drafts; here each row does as it can. And those
of `copyspec`.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.decode import ngrams
from jaxinfer.decode.copyspec import CopySpec
from jaxinfer.decode.draft_model import DraftModel, DraftState
from jaxinfer.decode.drafter import ChainDrafter
from jaxinfer.decode.types import Proposal, Step


@dataclasses.dataclass(frozen=True)
class CopyDraft(ChainDrafter):
    """`step`: the draft model, whose weights come as `draft_params`. `gamma`: tokens that must match before anything is
    copied; `copies`: the most tokens copied; `drafts`: the most drafted where nothing matches."""

    step: Step
    gamma: int = 3
    copies: int = 10
    drafts: int = 5

    def __post_init__(self):
        CopySpec(self.gamma, self.copies)
        DraftModel(self.step, self.drafts)

    @property
    def _model(self) -> DraftModel:
        return DraftModel(self.step, self.drafts, lazy=True)

    @property
    def vocab_size(self) -> int:
        """The draft's vocabulary, which must be the target's."""
        return self.step.vocab_size

    @property
    def width(self) -> int:
        """N."""
        return max(self.copies, self.drafts)

    def init(self, params, target_params, seq, cache) -> DraftState:
        """An empty draft cache."""
        return self._model.init(params, target_params, seq, cache)

    def prefill(self, params, state: DraftState, chunk, output) -> DraftState:
        """The draft model reads the prompt."""
        return self._model.prefill(params, state, chunk, output)

    def idle(self, params, state: DraftState, seq):
        """None: where nothing is copied the model drafts."""
        return jnp.zeros_like(seq.done)

    def propose(self, params, state: DraftState, seq, cache, key, *, target_params, warp):
        """What followed the last gamma tokens before; where nothing did, the draft model's tokens."""
        copied, have = ngrams.continuation(seq, ngrams.find(seq, self.gamma) + self.gamma, self.copies)
        copies = have[:, :1]
        state = self._model.shortened(state, jnp.where(copies[:, 0], 0, self.drafts))
        drafted, state = self._model.propose(params, state, seq, cache, key, target_params=target_params, warp=warp)
        tokens = jnp.where(copies, _wide(copied, self.width), _wide(drafted.tokens, self.width))
        valid = jnp.where(copies, _wide(have, self.width), _wide(drafted.valid, self.width))
        q_logp = drafted.q_logp
        if q_logp is not None:
            certain = jnp.where(jnp.arange(q_logp.shape[-1]) == tokens[..., None], 0.0, -jnp.inf)
            q_logp = jnp.where(copies[..., None], certain, _wide(q_logp, self.width))
        return Proposal.of_chain(tokens, valid, q_logp), state

    def observe(self, params, state: DraftState, seq, proposal, scored, verdict, n, cache) -> DraftState:
        """The cache follows the rows that drafted."""
        return self._model.observe(params, state, seq, proposal, scored, verdict, n, cache)


def _wide(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
