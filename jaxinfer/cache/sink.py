"""Attention sinks: the first few tokens and a sliding window, at positions counted within the cache.

StreamingLLM (Xiao et al. 2023, 2309.17453). Keeps `sinks + window` tokens, so text may stream without end. Guarantee:
exact softmax attention over the retained tokens at cache-relative positions, equal to dense attention until the window
overflows; what was evicted is gone, so the context does not grow. State: a dense cache of the first `sinks` tokens and
a ring of the last `window - 1`. The paper's setting is 4 sinks and a window of 1020 or 2044.

Counted within the cache, the window keeps its true distances to the query (RoPE, ALiBi and T5 see nothing else), and
the sinks stand still at `sinks + window - 1` behind it at most. So every key is stored rotated at its own position,
ring and Block are read by the query at its true position, and the sinks alone by the query at position
`min(p, sinks + window - 1)`: a function of p, whatever the calls. Released code keeps keys unrotated and rotates the
whole cache at each step; here nothing moves. Models that add absolute positions to their embeddings (learned,
sinusoidal) cannot count within the cache: for them this is eviction alone.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.cache.base import Block, SpecBase, View
from jaxinfer.cache.dense import Dense, DenseState, ring
from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import AttentionSpec, Part, Segment, attend, block_visibility


@struct.dataclass
class SinkState:
    """`sinks`: the first tokens; `recent`: a ring of the last ones."""

    sinks: DenseState
    recent: DenseState

    @property
    def t(self) -> jax.Array:
        """Tokens committed to each row, i32[B]."""
        return self.recent.t

    @property
    def pos(self) -> jax.Array:
        """True positions of all slots, i32[B, 1, C]."""
        return jnp.concatenate([self.sinks.pos, self.recent.pos], -1)


@dataclasses.dataclass(frozen=True)
class Sink(SpecBase):
    """The first `sinks` tokens and the last `window` ones, the query's own among them."""

    attention: AttentionSpec
    sinks: int = 4
    window: int = 1020
    dtype: str = "float32"

    def __post_init__(self):
        _check(self.sinks, self.window)
        own = self.attention.window
        if own is not None and own < self.sinks + self.window:
            raise ConfigError(
                f"a sink cache of {self.sinks} + {self.window} tokens needs a layer that sees as far; this one has a "
                f"sliding window of {own}: use a ring there"
            )

    @property
    def _first(self) -> Dense:
        return Dense(dataclasses.replace(self.attention, window=None), self.sinks, self.dtype)

    @property
    def _last(self) -> Dense:
        return ring(dataclasses.replace(self.attention, window=self.window), dtype=self.dtype)

    def init(self, batch: int) -> SinkState:
        """An empty State for `batch` rows."""
        return SinkState(self._first.init(batch), self._last.init(batch))

    def attend(
        self, state: SinkState, block: Block, q: jax.Array, positions: jax.Array, mask, table=None
    ) -> tuple[Part, None]:
        """Attention over sinks, window and Block in one softmax."""
        spec = self.attention
        slot = self._slot(positions)
        near, far = (spec.rotate(q, jnp.maximum(p, 0)) for p in (positions, slot))
        distance, visible = self._sees_first(state, positions)
        past = [Segment(state.sinks.k, state.sinks.v, visible, spec.bias(distance, table), far, transposed=True)]
        distance, visible = self._sees_last(state, positions)
        past.append(Segment(state.recent.k, state.recent.v, visible, spec.bias(distance, table), transposed=True))
        return attend(spec, near, [*past, *self._own(block, far, positions, mask, table)]), None

    def _own(self, block: Block, far: jax.Array, positions: jax.Array, mask, table) -> list[Segment]:
        """The Block's tokens. Only a Block longer than the window can hold a sink and a query beyond its reach."""
        spec = self.attention
        k = spec.rotate(block.k, jnp.maximum(block.positions, 0))
        visible = block_visibility(dataclasses.replace(spec, window=None), positions, block.positions, mask)
        is_sink = (block.positions < self.sinks)[:, None, None]
        distance = positions[:, None, :, None] - block.positions[:, None, None]
        inside = jnp.abs(distance) < self.window
        bias = spec.bias(distance, table)
        if block.k.shape[2] <= self.window:
            return [Segment(k, block.v, visible & (is_sink | inside), bias)]
        standing = spec.bias(self._slot(positions)[:, None, :, None] - block.positions[:, None, None], table)
        return [
            Segment(k, block.v, visible & ~is_sink & inside, bias),
            Segment(k, block.v, visible & is_sink, standing, far),
        ]

    def _slot(self, positions: jax.Array) -> jax.Array:
        """The query's position within the cache."""
        return jnp.minimum(positions, self.sinks + self.window - 1)

    def _sees_first(self, state: SinkState, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, visible = self._first.sees(state.sinks, positions)
        return self._slot(positions)[:, None, :, None] - state.sinks.pos[:, :, None], visible

    def _sees_last(self, state: SinkState, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        distance, visible = self._last.sees(state.recent, positions)
        return distance, visible & (state.recent.pos >= self.sinks)[:, :, None]

    def commit(self, state: SinkState, block: Block, path: jax.Array, n: jax.Array, notes=None) -> SinkState:
        """Append the kept slots: the first tokens of a row to its sinks, all of them to the ring."""
        return SinkState(
            self._first.commit(state.sinks, block, path, n), self._last.commit(state.recent, block, path, n)
        )

    def dense_view(self, state: SinkState, positions: jax.Array) -> View:
        """Sinks then ring, with their distances within the cache."""
        first, last = self._first.dense_view(state.sinks, positions), self._last.dense_view(state.recent, positions)
        (d0, s0), (d1, s1) = self._sees_first(state, positions), self._sees_last(state, positions)
        k, v = (jnp.concatenate(pair, 2) for pair in ((first.k, last.k), (first.v, last.v)))
        return View(k, v, jnp.concatenate([d0, d1], -1), jnp.concatenate([s0, s1], -1))


@dataclasses.dataclass(frozen=True)
class SinkCache:
    """Cache policy: sinks and a window in every layer that sees further, a ring or a dense cache in the others."""

    sinks: int = 4
    window: int = 1020

    def __post_init__(self):
        _check(self.sinks, self.window)

    def spec(self, attention: AttentionSpec, capacity: int, dtype: str) -> Sink | Dense:
        """The Spec of one layer for rows of up to `capacity` tokens."""
        budget = self.sinks + self.window
        if attention.window is not None and attention.window < min(budget, capacity + 1):
            return ring(attention, dtype=dtype)
        if capacity <= budget:
            return Dense(attention, capacity, dtype)
        return Sink(attention, self.sinks, self.window, dtype)


def _check(sinks: int, window: int) -> None:
    if sinks < 1:
        raise ConfigError(f"a sink cache needs at least one sink, got {sinks}; without sinks it is a sliding window")
    if window < 2:
        raise ConfigError(
            f"a sink cache needs a window of at least 2 (the query and one token before it), got {window}"
        )
