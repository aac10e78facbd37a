"""Int8 keys and values: keys per channel over groups of tokens, values per token, the most recent tokens in full.

After KIVI (Liu et al. 2024, 2402.02750), at 8 bits. Guarantee: approximate; each entry is within half a step of the
true one, a step being 1/255 of its group's range. A group is quantized once, when its last token is committed, by
asymmetric rounding; keys are rotated before (the cache moves no token, so they need not be rotated at each step).
State: codes with a float32 scale and offset for each channel and group (keys) or token (values), and a ring of the last
`lag + group - 1` tokens as they are. The paper's groups are 32 tokens and its residual 128.

A few queries against a large cache on a CPU read the codes block by block (`ops.attention.attend_blocks`): a step took
0.9 of the time where all blocks were live, 0.55 to 0.65 where half were. Otherwise codes become numbers as a whole
inside `attend`, one layer at a time: on CPU XLA writes them to scratch before it multiplies, so that such a step moves
more bytes than one of a dense cache.

Where it departs from the paper and released code: which tokens a query at p reads as codes is a function of p (whole
groups that end at or before p - lag), so neither chunked prefill nor a rejected draft changes any output. A causal
Block longer than `lag + 1` reads the groups that it completes as codes too, where the law says so.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.cache.base import Block, SpecBase, View, gather_path, kept
from jaxinfer.cache.dense import Dense, DenseState, block_segment, ring, unrotate
from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import AttentionSpec, Part, Segment, attend, attend_blocks, combine, reads_blocks
from jaxinfer.pallas_kernels.attention import decode as kernel


@struct.dataclass
class Codes:
    """`x = values * scale + offset`: int8 `values`, float32 `scale` and `offset` of one entry along the group axis."""

    values: jax.Array
    scale: jax.Array
    offset: jax.Array

    def dequantize(self, dtype) -> jax.Array:
        """The numbers that the codes stand for."""
        return (self.values.astype(jnp.float32) * self.scale + self.offset).astype(dtype)


def quantize(x: jax.Array, axis: int) -> Codes:
    """Asymmetric 8-bit codes of `x` in groups along `axis`; a constant group is exact."""
    x = x.astype(jnp.float32)
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = (high - low) / 255
    code = jnp.round((x - low) / jnp.where(scale > 0, scale, 1.0)) - 128
    return Codes(jnp.clip(code, -128, 127).astype(jnp.int8), scale, low + 128 * scale)


@struct.dataclass
class Int8State:
    """`keys` and `values`: codes of whole groups (`[B, G, d, N, g]` and `[B, G, N, g, d]`); `recent`: a ring."""

    keys: Codes
    values: Codes
    recent: DenseState

    @property
    def t(self) -> jax.Array:
        """Tokens committed to each row, i32[B]."""
        return self.recent.t

    @property
    def pos(self) -> jax.Array:
        """Positions of the ring's slots, i32[B, 1, F]; code number i of a row stands for position i."""
        return self.recent.pos


@dataclasses.dataclass(frozen=True)
class Int8(SpecBase):
    """Up to `capacity` tokens as int8, with the last `lag` before each query (and unfinished groups) as they are.

    `blocks`: whether few queries read the live blocks of codes alone; None: where that was measured to be faster.
    """

    attention: AttentionSpec
    capacity: int
    group: int = 64
    lag: int = 128
    dtype: str = "float32"
    blocks: bool | None = None

    def __post_init__(self):
        _check(self.group, self.lag)
        if self._groups < 1:
            raise ConfigError(
                f"an int8 cache of capacity {self.capacity} holds no group of {self.group} before its lag of "
                f"{self.lag} tokens: use a dense cache"
            )

    @property
    def _groups(self) -> int:
        return (self.capacity - 1 - self.lag) // self.group  # what a query at the last position can read as codes

    @property
    def _ring(self) -> Dense:
        slots = max(self.lag + self.group - 1, 1)
        return ring(dataclasses.replace(self.attention, window=slots + 1), dtype=self.dtype)

    def init(self, batch: int) -> Int8State:
        """An empty State for `batch` rows."""
        heads, dim, n, g = self.attention.num_kv_heads, self.attention.head_dim, self._groups, self.group

        def empty(shape, constants):
            zeros = jnp.zeros((batch, heads, *constants), jnp.float32)
            return Codes(jnp.zeros((batch, heads, *shape), jnp.int8), zeros, zeros)

        keys, values = empty((dim, n, g), (dim, n, 1)), empty((n, g, dim), (n, g, 1))
        return Int8State(keys, values, self._ring.init(batch))

    def attend(
        self, state: Int8State, block: Block, q: jax.Array, positions: jax.Array, mask, table=None
    ) -> tuple[Part, None]:
        """Attention over codes, ring and Block in one softmax; the codes are dequantized here and nowhere kept."""
        spec = self.attention
        distance, visible = self._sees_recent(state, positions)
        recent = Segment(state.recent.k, state.recent.v, visible, spec.bias(distance, table), transposed=True)
        rotated = spec.rotate(q, jnp.maximum(positions, 0))
        keys, values = _for_kernel(state)
        coded, segments = [], [recent]
        if reads_blocks(spec, q.shape[2], keys, self.blocks):
            whole, seen = state.t // self.group, (positions - self.lag) // self.group  # in groups
            slots = jnp.minimum(whole, self._groups) * self.group
            coded = [attend_blocks(spec, rotated, keys, values, slots, seen * self.group - 1)]
        else:
            at, exists = self._stored(state)
            segments = [self._codes(state.keys, state.values, at, exists, q, positions, table), recent]
        own = block_segment(spec, block, positions, mask, table)
        if block.k.shape[2] > self.lag + 1:
            if mask is not None:
                raise ConfigError(
                    f"an int8 cache with a lag of {self.lag} takes a masked Block of up to {self.lag + 1} slots, got "
                    f"{block.k.shape[2]}"
                )
            own = own._replace(visible=own.visible & ~self._as_codes(block.positions[:, None], positions))
            path = jnp.broadcast_to(jnp.arange(block.k.shape[2], dtype=jnp.int32), block.positions.shape)
            at, done, keys, values = self._completed(state, block, path, (block.positions >= 0).sum(1))
            exists = jnp.repeat(done, self.group, 1)[:, None]
            segments.append(self._codes(keys, values, at[:, None], exists, q, positions, table))
        rest = attend(spec, rotated, [*segments, own])
        return combine([*coded, rest]) if coded else rest, None

    def _codes(self, keys: Codes, values: Codes, at, exists, q, positions, table) -> Segment:
        """Codes of the tokens at `at[B or 1, 1, C]` as a Segment, for the queries that read them so."""
        distance, visible = self._sees_codes(at, exists, positions)
        k, v = (_merge_groups(codes.dequantize(q.dtype), axis) for codes, axis in ((keys, 3), (values, 2)))
        return Segment(k, v, visible, self.attention.bias(distance, table), transposed=True)

    def _stored(self, state: Int8State) -> tuple[jax.Array, jax.Array]:
        """Positions of the State's codes, i32[1, 1, C], and whether they have been written, bool[B, 1, C]."""
        at = jnp.arange(self._groups * self.group, dtype=jnp.int32)[None, None]
        return at, self._ends(at) <= state.t[:, None, None]

    def _sees_codes(self, at, exists, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        distance = positions[:, None, :, None] - at[:, :, None]
        visible = self._as_codes(at, positions) & exists[:, :, None] & self.attention.within_window(distance)
        return distance, visible

    def _sees_recent(self, state: Int8State, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        distance, visible = self._ring.sees(state.recent, positions)
        return distance, (
            visible & ~self._as_codes(state.recent.pos, positions) & self.attention.within_window(distance)
        )

    def _ends(self, pos: jax.Array) -> jax.Array:
        """Where the group of the token at `pos` ends."""
        return (pos // self.group + 1) * self.group

    def _as_codes(self, pos: jax.Array, positions: jax.Array) -> jax.Array:
        """Whether queries at `positions[B, T]` read the tokens at `pos[B, 1, C]` as codes: `bool[B, 1, T, C]`."""
        return self._ends(pos)[:, :, None] <= positions[:, None, :, None] - self.lag

    def commit(self, state: Int8State, block: Block, path: jax.Array, n: jax.Array, notes=None) -> Int8State:
        """Append the kept slots to the ring and write the codes of the groups that they complete."""
        at, done, keys, values = self._completed(state, block, path, n)
        number = at[:, :: self.group] // self.group
        slots = jnp.where(done, number, self._groups)  # a group beyond the last one that can be read is dropped too

        # A scale is never negative, but the compiler does not know: the ring is written after it has been read.
        n = jnp.where(jnp.any(keys.scale < 0, (1, 2, 3, 4)) | jnp.any(values.scale < 0, (1, 2, 3, 4)), 0, n)

        def write(axis):
            put = jax.vmap(lambda row, slot, new: row.at[(slice(None),) * axis + (slot,)].set(new, mode="drop"))
            return lambda leaf, new: put(leaf, slots, new)

        return Int8State(
            jax.tree.map(write(2), state.keys, keys),
            jax.tree.map(write(1), state.values, values),
            self._ring.commit(state.recent, block, path, n),
        )

    def _completed(self, state: Int8State, block: Block, path: jax.Array, n: jax.Array):
        """The groups that `path[:, :n]` can complete, assembled from the ring (before t) and the path (from t on).

        Returns their tokens' positions `i32[B, N * g]`, which groups are complete `bool[B, N]`, keys and values.
        """
        new = kept(state.recent, block, path, n)
        length, g, t = path.shape[1], self.group, state.t[:, None]
        number = t // g + jnp.arange(-(-length // g), dtype=jnp.int32)
        at = (number[:, :, None] * g + jnp.arange(g, dtype=jnp.int32)).reshape(number.shape[0], -1)
        slot, index = at % self._ring.capacity, jnp.clip(at - t, 0, length - 1)

        def assemble(old: jax.Array, fresh: jax.Array) -> jax.Array:
            return jnp.where((at < t)[:, None, :, None], old, gather_path(fresh, index).astype(old.dtype))

        old_k = jnp.take_along_axis(state.recent.k, slot[:, None, None], 3)
        rotated = self.attention.rotate(new.k, jnp.maximum(new.positions, 0))
        k = jnp.swapaxes(assemble(jnp.swapaxes(old_k, 2, 3), rotated), 2, 3)
        v = assemble(gather_path(state.recent.v, slot), new.v)
        keys = quantize(k.reshape(*k.shape[:3], -1, g), -1)
        values = quantize(v.reshape(*v.shape[:2], -1, g, v.shape[-1]), -1)
        return at, (number + 1) * g <= t + n[:, None], keys, values

    def dense_view(self, state: Int8State, positions: jax.Array) -> View:
        """Codes as numbers, then the ring; keys rotated back to position 0."""
        at, exists = self._stored(state)
        (d0, s0), (d1, s1) = self._sees_codes(at, exists, positions), self._sees_recent(state, positions)
        k = jnp.swapaxes(_merge_groups(state.keys.dequantize(jnp.float32), 3), 2, 3)
        v = _merge_groups(state.values.dequantize(jnp.float32), 2)
        recent = self._ring.dense_view(state.recent, positions)
        return View(
            jnp.concatenate(
                [unrotate(self.attention, k, jnp.broadcast_to(at[0], (k.shape[0], k.shape[2]))), recent.k], 2
            ),
            jnp.concatenate([v, recent.v], 2),
            jnp.concatenate([d0, d1], -1),
            jnp.concatenate([s0, s1], -1),
        )


def _for_kernel(state: Int8State) -> tuple[kernel.Codes, kernel.Codes]:
    """The State's codes, bit for bit, as the decode kernel takes them: tokens on one axis."""
    k, v = state.keys, state.values
    return (
        kernel.Codes(_merge_groups(k.values, 3), k.scale[..., 0], k.offset[..., 0]),
        kernel.Codes(_merge_groups(v.values, 2), _merge_groups(v.scale, 2), _merge_groups(v.offset, 2)),
    )


def _merge_groups(x: jax.Array, axis: int) -> jax.Array:
    """Groups and their tokens, two neighbouring axes, as one axis of tokens."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


@dataclasses.dataclass(frozen=True)
class Int8Cache:
    """Cache policy: int8 where it is smaller, a ring under a short sliding window, dense for short rows."""

    group: int = 64
    lag: int = 128

    def __post_init__(self):
        _check(self.group, self.lag)

    def spec(self, attention: AttentionSpec, capacity: int, dtype: str) -> Int8 | Dense:
        """The Spec of one layer for rows of up to `capacity` tokens."""
        if attention.window is not None and attention.window - 1 < capacity:
            return ring(attention, dtype=dtype)
        dense = Dense(attention, capacity, dtype)
        if capacity - 1 - self.lag < self.group:
            return dense
        int8 = Int8(attention, capacity, self.group, self.lag, dtype)
        return int8 if sum(int8.footprint(1).values()) < sum(dense.footprint(1).values()) else dense


def _check(group: int, lag: int) -> None:
    if group < 2:
        raise ConfigError(f"an int8 cache quantizes keys in groups of at least 2 tokens, got {group}")
    if lag < 0:
        raise ConfigError(f"the lag of an int8 cache is a count of tokens, got {lag}")
