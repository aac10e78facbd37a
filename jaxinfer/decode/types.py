"""What the parts of one decoding step hand to each other, and the protocols that models, drafters and verifiers meet.

One step is: propose, score, warp, verify, emit, commit, observe. Slot 0 of every scored block is the root, the last
committed token fed again; slot j is draft j - 1. So plain autoregression is the empty proposal, a cache always holds
`length - 1` tokens, and the bonus row comes for free.

Letters in shapes: B rows, T buffer length, N drafts, R = N + 1 scored slots, D longest path, V vocabulary.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.cache import Cache

Pytree = Any


class Reason(enum.IntEnum):
    """Why a row stopped. `word` is what other servers call it."""

    RUNNING = 0
    LENGTH = 1
    EOS = 2
    STOP = 3  # a stop string, found by the host
    ERROR = 4  # logits that are not finite, or a prompt length that does not fit

    @property
    def word(self) -> str:
        """`length`, `stop` or `error`; `running` before the end."""
        return ("running", "length", "stop", "stop", "error")[self]


@struct.dataclass
class Sequence:
    """Rows of tokens. Invariant: the cache holds `length - 1` tokens of each row.

    `tokens i32[B, T]` (right-padded), `length`, `prompt_length`, `limit` (the length at which the row stops) `i32[B]`,
    `done bool[B]`, `reason i32[B]` (`Reason`), `key[B]`: each row's own typed key, which nothing moves or advances.
    Static: `vocab_size` of the model that reads the rows, for drafters that keep a table over it (0: not told).
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array
    limit: jax.Array
    done: jax.Array
    reason: jax.Array
    key: jax.Array
    vocab_size: int = struct.field(pytree_node=False, default=0)

    @property
    def root(self) -> jax.Array:
        """The last committed token, i32[B]."""
        return self.token_at(self.length - 1)

    def token_at(self, position: jax.Array) -> jax.Array:
        """The token at `position i32[B]` of each row, clamped to the buffer: i32[B]."""
        return jnp.take_along_axis(self.tokens, position[:, None], 1, mode="clip")[:, 0]


@struct.dataclass
class Proposal:
    """Drafts for one step: `tokens`, `parent i32[B, N]` (slot ids, 0 is the root, a parent comes before its child),
    `valid bool[B, N]`, `q_logp f32[B, N, V]` (the law that each draft was sampled from; None: drafts are certain,
    that is one-hot), `probe bool[B, N]` (scored but never accepted) or None. `ahead i32[B]` (-1: none), of law
    `ahead_logp f32[B, V]` (None: certain): a guess at the token after a whole chain, which the target need not read as
    it stands in the place of the bonus: what a drafter guesses while the target is still at work. `embeddings
    f[B, N, D]`: what the target is fed for a probe in place of its token (None: the token; what a draft's row holds is
    not read); it needs an `EmbeddingStep`.

    Static: `depth`, the longest path that may be accepted; `beyond`, how many levels of probes stand below it;
    `chain`: slot j's parent is slot j - 1 and `valid` is a prefix.
    """

    tokens: jax.Array
    parent: jax.Array
    valid: jax.Array
    q_logp: jax.Array | None = None
    probe: jax.Array | None = None
    ahead: jax.Array | None = None
    ahead_logp: jax.Array | None = None
    embeddings: jax.Array | None = None
    depth: int = struct.field(pytree_node=False, default=0)
    beyond: int = struct.field(pytree_node=False, default=0)
    chain: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of_chain(cls, tokens: jax.Array, valid: jax.Array, q_logp: jax.Array | None = None) -> Proposal:
        """A chain of `tokens i32[B, N]`, of which the leading `valid bool[B, N]` count."""
        batch, n = tokens.shape
        parent = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
        valid = jnp.cumprod(valid, 1).astype(bool) if n else valid
        return cls(tokens, parent, valid, q_logp, depth=n, chain=True)

    def leading(self, n: int) -> Proposal:
        """The proposal without the drafts after the first `n`."""

        def cut(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else x[:, :n]

        return dataclasses.replace(
            self, tokens=self.tokens[:, :n], parent=self.parent[:, :n], valid=self.valid[:, :n],
            q_logp=cut(self.q_logp), probe=cut(self.probe), embeddings=cut(self.embeddings),
            depth=min(self.depth, n), chain=self.chain or n == 0,
        )  # fmt: skip

    @classmethod
    def of_tree(
        cls,
        tokens: jax.Array,
        parent: jax.Array,
        valid: jax.Array,
        *,
        depth: int,
        probe: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        beyond: int = 0,
    ) -> Proposal:
        """A tree of `tokens i32[B, N]` under `parent i32[B or 1, N]`. A draft under an invalid one is made invalid."""
        parent = jnp.broadcast_to(parent.astype(jnp.int32), tokens.shape)
        whole = valid
        for _ in range(depth + beyond - 1):
            above = jnp.concatenate([jnp.ones_like(whole[:, :1]), whole], 1)
            whole = valid & jnp.take_along_axis(above, parent, 1)
        return cls(tokens, parent, whole, probe=probe, embeddings=embeddings, depth=depth, beyond=beyond)


@struct.dataclass
class Slots:
    """Where scored slots stand, for what depends on a slot's own past (penalties, forced tokens, minimum length).

    `depth i32[B or 1, R]` (0 for the root), `tokens i32[B, N]` (drafts), `ancestors bool[B or 1, R, N]`: draft j is
    on the path that ends in slot r.
    """

    depth: jax.Array
    tokens: jax.Array
    ancestors: jax.Array


@struct.dataclass
class Scored:
    """What the target said: `tokens i32[B, R]` fed, raw `logits f32[B, R, V]`, and the model's whole `output`."""

    tokens: jax.Array
    logits: jax.Array
    output: Any


@struct.dataclass
class Verdict:
    """`path i32[B, D + 1]`: accepted slot ids from the root on, then -1. `n_accepted i32[B]` drafts on it,
    `next_token i32[B]` after it, `finite bool[B]`: the row's law could be read."""

    path: jax.Array
    n_accepted: jax.Array
    next_token: jax.Array
    finite: jax.Array


@struct.dataclass
class Emission:
    """The tokens that a step adds: `tokens i32[B, D + 1]`, of which the first `n i32[B]` count (0 once done)."""

    tokens: jax.Array
    n: jax.Array


@struct.dataclass
class Chunk:
    """A piece of the prompt during prefill: `tokens`, `positions i32[B, C]` (-1 past the committed part), `n i32[B]`
    tokens of it committed, `length i32[B]` of the whole prompt."""

    tokens: jax.Array
    positions: jax.Array
    n: jax.Array
    length: jax.Array


@struct.dataclass
class Stats:
    """Counts a row: target `forwards` and tokens `emitted i32[B]`, drafts `proposed_by_depth` and
    `accepted_by_depth i32[B, D]` (as verified: an end token or a limit may still cut some). Prefill is not counted."""

    forwards: jax.Array
    emitted: jax.Array
    proposed_by_depth: jax.Array
    accepted_by_depth: jax.Array

    @property
    def tokens_per_forward(self) -> jax.Array:
        """Mean tokens a target forward over all rows, bonus or correction included (plain decoding: 1.0)."""
        return self.emitted.sum() / jnp.maximum(self.forwards.sum(), 1)

    @property
    def proposed(self) -> jax.Array:
        """Drafts proposed, i32[B]."""
        return self.proposed_by_depth.sum(-1)

    @property
    def acceptance_by_depth(self) -> jax.Array:
        """Share of the drafts at each depth that were accepted, f32[D] (0 where none was proposed)."""
        return self.accepted_by_depth.sum(0) / jnp.maximum(self.proposed_by_depth.sum(0), 1)


class Step(Protocol):
    """A model: a frozen, hashable value. `jaxinfer.models.Step` is one; any other may be brought."""

    @property
    def vocab_size(self) -> int: ...
    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ) -> tuple[Any, Any]:
        """`inputs i32[B, T]` at `positions i32[B, T]` (-1: neither written nor seen) to `(Output, block)`."""
        ...

    def head(self, params, hidden) -> jax.Array:
        """Logits f32[..., V]."""
        ...

    def new_cache(self, batch: int, capacity: int) -> Cache: ...


class EmbeddingStep(Step, Protocol):
    """A Step that also embeds ids and accepts embeddings in their place, as `jaxinfer.models.Step` does."""

    def embed(self, params, ids: jax.Array) -> jax.Array: ...


class WarpLike(Protocol):
    """The target's rule from logits to the law of the next token, given to drafters too (`sampling.Warp`)."""

    @property
    def sampled(self) -> bool: ...
    def scores(self, logits: jax.Array, slots: Slots) -> jax.Array: ...
    def __call__(self, logits: jax.Array, slots: Slots) -> jax.Array: ...


class Drafter(Protocol):
    """Proposes drafts. Frozen and hashable; what it learns is a state whose every leaf leads with the batch axis.

    `width` is N, `depth` is D. `params` are the drafter's own; `target_params` the model's; `cache` the model's, read
    only. `key` holds one key a row for this step: take `keys.stream(key, Stream.DRAFT)` and nothing else. A drafter
    whose `vocab_size` (where it has one) differs from the model's is refused. `ready` is called once, after the last
    chunk of the prompt. `widths`: draft counts to which the target's forward may shrink where all rows' drafts fit.
    """

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    def init(self, params, target_params, seq: Sequence, cache: Cache) -> Pytree: ...
    def prefill(self, params, state: Pytree, chunk: Chunk, output: Any) -> Pytree: ...
    def ready(self, params, state: Pytree, seq: Sequence, cache: Cache, *, target_params) -> Pytree: ...
    def idle(self, params, state: Pytree, seq: Sequence) -> jax.Array | None:
        """Rows bool[B] that will draft nothing in the next step, or None where only `propose` knows. Where all are
        idle and 0 is among `widths`, the step is a plain one: `propose` is left out, `observe` sees no drafts."""
        ...

    def propose(
        self, params, state: Pytree, seq: Sequence, cache: Cache, key: jax.Array, *, target_params, warp: WarpLike
    ) -> tuple[Proposal, Pytree]: ...
    def observe(
        self,
        params,
        state: Pytree,
        seq: Sequence,
        proposal: Proposal,
        scored: Scored,
        verdict: Verdict,
        n: jax.Array,
        cache: Cache,
    ) -> Pytree:
        """After emit and commit: `seq` is the new one, `n i32[B]` tokens were emitted."""
        ...


class Verifier(Protocol):
    """Decides which drafts stay. `reads` says what it is given: `scores` (logits after bans and penalties, not
    normalised) or `logprobs` (the whole warp)."""

    @property
    def reads(self) -> str: ...
    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`, and the step's `key[B]`."""
        ...
