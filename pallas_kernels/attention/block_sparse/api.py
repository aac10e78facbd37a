"""`block_sparse`: attention over a list of key blocks for each block of queries and head, forward and backward.

The block-sparse FlashAttention of Dao, Fu, Ermon, Rudra and Re (2022), arXiv 2205.14135, section 3.3; the lists are
what MInference (Jiang et al. 2024, arXiv 2407.02490) and its kin choose. What is not listed is neither read nor
multiplied, in either direction.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch, named
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.attention.block_sparse import blocked, gpu, ref, tpu
from jaxinfer.pallas_kernels.attention.block_sparse.call import Call, turn
from jaxinfer.pallas_kernels.attention.flash import api as flash_api

Lists = np.ndarray | jax.Array


def block_sparse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: Lists,
    counts: Lists,
    *,
    block: tuple[int, int],
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
    scale: float | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of `q[B, H, T, d]` over listed blocks of `k[B, G, S, d]`, `v[B, G, S, e]`: `(out[B, H, T, e], lse)`.

    `block`: rows of queries and of keys of a block; they divide T and S. Block i of head h's queries sees the key
    blocks `indices[b, h, i, :counts[b, h, i]]`, no block twice. `indices i32[B or 1, H or 1, T/block_q, n]` and
    `counts i32[B or 1, H or 1, T/block_q]`; entries from the count on are not looked at. Lists that are not traced are
    checked, and the backward pass knows how long its own lists are. All the rest is as in `flash`, whose masks apply
    within the listed blocks too; lse f32[B, H, T] is -inf and out 0 where nothing is seen.

    Raises ArgumentError naming the argument, and UnsupportedError where `impl` cannot serve.
    """
    op = "block_sparse"
    checked = flash_api.checked(
        op, q, k, v, causal, window, softcap, slopes, scale, q_lengths, kv_lengths, block, interpret
    )
    indices, counts = (x if isinstance(x, Tracer | jax.ShapeDtypeStruct) else np.asarray(x) for x in (indices, counts))
    call = _checked(op, checked, indices, counts, block)
    if impl is None and interpret:
        impl = "tpu"
    if impl is not None:
        named(op, FORWARD, impl)
    q_lengths, kv_lengths = flash_api.both_lengths(checked, q_lengths, kv_lengths)
    # Lists that serve all heads still differ from head to head once they are turned: the entries name the head.
    heads = checked.heads if indices.shape[1] > 1 else checked.group
    turned, turned_counts = turn(indices, counts, heads, checked.group, call.k_blocks)
    size, uneven = (1, False) if isinstance(counts, Tracer) else blocked.together(call, counts)
    call = dataclasses.replace(call, turned=turned.shape[-1], together=size, uneven=uneven)
    lists = [jnp.asarray(x, jnp.int32) for x in (indices, counts, turned, turned_counts)]
    return _block_sparse(call, impl, q, k, v, *lists, q_lengths, kv_lengths, slopes)


def _checked(op: str, flash, indices: Lists, counts: Lists, block: Any) -> Call:
    """Refuse lists that no form takes, and return the static side of the call."""
    if block is None:
        raise argument_error(op, "block", None, "(rows of queries, rows of keys)")
    block_q, block_k = block
    if flash.queries % block_q or flash.keys % block_k:
        raise argument_error(op, "block", block, f"divisors of the {flash.queries} queries and the {flash.keys} keys")
    call = Call(flash, block_q, block_k, listed=0, turned=0)
    sizes = check.shapes(op, indices=(indices, "b h i n"), counts=(counts, "b h i"))
    check.integers(op, indices=indices, counts=counts)
    for name, got, accepts in (
        ("indices", sizes["b"], (1, flash.batch)),
        ("indices", sizes["h"], (1, flash.heads)),
        ("indices", sizes["i"], (call.q_blocks,)),
    ):
        if got not in accepts:
            wanted = f"[{flash.batch} or 1, {flash.heads} or 1, {call.q_blocks}, any]"
            raise argument_error(op, name, list(indices.shape), wanted)
    check.within(op, 0, sizes["n"], counts=counts)
    if isinstance(indices, np.ndarray) and isinstance(counts, np.ndarray):
        live = np.arange(sizes["n"]) < counts[..., None]
        check.within(op, 0, call.k_blocks - 1, indices=np.where(live, indices, 0))
        ordered = np.sort(np.where(live, indices, -1 - np.arange(sizes["n"])))  # what is not live differs from all
        twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
        if len(twice):
            raise argument_error(op, f"indices{twice[0][:3].tolist()}", "a block twice", "each block once in a list")
    return dataclasses.replace(call, listed=sizes["n"], shared=sizes["h"] == 1)


def _ref_backward(call: Call, q, k, v, *rest) -> Any:
    """jax's own derivative of the oracle."""
    lists, (dout, dlse) = rest[:7], rest[9:]
    _, pull = jax.vjp(lambda q, k, v: ref.forward(call, q, k, v, *lists), q, k, v)
    return pull((dout, dlse))


FORWARD = (
    Form("tpu", tpu.forward, platform="tpu", refuses=tpu.refuses),
    Form("gpu", gpu.forward, platform="cuda", refuses=gpu.refuses),
    Form("blocked", blocked.forward),
    Form("ref", ref.forward, automatic=False),
)
BACKWARD = (
    Form("tpu", tpu.backward, platform="tpu", refuses=tpu.refuses),
    Form("gpu", gpu.backward, platform="cuda", refuses=gpu.refuses),
    Form("blocked", blocked.backward),
    Form("ref", _ref_backward, automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _block_sparse(call: Call, impl: str | None, *arrays) -> Any:
    return dispatch("block_sparse", FORWARD, call, *arrays, impl=impl)


def _forward(call: Call, impl: str | None, *arrays) -> Any:
    out, lse = dispatch("block_sparse", FORWARD, call, *arrays, impl=impl)
    return (out, lse), (*arrays, out, lse)


def _backward(call: Call, impl: str | None, kept, cotangents) -> Any:
    return *dispatch("block_sparse", BACKWARD, call, *kept, *cotangents, impl=impl), *[None] * 7


_block_sparse.defvjp(_forward, _backward)
