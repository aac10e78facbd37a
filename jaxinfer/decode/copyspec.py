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
from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.types import Proposal
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CopySpec(DrafterBase):
    """`gamma`: tokens that must match before anything is copied; `copies`: the most tokens copied."""

    gamma: int = 3
    copies: int = 10

    def __post_init__(self):
        for name in ("gamma", "copies"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 1 or more")

    @property
    def width(self) -> int:
        """N."""
        return self.copies

    @property
    def depth(self) -> int:
        """D."""
        return self.copies

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        """The continuation of the first earlier occurrence of the last gamma tokens."""
        start = ngrams.find(seq, self.gamma) + self.gamma
        return Proposal.of_chain(*ngrams.continuation(seq, start, self.copies)), state
