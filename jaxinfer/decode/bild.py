"""BiLD: a small model writes while it is sure of itself, and the large one takes a token back where it disagrees badly.

Kim et al. 2023, Speculative Decoding with Big Little Decoder (arXiv:2302.07863). Fallback: the small model hands over
before the first token where its largest probability is below `fallback` (paper and code: 0.6), or after `gamma` tokens
(10). Rollback: in one forward the large model reads what was written; the first token with a surprise, -log p, above
`rollback` (code: 5; 2 to 5 useful) is replaced by the large model's own choice and the rest is dropped; where none is,
the large model adds its next token. A token that the large model would have chosen itself is never replaced.

Guarantee: approximate by design: tokens stay that the large model did not prefer. With `rollback` 0 only its own choice
stays, and the output is plain greedy's. Greedy only, as published: sampling is refused. State: as DraftModel.

Departures: the published code begins a text with a token of the large model and takes the largest probability over the
whole batch; here a step begins with the small model, which hands over at once where it is not sure, and every row falls
back and rolls back on its own.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.decode.draft_model import DraftModel
from jaxinfer.decode.draw import first_max
from jaxinfer.decode.types import Proposal, Verdict
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rollback:
    """Keeps drafts up to the first that surprises the target by more than `threshold` nats. Chains, greedy."""

    threshold: float = 5.0
    reads: str = dataclasses.field(default="scores", init=False)
    greedy_only: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        if self.threshold < 0:
            raise ConfigError(f"threshold: got {self.threshold}, accepts 0 or more")

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: scores. No randomness is read from `key[B]`."""
        if proposal.tokens.shape[1] and not proposal.chain:
            raise ConfigError("BiLD's verifier was given a tree; it accepts chains")
        peak, best = first_max(law)
        chosen = jnp.take_along_axis(law[:, :-1], proposal.tokens[..., None], 2)[..., 0]
        surprise = jax.nn.logsumexp(law[:, :-1], -1) - chosen
        kept = (surprise <= self.threshold) | (proposal.tokens == best[:, :-1])
        n = jnp.cumprod((proposal.valid & kept).astype(jnp.int32), 1).sum(1, dtype=jnp.int32)
        index = jnp.arange(proposal.depth + 1, dtype=jnp.int32)[None]
        path = jnp.where(index <= n[:, None], index, -1)
        finite = (jnp.isfinite(peak) | (index > n[:, None])).all(1)
        return Verdict(path, n, jnp.take_along_axis(best, n[:, None], 1)[:, 0], finite)


@dataclasses.dataclass(frozen=True)
class Bild(DraftModel):
    """`step`: the small model. `gamma`: the most that it writes before the large model reads; `fallback`: the least
    probability with which it goes on; `rollback`: the most surprise that the large model lets stand, in nats."""

    gamma: int = 10
    fallback: float = 0.6
    rollback: float = 5.0
    adaptive: bool = dataclasses.field(default=False, init=False)
    confidence: float = dataclasses.field(default=0.0, init=False)
    lazy: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self):
        object.__setattr__(self, "confidence", self.fallback)
        if not 0 <= self.fallback < 1:
            raise ConfigError(f"fallback: got {self.fallback}, accepts 0 (never) to below 1")
        if self.rollback < 0:
            raise ConfigError(f"rollback: got {self.rollback}, accepts 0 (plain greedy) or more")
        super().__post_init__()

    @property
    def verifier(self) -> Rollback:
        """The rule is the method's own."""
        return Rollback(self.rollback)
