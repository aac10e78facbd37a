"""Convolutions as long as the sequence, in O(T log T) or as matrix products: out = post * ((pre * u) conv kernel).

Fu et al., FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores, 2023 (arXiv 2311.05908): causal
and circular, with gates before and after; partial, for kernels shorter than the sequence; and frequency-sparse, for
kernels whose spectrum is kept in part, so that parts of the products fall away.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.fftconv import blocked, gpu, monarch, ref, tpu

Array = jax.Array
OP = "fftconv"


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call. `sizes`: the factors of the circular length N; `keep`: of each, the digits kept;
    `wraps`: whether entries that pass the end count at the beginning."""

    batch: int
    heads: int
    length: int
    kernel_length: int
    dtype: str
    sizes: tuple[int, ...]
    keep: tuple[int, ...] | None
    wraps: bool
    interpret: bool


def fftconv(
    u: Array,
    kernel: Array,
    *,
    pre: Array | None = None,
    post: Array | None = None,
    causal: bool = True,
    order: int | None = None,
    keep: tuple[int, ...] | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> Array:
    """u [B, H, T], kernel f32 [H, L] with 1 <= L <= T, gates `pre` and `post` [B, H, T] -> [B, H, T] in u's dtype.

    Causal: out_t = sum over s <= t of kernel_s u_(t-s); circular: u_(t-s) is read modulo T. Sums are in float32. A
    causal kernel of at most a quarter of T is applied to overlapping pieces, so that memory grows with L (partial
    convolutions).

    `order` is the number of factors of the transform's length N, 2 or 3, chosen if None. `keep` (as many numbers as
    factors) keeps the kernel's frequencies k = k1 + N1 (k2 + N2 k3) whose i-th digit, and that of -k, is among the
    keep[i] nearest to 0: a coarser kernel, and fewer operations. N is T if circular, else `transform_sizes(T, L)`.

    `impl` names a form: `ref`, `fft` (jnp.fft), `monarch` (matrix products in XLA), `tpu`, `gpu` (for
    u of 16 bits). Differentiable in
    u, kernel, pre and post. Raises ArgumentError before tracing for what does not fit, UnsupportedError where the
    form named cannot serve.
    """
    sizes = check.shapes(OP, u=(u, "B H T"), kernel=(kernel, "H L"))
    for name, gate in (("pre", pre), ("post", post)):
        if gate is not None:
            check.shapes(OP, u=(u, "B H T"), **{name: (gate, "B H T")})
            check.dtypes(OP, check.FLOATS, u=u, **{name: gate})
    check.dtypes(OP, u=u)
    check.dtypes(OP, ("float32",), kernel=kernel)
    length, taps = sizes["T"], sizes["L"]
    if 0 in sizes.values() or taps > length:
        raise argument_error(OP, "kernel", f"[{sizes['H']}, {taps}]", f"[H, L] with 1 <= L <= T = {length}, H > 0")
    x = u.astype(jnp.float32) if pre is None else u.astype(jnp.float32) * pre.astype(jnp.float32)
    piece = transform_sizes(length, taps, causal=causal, order=order)
    _check_keep(keep, piece)
    size = blocked.size_of(piece)
    halved = causal and size < length + taps - 1
    pieces = _overlapping(x, size // 2) if halved else x
    call = Call(pieces.shape[0], sizes["H"], pieces.shape[2], taps, str(u.dtype), piece, keep, not causal, interpret)
    out = cast(Array, _convolve(call, impl, (pieces, kernel)))
    out = _joined(out, sizes["B"], length) if halved else out
    out = out if post is None else out * post.astype(jnp.float32)
    return out.astype(u.dtype)


def transform_sizes(length: int, taps: int, *, causal: bool = True, order: int | None = None) -> tuple[int, ...]:
    """The factors of the transform's length N for u of `length` and a kernel of `taps`.

    Raises ArgumentError if a circular length has no such factors.
    """
    if order not in (None, 2, 3):
        raise argument_error(OP, "order", repr(order), "2, 3 or None")
    size = length if not causal else _power_of_two(2 * taps if 4 * taps <= length else length + taps - 1)
    found = monarch.factors(size, order)
    if found is None:
        got = f"{size} (order {order or '2 or 3'})"
        raise argument_error(OP, "T", got, f"a length that is a product of so many factors of at most {monarch.MOST}")
    return found


def _power_of_two(least: int) -> int:
    return max(4, 1 << (least - 1).bit_length())


def _check_keep(keep: tuple[int, ...] | None, sizes: tuple[int, ...]) -> None:
    if keep is None:
        return
    fits = isinstance(keep, tuple) and len(keep) == len(sizes) and all(type(n) is int for n in keep)
    if not fits or not all(1 <= n <= size for n, size in zip(keep, sizes, strict=True)):
        raise argument_error(OP, "keep", repr(keep), f"integers from 1 to each of the factors {sizes}")


def _overlapping(x: Array, half: int) -> Array:
    """[B, H, T] -> [B n, H, 2 half]: each piece of `half` behind the one before it."""
    batch, heads, length = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % half))).reshape(batch, heads, -1, half)
    before = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    return jnp.concatenate([before, x], -1).swapaxes(1, 2).reshape(-1, heads, 2 * half)


def _joined(out: Array, batch: int, length: int) -> Array:
    """The second halves of the pieces, in order: the first are where the circle closes."""
    half = out.shape[-1] // 2
    out = out[..., half:].reshape(batch, -1, out.shape[1], half).swapaxes(1, 2)
    return out.reshape(batch, out.shape[1], -1)[..., :length]


def _ref(call: Call, x: Array, kernel: Array) -> Array:
    return ref.convolve(x, kernel, blocked.size_of(call.sizes), monarch.kept_frequencies(call.sizes, call.keep))


def _ref_backward(call: Call, x: Array, kernel: Array, d_out: Array) -> tuple[Array, ...]:
    return jax.vjp(functools.partial(_ref, call), x, kernel)[1](d_out)


FORWARD = (
    Form(
        "tpu",
        lambda call, x, k: tpu.forward(x, k, call.sizes, call.keep, interpret=call.interpret),
        platform="tpu",
        refuses=tpu.refuses,
    ),
    Form("gpu", gpu.forward, platform="cuda", refuses=gpu.refuses),
    Form("fft", lambda call, x, k: blocked.forward_fast(x, k, call.sizes, call.keep)),
    Form("monarch", lambda call, x, k: blocked.forward_monarch(x, k, call.sizes, call.keep)),
    Form("ref", _ref, automatic=False),
)
BACKWARD = (
    Form(
        "tpu",
        lambda call, x, k, d: tpu.backward(x, k, d, call.sizes, call.keep, interpret=call.interpret),
        platform="tpu",
        refuses=tpu.refuses,
    ),
    Form("gpu", gpu.backward, platform="cuda", refuses=gpu.refuses),
    Form("fft", lambda call, x, k, d: blocked.backward_fast(x, k, d, call.sizes, call.keep)),
    Form("monarch", lambda call, x, k, d: blocked.backward_monarch(x, k, d, call.sizes, call.keep)),
    Form("ref", _ref_backward, automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(call: Call, impl: str | None, arrays: tuple[Array, Array]) -> Any:
    return dispatch(OP, FORWARD, call, *arrays, impl=impl)


def _save(call: Call, impl: str | None, arrays: tuple[Array, Array]) -> Any:
    return _convolve(call, impl, arrays), arrays


def _grads(call: Call, impl: str | None, arrays: tuple[Array, Array], d_out: Array) -> Any:
    return (tuple(dispatch(f"{OP} backward", BACKWARD, call, *arrays, d_out, impl=impl)),)


_convolve.defvjp(_save, _grads)
