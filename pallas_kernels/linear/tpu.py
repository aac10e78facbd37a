"""The chunked form of linear attention as TPU kernels: a grid step a chunk, the state in VMEM from step to step.

Forward is one kernel. Backward is two: the states that each chunk met, written out (T / C of them), then the chunks in
reverse order with the state's gradient in VMEM. The maths of a chunk is that of chunked.py, on tiles [C, channels].

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels.linear.chunked import Decays, product

Array = jax.Array
CHUNK = 128  # the side of the matrix unit; sublanes of 8 or 16 divide it


@dataclasses.dataclass(frozen=True)
class TileRule:
    """A gated rule on the tiles of one chunk; `gate` is the tuple of the gate arrays' tiles. As chunked.Rule, but
    `decays(gate).over` is [K or 1, 1], and `gate_grad(gate, x, boundary)` takes boundary [K, V] = dS' S', unsummed."""

    decays: Callable[[Any], Decays]
    inside: Callable[..., Array]
    inside_grad: Callable[..., tuple[Array, Array, Array]]
    gate_grad: Callable[[Any, Array, Array], Array]


def forward(
    rule: TileRule, q: Array, k: Array, v: Array, gates: Sequence[Array], state: Array, chunk: int, interpret: bool
) -> tuple[Array, Array]:
    """q, k [R, T, K], v [R, T, V], state f32 [R, K, V] -> out and state; `gates` are [R, T, d] or [R, N, 1, 1]."""
    spec = _specs(q, chunk, reverse=False)

    def kernel(*refs: Any) -> None:
        q, k, v, *gate, first, out, last, state = refs
        _start(state, first)
        qt, kt, vt, g = q[...], k[...], v[...], tuple(x[...] for x in gate)
        decays = rule.decays(g)
        seen = product((qt * decays.into).astype(qt.dtype), state[...].astype(qt.dtype), 1, 0)
        out[...] = (rule.inside(qt, kt, vt, g) + seen).astype(out.dtype)
        state[...] = decays.over * state[...] + product((kt * decays.out).astype(kt.dtype), vt, 0, 0)
        _finish(last, state)

    arrays = (q, k, v, *gates, state)
    return _call(kernel, spec, arrays, [v, state], [state], interpret)


def backward(
    rule: TileRule, q: Array, k: Array, v: Array, gates: Sequence[Array], state: Array, d_out: Array, d_state: Array,
    chunk: int, interpret: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradients of q, k, v, the initial state, and the gate (in the shape of the last of `gates`)."""
    rows, length, _ = q.shape
    met = jax.ShapeDtypeStruct((rows, length // chunk + 1, *state.shape[1:]), jnp.float32)

    def states_kernel(*refs: Any) -> None:
        k, v, *gate, first, met, state = refs
        _start(state, first)
        met[...] = state[...]
        decays = rule.decays(tuple(x[...] for x in gate))
        state[...] = decays.over * state[...] + product((k[...] * decays.out).astype(k.dtype), v[...], 0, 0)

    # One step more than there are chunks writes the final state behind the others; its tokens are the last chunk's.
    spec = _specs(q, chunk, reverse=False, steps=length // chunk + 1)
    (states,) = _call(states_kernel, spec, (k, v, *gates, state), [met], [state], interpret)

    def grads_kernel(*refs: Any) -> None:
        q, k, v, d_out, *gate, before, after, d_last, dq, dk, dv, d_first, d_gate, d_state = refs
        _start(d_state, d_last)
        qt, kt, vt, dt, g = q[...], k[...], v[...], d_out[...], tuple(x[...] for x in gate)
        decays, d_after = rule.decays(g), d_state[...]
        dq_, dk_, dv_ = rule.inside_grad(qt, kt, vt, g, dt)
        dq_ += product(dt, before[...].astype(qt.dtype), 1, 1) * decays.into
        dk_ += product(vt, d_after.astype(vt.dtype), 1, 1) * decays.out
        dv_ += product((kt * decays.out).astype(kt.dtype), d_after.astype(vt.dtype), 1, 0)
        dq[...], dk[...], dv[...] = dq_.astype(dq.dtype), dk_.astype(dk.dtype), dv_.astype(dv.dtype)
        d_gate[...] = rule.gate_grad(g, qt * dq_ - kt * dk_, d_after * after[...])
        d_state[...] = decays.over * d_after + product((qt * decays.into).astype(qt.dtype), dt, 0, 0)
        _finish(d_first, d_state)

    spec = _specs(q, chunk, reverse=True)
    arrays = (q, k, v, d_out, *gates, states[:, :-1], states[:, 1:], d_state)
    gate_out = jax.ShapeDtypeStruct(gates[-1].shape, jnp.float32)
    return _call(grads_kernel, spec, arrays, [q, k, v, state, gate_out], [state], interpret)


@dataclasses.dataclass(frozen=True)
class _Spec:
    grid: tuple[int, int]
    of: Callable[[Any], pl.BlockSpec]


def _specs(q: Array, chunk: int, *, reverse: bool, steps: int | None = None) -> _Spec:
    """The grid (rows, chunks), and each array's block, by its shape."""
    rows, length, _ = q.shape
    number = length // chunk

    def of(x: Any) -> pl.BlockSpec:
        shape = x.shape
        most = shape[1] - 1 if len(shape) == 4 else number - 1

        def at(n: Any) -> Any:
            return number - 1 - n if reverse else n if most + 1 == (steps or number) else jnp.minimum(n, most)

        if len(shape) == 4:  # one tile a chunk
            return pl.BlockSpec((None, None, *shape[2:]), lambda b, n: (b, at(n), 0, 0))
        if shape[1] == length:  # tokens
            return pl.BlockSpec((None, chunk, shape[2]), lambda b, n: (b, at(n), 0))
        return pl.BlockSpec((None, *shape[1:]), lambda b, n: (b, 0, 0))  # one tile a row

    return _Spec((rows, steps or number), of)


def _call(
    kernel: Callable[..., None], spec: _Spec, arrays: Sequence[Array], outs: Sequence[Any], scratch: Sequence[Array],
    interpret: bool,
) -> Any:  # fmt: skip
    return pl.pallas_call(
        kernel,
        grid=spec.grid,
        in_specs=[spec.of(x) for x in arrays],
        out_specs=[spec.of(x) for x in outs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        scratch_shapes=[pltpu.VMEM(x.shape[1:], jnp.float32) for x in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*arrays)


def _start(state: Any, first: Any) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        state[...] = first[...]


def _finish(last: Any, state: Any) -> None:
    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        last[...] = state[...]


def flat(x: Array) -> Array:
    """[B, H, ...] -> [B H, ...]."""
    return x.reshape(-1, *x.shape[2:])


def refuses(call: Any) -> str | None:
    """Why no TPU kernel serves the call, or None."""
    if call.dtype == "float16":
        return "the TPU has no float16"
    if max(call.key_dim, call.value_dim) > 512:
        return f"a state of {call.key_dim} x {call.value_dim} does not fit VMEM with its tiles; up to 512 x 512"
    if call.block is not None and call.block % 16:
        return f"block={call.block} is not a multiple of 16, the rows of a tile"
    return None
