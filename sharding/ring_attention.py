"""Context parallelism: attention over the tokens of one row that several devices hold, keys travelling round a ring.

Each device keeps its own queries, and the keys and values of all devices pass by (`ppermute`); the parts are merged by
`ops.combine`, so no device ever holds a whole row (Ring Attention: Liu et al. 2023, 2310.01889; the balanced order:
Brandon et al. 2023, Striped Attention, 2311.09431, here in the zigzag form). Few queries, as decoding has, stay
where they are: every device attends to its own slots and the parts are combined.

Guarantee: exact. State: `DenseState` with its slots split over the context axis. Who sees whom follows from positions
alone, so tokens may stand in any order: `zigzag` gives each device an early and a late piece, and a piece that sees
nothing of what passes by is skipped. Gradients go round the ring as well (a backward pass of its own): what a device
keeps for them is its own part, not what passed by. Departures: no blocks inside a piece (XLA's attention, or a
kernel's, does those); rotary or no positions only.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxinfer import cache as kv
from jaxinfer.cache.base import Block, kept, scatter_columns, scatter_slots
from jaxinfer.cache.dense import Dense, DenseState, block_segment
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.ops.attention import (
    AttentionSpec,
    Bidirectional,
    Part,
    Segment,
    Segments,
    attend,
    block_visibility,
    combine,
)
from jaxinfer.ops.position import Alibi, T5Bias
from jaxinfer.sharding.rules import AxisRules, mesh_here


def P(*axes: Any) -> Any:  # noqa: N802 - as everyone writes it; Any, since it stands where arrays do
    """A PartitionSpec."""
    return PartitionSpec(*axes)


class Keys(NamedTuple):
    """One piece of keys on a device: `k, v [B, G, C, d]` (rotated), `positions i32[B, C]` (-1: nothing there), and the
    `ids i32[B, C]` of their segments."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    ids: jax.Array


def zigzag(length: int, parts: int) -> np.ndarray:
    """The order i32[length] in which each of `parts` devices gets the j-th and the j-th but last of 2 * parts pieces:
    `tokens[:, zigzag(T, n)]`. Raises InputError where the pieces would not be equal."""
    if length % (2 * parts):
        raise InputError(f"zigzag: got {length} tokens for {parts} devices; accepted: a multiple of {2 * parts}")
    pieces = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([pieces[i], pieces[-1 - i]]) for i in range(parts)])


def work(positions: np.ndarray, parts: int, *, window: int | None = None) -> np.ndarray:
    """Pairs of half pieces that each device attends to at each step of a causal ring, i32[steps, devices], for one row
    of tokens at `positions` in the order in which the devices hold them. The slowest device sets each step's time."""
    halves = np.asarray(positions).reshape(parts, 2, -1)
    found = np.zeros((parts, parts), np.int32)
    for step in range(parts):
        for device in range(parts):
            for q in halves[device]:
                for k in halves[(device - step) % parts]:
                    distance = q[:, None] - k[None]
                    found[step, device] += bool(((distance >= 0) & (distance < (window or distance.max() + 1))).any())
    return found


def ring_attention(
    spec: AttentionSpec,
    q: jax.Array,
    keys: list[Keys],
    positions: jax.Array,
    *,
    mesh: Mesh,
    rules: AxisRules,
    mask: Any = None,
) -> Part:
    """Attention of `q[B, H, T, d]` (rotated) at `positions i32[B, T]` over all `keys`, tokens split over the context
    axis.

    `mask`: None (causal by position), `Bidirectional()` or `Segments(ids i32[B, T])`. T and each piece's C are
    multiples of the axis' parts. Raises ConfigError for position biases, InputError for other masks.
    """
    axis = _axis(rules)
    if isinstance(spec.position, Alibi | T5Bias):
        raise ConfigError(f"context parallelism: got {type(spec.position).__name__}; accepted: rotary or no positions")
    if not (mask is None or isinstance(mask, Bidirectional | Segments)):
        raise InputError("ring attention: got an array as mask; accepted: None, Bidirectional() or Segments(ids)")
    ids = mask.ids if isinstance(mask, Segments) else jnp.zeros_like(positions)
    rows, heads, groups, tokens = (rules[name] for name in ("batch", "heads", "kv_heads", "context"))
    heads_on = lambda h: P(rows, h, tokens, None)  # noqa: E731
    own = P(rows, tokens)
    static = _Static(_local_spec(spec, rules, mesh), isinstance(mask, Bidirectional), axis, mesh.shape[axis])
    run = jax.shard_map(
        functools.partial(_ring, static),
        mesh=mesh_here(mesh),
        in_specs=(heads_on(heads), own, own, [Keys(heads_on(groups), heads_on(groups), own, own)] * len(keys)),
        out_specs=Part(heads_on(heads), P(rows, heads, tokens)),
        check_vma=False,
    )
    return run(q, positions, ids, keys)


def spread_attention(
    spec: AttentionSpec, q: jax.Array, keys: Keys, positions: jax.Array, *, mesh: Mesh, rules: AxisRules
) -> Part:
    """Attention of few queries, whole on every device, to keys that are split: each attends to its own, then `combine`.

    Keys `[B, G, d, C]`, transposed as `DenseState` keeps them; all of them lie behind the queries (`positions`).
    """
    axis = _axis(rules)
    rows, heads, groups, tokens = (rules[name] for name in ("batch", "heads", "kv_heads", "context"))
    local = _local_spec(spec, rules, mesh)

    def run(q, positions, keys):
        distance = positions[:, None, :, None] - keys.positions[:, None, None, :]
        visible = (keys.positions[:, None, None, :] >= 0) & (distance > 0) & local.within_window(distance)
        part = attend(local, q, [Segment(keys.k, keys.v, visible, transposed=True)])
        part = Part(part.out.astype(jnp.float32), part.lse)
        parts = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis), part)
        whole = combine([jax.tree.map(lambda leaf, i=i: leaf[i], parts) for i in range(mesh.shape[axis])])
        return Part(whole.out.astype(q.dtype), whole.lse)

    split = Keys(P(rows, groups, None, tokens), P(rows, groups, tokens, None), P(rows, tokens), P(rows, tokens))
    return jax.shard_map(
        run,
        mesh=mesh_here(mesh),
        in_specs=(P(rows, heads, None, None), P(rows, None), split),
        out_specs=Part(P(rows, heads, None, None), P(rows, heads, None)),
        check_vma=False,
    )(q, positions, keys)


@dataclasses.dataclass(frozen=True)
class _Static:
    spec: AttentionSpec
    bidirectional: bool
    axis: str
    parts: int

    @property
    def ring(self) -> list[tuple[int, int]]:
        return [(i, (i + 1) % self.parts) for i in range(self.parts)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static: _Static, q, positions, ids, keys) -> Part:
    """One device's part; runs inside `shard_map`."""
    part = _visit(static, q, positions, ids, keys)

    def hop(carry, _):
        keys, part = carry
        keys = jax.lax.ppermute(keys, static.axis, static.ring)
        return (keys, combine([part, _visit(static, q, positions, ids, keys)])), None

    (_, part), _ = jax.lax.scan(hop, (keys, part), None, length=static.parts - 1)
    return Part(part.out.astype(q.dtype), part.lse)


def _forward(static, q, positions, ids, keys):
    part = _ring(static, q, positions, ids, keys)
    return part, (q, positions, ids, keys, part)


def _backward(static, saved, cotangent):
    """With the final lse known, a visitor's share is `exp(lse_there - lse) * out_there`, whose cotangents are the
    output's and, for its weight, lse's less `delta`. Keys travel once more, their gradients with them, until these are
    where the keys began."""
    q, positions, ids, keys, part = saved
    dout = cotangent.out.astype(jnp.float32)
    live = jnp.isfinite(part.lse)
    lse = jnp.where(live, part.lse, 0.0)
    delta = (dout * part.out.astype(jnp.float32)).sum(-1)
    dmass = jnp.where(live, cotangent.lse.astype(jnp.float32) - delta, 0.0)

    def pull(keys):
        def share(q, arrays):
            there = [Keys(k, v, piece.positions, piece.ids) for (k, v), piece in zip(arrays, keys, strict=True)]
            visited = _visit(static, q, positions, ids, there)
            weight = jnp.where(live, jnp.exp(visited.lse - lse), 0.0)
            return weight[..., None] * visited.out, weight

        _, back = jax.vjp(share, q, [(piece.k, piece.v) for piece in keys])
        return back((dout, dmass))

    dq, darrays = pull(keys)

    def hop(carry, _):
        keys, dq, darrays = carry
        keys, darrays = jax.lax.ppermute((keys, darrays), static.axis, static.ring)
        more_q, more = pull(keys)
        return (keys, dq + more_q, jax.tree.map(jnp.add, darrays, more)), None

    (_, dq, darrays), _ = jax.lax.scan(hop, (keys, dq, darrays), None, length=static.parts - 1)
    darrays = jax.lax.ppermute(darrays, static.axis, static.ring)
    none: Any = None
    return dq, None, None, [Keys(dk, dv, none, none) for dk, dv in darrays]


_ring.defvjp(_forward, _backward)


def _visit(static: _Static, q, positions, ids, keys: list[Keys]) -> Part:
    """The device's queries over the pieces that are here now, in float32; halves that see nothing are skipped."""
    parts = []
    for a in _halves(q.shape[2]):
        pieces = [jax.tree.map(lambda x, b=b, n=piece.k.shape[2]: _cut(x, n, b), piece)
                  for piece in keys for b in _halves(piece.k.shape[2])]  # fmt: skip
        found = [_attend(static, q[:, :, a], positions[:, a], ids[:, a], piece) for piece in pieces]
        parts.append(combine(found))
    return Part(jnp.concatenate([p.out for p in parts], 2), jnp.concatenate([p.lse for p in parts], 2))


def _attend(static: _Static, q, positions, ids, piece: Keys) -> Part:
    visible = block_visibility(
        static.spec, positions, piece.positions, Bidirectional() if static.bidirectional else None
    )
    visible &= (ids[:, :, None] == piece.ids[:, None, :])[:, None]

    def seen(q, k, v, visible):
        part = attend(static.spec, q, [Segment(k, v, visible)])
        return Part(part.out.astype(jnp.float32), part.lse)

    def unseen(q, k, v, visible):
        return Part(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32))

    return jax.lax.cond(visible.any(), seen, unseen, q, piece.k, piece.v, visible)


def _halves(length: int) -> list[slice]:
    return [slice(0, length // 2), slice(length // 2, length)] if length > 1 else [slice(0, length)]


def _cut(x: jax.Array, length: int, part: slice) -> jax.Array:
    return x[:, :, part] if x.ndim == 4 else x[:, part]


def _axis(rules: AxisRules) -> str:
    axis = rules["context"]
    if not isinstance(axis, str):
        raise ConfigError(f"context parallelism goes over one mesh axis, got {axis!r}")
    return axis


def _local_spec(spec: AttentionSpec, rules: AxisRules, mesh: Mesh) -> AttentionSpec:
    """The arithmetic of the heads that one device has."""
    heads, groups = (rules.parts(name, mesh) for name in ("heads", "kv_heads"))
    return dataclasses.replace(spec, num_heads=spec.num_heads // heads, num_kv_heads=spec.num_kv_heads // groups)


@dataclasses.dataclass(frozen=True)
class ContextDense(Dense):
    """A dense cache whose slots are split over the context axis of `mesh`.

    A call of as many tokens as the axis divides (a prompt's chunk, training) goes round the ring, any other attends
    where the slots are. A sliding window is a mask here: every token is kept.
    """

    mesh: Any = None
    rules: Any = None

    def __post_init__(self):
        super().__post_init__()
        if self.ring or self.capacity % self.rules.parts("context", self.mesh):
            raise ConfigError(
                f"a context cache of {self.capacity} slots cannot be split over {self.rules['context']!r}"
            )

    @property
    def logical_axes(self) -> Any:
        """The logical axes of a State's arrays: a `DenseState` of names."""
        keys: Any = ("batch", "kv_heads", None, "context")
        values: Any = ("batch", "kv_heads", "context", None)
        marks: Any = ("batch", None, "context")
        rows: Any = ("batch",)
        return DenseState(keys, values, marks, rows)

    def attend(self, state: DenseState, block: Block, q, positions, mask, table=None) -> tuple[Part, None]:
        """As `Dense.attend`."""
        spec, parts = self.attention, self.rules.parts("context", self.mesh)
        place = {"mesh": self.mesh, "rules": self.rules}
        rotated = spec.rotate(q, jnp.maximum(positions, 0))
        slots = state.pos[:, 0]
        ringed = mask is None or isinstance(mask, Bidirectional | Segments)
        if ringed and q.shape[2] % parts == 0 and block.k.shape[2] % parts == 0:
            ids = mask.ids if isinstance(mask, Segments) else jnp.zeros_like(block.positions)
            keys = [Keys(spec.rotate(block.k, jnp.maximum(block.positions, 0)), block.v, block.positions, ids)]
            if slots.shape[1] and not isinstance(mask, Segments):  # packed documents are trained on, without a past
                past = jnp.swapaxes(state.k, 2, 3)
                keys.append(Keys(past, state.v, slots, jnp.zeros_like(slots)))
            return ring_attention(spec, rotated, keys, positions, mask=mask, **place), None
        own = attend(spec, rotated, [block_segment(spec, block, positions, mask, table)])
        if not slots.shape[1]:
            return own, None
        past = Keys(state.k, state.v, slots, jnp.zeros_like(slots))
        return combine([spread_attention(spec, rotated, past, positions, **place), own]), None

    def commit(self, state: DenseState, block: Block, path: jax.Array, n: jax.Array, notes=None) -> DenseState:
        """As `Dense.commit`: each device writes the slots that it has. The block is gathered for it, one layer's."""
        rows, groups, tokens = (self.rules[name] for name in ("batch", "kv_heads", "context"))
        new = kept(state, block, path, n)
        slots = jnp.where(new.live, new.order, self.capacity)
        k = self.attention.rotate(new.k, jnp.maximum(new.positions, 0))

        def write(state_k, state_v, pos, slots, k, v, positions):
            first = jax.lax.axis_index(_axis(self.rules)) * pos.shape[2]
            here = slots - first
            here = jnp.where((here >= 0) & (here < pos.shape[2]), here, pos.shape[2])
            return (
                scatter_columns(state_k, here, k),
                scatter_slots(state_v, here, v),
                scatter_slots(pos, here, positions[:, None]),
            )

        columns, lines, marks = P(rows, groups, None, tokens), P(rows, groups, tokens, None), P(rows, None, tokens)
        whole, few = P(rows, groups, None, None), P(rows, None)
        state_k, state_v, pos = jax.shard_map(
            write,
            mesh=mesh_here(self.mesh),
            in_specs=(columns, lines, marks, few, whole, whole, few),
            out_specs=(columns, lines, marks),
            check_vma=False,
        )(state.k, state.v, state.pos, slots, k, new.v, new.positions)
        return DenseState(state_k, state_v, pos, state.t + n)


@dataclasses.dataclass(frozen=True)
class _NoPast(ContextDense):
    """No slots at all: what training attends with."""

    def init(self, batch: int) -> DenseState:
        """A State without slots."""
        whole = super().init(batch)
        return DenseState(whole.k[..., :0], whole.v[:, :, :0], whole.pos[..., :0], whole.t)


@dataclasses.dataclass(frozen=True)
class ContextCache:
    """Cache policy: `ContextDense` in every layer, its capacity rounded up to what the context axis divides."""

    mesh: Mesh
    rules: AxisRules

    def spec(self, attention: AttentionSpec, capacity: int, dtype: str) -> ContextDense:
        """The Spec of one layer."""
        parts = self.rules.parts("context", self.mesh)
        return ContextDense(attention, -(-capacity // parts) * parts, dtype, mesh=self.mesh, rules=self.rules)

    def empty(self, config: Any, batch: int, dtype: str = "float32") -> kv.Cache:
        """A cache without a past, for a call that is not part of a sequence of calls."""
        parts = self.rules.parts("context", self.mesh)
        specs = [
            _NoPast(config.attention(i), parts, dtype, mesh=self.mesh, rules=self.rules)
            for i in range(config.num_layers)
        ]
        return kv.Cache(tuple(spec.init(batch) for spec in specs), tuple(specs))
