"""The cache contract: frozen Specs, arrays-only States, and the Block that holds one step's own keys and values.

A step writes its keys and values to a Block and attends to State and Block together; `commit` alone appends the
kept slots to the State. So a rejected draft is a discarded Block, a ring needs no spare slots, a group never sees a
draft, and what a query sees depends on its position and the tokens before it, never on how calls were split.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import InputError
from jaxinfer.ops.attention import AttentionSpec, Part

State = Any  # a flax.struct of arrays; each leaf leads with batch; has `t i32[B]` and `pos i32[B, 1 or G, C]`


@struct.dataclass
class Block:
    """One layer's pending tokens: `k, v [B, G, R, d]` projected and normed but unrotated; -1 marks an empty slot."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array


@struct.dataclass
class View:
    """What queries see, decompressed, for oracles: `k` (unrotated) and `v [B, G, C, d]`; per query `distance` in
    positions and `visible`, both `[B, 1 or G, T, C]`."""

    k: jax.Array
    v: jax.Array
    distance: jax.Array
    visible: jax.Array


class Spec(Protocol):
    """A frozen, hashable description of one layer's cache. `supports` names the optional operations it has."""

    @property
    def attention(self) -> AttentionSpec: ...
    @property
    def supports(self) -> frozenset[str]: ...
    def init(self, batch: int) -> State: ...
    def new_block(self, batch: int, slots: int) -> Block: ...
    def attend(
        self, state: State, block: Block, q: jax.Array, positions: jax.Array, mask, table: jax.Array | None = None
    ) -> tuple[Part, Any]:
        """Attention of `q[B, H, T, d]` (unrotated) at `positions i32[B, T]` over State and Block; reads only."""
        ...

    def commit(self, state: State, block: Block, path: jax.Array, n: jax.Array, notes: Any = None) -> State:
        """Append block slots `path[:, :n]` (`path i32[B, K]`, `n i32[B]`, at positions `t .. t + n - 1`)."""
        ...

    def dense_view(self, state: State, positions: jax.Array) -> View:
        """The State as queries at `positions i32[B, T]` see it."""
        ...


class SpecBase:
    """What every Spec shares: blocks, row selection and placement, and memory accounting."""

    attention: AttentionSpec
    dtype: str

    @property
    def supports(self) -> frozenset[str]:
        """Optional operations that this cache has: none, unless it says so."""
        return frozenset()

    def init(self, batch: int) -> State:
        raise NotImplementedError(type(self).__name__)

    def new_block(self, batch: int, slots: int) -> Block:
        """An empty Block of `slots` slots."""
        shape = (batch, self.attention.num_kv_heads, slots, self.attention.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return Block(zeros, zeros, jnp.full((batch, slots), -1, jnp.int32))

    def select(self, state: State, rows: jax.Array) -> State:
        """State with row `rows[i]` in row i: reordering and replication."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), state)

    def place(self, state: State, rows: jax.Array, other: State) -> State:
        """State with row i of `other` written over row `rows[i]`; a row number out of range is dropped."""
        rows = jnp.where(rows < 0, jnp.iinfo(jnp.int32).max, rows)  # an index of -1 would mean the last row
        return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), state, other)

    def footprint(self, batch: int) -> dict[str, int]:
        """Bytes of each State leaf at this batch size."""
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: self.init(batch)))
        return {jax.tree_util.keystr(path, simple=True): leaf.size * leaf.dtype.itemsize for path, leaf in leaves}


@struct.dataclass
class Cache:
    """One State a layer, with the Specs as static data."""

    states: tuple[State, ...]
    specs: tuple[Any, ...] = struct.field(pytree_node=False)

    @property
    def t(self) -> jax.Array:
        """Committed tokens of each row, i32[B]."""
        return self.states[0].t


def init(specs: tuple[Any, ...], batch: int) -> Cache:
    """An empty cache of one State for each Spec."""
    states = tuple(spec.init(batch) for spec in specs)
    # Without the barrier XLA sees a prefill over constants and folds the attention away at compile time, for minutes.
    return Cache(jax.lax.optimization_barrier(states), tuple(specs))


def new_blocks(cache: Cache, slots: int) -> tuple[Block, ...]:
    """Empty Blocks for every layer."""
    batch = cache.t.shape[0]
    return tuple(spec.new_block(batch, slots) for spec in cache.specs)


def write_block(block: Block, k: jax.Array, v: jax.Array, positions: jax.Array, at: jax.Array | int) -> Block:
    """Write `k, v [B, G, T, d]` and `positions i32[B, T]` at slot `at`, one scalar shared by all rows."""
    if isinstance(at, int) and at == 0 and k.shape[2] == block.k.shape[2]:
        return Block(k.astype(block.k.dtype), v.astype(block.v.dtype), positions)
    update = jax.lax.dynamic_update_slice_in_dim
    return Block(
        update(block.k, k.astype(block.k.dtype), at, 2),
        update(block.v, v.astype(block.v.dtype), at, 2),
        update(block.positions, positions, at, 1),
    )


def commit(cache: Cache, blocks: tuple[Any, ...], path: jax.Array, n: jax.Array, notes: tuple | None = None) -> Cache:
    """Append slots `path[:, :n]` of every layer's Block. Row b keeps `n[b]` tokens; 0 leaves it as it is."""
    notes = (None,) * len(blocks) if notes is None else notes
    layers = zip(cache.specs, cache.states, blocks, notes, strict=True)
    return dataclasses.replace(
        cache, states=tuple(spec.commit(state, block, path, n, note) for spec, state, block, note in layers)
    )


def select(cache: Cache, rows: jax.Array) -> Cache:
    """The cache with row `rows[i]` in row i."""
    return dataclasses.replace(
        cache, states=tuple(s.select(state, rows) for s, state in zip(cache.specs, cache.states, strict=True))
    )


def place(cache: Cache, rows: jax.Array, other: Cache) -> Cache:
    """The cache with row i of `other` written over row `rows[i]`. The Specs must be equal."""
    if cache.specs != other.specs:
        raise InputError("place: the two caches have different Specs")
    layers = zip(cache.specs, cache.states, other.states, strict=True)
    return dataclasses.replace(cache, states=tuple(spec.place(state, rows, new) for spec, state, new in layers))


def footprint(cache: Cache) -> int:
    """Bytes of all States."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.states))


def gather_path(x: jax.Array, path: jax.Array) -> jax.Array:
    """Slots `path i32[B, K]` of `x[B, G, R, ...]` or of `x[B, R]`."""
    if x.ndim == 2:
        return jnp.take_along_axis(x, path, 1, mode="clip")
    return jnp.take_along_axis(x, path[:, None, :, None], 2, mode="clip")


def scatter_slots(buffer: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """Write `values[B, G, K, ...]` to `slots i32[B, K]` of `buffer[B, G, C, ...]`; slot C (or more) is dropped.

    vmapped, so that batch stays a batching dimension and a sharded batch needs no all-gather.
    """
    return jax.vmap(lambda row, slot, value: row.at[:, slot].set(value.astype(row.dtype), mode="drop"))(
        buffer, slots, values
    )


def scatter_columns(buffer: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """`scatter_slots` into a transposed buffer `[B, G, d, C]`; `values[B, G, K, d]`."""
    values = jnp.swapaxes(values, 2, 3)
    return jax.vmap(lambda row, slot, value: row.at[:, :, slot].set(value.astype(row.dtype), mode="drop"))(
        buffer, slots, values
    )


@dataclasses.dataclass(frozen=True)
class Kept:
    """The kept slots of one commit, as seen by a State that is about to append them."""

    live: jax.Array  # bool[B, K]: slot i of the path is kept
    order: jax.Array  # i32[B, K]: its position `t + i`
    positions: jax.Array  # i32[B, K]
    k: jax.Array  # [B, G, K, d], unrotated
    v: jax.Array


def kept(state: State, block: Block, path: jax.Array, n: jax.Array) -> Kept:
    """Gather the path's slots; the first `n[b]` of row b are live."""
    index = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
    live = index < n[:, None]
    order = state.t[:, None] + index
    return Kept(live, order, gather_path(block.positions, path), gather_path(block.k, path), gather_path(block.v, path))
