"""Draft model: a small model of the same vocabulary drafts a chain, the target scores it in one forward.

Leviathan et al. 2022 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318); paper default gamma 4 to 5. Guarantee:
greedy output equal to plain greedy, sampled output of the target's law (with the chain verifier). State: the draft's
own cache, and a draft length for each row.

Two rules shorten drafts, both off by default and both after the assisted generation of transformers: `adaptive` makes a
row's length two longer after a step that kept every draft and one shorter, down to one, after a step that did not;
`confidence` ends a draft where the draft model's largest probability falls below it (0.4 there).

Departures: published codes run gamma + 1 draft forwards, or leave a hole where the last draft's keys should be. Here
the draft's cache stays two tokens behind the row, and each round begins with one forward over the last two tokens:
gamma forwards, and nothing is missing after full acceptance. transformers ends a draft after an unlikely token was
drawn; here a draft ends before the token is drawn, which asks less of the target and leaves the law as it is. There a
draft cut short by doubt counts against the length; here only a rejected draft does.

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
from jaxinfer.decode.draft_chain import Law
from jaxinfer.decode.drafter import ChainDrafter
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.prefill import commit_chunk
from jaxinfer.decode.types import Proposal, Sequence, Step
from jaxinfer.errors import ConfigError


@struct.dataclass
class DraftState:
    """`cache`: holds `length - 2` tokens of each row, or fewer where the drafter is `lazy`; `gamma i32[B]`: drafts to
    propose, up to the static width. Within a step: `blocks`, and `ran bool[B]`, the rows that they hold."""

    cache: kv.Cache
    gamma: jax.Array
    blocks: Any = None
    ran: Any = None


@dataclasses.dataclass(frozen=True)
class DraftModel(ChainDrafter):
    """`step`: the draft, a model of the target's vocabulary; its weights come as `draft_params`.

    `gamma` is the most that a step drafts and fixes the shapes; `DraftState.gamma` is data, so one compilation serves
    every shorter length. `adaptive`, `confidence`: see above. `lazy`: rows of length 0 cost no draft forward, and their
    cache catches up when they draft again.
    """

    step: Step
    gamma: int = 4
    adaptive: bool = False
    confidence: float = 0.0
    lazy: bool = False

    def __post_init__(self):
        if self.gamma < 1:
            raise ConfigError(f"gamma: got {self.gamma}, accepts 1 or more")
        if not 0 <= self.confidence < 1:
            raise ConfigError(f"confidence: got {self.confidence}, accepts 0 (off) to below 1")

    @property
    def vocab_size(self) -> int:
        """The draft's vocabulary, which must be the target's."""
        return self.step.vocab_size

    @property
    def width(self) -> int:
        """N."""
        return self.gamma

    def init(self, params, target_params, seq, cache) -> DraftState:
        """An empty draft cache of the row's capacity."""
        if params is None:
            raise ConfigError(f"{type(self).__name__} needs its weights: pass draft_params")
        batch, capacity = seq.tokens.shape
        return DraftState(self.step.new_cache(batch, capacity), jnp.full(batch, self.gamma, jnp.int32))

    def prefill(self, params, state: DraftState, chunk, output) -> DraftState:
        """Commit the chunk up to two tokens before the prompt's end."""
        positions = jnp.where(chunk.positions < chunk.length[:, None] - 2, chunk.positions, -1)
        return dataclasses.replace(
            state, cache=commit_chunk(self.step, params, state.cache, chunk.tokens, positions)[0]
        )

    def shortened(self, state: DraftState, limit: jax.Array) -> DraftState:
        """Draft no more than `limit i32[B]` in the next step."""
        return dataclasses.replace(state, gamma=jnp.minimum(limit, self.gamma).astype(jnp.int32))

    def idle(self, params, state: DraftState, seq):
        """None; without `lazy` the cache must see every step."""
        return jnp.zeros_like(seq.done) if self.lazy else None

    def propose(
        self, params, state: DraftState, seq, cache, key, *, target_params, warp
    ) -> tuple[Proposal, DraftState]:
        """Draft up to gamma tokens, each from the draft's own warped law."""
        rows = ~seq.done & (state.gamma > 0) if self.lazy else ~seq.done
        own = draft_chain.catch_up(self.step, params, state.cache, seq, rows) if self.lazy else state.cache
        logits, blocks = self._first(params, own, seq, rows)
        law = Law.of(self.step, params, warp, key_streams.stream(key, Stream.DRAFT))
        drafts = draft_chain.chain(
            law, own, blocks, logits, at=2, last=jnp.where(rows, seq.length - 1, -1),
            want=jnp.where(rows, state.gamma, 0), most=self.gamma, confidence=self.confidence,
        )  # fmt: skip
        state = dataclasses.replace(state, cache=own, blocks=drafts.blocks, ran=rows)
        return Proposal.of_chain(drafts.tokens, drafts.valid, drafts.q_logp), state

    def _first(self, params, cache: kv.Cache, seq: Sequence, rows: jax.Array) -> tuple[jax.Array, Any]:
        """The logits [B, 1, V] after the rows' last two tokens, and the Blocks that hold these."""
        tokens, positions = draft_chain.last_two(seq, rows)

        def run():
            output, blocks = self.step(params, tokens, positions, cache, kv.new_blocks(cache, self.gamma + 1), 0)
            return self.step.head(params, output.hidden[:, 1:]), blocks

        if not self.lazy:
            return run()
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
        return jax.lax.cond(rows.any(), run, lambda: nothing)

    def observe(self, params, state: DraftState, seq, proposal, scored, verdict, n, cache) -> DraftState:
        """Commit what the target kept, so that the draft's cache is two tokens behind again."""
        if state.blocks is None:  # a step that the draft did not see: its cache lags
            return state
        first = (seq.length - n == 1) & (n > 0)  # a one-token prompt has no token before its root: that slot is empty
        path = jnp.arange(self.gamma + 1, dtype=jnp.int32)[None] + first[:, None]
        path = jnp.minimum(path, self.gamma)
        kept = jnp.where(state.ran, n - first, 0)
        return DraftState(kv.commit(state.cache, state.blocks, path, kept), self._next_length(state, proposal, verdict))

    def _next_length(self, state: DraftState, proposal, verdict) -> jax.Array:
        if not self.adaptive:
            return state.gamma
        proposed = proposal.valid.sum(1, dtype=jnp.int32)
        whole = verdict.n_accepted >= proposed
        gamma = jnp.where(whole, jnp.minimum(state.gamma + 2, self.gamma), jnp.maximum(state.gamma - 1, 1))
        return jnp.where(proposed > 0, gamma, state.gamma)
