"""Prompt lookup: drafts what followed the last n-gram when it occurred before, trying long n-grams first.

Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding), in the form of Xia et al.'s Spec-Bench 2024
(arXiv:2401.07851): n from 3 down to 1, the first earlier occurrence, up to 10 tokens. Guarantee: greedy output equal
to plain greedy; sampled output of the target's law (drafts count as certain). No state.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxinfer.decode import ngrams
from jaxinfer.decode.drafter import ChainDrafter, accept_counts
from jaxinfer.decode.types import Proposal


@dataclasses.dataclass(frozen=True)
class PromptLookup(ChainDrafter):
    """`ngram`: the longest n-gram looked up; `drafts`: the most tokens proposed."""

    ngram: int = 3
    drafts: int = 10

    def __post_init__(self):
        accept_counts(self, "ngram", "drafts")

    @property
    def width(self) -> int:
        """N."""
        return self.drafts

    def idle(self, params, state, seq):
        """Rows whose last token has not occurred before."""
        return ngrams.find(seq, 1) == seq.tokens.shape[1]

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        """The continuation of the longest n-gram that occurred before; nothing where none did."""
        size = seq.tokens.shape[1]
        start = jnp.full(seq.length.shape, size, jnp.int32)
        for n in range(1, self.ngram + 1):
            found = ngrams.find(seq, n)
            start = jnp.where(found < size, found + n, start)
        return Proposal.of_chain(*ngrams.continuation(seq, start, self.drafts)), state
