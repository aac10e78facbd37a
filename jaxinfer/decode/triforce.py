"""TriForce: a small model drafts for the target over a retrieval cache, and that for the target over its whole cache.

Sun et al. 2024 (arXiv:2404.11912), for prompts so long that reading their keys costs more than the weights do. Inner
loop, until gamma tokens are there (gamma or gamma + 1): the small model proposes one token; the target reads it over
the retrieval cache and keeps it, with a token more, or corrects it. Outer: one forward over the whole cache tests all
of them, each against the law that it has over the retrieval cache. Guarantee: greedy output equal to plain greedy,
sampled output of the target's law. The paper's settings: gamma 6, budget 4096, chunks of 8; a draft of 68M parameters
with a streaming cache (`cache.SinkCache(16, 240)` as the policy of `step`).

State: the small model's cache, up to three tokens behind the row, and the retrieval cache (`cache.Retrieval`), up to
two; the latter is made once, when the prompt is in the cache, by one forward of the target that notes its queries.

Departures: the released code draws the correction of the inner loop from the retrieval law itself in place of the
normalised residual, so its drafts do not have the law against which they are tested, and it is not lossless under
sampling (total variation 0.1 on a toy); here the residual is used. Its inner loop runs past end tokens, one row at a
time; here rows go at their own pace and an end is cut as everywhere. Keys of new tokens in the retrieval cache are its
own, not copies out of the whole cache.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.cache.retrieval import Asking, Retrieval
from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draft_chain import Law
from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.prefill import commit_chunk, notes_of
from jaxinfer.decode.types import Proposal, Sequence, Slots, Step, Verdict, Verifier, WarpLike
from jaxinfer.decode.verify import Chain, Greedy
from jaxinfer.errors import ConfigError

LAG = 3  # slots of the first inner round: what the small model may lack, and the root


@struct.dataclass
class Pending:
    """Blocks of an inner loop, and which of their slots hold tokens that stand."""

    small: Any
    small_fed: jax.Array
    middle: Any
    middle_kept: jax.Array


@struct.dataclass
class TriForceState:
    """`small` and `middle`: the caches of the small model and of retrieval. Within a step: `pending`."""

    small: kv.Cache
    middle: kv.Cache | None = None
    pending: Pending | None = None


@struct.dataclass
class Inner:
    """The inner loop: `n i32[B]` of `tokens i32[B, N]` stand, of laws `q_logp f32[B, N, V]`; `bonus bool[B]`: the last
    round kept its draft, so the token before the last one has not been fed to the small model; `at`: the next slot."""

    tokens: jax.Array
    q_logp: jax.Array | None
    n: jax.Array
    bonus: jax.Array
    at: jax.Array
    pending: Pending


@dataclasses.dataclass(frozen=True)
class TriForce(DrafterBase):
    """`step`: the small model, whose weights come as `draft_params`; `target`: the target's own Step. `gamma`: the
    least tokens of an inner loop. `budget`, `chunk`, `recent`: of the retrieval cache."""

    step: Step
    target: Step
    gamma: int = 6
    budget: int = 4096
    chunk: int = 8
    recent: int = 256

    def __post_init__(self):
        if self.gamma < 1:
            raise ConfigError(f"gamma: got {self.gamma}, accepts 1 or more")
        if self.chunk < 1 or self.budget < self.chunk:
            raise ConfigError(f"budget: got {self.budget} with chunks of {self.chunk}, accepts one chunk or more")

    @property
    def vocab_size(self) -> int:
        """The small model's vocabulary, which must be the target's."""
        return self.step.vocab_size

    @property
    def width(self) -> int:
        """N."""
        return self.gamma + 1

    @property
    def depth(self) -> int:
        """D."""
        return self.gamma + 1

    @property
    def _slots(self) -> int:
        return LAG + 2 * (self.gamma - 1)

    def init(self, params, target_params, seq, cache) -> TriForceState:
        """An empty cache for the small model."""
        if params is None:
            raise ConfigError("TriForce needs its small model's weights: pass draft_params")
        return TriForceState(self.step.new_cache(*seq.tokens.shape))

    def prefill(self, params, state: TriForceState, chunk, output) -> TriForceState:
        """Commit the chunk up to two tokens before the prompt's end."""
        positions = jnp.where(chunk.positions < chunk.length[:, None] - 2, chunk.positions, -1)
        return TriForceState(commit_chunk(self.step, params, state.small, chunk.tokens, positions)[0])

    def ready(self, params, state: TriForceState, seq, cache, *, target_params) -> TriForceState:
        """Make the retrieval cache out of the target's, asked by the prompt's last token."""
        return TriForceState(state.small, self.retrieve(target_params, seq, cache))

    def retrieve(self, target_params: Any, seq: Sequence, cache: kv.Cache) -> kv.Cache:
        """The retrieval cache of rows whose prompt, but for the last token, is in `cache`."""
        positions = seq.length[:, None] - 1
        asking = kv.Cache(cache.states, tuple(Asking(spec) for spec in cache.specs))
        output, _ = self.target(target_params, seq.root[:, None], positions, asking, None)
        queries = notes_of(output)
        if queries is None:
            raise ConfigError("TriForce needs a target whose output carries the notes of its caches, as models.Step's")
        recent = min(self.recent, seq.tokens.shape[1])
        specs, states = [], []
        for spec, state, q in zip(cache.specs, cache.states, queries, strict=True):
            specs.append(Retrieval(spec.attention, self.budget, self.chunk, recent, spec.dtype))
            states.append(specs[-1].of(spec.dense_view(state, positions), q, positions, cache.t))
        return kv.Cache(tuple(states), tuple(specs))

    def middle_params(self, params: Any, target_params: Any) -> Any:
        """The weights that run over the retrieval cache: the target's."""
        return target_params

    def inner_verifier(self, *, sampled: bool) -> Verifier:
        """Keeps a draft or corrects it; by its residual what stands has the law over the retrieval cache exactly."""
        return Chain() if sampled else Greedy()

    def propose(self, params, state: TriForceState, seq, cache, key, *, target_params, warp):
        """Gamma tokens or one more, of the law of the target over its retrieval cache."""
        middle: Any = state.middle
        batch = seq.length.shape[0]
        run = _Rounds(self, params, self.middle_params(params, target_params), state.small, middle, seq,
                      key_streams.stream(key, Stream.DRAFT), warp)  # fmt: skip
        unfed = jnp.zeros((batch, self._slots), bool)
        pending = Pending(kv.new_blocks(state.small, self._slots), unfed, kv.new_blocks(middle, self._slots), unfed)
        tokens = jnp.zeros((batch, self.width), jnp.int32)
        q_logp = jnp.zeros((batch, self.width, self.vocab_size)) if warp.sampled else None
        zeros = jnp.zeros(batch, jnp.int32)
        inner = run.first(Inner(tokens, q_logp, zeros, zeros > 0, jnp.int32(0), pending))
        if self.gamma > 1:
            inner = jax.lax.while_loop(lambda inner: run.going(inner).any(), run.next, inner)
        valid = jnp.arange(self.width)[None] < inner.n[:, None]
        return Proposal.of_chain(inner.tokens, valid, inner.q_logp), dataclasses.replace(state, pending=inner.pending)

    def observe(self, params, state: TriForceState, seq, proposal, scored, verdict, n, cache) -> TriForceState:
        """Commit to both caches what stands, as far as it was fed to them."""
        pending: Any = state.pending
        middle: Any = state.middle
        small = _commit(state.small, pending.small, pending.small_fed, seq.length - 2, n)
        return TriForceState(small, _commit(middle, pending.middle, pending.middle_kept, seq.length - 1, n))


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """What the rounds of one inner loop share."""

    drafter: TriForce
    params: Any
    target_params: Any
    small: kv.Cache
    middle: kv.Cache
    seq: Sequence
    key: jax.Array
    warp: WarpLike

    def going(self, inner: Inner) -> jax.Array:
        """Which rows want more tokens."""
        return ~self.seq.done & (inner.n < self.drafter.gamma)

    def token(self, inner: Inner, i: jax.Array) -> jax.Array:
        """Token number `i i32[B]` after the root; the row's own for 0 and below."""
        own = self.seq.token_at(jnp.maximum(self.seq.length - 1 + i, 0))
        new = jnp.take_along_axis(inner.tokens, jnp.maximum(i - 1, 0)[:, None], 1)[:, 0]
        return jnp.where(i > 0, new, own)

    def first(self, inner: Inner) -> Inner:
        """The round after the root: both models are first given what their caches lack."""
        i = jnp.arange(-2, 1, dtype=jnp.int32)
        at = self.seq.length[:, None] - 1 + i
        tokens = jnp.stack([self.token(inner, jnp.full_like(inner.n, k)) for k in range(-2, 1)], 1)
        rows = self.going(inner)[:, None]
        small = jnp.where(rows & (at >= self.small.t[:, None]) & (at >= 0), at, -1)
        middle = jnp.where(rows & (at >= self.middle.t[:, None]) & (at >= 0), at, -1)
        return self.round(inner, tokens, small, tokens[:, 1:], middle[:, 1:])

    def next(self, inner: Inner) -> Inner:
        """A later round: the tokens of the round before."""
        last = self.seq.length - 1 + inner.n
        pair = jnp.stack([self.token(inner, inner.n - 1), self.token(inner, inner.n)], 1)
        rows = self.going(inner)
        small = jnp.stack([jnp.where(rows & inner.bonus, last - 1, -1), jnp.where(rows, last, -1)], 1)
        return self.round(inner, pair, small, pair[:, 1:], small[:, 1:])

    def round(self, inner: Inner, small_tokens, small_at, middle_tokens, middle_at) -> Inner:
        """One proposal of the small model and its test over the retrieval cache."""
        key = key_streams.step_keys(self.key, inner.n)
        draft, q, small = self._propose(inner, small_tokens, small_at, key)
        law, blocks, at = self._score(inner, middle_tokens, middle_at, draft)
        proposal = Proposal.of_chain(draft[:, None], self.going(inner)[:, None], None if q is None else q[:, None])
        verdict = self.drafter.inner_verifier(sampled=self.warp.sampled).verify(law, proposal, key)
        small_fed = _marked(inner.pending.small_fed, inner.at, small_at >= 0)
        accepted = verdict.n_accepted > 0
        stands = jnp.concatenate([middle_at >= 0, accepted[:, None]], 1) & self.going(inner)[:, None]
        kept = _marked(inner.pending.middle_kept, inner.at, stands)
        grown = self._append(inner, draft, verdict, law)
        return dataclasses.replace(
            grown, at=inner.at + small_at.shape[1], pending=Pending(small, small_fed, blocks, kept)
        )

    def _propose(self, inner: Inner, tokens, at, key) -> tuple[jax.Array, jax.Array | None, Any]:
        step = self.drafter.step
        output, blocks = step(self.params, tokens, at, self.small, inner.pending.small, inner.at)
        law = Law(step, self.params, self.warp, key_streams.stream(key, Stream.DRAFT), inner.tokens, inner.n)
        draft, q = law.choose(step.head(self.params, output.hidden[:, -1:]), inner.tokens[:, :0], 0)
        return draft, q, blocks

    def _score(self, inner: Inner, tokens, at, draft) -> tuple[jax.Array, Any, jax.Array]:
        """The law after the last token and after the draft, f32[B, 2, V]; Blocks with both in them."""
        target = self.drafter.target
        after = jnp.where(self.going(inner), self.seq.length + inner.n, -1)
        tokens, at = jnp.concatenate([tokens, draft[:, None]], 1), jnp.concatenate([at, after[:, None]], 1)
        width, slot = tokens.shape[1], jnp.arange(self.drafter._slots)
        own = (slot[None] >= inner.at) & (slot[None] <= inner.at + jnp.arange(width)[:, None])
        mask = inner.pending.middle_kept[:, None] | own[None]
        output, blocks = target(self.target_params, tokens, at, self.middle, inner.pending.middle, inner.at, mask)
        logits = target.head(self.target_params, output.hidden[:, -2:])
        index = jnp.arange(inner.tokens.shape[1])[None]
        before = jnp.broadcast_to((index < inner.n[:, None])[:, None], (tokens.shape[0], 2, index.shape[1]))
        drafted = jnp.broadcast_to(jnp.array([[[False], [True]]]), (tokens.shape[0], 2, 1))
        slots = Slots(
            inner.n[:, None] + jnp.arange(2, dtype=jnp.int32),
            jnp.concatenate([inner.tokens, draft[:, None]], 1),
            jnp.concatenate([before, drafted], 2),
        )
        return self.warp(logits, slots) if self.warp.sampled else self.warp.scores(logits, slots), blocks, at

    def _append(self, inner: Inner, draft, verdict: Verdict, law) -> Inner:
        """The draft where it stands, and the token after it."""
        going, accepted = self.going(inner), verdict.n_accepted > 0
        size, n = inner.tokens.shape[1], inner.n
        place = jnp.where(going[:, None], n[:, None] + jnp.arange(2), size)
        place = place.at[:, 1].set(jnp.where(accepted, place[:, 1], size))
        values = jnp.stack([jnp.where(accepted, draft, verdict.next_token), verdict.next_token], 1)

        def put(rows, at, new):
            return jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop"))(rows, at, new)

        q_logp = None if inner.q_logp is None else put(inner.q_logp, place, law)
        n = n + jnp.where(going, 1 + verdict.n_accepted, 0)
        bonus = jnp.where(going, accepted, inner.bonus)
        return dataclasses.replace(inner, tokens=put(inner.tokens, place, values), q_logp=q_logp, n=n, bonus=bonus)


def _marked(flags: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(flags, new, at, 1)


def _commit(cache: kv.Cache, blocks: Any, live: jax.Array, until: jax.Array, n: jax.Array) -> kv.Cache:
    """Append the live slots, in their order, up to `until i32[B]` tokens; nothing for rows that emitted none."""
    path = jnp.argsort(~live, axis=1, stable=True).astype(jnp.int32)
    count = jnp.clip(until - cache.t, 0, live.sum(1))
    return kv.commit(cache, blocks, path, jnp.where(n > 0, count, 0))
