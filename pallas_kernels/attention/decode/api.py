"""Decode attention: a few queries of each row against a long cache, read as it is kept, only as far as it is live.

The split over cores is LeanAttention's (Sanovar et al. 2024, arXiv 2405.10480: equal work whatever the lengths in the
batch). `unified_max` is FlashDecoding++ (Hong et al. 2023, arXiv 2311.01282): a constant stands in for the maximum of
the scores, so that blocks need no rescaling; where a sum leaves the safe range the call is computed again with true
maxima, so that the result is exact either way.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.attention.decode import blocked, gpu, ref, tpu
from jaxinfer.pallas_kernels.attention.decode.call import Call, Store, cuts_groups
from jaxinfer.pallas_kernels.attention.decode.codes import BITS, Codes
from jaxinfer.pallas_kernels.attention.decode.options import Options, checked_lengths, checked_slopes

# A sum of exp(score - unified_max) within exp(+-60) has neither overflowed nor lost any term that matters in float32.
SAFE = 60.0

FORMS = (
    Form("gpu", gpu.attend, platform="cuda", refuses=gpu.refuses),
    Form("tpu", tpu.attend, platform="tpu", refuses=tpu.refuses),
    Form("blocked", blocked.attend),
    Form("ref", ref.attend, automatic=False),
)


def decode(
    q: jax.Array,
    k: jax.Array | Codes,
    v: jax.Array | Codes,
    lengths: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi: jax.Array | None = None,
    transposed: bool = False,
    unified_max: float | None = None,
    invariant: bool = False,
    impl: str | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of `q[B, H, T, d]` over a cache `k, v [B, G, C, d]`: `(out[B, H, T, d], lse f32[B, H, T])`.

    Query head `h` reads key head `h // (H / G)`. Row `b` has `lengths[b]` live tokens (i32[B], 0 to C; None: C), the
    token in slot `c` at position `c`. `positions i32[B, T]` are the queries'; a query sees the live tokens at its own
    position and before it. None: the queries are those of the newest T tokens, `lengths - T + t`. Queries that come
    after the cache stand at `lengths + t`; one at a negative position sees nothing. A query that sees no key has
    out = 0 and lse = -inf.

    The score is `scale * q.k` (None: 1 / sqrt(d)), soft-capped to `softcap * tanh(score / softcap)`, less
    `alibi[h] * distance` (slopes f32[H]). With `window`, a query sees its own position and the `window - 1` before.
    `transposed`: the keys are `[B, G, d, C]`. `k` and `v` are arrays of one dtype, or `Codes` each of its own layout.

    `unified_max`: FlashDecoding++'s constant, near the largest scores; the result stays exact. `invariant`: a row's
    bits do not depend on what the other rows are or how long; the price is a split on GPU that is equal but for pieces
    of 8 blocks, and on CPU that a float32 cache is never read at once. `block`: tokens of the cache at a time.
    Differentiable in q, k, v, scales, offsets and slopes. `impl`: "blocked", "tpu", "gpu" or "ref";
    `interpret` runs a named "tpu" or "gpu" form on any machine.

    Raises ArgumentError for shapes, dtypes, options or known lengths that do not fit, before anything is traced;
    UnsupportedError where the form named by `impl` cannot serve.
    """
    check.shapes("decode", q=(q, "B H T d"))
    options = Options(scale, window, softcap, transposed, invariant, impl, block, interpret, unified_max)
    return attend("decode", q, k, v, lengths, positions, alibi, options)


def attend(op: str, q, k, v, lengths, positions, alibi, options: Options) -> tuple[jax.Array, jax.Array]:
    """`decode` for an op that is made of it, and by whose name arguments are refused."""
    sizes = _sizes(op, q, k, v, options.transposed)
    batch, heads, groups, capacity = (sizes[n] for n in "BHGC")
    if heads % groups:
        raise argument_error(op, "q", f"{heads} heads", f"a multiple of the cache's {groups}")
    check.dtypes(op, q=q)
    if not isinstance(k, Codes) and not isinstance(v, Codes):
        check.dtypes(op, k=k, v=v)
    options = options.checked(op, sizes["d"])
    lengths = checked_lengths(op, "lengths", lengths, batch, capacity)
    if positions is None:
        positions = newest(lengths, sizes["T"])
    check.shapes(op, positions=(positions, f"{batch} {sizes['T']}"))
    check.integers(op, positions=positions)
    slopes = checked_slopes(op, alibi, heads)
    call = Call(
        batch=batch, heads=heads, groups=groups, queries=sizes["T"], capacity=capacity, dim=sizes["d"],
        dtype=str(q.dtype), keys=_store(op, "k", k, sizes, options.transposed), values=_store(op, "v", v, sizes, False),
        alibi=alibi is not None, **options.of_call(),
    )  # fmt: skip
    if options.block is not None and (reason := cuts_groups(call, options.block)):
        raise argument_error(op, "block", options.block, f"blocks that fit the codes: {reason}")
    return _decode(call, options.impl, q, k, v, lengths, jnp.asarray(positions, jnp.int32), slopes)


def newest(lengths: jax.Array, queries: int) -> jax.Array:
    """The positions `i32[B, T]` of the newest T of `lengths` tokens; negative where there are fewer."""
    return lengths[:, None] - queries + jnp.arange(queries, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(call: Call, impl: str | None, q, k, v, lengths, positions, slopes):
    arrays = (q, k, v, lengths, positions, slopes)
    out, lse = dispatch("decode", FORMS, call, *arrays, impl=impl)
    if call.unified_max is None:
        return out, lse
    exact = dataclasses.replace(call, unified_max=None)
    served = in_range(call, lse, lengths, positions)

    def again(*arrays):
        # Only queries that were not served change: what a row gets does not depend on the others' need.
        true_out, true_lse = dispatch("decode", FORMS, exact, *arrays, impl=impl)
        return jnp.where(served[..., None], out, true_out), jnp.where(served, lse, true_lse)

    return lax.cond(jnp.all(served), lambda *_: (out, lse), again, *arrays)


def _forward(call: Call, impl: str | None, *arrays):
    return _decode(call, impl, *arrays), arrays


def _backward(call: Call, impl: str | None, arrays, cotangents):
    # A few queries' scores over a whole cache are smaller than the cache, so one step over all of it will do.
    exact = dataclasses.replace(call, unified_max=None)
    _, pull = jax.vjp(functools.partial(blocked.whole, exact), *arrays)
    return pull(cotangents)


_decode.defvjp(_forward, _backward)


def in_range(call: Call, lse: jax.Array, lengths: jax.Array, positions: jax.Array) -> jax.Array:
    """Whether a unified maximum served a query: its sum is within the safe range, or it sees nothing; bool[B, H, T]."""
    assert call.unified_max is not None
    first = 0 if call.window is None else jnp.maximum(positions - call.window + 1, 0)
    empty = jnp.minimum(positions + 1, lengths[:, None]) <= first
    return (jnp.abs(lse - call.unified_max) <= SAFE) | empty[:, None]


def _sizes(op: str, q, k, v, transposed: bool) -> dict[str, int]:
    """B, H, T, d, G, C; keys and values may be codes, two in a byte, whose constants divide their axes."""
    sizes: dict[str, int] = {}
    patterns = {"k": "B G d C" if transposed else "B G C d", "v": "B G C d"}
    named = {name: (_Shaped(x, pattern), pattern) for (name, pattern), x in zip(patterns.items(), (k, v), strict=True)}
    sizes = check.shapes(op, q=(q, "B H T d"), **named)
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Codes):
            continue
        shape = named[name][0].shape
        if x.bits not in BITS:
            raise argument_error(op, f"{name}.bits", x.bits, "8 or 4")
        check.dtypes(op, ("int8",) if x.bits == 8 else ("uint8",), **{f"{name}.values": x.values})
        for part, constants in (("scale", x.scale), ("offset", x.offset)):
            if constants is None:
                continue
            fits = len(constants.shape) == 4 and constants.shape[:2] == shape[:2]
            fits = fits and all(n and not size % n for n, size in zip(constants.shape[2:], shape[2:], strict=True))
            if not fits or (part == "offset" and constants.shape != x.scale.shape):
                accepts = "sizes that divide " + str(list(shape)) if part == "scale" else f"{list(x.scale.shape)}"
                raise argument_error(op, f"{name}.{part}", list(constants.shape), accepts)
            check.dtypes(op, ("float32",), **{f"{name}.{part}": constants})
    return sizes


class _Shaped:
    """The logical shape of keys or values."""

    def __init__(self, x, pattern: str):
        if not isinstance(x, Codes):
            if hasattr(x, "shape"):
                self.shape = tuple(x.shape)
            return
        self.shape = tuple(x.values.shape)
        if x.bits == 4 and len(self.shape) == 4:
            axis = pattern.split().index("d")
            self.shape = (*self.shape[:axis], 2 * self.shape[axis], *self.shape[axis + 1 :])


def _store(op: str, name: str, x, sizes: dict[str, int], transposed: bool) -> Store:
    if not isinstance(x, Codes):
        check.dtypes(op, **{name: x})
        return Store(str(x.dtype))
    tokens, channels = x.scale.shape[2:][:: -1 if transposed else 1]
    return Store(f"int{x.bits}", sizes["C"] // tokens, sizes["d"] // channels, x.offset is not None)
