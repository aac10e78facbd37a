"""The cache that a model is trained through by chunks: keys and values of the whole sequence, and their gradients.

A chunk attends to everything before it and to itself in blocks (FlashAttention-2's arithmetic, Dao 2023, arXiv
2307.08691), reading only the panels of keys that it can see, so no score outlives its panel. Its derivative adds into
one buffer of gradients in place: the cotangent of the buffer that goes into a chunk is that of the buffer that comes
out plus what this chunk sent to its keys and values, and the cotangent of the chunk's own keys and values is read out
of it. That is the relay that lets chunks be differentiated one after another (`jaxinfer.train.chunkwise`).

Guarantee: exact; of any model whose layers hand over their `AttentionSpec` (grouped heads, sliding windows, soft-caps,
RoPE, ALiBi, T5's learned table), and of packed documents. State: k and v of every token in the model's dtype, and
gradients of both in float32 (sums over many chunks would be lost in bfloat16).

Departures from the cache contract: `attend` returns the State with the chunk written as its notes, and `commit` takes
that; all rows are at one place, a scalar. Windows save time, not memory: every layer keeps the whole sequence, because
a gradient may come back to any token as long as chunks remain.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxinfer.cache.base import Block, SpecBase
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.ops import AttentionSpec, Bidirectional, Part, Segments, sum_dtype

UNSEEN = -1e30  # finite stand-in for -inf: rows that see nothing stay free of NaN


@struct.dataclass
class RelayState:
    """`k, v [B, G, C, d]` (rotated); `relay_k, relay_v` of that shape, zeros whose cotangents are the gradients of k
    and v; `pos i32[B, C]` (-1 empty) and `segments i32[B, C]` of the whole sequence, known beforehand; `at i32[]` is
    the slot that the next chunk begins at."""

    k: jax.Array
    v: jax.Array
    relay_k: jax.Array
    relay_v: jax.Array
    pos: jax.Array
    segments: jax.Array
    at: jax.Array

    @property
    def t(self) -> jax.Array:
        """Tokens before the next chunk of each row, i32[B]."""
        return jnp.full(self.pos.shape[0], self.at)


@dataclasses.dataclass(frozen=True)
class RelayCache:
    """Cache policy of training by chunks: one `Relay` a layer. Blocks as for `Relay`."""

    rows: int = 128
    panel: int = 512

    def spec(self, attention: AttentionSpec, capacity: int, dtype: str) -> Relay:
        """The Spec of one layer."""
        return Relay(attention, capacity, dtype, self.rows, self.panel)


@dataclasses.dataclass(frozen=True)
class Relay(SpecBase):
    """A training-time cache of `capacity` slots, worked on in blocks of up to `rows` queries by `panel` keys.

    Slots follow the sequence and positions rise within a segment; a query sees the keys of its segment at its own
    position and before it. Raises ConfigError for sizes below 1 or a capacity of no whole panels.
    """

    attention: AttentionSpec
    capacity: int
    dtype: str = "float32"
    rows: int = 128
    panel: int = 512

    def __post_init__(self):
        for name in ("capacity", "rows", "panel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 1 or more")
        if self.capacity % self.width:
            raise ConfigError(f"capacity: got {self.capacity}, accepts multiples of the panel, {self.width}")

    @property
    def width(self) -> int:
        """Keys of a panel."""
        return min(self.panel, self.capacity)

    def init(self, batch: int) -> RelayState:
        """An empty State; whoever trains gives it the positions and segments of the sequence."""
        shape = (batch, self.attention.num_kv_heads, self.capacity, self.attention.head_dim)
        zeros, relay = jnp.zeros(shape, self.dtype), jnp.zeros(shape, sum_dtype(jnp.dtype(self.dtype)))
        nowhere = jnp.full((batch, self.capacity), -1, jnp.int32)
        return RelayState(zeros, zeros, relay, relay, nowhere, nowhere, jnp.zeros((), jnp.int32))

    def attend(
        self, state: RelayState, block: Block, q: jax.Array, positions: jax.Array, mask, table=None
    ) -> tuple[Part, RelayState]:
        """Attention of a chunk over itself and what is before it; the notes are the State with the chunk written."""
        if not isinstance(mask, Segments):
            kind = type(mask).__name__ if isinstance(mask, Bidirectional) else "another mask"
            raise InputError(f"mask: got {kind}, training by chunks accepts Segments(ids)")
        turned = jnp.maximum(positions, 0)
        q, k = self.attention.rotate(q, turned), self.attention.rotate(block.k, turned)
        shown = _Shown(state.at, positions, mask.ids, state.pos, state.segments)
        relays = (state.relay_k, state.relay_v)
        found: Any = _attention(self, q, k.astype(state.k.dtype), block.v, table, *relays, state.k, state.v, shown)
        out, lse, relay_k, relay_v, k, v = found
        state = RelayState(k, v, relay_k, relay_v, state.pos, state.segments, state.at + q.shape[2])
        return Part(out, lse), state

    def commit(self, state: RelayState, block: Block, path, n, notes: Any = None) -> RelayState:
        """The State that `attend` returned as its notes: a chunk is kept whole."""
        return notes


@struct.dataclass
class _Shown:
    """Where a chunk and all keys stand: the chunk's first slot, positions and segments of queries and of keys."""

    at: jax.Array
    q_pos: jax.Array
    q_segments: jax.Array
    pos: jax.Array
    segments: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: Relay, q, own_k, own_v, table, relay_k, relay_v, k, v, shown: _Shown) -> Any:
    """`(out[B, H, T, d], lse[B, H, T], relay_k, relay_v, k, v)` with the chunk's keys and values written into k and v.

    Gradients to earlier keys and values go to the relays' cotangents; k and v themselves have none.
    """
    return _attention_forward(spec, q, own_k, own_v, table, relay_k, relay_v, k, v, shown)[0]


def _attention_forward(spec: Relay, q, own_k, own_v, table, relay_k, relay_v, k, v, shown: _Shown) -> Any:
    k, v = (lax.dynamic_update_slice_in_dim(x, own.astype(x.dtype), shown.at, 2) for x, own in ((k, own_k), (v, own_v)))
    grid = _Grid(spec, q.shape[2], shown)

    def block(xs):
        tile, q = grid.tile(xs[0]), xs[1]

        def panel(number, carry):
            peak, total, acc = carry
            keys, values = tile.slice(k, number), tile.slice(v, number)
            score = jnp.where(tile.visible(number), tile.scores(number, q, keys, table), UNSEEN)
            new = jnp.maximum(peak, score.max(-1))
            shrink, weight = jnp.exp(peak - new), jnp.exp(score - new[..., None])
            acc = acc * shrink[..., None] + _product("bgntc,bgcd->bgntd", weight.astype(values.dtype), values)
            return new, total * shrink + weight.sum(-1), acc

        wide = sum_dtype(q.dtype)
        start = (jnp.full(q.shape[:-1], UNSEEN / 2, wide), jnp.zeros(q.shape[:-1], wide), jnp.zeros(q.shape, wide))
        peak, total, acc = lax.fori_loop(tile.low, tile.high, panel, start)
        live = total > 0
        divisor = jnp.where(live, total, 1.0)
        return (acc / divisor[..., None]).astype(q.dtype), jnp.where(live, peak + jnp.log(divisor), -jnp.inf)

    out, lse = grid.whole(lax.map(block, (grid.numbers, grid.blocks(q))))
    kept = (q, table, k, v, shown, out, lse)
    return (out, lse, relay_k, relay_v, k, v), kept


def _attention_backward(spec: Relay, kept, cotangents) -> Any:
    q, table, k, v, shown, out, lse = kept
    d_out, d_lse, relay_k, relay_v, _, _ = cotangents
    grid = _Grid(spec, q.shape[2], shown)
    wide = sum_dtype(q.dtype)
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), -1) - jnp.where(jnp.isfinite(lse), d_lse, 0.0)

    def block(carry, xs):
        tile, (q, d_out, lse, delta) = grid.tile(xs[0]), xs[1]
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

        def panel(number, carry):
            d_q, d_table, relay_k, relay_v = carry
            keys, values = tile.slice(k, number), tile.slice(v, number)
            score, pull = jax.vjp(functools.partial(tile.scores, number), q, keys, table)
            weight = jnp.where(tile.visible(number), jnp.exp(score - lse[..., None]), 0.0)
            d_score = weight * (_product("bgntd,bgcd->bgntc", d_out, values) - delta[..., None])
            more_q, more_k, more_table = pull(d_score)
            d_table = jax.tree.map(jnp.add, d_table, more_table)
            relay_k = tile.add(relay_k, number, more_k)
            relay_v = tile.add(relay_v, number, _product("bgntc,bgntd->bgcd", weight.astype(d_out.dtype), d_out))
            return d_q + more_q.astype(wide), d_table, relay_k, relay_v

        start = (jnp.zeros(q.shape, wide), *carry)
        d_q, *carry = lax.fori_loop(tile.low, tile.high, panel, start)
        return tuple(carry), d_q.astype(q.dtype)

    start = (jax.tree.map(jnp.zeros_like, table), relay_k, relay_v)
    rows = tuple(grid.blocks(x) for x in (q, d_out, lse, delta))
    (d_table, relay_k, relay_v), d_q = lax.scan(block, start, (grid.numbers, rows))
    (d_q,) = grid.whole((d_q,))
    # What is in the chunk's own slots is the cotangent of what it wrote there. It is left there, though what lay there
    # before has none: earlier chunks do not look there, and to clear it costs XLA two copies of the whole buffer.
    own = (lax.dynamic_slice_in_dim(x, shown.at, q.shape[2], 2) for x in (relay_k, relay_v))
    d_k, d_v = (mine.astype(x.dtype) for mine, x in zip(own, (k, v), strict=True))
    return d_q, d_k, d_v, d_table, relay_k, relay_v, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


class _Grid:
    """The blocks of queries of one chunk."""

    def __init__(self, spec: Relay, queries: int, shown: _Shown):
        self.spec, self.shown, self.queries = spec, shown, queries
        self.rows = min(spec.rows, queries)
        self.count = -(-queries // self.rows)
        self.numbers = jnp.arange(self.count, dtype=jnp.int32)
        positions, segments = (jnp.asarray(x)[:, None] for x in (shown.q_pos, shown.q_segments))
        self.positions, self.segments = self._cut(positions, fill=-1), self._cut(segments, fill=-1)

    def blocks(self, x: jax.Array) -> jax.Array:
        """`x[B, H, T, ...]` as `[blocks, B, G, H/G, rows, ...]`."""
        groups = self.spec.attention.num_kv_heads
        cut = self._cut(x, fill=0)
        return cut.reshape(*cut.shape[:2], groups, -1, *cut.shape[3:])

    def whole(self, xs: tuple) -> tuple:
        """The inverse of `blocks`, for each of `xs`."""

        def join(x):
            x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, *x.shape[4:]), 0, 2)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : self.queries]

        return tuple(join(x) for x in xs)

    def tile(self, number: jax.Array) -> _Tile:
        """One block of queries."""
        return _Tile(self, number)

    def _cut(self, x: jax.Array, *, fill: int) -> jax.Array:
        """`x[B, H, T, ...]` as `[blocks, B, H, rows, ...]`; what is missing of the last block is `fill`."""
        extra = self.count * self.rows - self.queries
        if extra:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, extra), *[(0, 0)] * (x.ndim - 3)], constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.count, self.rows, *x.shape[3:]), 2, 0)


class _Tile:
    """A block of queries against panels of keys: which panels it sees, `low` to `high`, and what of each."""

    def __init__(self, grid: _Grid, number: jax.Array):
        self.grid, self.spec, self.width = grid, grid.spec, grid.spec.width
        self.positions, self.segments = (
            lax.dynamic_index_in_dim(x, number, keepdims=False)[:, 0] for x in (grid.positions, grid.segments)
        )
        first = grid.shown.at + number * grid.rows
        self.end = grid.shown.at + jnp.minimum((number + 1) * grid.rows, grid.queries)
        window = self.spec.attention.window
        self.low = jnp.zeros_like(first) if window is None else jnp.maximum(first - window + 1, 0) // self.width
        self.high = -(-self.end // self.width)

    def slice(self, x: jax.Array, number: jax.Array, axis: int = 2) -> jax.Array:
        """Panel `number` of `x[B, G, C, d]`, or of another axis."""
        return lax.dynamic_slice_in_dim(x, number * self.width, self.width, axis)

    def add(self, total: jax.Array, number: jax.Array, part: jax.Array) -> jax.Array:
        """`total[B, G, C, d]` with `part` added to panel `number`."""
        new = self.slice(total, number) + part.astype(total.dtype)
        return lax.dynamic_update_slice_in_dim(total, new, number * self.width, 2)

    def _distance(self, number: jax.Array) -> jax.Array:
        return self.positions[:, :, None] - self.slice(self.grid.shown.pos, number, 1)[:, None, :]

    def visible(self, number: jax.Array) -> jax.Array:
        """bool[B, 1, 1, rows, panel]."""
        shown, distance = self.grid.shown, self._distance(number)
        slots = number * self.width + jnp.arange(self.width, dtype=jnp.int32)
        seen = (self.segments[:, :, None] == self.slice(shown.segments, number, 1)[:, None, :]) & (distance >= 0)
        seen &= (self.slice(shown.pos, number, 1) >= 0)[:, None, :] & (slots < self.end)
        return (seen & self.spec.attention.within_window(distance))[:, None, None]

    def scores(self, number: jax.Array, q: jax.Array, keys: jax.Array, table) -> jax.Array:
        """`[B, G, H/G, rows, panel]` of `q[B, G, H/G, rows, d]` and `keys[B, G, panel, d]`, seen or not."""
        attention = self.spec.attention
        score = _product("bgntd,bgcd->bgntc", q, keys.astype(q.dtype)) * attention.scale
        if attention.softcap is not None:
            score = attention.softcap * jnp.tanh(score / attention.softcap)
        bias = attention.bias(self._distance(number)[:, None], table)
        return score if bias is None else score + bias.reshape(score.shape).astype(score.dtype)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=sum_dtype(b.dtype))
