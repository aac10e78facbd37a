"""CopySpec: drafts what followed the last gamma tokens when they first occurred.

Dumitru et al. 2025 (arXiv:2502.08923); paper: gamma 3, 10 copied tokens. Guarantee: greedy output equal to plain
greedy; sampled output of the target's law (copies count as certain). No state.

Departures: the published code keeps a hash map of gamma-grams, here the row is searched (`ngrams`), with the same
result; and under sampling it keeps a copied token only where the target is certain of it, and so accepts next to none.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

from jaxinfer.decode import ngrams
from jaxinfer.decode.drafter import ChainDrafter, accept_counts
from jaxinfer.decode.types import Proposal


@dataclasses.dataclass(frozen=True)
class CopySpec(ChainDrafter):
    """`gamma`: tokens that must match before anything is copied; `copies`: the most tokens copied."""

    gamma: int = 3
    copies: int = 10

    def __post_init__(self):
        accept_counts(self, "gamma", "copies")

    @property
    def width(self) -> int:
        """N."""
        return self.copies

    def idle(self, params, state, seq):
        """Rows whose last gamma tokens have not occurred before."""
        return ngrams.find(seq, self.gamma) == seq.tokens.shape[1]

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        """The continuation of the first earlier occurrence of the last gamma tokens."""
        start = ngrams.find(seq, self.gamma) + self.gamma
        return Proposal.of_chain(*ngrams.continuation(seq, start, self.copies)), state
