"""Retrieval cache: the chunks of a prompt that its last token attends to most, and the last tokens after it.

TriForce (Sun et al. 2024, arXiv:2404.11912), where it makes the target model its own cheap draft on long contexts. The
prompt's keys are cut in chunks of 8 tokens; in each layer and for each key head the chunks whose mean key has the
largest product with the last prompt token's query are kept, the first chunk always (it holds the attention sinks), up
to a budget of tokens (4096 in the paper). Guarantee: approximate; exact attention over what it keeps, and over
everything where the budget holds the whole prompt and `recent` all that follows. State: the kept keys (rotated at their
own positions) and values, and a ring of the last `recent` tokens after the prompt.

It is made once, from a cache that holds the prompt (`Retrieval.of`), and then appended to like any other; an empty one
is the ring alone. Where it departs from the released code: there new tokens overwrite the lowest-scored kept tokens,
here they have a ring of their own, so that what a query sees depends on its position and not on how calls were split; a
group of query heads that share a key head votes with the sum of its queries.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.cache.base import Block, Spec, SpecBase, View
from jaxinfer.cache.dense import Dense, DenseState, block_segment, ring, unrotate
from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import AttentionSpec, Part, Segment, attend


@struct.dataclass
class RetrievalState:
    """`k [B, G, d, S]` (rotated), `v [B, G, S, d]` and `kept i32[B, G, S]`, their positions (-1 empty); `recent`."""

    k: jax.Array
    v: jax.Array
    kept: jax.Array
    recent: DenseState

    @property
    def t(self) -> jax.Array:
        """Tokens committed to each row, those that were not kept included: i32[B]."""
        return self.recent.t

    @property
    def pos(self) -> jax.Array:
        """Positions of all slots, i32[B, G, C]."""
        groups = self.kept.shape[1]
        last = jnp.broadcast_to(self.recent.pos, (self.kept.shape[0], groups, self.recent.pos.shape[2]))
        return jnp.concatenate([self.kept, last], -1)


@dataclasses.dataclass(frozen=True)
class Retrieval(SpecBase):
    """Up to `budget` tokens of a prompt in chunks of `chunk`, and the last `recent` tokens after it."""

    attention: AttentionSpec
    budget: int = 4096
    chunk: int = 8
    recent: int = 256
    dtype: str = "float32"

    def __post_init__(self):
        if self.chunk < 1 or self.budget < self.chunk:
            raise ConfigError(f"a retrieval cache keeps whole chunks: got budget {self.budget} and chunk {self.chunk}")
        if self.recent < 1:
            raise ConfigError(f"recent: got {self.recent}, accepts 1 or more")

    @property
    def _ring(self) -> Dense:
        own = self.attention.window
        window = self.recent + 1 if own is None else min(self.recent + 1, own)
        return ring(dataclasses.replace(self.attention, window=window), dtype=self.dtype)

    @property
    def slots(self) -> int:
        """Tokens of the prompt that are kept."""
        return self.budget // self.chunk * self.chunk

    def init(self, batch: int) -> RetrievalState:
        """An empty State for `batch` rows."""
        groups, dim = self.attention.num_kv_heads, self.attention.head_dim
        return RetrievalState(
            jnp.zeros((batch, groups, dim, self.slots), self.dtype),
            jnp.zeros((batch, groups, self.slots, dim), self.dtype),
            jnp.full((batch, groups, self.slots), -1, jnp.int32),
            self._ring.init(batch),
        )

    def of(self, view: View, q: jax.Array, positions: jax.Array, t: jax.Array) -> RetrievalState:
        """The State of rows of `t i32[B]` tokens, from what the unrotated queries `q[B, H, 1, d]` at `positions
        i32[B, 1]` see of another cache (its `dense_view` at these positions)."""
        if view.distance.shape[1] != 1:
            raise ConfigError("a retrieval cache is made from a cache whose heads keep the same tokens")
        at, live = (positions[:, None, :, None] - view.distance)[:, 0, 0], view.visible[:, 0, 0]
        k = self.attention.rotate(view.k, jnp.maximum(at, 0))
        pad = max(-(-k.shape[2] // self.chunk), self.slots // self.chunk) * self.chunk - k.shape[2]
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k, view.v))
        at, live = jnp.pad(at, ((0, 0), (0, pad))), jnp.pad(live, ((0, 0), (0, pad)))
        token = self._tokens(self._scores(k, q, positions, live))
        kept = jnp.take_along_axis(jnp.where(live, at, -1)[:, None], token, 2)

        def take(x):
            return jnp.take_along_axis(x, token[..., None], 2).astype(self.dtype)

        recent = dataclasses.replace(self._ring.init(t.shape[0]), t=t)
        return RetrievalState(jnp.swapaxes(take(k), 2, 3), take(v), kept, recent)

    def _scores(self, k: jax.Array, q: jax.Array, positions: jax.Array, live: jax.Array) -> jax.Array:
        """The product of each chunk's mean key with the queries, f32[B, G, chunks]; -inf where a chunk is empty."""
        batch, groups, size, dim = k.shape
        counts = live.reshape(batch, 1, -1, self.chunk, 1)
        mean = (k.reshape(batch, groups, -1, self.chunk, dim) * counts).sum(3) / jnp.maximum(counts.sum(3), 1)
        rotated = self.attention.rotate(q.astype(jnp.float32), jnp.maximum(positions, 0))
        query = rotated.reshape(batch, groups, -1, dim).sum(2)
        score = jnp.where(counts.any(3)[..., 0], jnp.einsum("bgd,bgcd->bgc", query, mean), -jnp.inf)
        return jnp.where((jnp.arange(size // self.chunk) == 0) & counts.any(3)[..., 0], jnp.inf, score)

    def _tokens(self, score: jax.Array) -> jax.Array:
        """The tokens of the best chunks, i32[B, G, S]."""
        best = jax.lax.top_k(score, self.slots // self.chunk)[1]
        return (best[..., None] * self.chunk + jnp.arange(self.chunk)).reshape(*best.shape[:2], -1)

    def attend(
        self, state: RetrievalState, block: Block, q: jax.Array, positions: jax.Array, mask, table=None
    ) -> tuple[Part, None]:
        """Attention over kept tokens, ring and Block in one softmax."""
        spec, last = self.attention, self._ring
        distance, visible = self._sees_kept(state, positions)
        by_head = jnp.repeat(distance, spec.num_heads // spec.num_kv_heads, 1)
        segments = [Segment(state.k, state.v, visible, spec.bias(by_head, table), transposed=True)]
        distance, visible = last.sees(state.recent, positions)
        segments.append(Segment(state.recent.k, state.recent.v, visible, spec.bias(distance, table), transposed=True))
        segments.append(block_segment(last.attention, block, positions, mask, table))
        return attend(spec, spec.rotate(q, jnp.maximum(positions, 0)), segments), None

    def _sees_kept(self, state: RetrievalState, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        distance = positions[:, None, :, None] - state.kept[:, :, None]
        visible = (state.kept[:, :, None] >= 0) & (distance > 0) & self.attention.within_window(distance)
        return distance, visible

    def commit(self, state: RetrievalState, block: Block, path: jax.Array, n: jax.Array, notes=None) -> RetrievalState:
        """Append the kept slots to the ring."""
        return dataclasses.replace(state, recent=self._ring.commit(state.recent, block, path, n))

    def dense_view(self, state: RetrievalState, positions: jax.Array) -> View:
        """Kept tokens, then the ring; keys rotated back to position 0."""
        batch, groups, dim, size = state.k.shape
        flat = jnp.swapaxes(state.k, 2, 3).astype(jnp.float32).reshape(batch * groups, 1, size, dim)
        k = unrotate(self.attention, flat, state.kept.reshape(batch * groups, size)).reshape(batch, groups, size, dim)
        distance, visible = self._sees_kept(state, positions)
        recent = self._ring.dense_view(state.recent, positions)

        def spread(x):
            return jnp.broadcast_to(x, (batch, groups, *x.shape[2:]))

        return View(
            jnp.concatenate([k, recent.k], 2),
            jnp.concatenate([state.v.astype(jnp.float32), recent.v], 2),
            jnp.concatenate([distance, spread(recent.distance)], -1),
            jnp.concatenate([visible, spread(recent.visible)], -1),
        )


@dataclasses.dataclass(frozen=True)
class Asking(SpecBase):
    """Another Spec that also notes the queries, unrotated: what `Retrieval.of` is asked with. Reads only."""

    spec: Spec

    @property
    def attention(self) -> AttentionSpec:
        """That of the other Spec."""
        return self.spec.attention

    def new_block(self, batch: int, slots: int) -> Block:
        """A Block of the other Spec."""
        return self.spec.new_block(batch, slots)

    def attend(
        self, state, block: Block, q: jax.Array, positions: jax.Array, mask, table=None
    ) -> tuple[Part, jax.Array]:
        """The other Spec's attention, and its queries as notes."""
        return self.spec.attend(state, block, q, positions, mask, table)[0], q
