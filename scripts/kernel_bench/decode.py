"""Decode, shared prefixes and speculative trees: a few queries against long caches.

Peers on CPU: attention as one product over the whole cache with a mask, as plain jax writes it (`naive`), and torch's
scaled_dot_product_attention. The cache's keys lie transposed for ours and the naive form, which is how jaxinfer keeps
them since a CPU reads them so fastest; torch gets its own layout. The peer of a shared prefix is plain decode with the
prefix copied to every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.attention.decode import decode, quantize
from jaxinfer.pallas_kernels.attention.shared_prefix import shared_prefix
from jaxinfer.pallas_kernels.attention.tree import pack_ancestors, tree

from .case import Case, unavailable

HEADS, GROUPS, DIM = 8, 2, 64
_ours = jax.jit(functools.partial(decode, transposed=True))


@jax.jit
def _naive(q, k, v, lengths):
    """Softmax of masked scores of the whole cache; keys transposed."""
    batch, heads, queries, dim = q.shape
    grouped = q.reshape(batch, GROUPS, -1, queries, dim)
    score = jnp.einsum("bgrtd,bgdc->bgrtc", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    last = (lengths[:, None] - queries + jnp.arange(queries))[:, None, None, :, None]
    weight = jax.nn.softmax(jnp.where(jnp.arange(k.shape[3]) <= last, score, -1e30))
    out = jnp.einsum("bgrtc,bgcd->bgrtd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def cases() -> Iterator[Case]:
    """Caches of 512 to 8192 tokens, full and ragged, kept in four ways; prefixes of 4096 and 16384; trees of 32."""
    for batch in (1, 8, 64):
        for capacity in (512, 2048, 8192):
            for fill in ("full", "ragged"):
                yield _decode_case(batch, capacity, fill, "float32")
    for dtype in ("bfloat16", "int8", "int4"):
        for batch, capacity in ((8, 8192), (64, 2048)):
            for fill in ("full", "ragged"):
                yield _decode_case(batch, capacity, fill, dtype)
    for batch, prefix in ((64, 4096), (64, 16384), (256, 4096)):
        yield _prefix_case(batch, prefix)
    yield _tree_case(8, 2048, 32)


def _decode_case(batch: int, capacity: int, fill: str, kept: str) -> Case:
    rng = np.random.default_rng(0)
    lengths = np.full(batch, capacity) if fill == "full" else rng.integers(1, capacity + 1, batch)
    if fill == "ragged" and batch == 1:
        lengths = np.array([capacity // 4])
    dtype = "float32" if kept in ("int8", "int4") else kept
    q, k, v = _normal(dtype, (batch, HEADS, 1, DIM), (batch, GROUPS, DIM, capacity), (batch, GROUPS, capacity, DIM))
    live, keys, values = jnp.asarray(lengths, jnp.int32), k, v
    if kept != dtype:
        bits = int(kept[3:])
        keys = jax.jit(functools.partial(quantize, bits=bits, tokens=64, channels=1, transposed=True))(k)
        values = jax.jit(functools.partial(quantize, bits=bits))(v)
    tokens = int(lengths.sum())
    bits_a_number = {"float32": 32, "bfloat16": 16, "int8": 9, "int4": 5}[kept]  # constants included
    return Case(
        op="decode",
        shape=f"{batch}x{HEADS}/{GROUPS}x{capacity}x{DIM} {kept} {fill}",
        dtype=dtype,
        direction="forward",
        runs={
            "jaxinfer": functools.partial(_ours, q, keys, values, live),
            "naive": functools.partial(_naive, q, k, v, live),
            "torch sdpa": _torch(q, k, v, lengths),
        },
        flops=4.0 * HEADS * DIM * tokens,
        bytes=2.0 * GROUPS * DIM * tokens * bits_a_number / 8,
        targets={"naive": 1.0} if kept == "float32" else {},
    )


def _prefix_case(batch: int, prefix: int, suffix: int = 256) -> Case:
    q, pk, pv, sk, sv = _normal(
        "float32",
        (batch, HEADS, 1, DIM),
        (1, GROUPS, DIM, prefix),
        (1, GROUPS, prefix, DIM),
        (batch, GROUPS, DIM, suffix),
        (batch, GROUPS, suffix, DIM),
    )
    k, v = (_written_out(axis)(p, s) for axis, p, s in ((3, pk, sk), (2, pv, sv)))
    ours = jax.jit(functools.partial(shared_prefix, transposed=True))
    lengths = jnp.full(batch, prefix + suffix, jnp.int32)
    return Case(
        op="shared_prefix",
        shape=f"{batch}x{HEADS}/{GROUPS}x{prefix}+{suffix}x{DIM}",
        dtype="float32",
        direction="forward",
        runs={
            "jaxinfer": functools.partial(ours, q, pk, pv, sk, sv),
            "decode of copies": functools.partial(_ours, q, k, v, lengths),
        },
        flops=4.0 * batch * HEADS * DIM * (prefix + suffix),
        bytes=8.0 * GROUPS * DIM * (prefix + batch * suffix),
    )


def _tree_case(batch: int, capacity: int, nodes: int) -> Case:
    shapes = (batch, HEADS, nodes, DIM), (batch, GROUPS, DIM, capacity), (batch, GROUPS, capacity, DIM)
    q, k, v, nk, nv = _normal("float32", *shapes, *[(batch, GROUPS, nodes, DIM)] * 2)
    visible = np.eye(nodes, dtype=bool)
    for i in range(1, nodes):
        visible[i] |= visible[(i - 1) // 2]  # a binary tree
    bits, mask = pack_ancestors(jnp.asarray(visible))[None], jnp.asarray(visible)
    lengths = jnp.full(batch, capacity, jnp.int32)

    @jax.jit
    def naive(q, k, v, nk, nv, mask):
        grouped = q.reshape(batch, GROUPS, -1, nodes, DIM)
        keys, values = jnp.concatenate([k, jnp.swapaxes(nk, 2, 3)], 3), jnp.concatenate([v, nv], 2)
        score = jnp.einsum("bgrtd,bgdc->bgrtc", grouped, keys) * DIM**-0.5
        seen = jnp.concatenate([jnp.ones((nodes, capacity), bool), mask], 1)
        weight = jax.nn.softmax(jnp.where(seen, score, -1e30))
        return jnp.einsum("bgrtc,bgcd->bgrtd", weight, values).reshape(q.shape)

    ours = jax.jit(functools.partial(tree, transposed=True))
    return Case(
        op="tree",
        shape=f"{batch}x{HEADS}/{GROUPS}x{capacity}x{DIM} {nodes} nodes",
        dtype="float32",
        direction="forward",
        runs={
            "jaxinfer": functools.partial(ours, q, k, v, nk, nv, bits, lengths),
            "naive": functools.partial(naive, q, k, v, nk, nv, mask),
        },
        flops=4.0 * batch * HEADS * nodes * DIM * (capacity + nodes),
        bytes=8.0 * batch * GROUPS * DIM * (capacity + nodes),
    )


def _normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True)]


def _written_out(axis: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The prefix copied before each row's suffix."""
    return jax.jit(
        lambda p, s: jnp.concatenate([jnp.broadcast_to(p, (s.shape[0], *p.shape[1:])), s], axis)
    )  # fmt: skip


def _torch(q: jax.Array, k: jax.Array, v: jax.Array, lengths: np.ndarray) -> Callable[[], Any]:
    try:
        import torch
    except ImportError:
        return unavailable("torch is not installed")
    dtype = torch.bfloat16 if q.dtype == jnp.bfloat16 else torch.float32
    arrays = (q, jnp.swapaxes(k, 2, 3), v)
    tensors = [torch.from_numpy(np.array(x.astype(jnp.float32))).to(dtype) for x in arrays]
    capacity = v.shape[2]
    mask = None
    if (lengths < capacity).any():
        seen = np.arange(capacity) < lengths[:, None, None, None]
        mask = torch.from_numpy(seen)
    attend = torch.nn.functional.scaled_dot_product_attention

    def run():
        with torch.no_grad():
            return attend(*tensors, attn_mask=mask, enable_gqa=True)

    return run
