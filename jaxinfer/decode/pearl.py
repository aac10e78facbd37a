"""PEARL: the small model drafts the next block while the target reads the last one, so that neither waits.

Liu et al. 2024 (arXiv:2408.11850); gamma, the ratio of the two models' times, is 3 to 5 in the paper's scripts, 4 by
default. Guarantee: greedy output equal to plain greedy, sampled output of the target's law. State: the draft model's
cache and the pending block (tokens and their laws).

Two modes. With nothing pending (pre-verify) the target reads the root alone while gamma tokens are drafted, and its one
law tests the first of them; where it stays, the other gamma - 1 become the pending block. With a block pending
(post-verify) the target reads it while gamma more are drafted after it, and tests the block and the first of the new
drafts; where all stay, the others become pending. Any rejection goes back to pre-verify with the corrected token. There
is no bonus: the draft already guessed that token (`Proposal.ahead`), so a guess is tested where a bonus would be drawn.

What runs where: in one step the new drafts and the target's forward both depend on the pending block and not on each
other, so two devices can do both at once: `pearl_devices` does. In one compiled program on one device nothing is made
to overlap: there a step costs gamma draft forwards and a target forward one after the other, as DraftModel's does,
without a bonus and with the new drafts lost at each rejection, and is slower. Steps and acceptance are the same either
way.

Departures: the published code seeds both processes alike, so that one uniform drafts a token and tests it, which is
biased under sampling (total variation 0.29 on a toy); here the draws are of separate streams. The draft model reads the
pending block anew in each step's first forward instead of keeping keys that a rejection must take back.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.decode import draft_chain
from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draft_chain import Drafts, Law
from jaxinfer.decode.drafter import ChainDrafter
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.prefill import commit_chunk
from jaxinfer.decode.types import Proposal, Step
from jaxinfer.errors import ConfigError


@struct.dataclass
class PearlState:
    """`cache`: holds `length - 2` tokens of each row. The pending block: `tokens i32[B, gamma - 1]`, `count i32[B]` (0
    in pre-verify, else gamma - 1) and its laws `q_logp f32[B, gamma - 1, V]`. Within a step: the new `drafts`."""

    cache: kv.Cache
    tokens: jax.Array
    count: jax.Array
    q_logp: jax.Array
    drafts: Drafts | None = None


@dataclasses.dataclass(frozen=True)
class Pearl(ChainDrafter):
    """`step`: the draft model, whose weights come as `draft_params`; `gamma`: drafts a step."""

    step: Step
    gamma: int = 4

    def __post_init__(self):
        if self.gamma < 2:
            raise ConfigError(f"gamma: got {self.gamma}, accepts 2 or more")

    @property
    def vocab_size(self) -> int:
        """The draft's vocabulary, which must be the target's."""
        return self.step.vocab_size

    @property
    def width(self) -> int:
        """N: what the target reads; the guess ahead is one more."""
        return self.gamma - 1

    def init(self, params, target_params, seq, cache) -> PearlState:
        """An empty draft cache, and nothing pending."""
        if params is None:
            raise ConfigError("Pearl needs its draft model's weights: pass draft_params")
        batch, capacity = seq.tokens.shape
        return PearlState(
            self.step.new_cache(batch, capacity),
            jnp.zeros((batch, self.gamma - 1), jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((batch, self.gamma - 1, self.vocab_size)),
        )

    def prefill(self, params, state: PearlState, chunk, output) -> PearlState:
        """Commit the chunk up to two tokens before the prompt's end."""
        positions = jnp.where(chunk.positions < chunk.length[:, None] - 2, chunk.positions, -1)
        return dataclasses.replace(
            state, cache=commit_chunk(self.step, params, state.cache, chunk.tokens, positions)[0]
        )

    def propose(self, params, state: PearlState, seq, cache, key, *, target_params, warp):
        """The pending block, and the first of gamma new drafts as the guess ahead of it."""
        drafts = self.draft(params, state, seq, key, warp)
        return self.proposal(state, drafts), dataclasses.replace(state, drafts=drafts)

    def draft(self, params, state: PearlState, seq, key, warp) -> Drafts:
        """Gamma drafts after the row and its pending block. Reads nothing of the target's."""
        pending = self.gamma - 1
        rows = ~seq.done
        tokens, positions = draft_chain.last_two(seq, rows)
        after = jnp.arange(pending, dtype=jnp.int32)[None]
        ahead = jnp.where(rows[:, None] & (after < state.count[:, None]), seq.length[:, None] + after, -1)
        blocks = kv.new_blocks(state.cache, 2 * self.gamma)
        output, blocks = self.step(
            params, jnp.concatenate([tokens, state.tokens], 1), jnp.concatenate([positions, ahead], 1),
            state.cache, blocks, 0,
        )  # fmt: skip
        last = jnp.take_along_axis(output.hidden, (1 + state.count)[:, None, None], 1)
        law = Law(self.step, params, warp, key_streams.stream(key, Stream.DRAFT), state.tokens, state.count)
        return draft_chain.chain(
            law, state.cache, blocks, self.step.head(params, last), at=self.gamma + 1,
            last=jnp.where(rows, seq.length - 1 + state.count, -1), want=jnp.full_like(state.count, self.gamma),
            most=self.gamma,
        )  # fmt: skip

    def proposal(self, state: PearlState, drafts: Drafts) -> Proposal:
        """What the target tests: the pending block and the first draft after it."""
        valid = jnp.arange(self.gamma - 1)[None] < state.count[:, None]
        sampled = drafts.q_logp is not None
        proposal = Proposal.of_chain(state.tokens, valid, state.q_logp if sampled else None)
        first = None if drafts.q_logp is None else drafts.q_logp[:, 0]
        return dataclasses.replace(proposal, ahead=drafts.tokens[:, 0], ahead_logp=first)

    def observe(self, params, state: PearlState, seq, proposal, scored, verdict, n, cache) -> PearlState:
        """Commit what the target kept; the new drafts are pending where they follow what was emitted."""
        drafts: Any = state.drafts
        first = (seq.length - n == 1) & (n > 0)  # a one-token prompt has no token before its root: that slot is empty
        path = jnp.arange(self.gamma, dtype=jnp.int32)[None] + first[:, None]
        own = kv.commit(state.cache, drafts.blocks, jnp.minimum(path, 2 * self.gamma - 1), n - first)
        on = (verdict.n_accepted == state.count) & (verdict.next_token == drafts.tokens[:, 0])
        q_logp = state.q_logp if drafts.q_logp is None else drafts.q_logp[:, 1:]
        return PearlState(own, drafts.tokens[:, 1:], jnp.where(on, self.gamma - 1, 0), q_logp)
