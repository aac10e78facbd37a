"""Attention with shared prefixes: Hydragen, Juravsky et al. 2024, arXiv 2402.05099, with trees of prefixes.

Prefixes are kept once. The queries of all rows that share one are multiplied with its keys as one matrix, each row's
own suffix is decoded as usual, and the parts are merged by their log-sum-exps, exactly.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.attention.combine import combine
from jaxinfer.pallas_kernels.attention.decode import blocked, gpu, tpu
from jaxinfer.pallas_kernels.attention.decode.api import attend, newest
from jaxinfer.pallas_kernels.attention.decode.call import Call, Store
from jaxinfer.pallas_kernels.attention.decode.options import Options, checked_lengths, checked_slopes
from jaxinfer.pallas_kernels.attention.shared_prefix import packed, ref

FORMS = (
    Form("gpu", functools.partial(packed.attend, gpu.items, gpu.TILE), platform="cuda", refuses=gpu.refuses),
    Form("tpu", functools.partial(packed.attend, tpu.items, tpu.TILE), platform="tpu", refuses=tpu.refuses),
    Form("blocked", functools.partial(packed.attend, blocked.items, blocked.TILE)),
    Form("ref", ref.attend, automatic=False),
)


def shared_prefix(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    suffix_k: jax.Array,
    suffix_v: jax.Array,
    *,
    paths: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
    suffix_lengths: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi: jax.Array | None = None,
    transposed: bool = False,
    invariant: bool = False,
    impl: str | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of `q[B, H, T, d]` over shared prefixes and own suffixes: `(out[B, H, T, d], lse f32[B, H, T])`.

    `prefix_k, prefix_v [N, G, P, d]` hold N prefixes, `prefix_lengths i32[N]` their live tokens (None: P). A row's text
    is the prefixes `paths[b]` in order (i32[B, levels], -1: no prefix at that level; None: the only prefix, for every
    row), then its own `suffix_k, suffix_v [B, G, C, d]`, of which `suffix_lengths i32[B]` tokens are live (None: C). In
    a tree the path of a row lists its node's ancestors from the root. The queries are those of the newest T tokens of
    the text. `window`, `softcap`, `alibi`, `scale`, `invariant` and `transposed` (prefixes and suffixes) are as in
    `decode`; `block` is the tokens of a prefix at a time. Differentiable in every float. `impl`: "blocked", "tpu",
    "gpu" or "ref".

    Raises ArgumentError for shapes, dtypes, options or known lengths and paths that do not fit, before anything is
    traced; UnsupportedError where the form named by `impl` cannot serve.
    """
    op = "shared_prefix"
    kept = "d P" if transposed else "P d"
    sizes = check.shapes(
        op,
        q=(q, "B H T d"),
        prefix_k=(prefix_k, f"N G {kept}"),
        prefix_v=(prefix_v, "N G P d"),
        suffix_k=(suffix_k, f"B G {kept.replace('P', 'C')}"),
        suffix_v=(suffix_v, "B G C d"),
    )
    batch, heads, groups, count = (sizes[n] for n in "BHGN")
    if heads % groups:
        raise argument_error(op, "q", f"{heads} heads", f"a multiple of the prefixes' {groups}")
    check.dtypes(op, q=q)
    check.dtypes(op, prefix_k=prefix_k, prefix_v=prefix_v, suffix_k=suffix_k, suffix_v=suffix_v)
    options = Options(scale, window, softcap, transposed, invariant, impl, block, interpret).checked(op, sizes["d"])
    paths = _paths(paths, batch, count)
    prefix_lengths = checked_lengths(op, "prefix_lengths", prefix_lengths, count, sizes["P"])
    suffix_lengths = checked_lengths(op, "suffix_lengths", suffix_lengths, batch, sizes["C"])
    slopes = checked_slopes(op, alibi, heads)
    along = jnp.where(paths >= 0, prefix_lengths[paths], 0)
    starts = jnp.cumsum(along, 1) - along
    own = newest(suffix_lengths, sizes["T"])  # within the suffix; negative for queries whose tokens are in a prefix
    positions = own + along.sum(1, keepdims=True)
    store = Store(str(prefix_k.dtype))
    call = Call(
        batch=count, heads=heads, groups=groups, queries=sizes["T"], capacity=sizes["P"], dim=sizes["d"],
        dtype=str(q.dtype), keys=store, values=store, alibi=alibi is not None, **options.of_call(),
    )  # fmt: skip
    prefix: Any = _prefix(call, impl, q, prefix_k, prefix_v, prefix_lengths, paths, starts, positions, slopes)
    of_suffix = dataclasses.replace(options, block=None)
    return combine([prefix, attend(op, q, suffix_k, suffix_v, suffix_lengths, None, slopes, of_suffix)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _prefix(call: Call, impl: str | None, *arrays):
    return dispatch("shared_prefix", FORMS, call, *arrays, impl=impl)


def _forward(call: Call, impl: str | None, *arrays):
    return _prefix(call, impl, *arrays), arrays


def _backward(call: Call, impl: str | None, arrays, cotangents):
    _, pull = jax.vjp(functools.partial(packed.differentiable, call), *arrays)
    return pull(cotangents)


_prefix.defvjp(_forward, _backward)


def _paths(paths: jax.Array | None, batch: int, count: int) -> jax.Array:
    if paths is None:
        if count != 1:
            raise argument_error("shared_prefix", "paths", "None", f"a path for each row, with {count} prefixes")
        return jnp.zeros((batch, 1), jnp.int32)
    check.shapes("shared_prefix", paths=(paths, f"{batch} levels"))
    check.integers("shared_prefix", paths=paths)
    check.within("shared_prefix", -1, count - 1, paths=paths)
    return jnp.clip(jnp.asarray(paths, jnp.int32), -1, count - 1)
