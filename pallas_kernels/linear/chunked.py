"""The chunked form of linear attention, forward and backward, as every gated rule shares it.

A sequence is cut in chunks of C tokens. Inside a chunk a rule computes what tokens see of each other; between chunks
goes a state S [K, V]. With `into` (the decay from the chunk's start to a token, times the op's scale), `out` (from a
token to the chunk's end) and `over` (across the chunk), decays all in [0, 1]:

    o = inside + (q into) S,        S' = over S + (k out)^T v.

Several chunks are worked on at a time (`group`), so that each XLA operation has enough to do; only the chain of states
is sequential. The gradient runs the chain once forward for the states (T/C of them, as many numbers as q has where
C = V; computing those inside a group again costs a tenth of the time) and once backward.

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
class Sizes:
    """`chunk` tokens in a chunk, `group` chunks worked on at a time. A rule whose method wants other sizes works on
    `rows` rows for a chunk: those behind the tokens are zeros, tokens that do nothing."""

    chunk: int
    group: int
    rows: int

    @classmethod
    def of(cls, length: int, chunk: int, group: int, rows: int | None = None) -> Sizes:
        """Groups of no more chunks than `length` tokens have."""
        return cls(chunk, min(group, -(-length // chunk)), rows or chunk)

    @property
    def tokens(self) -> int:
        """Tokens of a group."""
        return self.chunk * self.group

    def cut(self, x: Array, i: Array) -> Array:
        """The i-th group of x [B, H, T, d] as [B, H, G, rows, d]."""
        dtype = x.dtype
        if dtype.itemsize == 2:
            # XLA's CPU backend may rewrite a slice of a 16-bit float array as a conversion of the whole array; of its
            # bits it does not. Out of the loop it would move their making, and so copy the array: hence the barrier.
            x, i = lax.optimization_barrier((x, i))
        piece = lax.dynamic_slice_in_dim(_bits(x), i * self.tokens, self.tokens, 2)
        piece = piece.reshape(*x.shape[:2], self.group, self.chunk, x.shape[-1])
        if self.rows != self.chunk:
            piece = jnp.pad(piece, ((0, 0),) * 3 + ((0, self.rows - self.chunk), (0, 0)))
        return lax.bitcast_convert_type(piece, dtype)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a gated rule adds to the chain. Arrays are [B, H, G, C, channels]; `gate` is what `gates` gave.

    `gates(i)`: the gates of the i-th group.
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


def forward(rule: Rule, q: Array, k: Array, v: Array, state: Array, sizes: Sizes) -> tuple[Array, Array]:
    """out [B, H, T, V] in v's dtype and the final state f32 [B, H, K, V]; T is a multiple of `sizes.tokens`."""
    cut, number = sizes.cut, q.shape[2] // sizes.tokens

    def step(i: Array, carry: tuple[Array, Bits]) -> tuple[Array, Bits]:
        state, out = carry
        qc, kc, vc = cut(q, i), cut(k, i), cut(v, i)
        gate = rule.gates(i)
        decays = rule.decays(gate)
        state, states = _chain(state, decays.over, _written(kc, vc, decays))
        new = rule.inside(qc, kc, vc, gate) + product(_cast(qc * decays.into, qc), _cast(states, qc), 1, 0)
        return state, _placed(out, new, i, sizes)

    state, out = lax.fori_loop(0, number, step, (state, _unset(v)))
    return out.array(), state


def backward(
    rule: Rule, q: Array, k: Array, v: Array, state: Array, d_out: Array, d_state: Array, sizes: Sizes,
    gates: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Gradients of q, k, v in their dtype, of the initial state in f32, and of the gates.

    The latter in the shape and dtype of `gates` [B, H, T, d], or, without them, of each group, stacked.
    """
    cut, number = sizes.cut, q.shape[2] // sizes.tokens

    def states_of(state: Array, i: Array) -> tuple[Array, Array]:
        decays = rule.decays(rule.gates(i))
        return _chain(state, decays.over, _written(cut(k, i), cut(v, i), decays))

    last, states = lax.scan(states_of, state, jnp.arange(number))

    def step(carry: tuple[Any, ...], x: tuple[Array, Array]) -> tuple[Any, Any]:
        (d_state, after, *grads), (i, before) = carry, x
        qc, kc, vc, dc = cut(q, i), cut(k, i), cut(v, i), cut(d_out, i)
        gate = rule.gates(i)
        decays = rule.decays(gate)
        dq, dk, dv = rule.inside_grad(qc, kc, vc, gate, dc)
        read = product(_cast(qc * decays.into, qc), dc, 0, 0)
        d_state, d_after = _chain(d_state, decays.over, read, reverse=True)
        dq += product(dc, _cast(before, qc), 1, 1) * decays.into
        dk += product(vc, _cast(d_after, vc), 1, 1) * decays.out
        dv += product(_cast(kc * decays.out, kc), _cast(d_after, vc), 1, 0)
        after = jnp.concatenate([before[:, :, 1:], after[:, :, None]], 2)
        d_gate = rule.gate_grad(gate, qc * dq - kc * dk, (d_after * after).sum(-1))
        new = (dq, dk, dv) if gates is None else (dq, dk, dv, d_gate)
        grads = [_placed(whole, piece, i, sizes) for whole, piece in zip(grads, new, strict=True)]
        return (d_state, before[:, :, 0], *grads), d_gate if gates is None else None

    unset = [_unset(x, mark) for mark, x in enumerate((q, k, v, gates), 1) if x is not None]
    (d_state, _, *grads), d_gate = lax.scan(step, (d_state, last, *unset), (jnp.arange(number), states), reverse=True)
    dq, dk, dv, *placed = (x.array() for x in grads)
    return dq, dk, dv, d_state, placed[0] if placed else d_gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bits:
    """An array that a loop updates. XLA's CPU backend may rewrite an update of a 16-bit float array as a conversion of
    the whole array, at every step of the loop; of its bits, kept as integers, it does not."""

    stored: Array
    dtype: str = dataclasses.field(metadata={"static": True})

    def array(self) -> Array:
        return lax.bitcast_convert_type(self.stored, jnp.dtype(self.dtype))


def _bits(x: Array) -> Array:
    """x, as integers if its floats have 16 bits."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _unset(like: Array, mark: int = 0) -> Bits:
    """An array of the shape of `like`, to be written over. Of equal arrays XLA would make one and copy it for each
    loop; with a `mark` of its own each is filled where it will stay."""
    dtype = jnp.uint16 if like.dtype.itemsize == 2 else like.dtype
    return Bits(jnp.full(like.shape, mark, dtype), str(like.dtype))


def _placed(whole: Bits, new: Array, i: Array, sizes: Sizes) -> Bits:
    """`whole` [B, H, T, d] with its i-th group replaced by `new` [B, H, G, rows, d]."""
    new = new[..., : sizes.chunk, :].astype(whole.dtype)
    piece = _bits(new.reshape(*new.shape[:2], -1, new.shape[-1]))
    return Bits(lax.dynamic_update_slice_in_dim(whole.stored, piece, i * piece.shape[2], 2), whole.dtype)


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
