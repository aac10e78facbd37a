"""Generalized aggressive decoding: a non-autoregressive head drafts a block in one pass, and drafts near the top stay.

Xia et al. 2022 (arXiv:2203.16487), Ge et al. 2022 (arXiv:2205.10350); the paper's blocks are of 25, its code's default
5. A draft stays where its score is among the target's `beta` highest and at most `tau` below the highest; the first
other one is replaced by the target's best. Guarantee: approximate; with `beta=1` or `tau=0` (ties apart) the output is
plain greedy's. Paper (its relaxed form): beta 3, tau 1. No state.

The rule reads scores, so temperature and filters have no effect on it; bias, penalties and processors do.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxinfer.decode.drafter import DrafterBase, accept_counts
from jaxinfer.decode.draw import first_max
from jaxinfer.decode.tree import slots_of
from jaxinfer.decode.types import Proposal, Sequence, Verdict
from jaxinfer.decode.walk import along, path_to, usable
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TopBeta:
    """`beta`: ranks that may stay; `tau`: the greatest distance to the best score, in nats. Chains and trees."""

    beta: int = 3
    tau: float = 1.0
    reads: str = dataclasses.field(default="scores", init=False)

    def __post_init__(self):
        if self.beta < 1:
            raise ConfigError(f"beta: got {self.beta}, accepts 1 or more")
        if not self.tau >= 0:
            raise ConfigError(f"tau: got {self.tau}, accepts 0 or more")

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: scores. The longest path of kept drafts; of several, the one whose drafts come first."""
        peak, best = first_max(law)
        zeros = jnp.zeros_like(best[:, 0])
        end, n, path = zeros, zeros, zeros[:, None]
        if proposal.tokens.shape[1]:
            kept = jnp.concatenate([zeros[:, None] == 0, self._fits(law, peak, proposal)], 1)
            for _ in range(proposal.depth - 1):  # a draft stays only under one that stays
                kept = kept.at[:, 1:].set(kept[:, 1:] & jnp.take_along_axis(kept, proposal.parent, 1))
            depth = jnp.where(kept, slots_of(proposal).depth, -1)
            n, end = first_max(depth)
            path = path_to(end, n, proposal)
        next_token = jnp.take_along_axis(best, end[:, None], 1)[:, 0]
        return Verdict(path, n, next_token, along(path, jnp.isfinite(peak)).all(1))

    def _fits(self, law: jax.Array, peak: jax.Array, proposal: Proposal) -> jax.Array:
        """Which drafts pass after their parent, bool[B, N]. Of equal scores the lower id ranks higher, as in greedy."""
        parent, token = proposal.parent, proposal.tokens[..., None]
        scores = jnp.take_along_axis(law, parent[..., None], 1)
        own = jnp.take_along_axis(scores, token, 2)
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, law.shape[-1]), 2)
        rank = ((scores > own) | ((scores == own) & (ids < token))).sum(-1)
        near = jnp.take_along_axis(peak, parent, 1) - own[..., 0] <= self.tau
        return usable(proposal) & (rank < self.beta) & near


class BlockHead(Protocol):
    """A non-autoregressive head: frozen and hashable, with its weights as `draft_params`."""

    def __call__(self, params: Any, target_params: Any, seq: Sequence, block: int) -> jax.Array:
        """Scores f32[B, block, V] of the `block` tokens after each row's prefix, all in one pass."""
        ...


class BlockDrafter(DrafterBase):
    """What drafters that fill a block at once share; a subclass has the fields `block`, `beta` and `tau`."""

    block: int
    beta: int
    tau: float

    def __post_init__(self):
        accept_counts(self, "block")
        TopBeta(self.beta, self.tau)

    @property
    def width(self) -> int:
        """N."""
        return self.block

    @property
    def depth(self) -> int:
        """D."""
        return self.block

    @property
    def verifier(self) -> TopBeta:
        """The rule that the method prescribes."""
        return TopBeta(self.beta, self.tau)


@dataclasses.dataclass(frozen=True)
class GAD(BlockDrafter):
    """`head` fills `block` places after the prefix at once; `beta` and `tau` are its verifier's."""

    head: BlockHead
    block: int = 5
    beta: int = 3
    tau: float = 1.0

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        """The head's best token at each place."""
        tokens = first_max(self.head(params, target_params, seq, self.block))[1]
        return Proposal.of_chain(tokens, jnp.ones(tokens.shape, bool)), state
