"""The chunked form of linear attention on Hopper: what Lightning attention and GLA share, in Mosaic GPU.

Work is split so that few heads fill the machine. `states` walks the chunks of a row and writes the state that each
meets; all else is a block a chunk: what tokens of a chunk see of each other (`a`, from the op's own kernel), and
`read`, which adds what they see of the state. A row is a head's sequence, or, where heads are few, a piece of it, whose
first state comes from a pass before (as LASP does between devices: Sun et al., 2024, arXiv 2404.02882). The gradient
is the same kernels over the transposed products: gradients of the state go backward in time,
`dv = a^T do + (k out) dS`, and so on.

Operands of products are read from shared memory, which Mosaic's interpreter asks for. Compiled for the H200 without
spills (tests/budgets); not run on one yet.

Stability: internal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses

Array = jax.Array
CHUNK = 64  # the rows of a warpgroup's wgmma
CORES = 132  # of an H100 or H200 (SXM)
LOG2_E = math.log2(math.e)


def refuses(call: Any) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if call.dtype not in ("bfloat16", "float16"):
        return f"wgmma takes 16-bit floats, q is {call.dtype}"
    if {call.key_dim, call.value_dim} - {64, 128}:
        return f"head sizes K and V of 64 or 128, got {call.key_dim} and {call.value_dim}"
    if call.block not in (None, CHUNK):
        return f"block is {CHUNK}, got {call.block}"
    return None


def pieces_of(q: Array, v: Array) -> int:
    """`pieces` of q [B, H, T, K] with v [B, H, T, V]: a block walks 64 channels of v."""
    return pieces(q.shape[0] * q.shape[1] * (v.shape[-1] // 64), q.shape[2])


def pieces(blocks: int, length: int) -> int:
    """In how many pieces to cut sequences of `length` tokens, so that `blocks` blocks a piece fill the machine."""
    most = min(CORES // blocks, -(-length // CHUNK))
    return 1 << max(0, most.bit_length() - 1)


def states(
    write: Array, value: Array, over: Array, first: Array, *,
    reverse: bool = False, against: Array | None = None, keep: bool = True, interpret: bool,
) -> tuple[Array | None, Array, Array | None]:  # fmt: skip
    """Run S = over S + write^T value along the chunks of every row, or backward.

    write [R, T, K], value [R, T, V], over f32 [R, N, K], first f32 [R, K, V]. Returns the states that the chunks met
    [R, N, K, V] in write's dtype (forward, the last one behind them: [R, N + 1, K, V]; None unless `keep`), the last
    one in f32, and where `against` [R, N + 1, K, V] is given the sums over V of state times entry n + 1, f32 [R, N, K].
    """
    plgpu = mosaic_gpu()
    (rows, length, keys), values, dtype = write.shape, value.shape[-1], write.dtype
    chunks, tiles = length // CHUNK, values // 64
    outs: dict[str, Any] = {"last": jax.ShapeDtypeStruct(first.shape, jnp.float32)}
    buffers: dict[str, Any] = {
        "write_s": tile(dtype, CHUNK, keys, 2),
        "value_s": tile(dtype, CHUNK, 64, 2),
        "wide_s": tile("float32", keys, 64),
        "here": plgpu.Barrier(num_arrivals=2 if against is None else 3, num_barriers=2),
        "loaded": plgpu.Barrier(),
    }
    if keep:
        outs["met"] = jax.ShapeDtypeStruct((rows, chunks + (not reverse), keys, values), dtype)
        buffers["met_s"] = tile(dtype, keys, 64)
    if against is not None:
        outs["sums"] = jax.ShapeDtypeStruct((rows, tiles, chunks, keys), jnp.float32)
        buffers["against_s"] = tile(dtype, keys, 64, 2)
        buffers["sums_s"] = plgpu.SMEM((keys,), jnp.float32)
    inputs = {"write": write, "value": value, "over": over, "first": first}
    if against is not None:
        inputs["against"] = against
    found = run(
        functools.partial(_states_kernel, chunks=chunks, reverse=reverse),
        inputs, outs, buffers, {"row": rows, "channels": tiles}, interpret,
    )  # fmt: skip
    sums = found["sums"].sum(1) if "sums" in found else None
    return found.get("met"), found["last"], sums


def firsts(
    write: Array, value: Array, over: Array, first: Array, count: int, *, reverse: bool = False, interpret: bool
) -> Array:
    """The states f32 [R count, K, V] that each of `count` pieces of every row starts from; first f32 [R, K, V].

    The other arrays are those of the pieces, [R count, ...].
    """
    if count == 1:
        return first
    nothing = jnp.zeros((write.shape[0], *first.shape[1:]), jnp.float32)
    _, added, _ = states(write, value, over, nothing, reverse=reverse, keep=False, interpret=interpret)
    overs, adds = (x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for x in (over.prod(1), added))

    def step(state: Array, piece: tuple[Array, Array]) -> tuple[Array, Array]:
        over, added = piece
        return over[..., None] * state + added, state

    _, met = lax.scan(step, first, (overs, adds), reverse=reverse)
    return met.swapaxes(0, 1).reshape(-1, *first.shape[1:])


def both_ways(
    read: Array, write: Array, value: Array, d_out: Array, over: Array, state: Array, d_state: Array, count: int,
    interpret: bool,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """What the gradient needs of the states, in `count` pieces: as `states`, forward and backward in time.

    The states that the chunks met, the last one; the states' gradients behind the chunks; that of the first state
    [B, H, K, V]; and `sums`.
    """
    first, after = (x.reshape(-1, *x.shape[2:]) for x in (state, d_state))
    first = firsts(write, value, over, first, count, interpret=interpret)
    met, last, _ = states(write, value, over, first, interpret=interpret)
    after = firsts(read, d_out, over, after, count, reverse=True, interpret=interpret)
    d_met, d_first, sums = states(read, d_out, over, after, reverse=True, against=met, interpret=interpret)
    assert met is not None and d_met is not None and sums is not None
    return met, last, d_met, piece(d_first, count, 0).reshape(state.shape), sums


def read(
    a: Array, value: Array, by: Array, met: Array, *, dtype: Any, a_turned: bool = False, met_turned: bool = False,
    interpret: bool,
) -> Array:  # fmt: skip
    """a value + by S for every chunk: [R, T, d] in `dtype`. a [R, T, 64], or its transpose in every chunk (`a_turned`).

    value [R, T, d], by [R, T, e], met [R, >= N, e, d] the chunks' states, or [R, >= N, d, e] (`met_turned`).
    """
    (rows, length, size), depth = value.shape, by.shape[-1]
    buffers = {
        "a_s": tile(a.dtype, CHUNK, CHUNK),
        "value_s": tile(value.dtype, CHUNK, 64),
        "by_s": tile(by.dtype, CHUNK, depth),
        "met_s": tile(met.dtype, *((64, depth) if met_turned else (depth, 64))),
        "out_s": tile(dtype, CHUNK, 64),
        "here": mosaic_gpu().Barrier(num_arrivals=4),
    }
    return run(
        functools.partial(_read_kernel, a_turned=a_turned, met_turned=met_turned),
        {"a": a, "value": value, "by": by, "met": met},
        {"out": jax.ShapeDtypeStruct(value.shape, jnp.dtype(dtype))},
        buffers, {"channels": size // 64, "chunk": length // CHUNK, "row": rows}, interpret,
    )["out"]  # fmt: skip


def _states_kernel(r: dict[str, Any], *, chunks: int, reverse: bool) -> None:
    plgpu = mosaic_gpu()
    row, number = lax.axis_index("row"), lax.axis_index("channels")
    channels, layout = pl.ds(number * 64, 64), plgpu.Layout.WGMMA
    keep, against = "met" in r, "against" in r

    def chunk(i: Any) -> Any:
        return chunks - 1 - i if reverse else i

    def fetch(i: Any) -> None:
        tokens, slot = pl.ds(chunk(i) * CHUNK, CHUNK), lax.rem(i, 2)
        plgpu.copy_gmem_to_smem(r["write"].at[row, tokens], r["write_s"].at[slot], r["here"].at[slot])
        plgpu.copy_gmem_to_smem(r["value"].at[row, tokens, channels], r["value_s"].at[slot], r["here"].at[slot])
        if against:
            entry = r["against"].at[row, chunk(i) + 1, :, channels]
            plgpu.copy_gmem_to_smem(entry, r["against_s"].at[slot], r["here"].at[slot])

    def emit(state: Array, at: Any, slot: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r["met_s"][...] = state.astype(r["met_s"].dtype)
        if against:
            r["sums_s"][...] = (state * r["against_s"].at[slot][...].astype(jnp.float32)).sum(axis=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r["met_s"], r["met"].at[row, at, :, channels])
        if against:
            plgpu.copy_smem_to_gmem(r["sums_s"], r["sums"].at[row, number, at])

    def step(i: Any, state: Array) -> Array:
        slot = lax.rem(i, 2)
        plgpu.commit_smem()  # one thread fetches: all warps must be past their products of what it overwrites
        pl.when(i + 1 < chunks)(lambda: fetch(i + 1))
        plgpu.barrier_wait(r["here"].at[slot])
        if keep:
            emit(state, chunk(i), slot)
        over = plgpu.load(r["over"].at[row, chunk(i)], layout=layout.reduce(1), optimized=False)
        added = product(r["write_s"].at[slot].transpose((1, 0)), r["value_s"].at[slot], state.shape)
        return state * lax.broadcast_in_dim(over, state.shape, [0]) + added

    fetch(0)
    plgpu.copy_gmem_to_smem(r["first"].at[row, :, channels], r["wide_s"], r["loaded"])
    plgpu.barrier_wait(r["loaded"])
    state = plgpu.layout_cast(r["wide_s"][...], layout)
    state = lax.fori_loop(0, chunks, step, state)
    if keep and not reverse:
        emit(state, chunks, 0)
    r["wide_s"][...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(r["wide_s"], r["last"].at[row, :, channels])
    plgpu.wait_smem_to_gmem(0)


def _read_kernel(r: dict[str, Any], *, a_turned: bool, met_turned: bool) -> None:
    row, chunk, channels = (lax.axis_index(name) for name in ("row", "chunk", "channels"))
    tokens, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(channels * 64, 64)
    met = r["met"].at[row, chunk, columns] if met_turned else r["met"].at[row, chunk, :, columns]
    load(r, {"a": r["a"].at[row, tokens], "value": r["value"].at[row, tokens, columns],
             "by": r["by"].at[row, tokens], "met": met})  # fmt: skip
    a, met = r["a_s"], r["met_s"]
    out = product(a.transpose((1, 0)) if a_turned else a, r["value_s"], (CHUNK, 64))
    out += product(r["by_s"], met.transpose((1, 0)) if met_turned else met, (CHUNK, 64))
    store(out, r["out_s"], r["out"].at[row, tokens, columns])


def run(
    kernel: Callable[[dict[str, Any]], None], inputs: dict[str, Any], outs: dict[str, Any], buffers: dict[str, Any],
    grid: dict[str, int], interpret: bool,
) -> dict[str, Array]:  # fmt: skip
    """Run `kernel(refs)`, whose references have the names of `inputs`, `outs` and `buffers`."""
    plgpu = mosaic_gpu()
    names = (*inputs, *outs)

    def body(*refs: Any, **scratch: Any) -> None:
        kernel(dict(zip(names, refs, strict=True)) | scratch)

    made = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=buffers,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*inputs.values())
    return dict(zip(outs, made, strict=True))


def load(r: dict[str, Any], sources: dict[str, Any]) -> None:
    """Fetch each source into the buffer of its name with `_s` behind, and wait for all, on the barrier `here`."""
    plgpu = mosaic_gpu()
    for name, source in sources.items():
        plgpu.copy_gmem_to_smem(source, r[f"{name}_s"], r["here"])
    plgpu.barrier_wait(r["here"])


def store(x: Array, buffer: Any, to: Any) -> None:
    """Write x, rounded to the buffer's type, through the buffer into global memory."""
    plgpu = mosaic_gpu()
    put(buffer, x)
    plgpu.copy_smem_to_gmem(buffer, to)
    plgpu.wait_smem_to_gmem(0)


def put(buffer: Any, x: Array) -> Any:
    """Overwrite a buffer that products may still be reading, with what products will read; returns the buffer."""
    plgpu = mosaic_gpu()
    plgpu.commit_smem()
    buffer[...] = x.astype(buffer.dtype)
    plgpu.commit_smem()
    return buffer


def product(a: Any, b: Any, shape: Sequence[int]) -> Array:
    """The float32 product of two tiles in shared memory; of a with each of b and their sum, where b is a tuple."""
    plgpu = mosaic_gpu()

    def multiply(acc: Any) -> Array:
        for factor in b if isinstance(b, tuple) else (b,):
            plgpu.wgmma(acc, a, factor)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(tuple(shape), jnp.float32))


def numbers(axis: int, shape: tuple[int, int] = (CHUNK, CHUNK)) -> Array:
    """The row (axis 0) or column of every entry of a tile, i32."""
    plgpu = mosaic_gpu()
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def tile(dtype: Any, rows: int, columns: int, *lead: int) -> Any:
    """Shared memory for tiles, in the swizzled order that TMA writes and wgmma reads."""
    plgpu = mosaic_gpu()
    dtype = jnp.dtype(dtype)
    transforms = (plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*lead, rows, columns), dtype, transforms=transforms)


def flat(x: Array, count: int) -> Array:
    """[B, H, T, d] -> its pieces [B H count, T / count, d]."""
    return x.reshape(-1, x.shape[2] // count, x.shape[3])


def whole(x: Array, like: Array) -> Array:
    """Pieces of padded sequences -> the shape of `like` [B, H, T, d]."""
    return x.reshape(*like.shape[:2], -1, x.shape[-1])[:, :, : like.shape[2]]


def piece(x: Array, count: int, which: int) -> Array:
    """[R count, ...] -> what belongs to one of each row's pieces [R, ...]."""
    return x.reshape(-1, count, *x.shape[1:])[:, which]
