"""Lightning Attention-2 as a Hopper kernel (Qin et al., 2024, arXiv 2401.04658): the state stays in registers.

A warpgroup takes a head and 64 channels of v, and goes through the sequence in chunks of 64 tokens: q, k and v by TMA
into two buffers, scores and outputs by wgmma, and the float32 state [K, 64] as an accumulator that only its rounded
copy leaves, to be multiplied with q from shared memory. Forward only. It has been compiled for the H200, not run.

Stability: experimental.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu_refuses
from jaxinfer.pallas_kernels.linear.arguments import padded

Array = jax.Array
CHUNK = 64
LOG2_E = math.log2(math.e)


def refuses(call: Any) -> str | None:
    """Why this kernel cannot serve the call, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if call.dtype not in ("bfloat16", "float16"):
        return f"wgmma takes 16-bit floats, q is {call.dtype}"
    if call.key_dim not in (64, 128) or call.value_dim % 64:
        return f"head sizes K of 64 or 128 and V a multiple of 64, got {call.key_dim} and {call.value_dim}"
    if call.block not in (None, CHUNK):
        return f"block is {CHUNK}, got {call.block}"
    return None


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, *, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """As blocked.forward, for shapes that `refuses` lets pass."""
    plgpu = _mosaic_gpu()
    tokens = [padded(x, CHUNK) for x in (q, k, v)]
    qs, ks, vs = (x.reshape(-1, *x.shape[2:]) for x in tokens)
    heads, dtype, (rows, length, key_dim) = q.shape[1], q.dtype, qs.shape
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # the same 128 bytes in float32

    def kernel(*refs: Any) -> None:
        _kernel(*refs, heads=heads, chunks=length // CHUNK, scale=scale, interpret=interpret)

    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(vs.shape, dtype),
            jax.ShapeDtypeStruct((rows, key_dim, v.shape[-1]), jnp.float32),
        ],
        grid=(rows, v.shape[-1] // 64),
        grid_names=("row", "channels"),
        scratch_types=[
            plgpu.SMEM((2, CHUNK, key_dim), dtype, transforms=tiles),
            plgpu.SMEM((2, CHUNK, key_dim), dtype, transforms=tiles),
            plgpu.SMEM((2, CHUNK, 64), dtype, transforms=tiles),
            plgpu.SMEM((CHUNK, 64), dtype, transforms=tiles),  # v, decayed to the chunk's end
            plgpu.SMEM((key_dim, 64), dtype, transforms=tiles),  # the state, rounded
            plgpu.SMEM((CHUNK, 64), dtype, transforms=tiles),  # out
            plgpu.SMEM((CHUNK if interpret else 8, CHUNK), dtype, transforms=tiles),  # scores
            plgpu.SMEM((key_dim, 64), jnp.float32, transforms=wide),  # the state, on its way in and out
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    out, last = run(qs, ks, vs, log_decay * LOG2_E, lengths, state.reshape(rows, *state.shape[2:]))
    return out.reshape(tokens[2].shape)[:, :, : v.shape[2]], last.reshape(state.shape)


def _mosaic_gpu() -> Any:
    """The module that builds Hopper kernels, imported where it is used: before jax 0.11 the import needs absl."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def _kernel(
    q_g: Any, k_g: Any, v_g: Any, slope_g: Any, lengths_g: Any, first_g: Any, out_g: Any, last_g: Any,
    q_s: Any, k_s: Any, v_s: Any, w_s: Any, state_s: Any, out_s: Any, scores_s: Any, wide_s: Any,
    ready: Any, loaded: Any,
    *, heads: int, chunks: int, scale: float, interpret: bool,
) -> None:  # fmt: skip
    plgpu = _mosaic_gpu()
    row, channels = lax.axis_index("row"), pl.ds(lax.axis_index("channels") * 64, 64)
    slope, true_length = slope_g[row % heads], lengths_g[row // heads]
    layout = plgpu.Layout.WGMMA
    dtype = q_s.dtype

    def fetch(i: Any) -> None:
        tokens, slot = pl.ds(i * CHUNK, CHUNK), lax.rem(i, 2)
        plgpu.copy_gmem_to_smem(q_g.at[row, tokens], q_s.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(k_g.at[row, tokens], k_s.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(v_g.at[row, tokens, channels], v_s.at[slot], ready.at[slot])

    def product(a: Any, b: Any, shape: tuple[int, ...]) -> Array:
        def run(acc: Any) -> Array:
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def added(start: Array, a: Any, b: Any) -> Array:
        if interpret:
            return start + product(a, b, start.shape)
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(start))

    def numbers(shape: tuple[int, int], axis: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout).astype(jnp.float32)

    def step(i: Any, state: Array) -> Array:
        slot = lax.rem(i, 2)

        @pl.when(i + 1 < chunks)
        def _() -> None:
            fetch(i + 1)

        plgpu.barrier_wait(ready.at[slot])
        q, k, v = q_s.at[slot], k_s.at[slot], v_s.at[slot]
        count = jnp.clip(true_length - i * CHUNK, 0, CHUNK).astype(jnp.float32)
        age = numbers((CHUNK, CHUNK), 0) - numbers((CHUNK, CHUNK), 1)
        scores = product(q, k.transpose((1, 0)), (CHUNK, CHUNK))
        weights = jnp.exp2(slope * jnp.maximum(age, 0.0)) * scale
        scores = jnp.where(age >= 0, scores * weights, 0.0).astype(dtype)

        passed = jnp.minimum(numbers((CHUNK, 64), 0) + 1, count)
        state_s[...] = state.astype(dtype)
        w_s[...] = (v[...].astype(jnp.float32) * jnp.exp2(slope * (count - passed))).astype(dtype)
        plgpu.commit_smem()
        out = product(q, state_s, (CHUNK, 64)) * (jnp.exp2(slope * passed) * scale)
        if interpret:  # the interpreter multiplies only what is in shared memory
            scores_s[...] = scores
        out = added(out, scores_s if interpret else scores, v)
        state = added(state * jnp.exp2(slope * count), k.transpose((1, 0)), w_s)

        plgpu.wait_smem_to_gmem(0)
        out_s[...] = out.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out_g.at[row, pl.ds(i * CHUNK, CHUNK), channels])
        return state

    fetch(0)
    plgpu.copy_gmem_to_smem(first_g.at[row, :, channels], wide_s, loaded)
    plgpu.barrier_wait(loaded)
    state = plgpu.layout_cast(wide_s[...], layout)
    state = lax.fori_loop(0, chunks, step, state)
    wide_s[...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(wide_s, last_g.at[row, :, channels])
    plgpu.wait_smem_to_gmem(0)
