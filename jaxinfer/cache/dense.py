"""The dense cache and the ring cache: every key and value kept, or those of a sliding window.

Exact. Keys are stored rotated, since neither cache moves a token; the dense cache has one slot for each position up
to its capacity, the ring `window - 1` slots that a write counter fills in turn (the query's own token is in the
Block, so no slot is spare and none is needed for drafts).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.cache.base import Block, SpecBase, View, kept, scatter_columns, scatter_slots
from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import (
    AttentionSpec,
    Part,
    Segment,
    attend,
    attend_blocks,
    block_visibility,
    combine,
    reads_blocks,
)


@struct.dataclass
class DenseState:
    """`k [B, G, d, C]` (rotated), `v [B, G, C, d]`, `pos i32[B, 1, C]` (-1 empty), `t i32[B]`."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    t: jax.Array


def block_segment(spec: AttentionSpec, block: Block, positions: jax.Array, mask, table=None) -> Segment:
    """The step's own tokens as a Segment: rotated at their positions, masked by `mask`."""
    distance = positions[:, None, :, None] - block.positions[:, None, None, :]
    visible = block_visibility(spec, positions, block.positions, mask)
    k = spec.rotate(block.k, jnp.maximum(block.positions, 0))
    return Segment(k, block.v, visible, spec.bias(distance, table))


@dataclasses.dataclass(frozen=True)
class Dense(SpecBase):
    """Every token, up to `capacity` positions; with `ring=True` the last `capacity` of them.

    `blocks`: few queries read the live blocks alone (`ops.attention.attend_blocks`), not all slots under a mask. On a
    CPU that is faster for a float32 cache of which half or less is live. A ring, a window and a bias stay as they are.
    The host checks lengths against the capacity before work starts; inside a program a token beyond the capacity
    of a dense cache is dropped.
    """

    attention: AttentionSpec
    capacity: int
    dtype: str = "float32"
    ring: bool = False
    blocks: bool = False

    def __post_init__(self):
        if self.capacity < 1:
            raise ConfigError(f"a cache needs a capacity of at least 1, got {self.capacity}")
        if self.ring and self.attention.window is None:
            raise ConfigError("a ring cache needs a layer with a sliding window")
        if self.ring and self.attention.window is not None and self.capacity < self.attention.window - 1:
            raise ConfigError(f"a ring of {self.capacity} is too small for a window of {self.attention.window}")

    @property
    def supports(self) -> frozenset[str]:
        """A ring has forgotten what a shorter row would need."""
        return frozenset() if self.ring else frozenset({"truncate"})

    def init(self, batch: int) -> DenseState:
        """An empty State for `batch` rows."""
        groups, dim = self.attention.num_kv_heads, self.attention.head_dim
        return DenseState(
            jnp.zeros((batch, groups, dim, self.capacity), self.dtype),
            jnp.zeros((batch, groups, self.capacity, dim), self.dtype),
            jnp.full((batch, 1, self.capacity), -1, jnp.int32),
            jnp.zeros(batch, jnp.int32),
        )

    def attend(
        self, state: DenseState, block: Block, q: jax.Array, positions: jax.Array, mask, table=None
    ) -> tuple[Part, None]:
        """Attention over State and Block in one softmax."""
        spec = self.attention
        rotated = spec.rotate(q, jnp.maximum(positions, 0))
        own = block_segment(spec, block, positions, mask, table)
        if not self.ring and reads_blocks(spec, q.shape[2], state.k, self.blocks):
            past = attend_blocks(spec, rotated, state.k, state.v, jnp.minimum(state.t, self.capacity), positions - 1)
            return combine([past, attend(spec, rotated, [own])]), None
        distance, visible = self.sees(state, positions)
        past = Segment(state.k, state.v, visible, spec.bias(distance, table), transposed=True)
        return attend(spec, rotated, [past, own]), None

    def sees(self, state: DenseState, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Distances from queries at `positions i32[B, T]` to the slots, and which they see: `[B, 1, T, C]` both."""
        distance = positions[:, None, :, None] - state.pos[:, :, None, :]
        visible = (state.pos[:, :, None, :] >= 0) & (distance > 0) & self.attention.within_window(distance)
        return distance, visible

    def commit(self, state: DenseState, block: Block, path: jax.Array, n: jax.Array, notes=None) -> DenseState:
        """Append the kept slots; of more than fit a ring only the last `capacity` are written."""
        new = kept(state, block, path, n)
        live = new.live
        if self.ring:
            live &= new.order >= (state.t + n)[:, None] - self.capacity
            slots = new.order % self.capacity
        else:
            slots = new.order
        slots = jnp.where(live, slots, self.capacity)
        k = self.attention.rotate(new.k, jnp.maximum(new.positions, 0))
        return DenseState(
            scatter_columns(state.k, slots, k),
            scatter_slots(state.v, slots, new.v),
            scatter_slots(state.pos, slots, new.positions[:, None]),
            state.t + n,
        )

    def truncate(self, state: DenseState, t: jax.Array) -> DenseState:
        """Forget the tokens at positions `t i32[B]` and beyond; exact for a dense cache only."""
        if self.ring:
            raise ConfigError("a ring cache cannot be truncated: what it overwrote is gone")
        return dataclasses.replace(
            state, pos=jnp.where(state.pos < t[:, None, None], state.pos, -1), t=jnp.minimum(state.t, t)
        )

    def dense_view(self, state: DenseState, positions: jax.Array) -> View:
        """Keys rotated back to position 0, with the true distances."""
        distance, visible = self.sees(state, positions)
        k = unrotate(self.attention, jnp.swapaxes(state.k, 2, 3).astype(jnp.float32), state.pos[:, 0])
        return View(k, state.v.astype(jnp.float32), distance, visible)


def unrotate(spec: AttentionSpec, k: jax.Array, positions: jax.Array) -> jax.Array:
    """Keys `[B, G, C, d]` as they were before `spec.rotate(k, positions i32[B, C])`, to rounding (for oracles)."""
    ones, zero = jnp.ones((1, 1, 1, spec.head_dim), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    scale = spec.rotate(spec.rotate(ones, zero), zero)  # a scaling's attention factor, twice
    return spec.rotate(k, -jnp.maximum(positions, 0)) / scale


def ring(attention: AttentionSpec, *, dtype: str = "float32") -> Dense:
    """A ring cache of the layer's own window: `window - 1` slots (at least one)."""
    if attention.window is None:
        raise ConfigError("a ring cache needs a layer with a sliding window")
    return Dense(attention, max(attention.window - 1, 1), dtype, ring=True)
