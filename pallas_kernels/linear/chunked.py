"""The chunked form of linear attention, forward and backward, as every gated rule shares it.

A sequence is cut in chunks of C tokens. Inside a chunk a rule computes what tokens see of each other; between chunks
goes a state S [K, V]. With `into` (the decay from the chunk's start to a token, times the op's scale), `out` (from a
token to the chunk's end) and `over` (across the chunk), decays all in [0, 1]:

    o = inside + (q into) S,        S' = over S + (k out)^T v.

Several chunks are worked on at a time (`group`), so that each XLA operation has enough to do; only the chain of states
is sequential. The gradient runs the chain once forward for the states (T/C of them, as many numbers as q has where
C = V) and once backward.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Decays:
    """f32 factors of one chunk: `into`, `out` [..., C, K or 1] and `over` [..., K or 1, 1]."""

    into: Array
    out: Array
    over: Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a gated rule adds to the chain. Arrays are [B, H, G, C, channels]; `gate` is what `gates` gave.

    `gates(chunk)`: the gates of the group that starts at chunk number `chunk`.
    `inside(q, k, v, gate)` -> f32 output; `inside_grad(q, k, v, gate, do)` -> f32 dq, dk, dv. What they compute
    again of `decays(gate)`, XLA merges.
    `gate_grad(gate, x, boundary)`: the gate's gradient from x = q dq - k dk [B, H, G, C, K] and
    boundary = sum over V of dS' S' [B, H, G, K].
    """

    gates: Callable[[Array], Any]
    decays: Callable[[Any], Decays]
    inside: Callable[..., Array]
    inside_grad: Callable[..., tuple[Array, Array, Array]]
    gate_grad: Callable[[Any, Array, Array], Array]


def product(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Products of tiles [..., m, n] over the named axes (0 or 1) of each, leading axes in step, accumulated in f32."""
    lead = tuple(range(a.ndim - 2))
    numbers = (((contract_a + len(lead),), (contract_b + len(lead),)), (lead, lead))
    # Products of 16-bit floats are exact in float32; a TPU kernel refuses to be asked for more.
    precision = lax.Precision.DEFAULT if a.dtype.itemsize == 2 else None
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def forward(rule: Rule, q: Array, k: Array, v: Array, state: Array, chunk: int, group: int) -> tuple[Array, Array]:
    """out [B, H, T, V] in v's dtype and the final state f32 [B, H, K, V]; T is a multiple of chunk * group."""
    qs, ks, vs = bits(q), bits(k), bits(v)
    cut, number = cutter(qs, chunk, group)

    def step(i: Array, carry: tuple[Array, Bits]) -> tuple[Array, Bits]:
        state, out = carry
        qc, kc, vc = cut(qs, i), cut(ks, i), cut(vs, i)
        gate = rule.gates(i * group)
        decays = rule.decays(gate)
        state, states = _chain(state, decays.over, _written(kc, vc, decays))
        new = rule.inside(qc, kc, vc, gate) + product(_cast(qc * decays.into, qc), _cast(states, qc), 1, 0)
        return state, _placed(out, new, i)

    state, out = lax.fori_loop(0, number, step, (state, _empty(vs)))
    return out.array(), state


def backward(
    rule: Rule, q: Array, k: Array, v: Array, state: Array, d_out: Array, d_state: Array, chunk: int, group: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of q, k, v in their dtype, of the initial state in f32, and of each group's gates, stacked."""
    qs, ks, vs, ds = bits(q), bits(k), bits(v), bits(d_out)
    cut, number = cutter(qs, chunk, group)

    def states_of(state: Array, i: Array) -> tuple[Array, Array]:
        decays = rule.decays(rule.gates(i * group))
        return _chain(state, decays.over, _written(cut(ks, i), cut(vs, i), decays))

    last, states = lax.scan(states_of, state, jnp.arange(number))

    def step(carry: tuple[Any, ...], x: tuple[Array, Array]) -> tuple[Any, Array]:
        (d_state, after, *grads), (i, before) = carry, x
        qc, kc, vc, dc = cut(qs, i), cut(ks, i), cut(vs, i), cut(ds, i)
        gate = rule.gates(i * group)
        decays = rule.decays(gate)
        dq, dk, dv = rule.inside_grad(qc, kc, vc, gate, dc)
        read = product(_cast(qc * decays.into, qc), dc, 0, 0)
        d_state, d_after = _chain(d_state, decays.over, read, reverse=True)
        dq += product(dc, _cast(before, qc), 1, 1) * decays.into
        dk += product(vc, _cast(d_after, vc), 1, 1) * decays.out
        dv += product(_cast(kc * decays.out, kc), _cast(d_after, vc), 1, 0)
        after = jnp.concatenate([before[:, :, 1:], after[:, :, None]], 2)
        d_gate = rule.gate_grad(gate, qc * dq - kc * dk, (d_after * after).sum(-1))
        grads = [_placed(all_, new, i) for all_, new in zip(grads, (dq, dk, dv), strict=True)]
        return (d_state, before[:, :, 0], *grads), d_gate

    carry = (d_state, last, _empty(qs), _empty(ks), _empty(vs))
    (d_state, _, *grads), d_gate = lax.scan(step, carry, (jnp.arange(number), states), reverse=True)
    dq, dk, dv = (x.array() for x in grads)
    return dq, dk, dv, d_state, d_gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bits:
    """An array that a loop slices or updates. XLA's CPU backend rewrites a slice or an update of a 16-bit float array
    as a conversion of the whole array, at every step of the loop; of its bits, kept as integers, it does not."""

    stored: Array
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def array(self) -> Array:
        return lax.bitcast_convert_type(self.stored, jnp.dtype(self.dtype))


def bits(x: Array) -> Bits:
    """x, stored as integers if its floats have 16 bits."""
    stored = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
    return Bits(stored, str(x.dtype))


def _empty(like: Bits) -> Bits:
    return dataclasses.replace(like, stored=jnp.zeros_like(like.stored))


def _placed(whole: Bits, new: Array, i: Array) -> Bits:
    """`whole` [B, H, T, d] with its i-th group replaced by `new` [B, H, G, C, d]."""
    piece = bits(new.astype(whole.dtype).reshape(*new.shape[:2], -1, new.shape[-1])).stored
    return Bits(lax.dynamic_update_slice_in_dim(whole.stored, piece, i * piece.shape[2], 2), whole.dtype)


def cutter(like: Bits, chunk: int, group: int) -> tuple[Callable[[Bits, Array], Array], int]:
    """`cut(x, i)`, the i-th group of x [B, H, T, d] as [B, H, G, C, d], and how many groups there are."""
    batch, heads, length, _ = like.shape

    def cut(x: Bits, i: Array) -> Array:
        piece = lax.dynamic_slice_in_dim(x.stored, i * chunk * group, chunk * group, 2)
        return Bits(piece.reshape(batch, heads, group, chunk, x.shape[-1]), x.dtype).array()

    return cut, length // (chunk * group)


def _written(k: Array, v: Array, decays: Decays) -> Array:
    """What each chunk adds to the state by its end: f32 [B, H, G, K, V]."""
    return product(_cast(k * decays.out, k), v, 0, 0)


def _chain(state: Array, over: Array, added: Array, reverse: bool = False) -> tuple[Array, Array]:
    """The state after the group's chunks, and the one that each chunk met."""
    met = []
    order = range(added.shape[2])
    for i in reversed(order) if reverse else order:
        met.append(state)
        state = over[:, :, i] * state + added[:, :, i]
    return state, jnp.stack(met[::-1] if reverse else met, 2)


def _cast(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)
