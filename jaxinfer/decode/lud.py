"""Lexical Unit Decoding: a model trained to guess past its next token keeps the guesses that it is sure of, unchecked.

Sun et al. 2024, LUD (arXiv:2405.15208). The model reads k - 1 PAD tokens after the text and so gives k laws in one
forward: that of the next token, which always stays, and k - 1 guesses at what follows it. Guess i stays while its
probability is at least theta and all guesses before it stayed. The PADs' keys and values are dropped.
`jaxinfer.train.lud` makes such a model of any other; one that was not trained for it keeps next to nothing.

Guarantee: approximate: a guess that stays is never compared with what the model would have said with the text before
it. With `theta` 1 nothing is guessed and the output is plain greedy's, with `theta` 0 every step keeps k tokens.
State: a row's guesses i32[B, k - 1] and how many of them stay i32[B].

On the decoder's contract the guesses that stayed in one step are the chain of the next, so that their keys come from
real tokens, and PADs follow the chain as probes: a step's k laws stand at the chain's end. Token for token this is the
published loop, seen half a step later.

Departures: defaults of theta and k are ours, since the paper's could not be verified. Greedy only. Bans, grammars,
forced tokens and end tokens hold for guesses too (a guess that they forbid is dropped, with all after it); penalties
change the first token of a step alone.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.draw import first_max
from jaxinfer.decode.types import Proposal, Scored, Sequence, Verdict
from jaxinfer.decode.walk import usable
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Decided:
    """Keeps every draft that no rule forbids: the drafts were judged when they were guessed. Chains, greedy."""

    reads: str = dataclasses.field(default="scores", init=False)
    greedy_only: bool = dataclasses.field(default=True, init=False)

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: scores, of which only what is impossible is read at a draft. No randomness is read."""
        if proposal.tokens.shape[1] and not proposal.chain:
            raise ConfigError("the verifier of lexical units was given a tree; it accepts chains")
        peak, best = first_max(law)
        chosen = jnp.take_along_axis(law[:, :-1], proposal.tokens[..., None], 2)[..., 0]
        kept = usable(proposal) & jnp.isfinite(chosen)
        n = jnp.cumprod(kept.astype(jnp.int32), 1).sum(1, dtype=jnp.int32)
        index = jnp.arange(proposal.depth + 1, dtype=jnp.int32)[None]
        path = jnp.where(index <= n[:, None], index, -1)
        finite = jnp.isfinite(jnp.take_along_axis(peak, n[:, None], 1)[:, 0])
        return Verdict(path, n, jnp.take_along_axis(best, n[:, None], 1)[:, 0], finite)


@struct.dataclass
class Unit:
    """`tokens i32[B, k - 1]`: guesses, of which the first `n i32[B]` stay."""

    tokens: jax.Array
    n: jax.Array


@dataclasses.dataclass(frozen=True)
class LUD(DrafterBase):
    """`k`: the most tokens that a step adds; `theta`: the least probability of a guess that stays; `pad`: the token id
    that stands for one to be guessed, as in training."""

    k: int = 4
    theta: float = 0.9
    pad: int = 1

    def __post_init__(self):
        if type(self.k) is not int or self.k < 2:
            raise ConfigError(f"k: got {self.k!r}, accepts a whole number of 2 or more")
        if not 0 <= self.theta <= 1:
            raise ConfigError(f"theta: got {self.theta!r}, accepts 0 (every guess stays) to 1 (none)")
        if type(self.pad) is not int or self.pad < 0:
            raise ConfigError(f"pad: got {self.pad!r}, accepts a token id")

    @property
    def width(self) -> int:
        """N: guesses, and PADs after them."""
        return 2 * (self.k - 1)

    @property
    def depth(self) -> int:
        """D: guesses alone are ever kept."""
        return self.k - 1

    @property
    def verifier(self) -> Decided:
        """The rule is the method's own."""
        return Decided()

    def init(self, params, target_params, seq: Sequence, cache) -> Unit:
        """No guesses before the first step."""
        if seq.vocab_size and self.pad >= seq.vocab_size:
            raise ConfigError(f"pad: got {self.pad}, accepts a token id below {seq.vocab_size}")
        batch = seq.length.shape[0]
        return Unit(jnp.full((batch, self.k - 1), self.pad, jnp.int32), jnp.zeros(batch, jnp.int32))

    def propose(self, params, state: Unit, seq, cache, key, *, target_params, warp) -> tuple[Proposal, Unit]:
        """The guesses that stay, and k - 1 PADs where they end."""
        index = jnp.arange(self.width, dtype=jnp.int32)[None]
        n = state.n[:, None]
        guesses = jnp.pad(state.tokens, ((0, 0), (0, self.k - 1)))
        chain = Proposal.of_chain(jnp.where(index < n, guesses, self.pad), index < n + self.k - 1)
        return dataclasses.replace(chain, probe=index >= n, depth=self.depth), state

    def observe(self, params, state: Unit, seq, proposal: Proposal, scored: Scored, verdict, n, cache) -> Unit:
        """Read the next guesses from the PADs after the chain's end."""
        at = state.n[:, None] + jnp.arange(1, self.k, dtype=jnp.int32)[None]  # slots; slot 0 is the root
        logits = jnp.take_along_axis(scored.logits, at[..., None], 1).astype(jnp.float32)
        peak, tokens = first_max(logits)
        sure = peak - jax.nn.logsumexp(logits, -1) >= (math.log(self.theta) if self.theta else -jnp.inf)
        read = jnp.take_along_axis(proposal.valid, at - 1, 1) & (self.theta < 1)
        # A chain that a rule cut short leaves the PADs after tokens that never came.
        read &= (verdict.n_accepted == state.n)[:, None]
        kept = jnp.cumprod((read & sure).astype(jnp.int32), 1).sum(1, dtype=jnp.int32)
        return Unit(tokens, kept)
