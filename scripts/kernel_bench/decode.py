"""Decode, shared prefixes and speculative trees: a few queries against long caches.

Peers on CPU: `jax.nn.dot_product_attention` with the rows' lengths, torch's scaled_dot_product_attention with a mask,
and one product over the whole cache with its dead tokens masked (`whole cache`). Ours and the whole cache have their
keys transposed, as jaxinfer keeps them since a CPU reads them so fastest; the others have their own layouts. Ours of
int8 and int4 reads codes, its peers the float32 numbers that were quantized.

Ragged rows stand beside rows that are all half full, which has the same tokens in all (`ours, equal rows`): within 1.1
is asked for. Lengths are rounded up to blocks of 512 tokens, which alone is 1.06 at 8192 tokens and 1.25 at 2048.
The peer of a shared prefix is plain decode with the prefix copied to every row.
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
BITS = {"float32": 32, "bfloat16": 16, "int8": 9, "int4": 5}  # a number's, constants included
_ours = jax.jit(functools.partial(decode, transposed=True))


def cases() -> Iterator[Case]:
    """Full and ragged caches of each kind, from one row to 64; prefixes of 4096 and 16384 tokens; a tree of 32 drafts.

    A prefix of 16384 is shared by 64 rows here: of 256, as a GPU is asked to do, the copies alone would be 4 GB.
    """
    for batch, capacity, kept in (
        (1, 8192, "float32"), (8, 8192, "float32"), (64, 2048, "float32"),
        (8, 8192, "bfloat16"), (64, 2048, "bfloat16"), (8, 8192, "int8"), (64, 2048, "int8"), (8, 8192, "int4"),
    ):  # fmt: skip
        yield _decode_case(batch, capacity, "full", kept)
        if batch > 1:
            yield _decode_case(batch, capacity, "ragged", kept)
    for batch, prefix in ((64, 4096), (256, 4096), (64, 16384)):
        yield _prefix_case(batch, prefix)
    yield _tree_case(8, 2048, 32)


def _decode_case(batch: int, capacity: int, fill: str, kept: str) -> Case:
    lengths = np.full(batch, capacity)
    if fill == "ragged":
        some = np.random.default_rng(0).integers(1, capacity, batch // 2)
        lengths = np.concatenate([some, capacity - some])
    dtype = "bfloat16" if kept == "bfloat16" else "float32"
    q, k, v = _normal(dtype, (batch, HEADS, 1, DIM), (batch, GROUPS, DIM, capacity), (batch, GROUPS, capacity, DIM))
    live, keys, values = jnp.asarray(lengths, jnp.int32), k, v
    if kept != dtype:
        bits = int(kept[3:])
        keys = jax.jit(functools.partial(quantize, bits=bits, tokens=64, channels=1, transposed=True))(k)
        values = jax.jit(functools.partial(quantize, bits=bits))(v)
    tokens = int(lengths.sum())
    runs = {
        "jaxinfer": functools.partial(_ours, q, keys, values, live),
        "jax.nn": _jax_nn(q, k, v, live),
        "torch sdpa": _torch(q, k, v, lengths),
        "whole cache": functools.partial(_whole, q, k, v, live),
    }
    if fill == "ragged":
        runs["ours, equal rows"] = functools.partial(_ours, q, keys, values, jnp.full(batch, capacity // 2))
    return Case(
        op="decode",
        shape=f"{batch}x{HEADS}/{GROUPS}x{capacity}x{DIM} {kept} {fill}",
        dtype=dtype,
        direction="forward",
        runs=runs,
        flops=4.0 * HEADS * DIM * tokens,
        bytes=2.0 * GROUPS * DIM * tokens * BITS[kept] / 8,
        targets={"ours, equal rows": 1 / 1.1} if fill == "ragged" else {},
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
            "plain decode": functools.partial(_ours, q, k, v, lengths),
        },
        flops=4.0 * batch * HEADS * DIM * (prefix + suffix),
        bytes=8.0 * GROUPS * DIM * (prefix + batch * suffix),
    )


def _tree_case(batch: int, capacity: int, nodes: int) -> Case:
    """A binary tree; the peers get keys and values with the nodes already behind the cache, and a mask."""
    shapes = (batch, HEADS, nodes, DIM), (batch, GROUPS, DIM, capacity), (batch, GROUPS, capacity, DIM)
    q, k, v, nk, nv = _normal("float32", *shapes, *[(batch, GROUPS, nodes, DIM)] * 2)
    visible = np.eye(nodes, dtype=bool)
    for i in range(1, nodes):
        visible[i] |= visible[(i - 1) // 2]
    bits = pack_ancestors(jnp.asarray(visible))[None]
    seen = np.concatenate([np.ones((nodes, capacity), bool), visible], 1)[None, None]
    keys, values = jnp.concatenate([k, jnp.swapaxes(nk, 2, 3)], 3), jnp.concatenate([v, nv], 2)
    ours = jax.jit(functools.partial(tree, transposed=True))
    return Case(
        op="tree",
        shape=f"{batch}x{HEADS}/{GROUPS}x{capacity}x{DIM} {nodes} nodes",
        dtype="float32",
        direction="forward",
        runs={
            "jaxinfer": functools.partial(ours, q, k, v, nk, nv, bits, jnp.full(batch, capacity, jnp.int32)),
            "jax.nn": _jax_nn(q, keys, values, mask=jnp.asarray(seen)),
            "torch sdpa": _torch(q, keys, values, mask=seen),
        },
        flops=4.0 * batch * HEADS * nodes * DIM * (capacity + nodes),
        bytes=8.0 * batch * GROUPS * DIM * (capacity + nodes),
        targets={"jax.nn": 1.0},
    )


def _normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True)]


def _written_out(axis: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The prefix copied before each row's suffix."""
    return jax.jit(lambda p, s: jnp.concatenate([jnp.broadcast_to(p, (s.shape[0], *p.shape[1:])), s], axis))


@jax.jit
def _whole(q, k, v, lengths):
    """Softmax of masked scores of the whole cache; keys transposed, one query a row."""
    batch, heads, queries, dim = q.shape
    grouped = q.reshape(batch, GROUPS, -1, queries, dim)
    score = jnp.einsum("bgrtd,bgdc->bgrtc", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    seen = jnp.arange(k.shape[3]) < lengths[:, None, None, None, None]
    weight = jax.nn.softmax(jnp.where(seen, score, -1e30))
    out = jnp.einsum("bgrtc,bgcd->bgrtd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def _jax_nn(q, k, v, lengths: jax.Array | None = None, mask: jax.Array | None = None) -> Callable[[], Any]:
    arrays = [jnp.swapaxes(q, 1, 2), jnp.moveaxis(k, 3, 1), jnp.swapaxes(v, 1, 2)]  # [B, tokens, heads, d]

    @jax.jit
    def attend(q, k, v, lengths, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=lengths)

    return functools.partial(attend, *arrays, lengths, mask)


def _torch(q, k, v, lengths: np.ndarray | None = None, mask: np.ndarray | None = None) -> Callable[[], Any]:
    try:
        import torch
    except ImportError:
        return unavailable("torch is not installed")
    dtype = torch.bfloat16 if q.dtype == jnp.bfloat16 else torch.float32
    tensors = [
        torch.from_numpy(np.array(x.astype(jnp.float32))).to(dtype).contiguous() for x in (q, jnp.swapaxes(k, 2, 3), v)
    ]
    if lengths is not None and (lengths < v.shape[2]).any():
        mask = np.arange(v.shape[2]) < lengths[:, None, None, None]
    seen = None if mask is None else torch.from_numpy(mask)
    attend = torch.nn.functional.scaled_dot_product_attention

    def run():
        with torch.no_grad():
            return attend(*tensors, attn_mask=seen, enable_gqa=True)

    return run
