"""Lightning Attention-2 on Hopper (Qin et al., 2024, arXiv 2401.04658): linear/gpu.py with a constant decay.

Forward, a warpgroup takes a piece of a head's sequence and 64 channels of v, and goes through it in chunks of 64
tokens: q, k and v by TMA into two buffers, scores and outputs by wgmma, the float32 state [K, 64] in registers.
Backward, the states are written out and every chunk is a block of its own.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu
from jaxinfer.pallas_kernels.linear import gpu
from jaxinfer.pallas_kernels.linear.arguments import padded
from jaxinfer.pallas_kernels.linear.gpu import CHUNK, LOG2_E, product, put, tile

Array = jax.Array


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, *, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """As blocked.forward, for shapes that linear/gpu.py serves."""
    count = gpu.pieces_of(q, v)
    qs, ks, vs = (gpu.flat(padded(x, CHUNK * count), count) for x in (q, k, v))
    decays = _Decays.of(log_decay, lengths, qs, count, scale)
    first = state.reshape(-1, *state.shape[2:])
    if count > 1:
        first = gpu.firsts(_times(ks, decays.out), vs, decays.over, first, count, interpret=interpret)
    (rows, length, keys), values, dtype = qs.shape, vs.shape[-1], q.dtype
    buffers = {
        "q_s": tile(dtype, CHUNK, keys, 2),
        "k_s": tile(dtype, CHUNK, keys, 2),
        "v_s": tile(dtype, CHUNK, 64, 2),
        "added_s": tile(dtype, CHUNK, 64),  # v, decayed to the chunk's end
        "state_s": tile(dtype, keys, 64),
        "scores_s": tile(dtype, CHUNK, CHUNK),
        "out_s": tile(dtype, CHUNK, 64),
        "wide_s": tile("float32", keys, 64),  # the state, on its way in and out
        "here": mosaic_gpu().Barrier(num_arrivals=3, num_barriers=2),
        "loaded": mosaic_gpu().Barrier(),
    }
    found = gpu.run(
        functools.partial(_forward_kernel, chunks=length // CHUNK, scale=scale),
        {"q": qs, "k": ks, "v": vs, "slope": decays.slope * LOG2_E, "length": decays.length, "first": first},
        {"out": jax.ShapeDtypeStruct(vs.shape, dtype), "last": jax.ShapeDtypeStruct(first.shape, jnp.float32)},
        buffers, {"row": rows, "channels": values // 64}, interpret,
    )  # fmt: skip
    return gpu.whole(found["out"], v), gpu.piece(found["last"], count, -1).reshape(state.shape)


def backward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, d_out: Array, d_state: Array,
    *, scale: float, interpret: bool,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """As blocked.backward."""
    count = gpu.pieces_of(q, v)
    qs, ks, vs, ds = (gpu.flat(padded(x, CHUNK * count), count) for x in (q, k, v, d_out.astype(q.dtype)))
    decays = _Decays.of(log_decay, lengths, qs, count, scale)
    read, write = _times(qs, decays.into), _times(ks, decays.out)
    met, _, d_met, d_first, sums = gpu.both_ways(read, write, vs, ds, decays.over, state, d_state, count, interpret)
    scores = functools.partial(_scores, decays.slope * LOG2_E, scale=scale, interpret=interpret)
    a, d_a = scores(qs, ks), scores(ds, vs)
    turned = functools.partial(gpu.read, a_turned=True, interpret=interpret)
    dv = turned(a, ds, write, d_met, dtype=v.dtype)
    dq = gpu.read(d_a, ks, _times(ds, decays.into), met, dtype="float32", met_turned=True, interpret=interpret)
    dk = turned(d_a, qs, _times(vs, decays.out), d_met, dtype="float32", met_turned=True)
    # A token's decay scales what crosses it; what later tokens read and earlier ones did not write, and the new state.
    crossing = (qs * dq - ks * dk).sum(-1).reshape(decays.passed.shape)
    d_decay = (decays.passed * crossing).sum(-1) + decays.passed[..., -1] * sums.sum(-1)
    d_decay = d_decay.sum(1).reshape(q.shape[0], q.shape[1], count).sum((0, 2))
    dq, dk = (gpu.whole(x.astype(q.dtype), q) for x in (dq, dk))
    return dq, dk, gpu.whole(dv, v), d_decay, d_first


@dataclasses.dataclass(frozen=True)
class _Decays:
    """Of the pieces' rows R and their N chunks, all f32 but `length`."""

    slope: Array  # [R], the logarithm of a token's decay
    length: Array  # i32 [R], true tokens
    passed: Array  # [R, N, 64], steps of decay from the chunk's start up to a token
    into: Array  # [R, T, 1], from the chunk's start to a token, scaled
    out: Array  # [R, T, 1], from a token to the chunk's end
    over: Array  # [R, N, K], across the chunk

    @classmethod
    def of(cls, log_decay: Array, lengths: Array, q: Array, pieces: int, scale: float) -> _Decays:
        """q [R, T, K] in pieces."""
        rows, size, keys = q.shape
        heads = log_decay.shape[0]
        slope = jnp.tile(jnp.repeat(log_decay, pieces), lengths.shape[0])
        length = jnp.clip(lengths[:, None, None] - jnp.arange(pieces) * size, 0, size)
        length = jnp.broadcast_to(length, (lengths.shape[0], heads, pieces)).reshape(rows)
        true = jnp.clip(length[:, None] - jnp.arange(size // CHUNK) * CHUNK, 0, CHUNK)
        passed = jnp.minimum(jnp.arange(CHUNK) + 1, true[..., None]).astype(jnp.float32)
        by = slope[:, None, None]
        over = jnp.exp(by * true[..., None])
        into, out = scale * jnp.exp(by * passed), jnp.exp(by * (true[..., None] - passed))
        into, out = (x.reshape(rows, size, 1) for x in (into, out))
        return cls(slope, length, passed, into, out, jnp.broadcast_to(over, (*true.shape, keys)))


def _times(x: Array, decay: Array) -> Array:
    return (x * decay).astype(x.dtype)


def _scores(slope: Array, x: Array, y: Array, *, scale: float, interpret: bool) -> Array:
    """scale x y^T of the tokens of each chunk, decayed from column to row, nothing above the diagonal: [R, T, 64]."""
    rows, length, size = x.shape
    buffers = {
        "x_s": tile(x.dtype, CHUNK, size),
        "y_s": tile(x.dtype, CHUNK, size),
        "out_s": tile(x.dtype, CHUNK, CHUNK),
        "here": mosaic_gpu().Barrier(num_arrivals=2),
    }

    def kernel(r: dict[str, Any]) -> None:
        row, tokens = lax.axis_index("row"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)
        gpu.load(r, {name: r[name].at[row, tokens] for name in ("x", "y")})
        scores = product(r["x_s"], r["y_s"].transpose((1, 0)), (CHUNK, CHUNK))
        gpu.store(_decayed(scores, r["slope"][row], scale), r["out_s"], r["out"].at[row, tokens])

    out = {"out": jax.ShapeDtypeStruct((rows, length, CHUNK), x.dtype)}
    grid = {"chunk": length // CHUNK, "row": rows}
    return gpu.run(kernel, {"x": x, "y": y, "slope": slope}, out, buffers, grid, interpret)["out"]


def _decayed(scores: Array, slope: Any, scale: float) -> Array:
    age = (gpu.numbers(0) - gpu.numbers(1)).astype(jnp.float32)
    return jnp.where(age >= 0, scores * (jnp.exp2(slope * jnp.maximum(age, 0.0)) * scale), 0.0)


def _forward_kernel(r: dict[str, Any], *, chunks: int, scale: float) -> None:
    plgpu = mosaic_gpu()
    row, channels = lax.axis_index("row"), pl.ds(lax.axis_index("channels") * 64, 64)
    slope, length = r["slope"][row], r["length"][row]

    def fetch(i: Any) -> None:
        tokens, slot = pl.ds(i * CHUNK, CHUNK), lax.rem(i, 2)
        for name, source in (
            ("q", r["q"].at[row, tokens]), ("k", r["k"].at[row, tokens]), ("v", r["v"].at[row, tokens, channels])
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(source, r[f"{name}_s"].at[slot], r["here"].at[slot])

    def step(i: Any, state: Array) -> Array:
        slot = lax.rem(i, 2)
        plgpu.commit_smem()  # one thread fetches: all warps must be past their products of what it overwrites
        pl.when(i + 1 < chunks)(lambda: fetch(i + 1))
        plgpu.barrier_wait(r["here"].at[slot])
        q, k, v = (r[f"{name}_s"].at[slot] for name in "qkv")
        count = jnp.clip(length - i * CHUNK, 0, CHUNK).astype(jnp.float32)
        scores = put(r["scores_s"], _decayed(product(q, k.transpose((1, 0)), (CHUNK, CHUNK)), slope, scale))
        passed = jnp.minimum(gpu.numbers(0, (CHUNK, 64)).astype(jnp.float32) + 1, count)
        out = product(q, put(r["state_s"], state), (CHUNK, 64)) * (jnp.exp2(slope * passed) * scale)
        out += product(scores, v, (CHUNK, 64))
        added = put(r["added_s"], v[...].astype(jnp.float32) * jnp.exp2(slope * (count - passed)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(r["out_s"], out)
        plgpu.copy_smem_to_gmem(r["out_s"], r["out"].at[row, pl.ds(i * CHUNK, CHUNK), channels])
        return state * jnp.exp2(slope * count) + product(k.transpose((1, 0)), added, state.shape)

    fetch(0)
    plgpu.copy_gmem_to_smem(r["first"].at[row, :, channels], r["wide_s"], r["loaded"])
    plgpu.barrier_wait(r["loaded"])
    state = plgpu.layout_cast(r["wide_s"][...], plgpu.Layout.WGMMA)
    state = lax.fori_loop(0, chunks, step, state)
    gpu.store(state, r["wide_s"], r["last"].at[row, :, channels])
