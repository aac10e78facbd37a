"""FlashFFTConv on Hopper (Fu et al., 2023, arXiv 2311.05908): transform, filter and inverse of a row in shared memory.

With N = N1 N2 the products are wgmma of 16-bit operands with float32 sums. A real row needs half of its spectrum. At
the frequencies k + 1/2, where the convolution is negacyclic, that half is exactly the digits k1 < N1 / 2, so every
matrix has 64 rows; a circular convolution is one of twice the length whose two halves the last matrix adds. Where
N1 / 2 < 64, neighbouring heads share a tile and the matrices of N1 are block-diagonal: rows of the batch never meet. A
tile is scaled by its largest magnitude, so that float16, with 11 bits, holds the stages: errors are within about 1e-3
of a tile's largest result, which a result of 16 bits can bear and one of float32 cannot.

A block takes a tile of heads, keeps the matrices in shared memory and walks rows of the batch. It serves transforms up
to N = 8192: compiled at 16384, or for the pieces of a partial convolution, it spills registers (1056 and 328 bytes a
thread), and at 32768 the matrices and one row's stages are 350 KB of the 227 a block has. With three factors every
stage would pass through memory. What a causal row of T takes, N = 2T, in millions of operations, and in bytes through
memory per entry, counted and not measured, gates aside (`fft` at best: 5/2 N log2 N a transform, two of them; write and
read the padded row, its spectrum, the filtered one, the result):

    T         1024  4096  16384  65536   bytes
    here       1.6   6.3      -      -      8
    fft        0.1   0.5    2.5   11.1     56

Other calls are left to `fft`. Interpreted, and compiled for an H200; not run on a device.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses
from jaxinfer.pallas_kernels.fftconv import monarch
from jaxinfer.pallas_kernels.fftconv.blocked import kernel_gradient, size_of

Array = jax.Array
ROWS = 64  # of a warpgroup's product
COLUMNS = 64  # of one, and the second factor
BLOCKS = 2 * 132  # blocks that fill an H100 or H200


class Plan(NamedTuple):
    """The factors of the transform, and the heads of a tile."""

    first: int
    second: int
    heads: int


def plan(call: Any) -> Plan | None:
    """How a call is cut, or None where no tile fits."""
    size = size_of(call.sizes) * (2 if call.wraps else 1)
    if size & (size - 1) or not 512 <= size <= 8192 or 2 * call.length > size:
        return None
    first = size // COLUMNS
    return Plan(first, COLUMNS, 2 * ROWS // first)


def refuses(call: Any) -> str | None:
    """Why this kernel cannot serve the call, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if call.dtype == "float32":
        return "its products have operands of 16 bits, u is float32"
    if call.keep is not None:
        return "it has all frequencies; impl='monarch' skips those dropped"
    of = plan(call)
    if of is None:
        got = f"{size_of(call.sizes)} for rows of {call.length}"
        return f"a transform of {got} is no power of two from 512 to 8192 (half of it if circular) of twice the row"
    if call.heads % of.heads:
        return f"{call.heads} heads do not fill tiles of {of.heads}"
    return None


def forward(call: Any, x: Array, kernel: Array) -> Array:
    """The first T entries of the convolution of x [B, H, T] with kernel [H, L], f32."""
    return _filtered(call, x, _spectrum(kernel, plan(call)), 1)


def backward(call: Any, x: Array, kernel: Array, d_out: Array) -> tuple[Array, Array]:
    """Gradients of x, by the same kernel, and of the filter, by `jnp.fft`: one inverse a head."""
    # What passes the beginning of a negacyclic transform comes back at its end with the other sign.
    dx = _filtered(call, d_out, _spectrum(kernel, plan(call)).conj(), -1)
    return dx, kernel_gradient(x, d_out, kernel.shape[-1], call.sizes, None)


def _spectrum(kernel: Array, of: Plan | None) -> Array:
    """[H, k1, k2] at k1 + N1 k2 + 1/2, k1 < N1 / 2."""
    assert of is not None  # `refuses` has seen to it
    size = of.first * of.second
    twist = np.exp(-1j * np.pi * np.arange(kernel.shape[-1]) / size).astype(np.complex64)
    digits = jnp.fft.fft(kernel * twist, size).reshape(-1, of.second, of.first)
    return digits.swapaxes(1, 2)[:, : of.first // 2]


def tables(of: Plan, fold: int) -> dict[str, np.ndarray]:
    """float16 [re, im] matrices of the first product, the last and the second, twiddles, conjugates.

    `fold`: 1 or -1 adds or subtracts the second half of the result. Scaled so that magnitudes of at most 1 stay within
    float16 through all stages; the last one undoes it.
    """
    k1, n1 = np.arange(of.first // 2)[:, None] + 0.5, np.arange(of.first)
    first = np.exp(-2j * np.pi * k1 * n1 / of.first)
    last = 2 * first.conj().T / of.first
    last = last[: of.first // 2] + fold * last[of.first // 2 :]
    n2 = np.arange(of.second)
    second = np.exp(-2j * np.pi * (n2[:, None] * n2 % of.second) / of.second) / of.second**0.5
    twiddle = np.exp(-2j * np.pi * k1 * n2 / (of.first * of.second))
    diagonal = np.eye(of.heads)

    def parts(x: np.ndarray, dtype: Any) -> np.ndarray:
        return np.stack([np.real(x), np.imag(x)]).astype(dtype)

    return {
        "first": parts(np.kron(diagonal, first[:, : of.first // 2]) * ENTRY, np.float16),
        "last": parts(np.kron(diagonal, last[: of.first // 2]) * LEAVE, np.float16),
        "second": parts(second, np.float16),
        "twiddle": parts(np.tile(twiddle, (of.heads, 1)), np.float16),
        "back": parts(np.tile(twiddle.conj(), (of.heads, 1)), np.float16),
    }


ENTRY, LEAVE = 1 / 8, 8.0  # a sum of 64 terms of at most 1, as large as a random one


def _filtered(call: Any, x: Array, spectrum: Array, sign: int) -> Array:
    of = plan(call)
    assert of is not None
    batch, heads, length = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, of.first // 2 * of.second - length))).reshape(batch, -1, of.second)
    # A power of two, which costs no bits, brings each head's spectrum to 1.
    top = jnp.maximum(jnp.maximum(jnp.abs(spectrum.real), jnp.abs(spectrum.imag)).max((1, 2)), 1e-30)
    unit = jnp.exp2(jnp.ceil(jnp.log2(top)))
    digits = jnp.stack([spectrum.real, spectrum.imag]) / unit[:, None, None]
    digits = digits.reshape(2, -1, of.second).astype(jnp.float16)
    given = tables(of, sign if call.wraps else 0)
    tiles = heads // of.heads
    walks = min(batch, pl.cdiv(BLOCKS, tiles)) if not call.interpret else 1
    out = _call(call, batch, tiles, walks)(x, digits, *given.values())
    return out.reshape(batch, heads, -1)[..., :length] * unit[:, None]


def _call(call: Any, batch: int, tiles: int, walks: int) -> Any:
    plgpu = mosaic_gpu()

    def kernel(*refs: Any, x_s: Any, xh_s: Any, z_s: Any, first_s: Any, last_s: Any, second_s: Any, came: Any,
               loaded: Any) -> None:  # fmt: skip
        x_g, digits_g, first_g, last_g, second_g, twiddle_g, back_g, out_g = refs
        tile, walk = lax.axis_index("tile"), lax.axis_index("walk")
        for table, buffer in ((first_g, first_s), (last_g, last_s), (second_g, second_s)):
            plgpu.copy_gmem_to_smem(table, buffer, loaded)
        plgpu.barrier_wait(loaded)

        def product(a: Any, b: Any) -> Array:
            def run(acc: Any) -> Array:
                plgpu.wgmma(acc, a, b)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

        def put(z: monarch.Pair, factors: Any, row: Any) -> None:
            """z times factors, rounded, where the next products read it."""
            at = pl.ds(row * ROWS, ROWS)
            numbers = (plgpu.load(factors.at[p, at], layout=plgpu.Layout.WGMMA, optimized=False) for p in range(2))
            real, imag = (x.astype(jnp.float32) for x in numbers)
            for part, value in enumerate(monarch.times(z, (real, imag))):
                z_s[part] = value.astype(jnp.float16)
            plgpu.commit_smem()

        def by_second(sign: float) -> monarch.Pair:
            """z times the second matrix, or its conjugate."""
            real = product(z_s.at[0], second_s.at[0]) - sign * product(z_s.at[1], second_s.at[1])
            return real, sign * product(z_s.at[0], second_s.at[1]) + product(z_s.at[1], second_s.at[0])

        def row(i: Array, nothing: None) -> None:
            here = (walk + i * walks, pl.ds(tile * ROWS, ROWS))
            plgpu.copy_gmem_to_smem(x_g.at[here], x_s, came)
            plgpu.barrier_wait(came)
            top = jnp.maximum(jnp.abs(x_s[...]).max(1).max(0), 1e-30)
            xh_s[...] = (x_s[...] * (1 / top)).astype(jnp.float16)
            plgpu.commit_smem()
            # Were these rows known to be the same for every i, they would be kept in registers, more than there are.
            zero = lax.shift_right_logical(i, 30)
            put((product(first_s.at[0], xh_s), product(first_s.at[1], xh_s)), twiddle_g, zero)
            put(by_second(1.0), digits_g, tile + zero)
            put(by_second(-1.0), back_g, zero)
            x_s[...] = (product(last_s.at[0], z_s.at[0]) - product(last_s.at[1], z_s.at[1])) * top
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_s, out_g.at[here])
            plgpu.wait_smem_to_gmem(0)

        lax.fori_loop(0, (batch - walk + walks - 1) // walks, row, None)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, tiles * ROWS, COLUMNS), jnp.float32),
        grid=(tiles, walks),
        grid_names=("tile", "walk"),
        scratch_types=dict(
            x_s=_tiled((ROWS, COLUMNS), jnp.float32),
            xh_s=_tiled((ROWS, COLUMNS), jnp.float16),
            z_s=_tiled((2, ROWS, COLUMNS), jnp.float16),
            first_s=_tiled((2, ROWS, ROWS), jnp.float16),
            last_s=_tiled((2, ROWS, ROWS), jnp.float16),
            second_s=_tiled((2, COLUMNS, COLUMNS), jnp.float16),
            came=plgpu.Barrier(),
            loaded=plgpu.Barrier(num_arrivals=3),
        ),
        **({"interpret": plgpu.InterpretGPUParams()} if call.interpret else {}),
    )


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the order that TMA writes and wgmma reads."""
    plgpu = mosaic_gpu()
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))
