"""Attention of a tree of drafts to a cache and to its own ancestors, given as bits.

Tree attention as in SpecInfer (Miao et al. 2023, arXiv 2305.09781) and Medusa (Cai et al. 2024, arXiv 2401.10774): one
forward pass scores every branch. Every node sees all of the cache, so that part is `decode`; among the nodes it is one
small product, masked by bits that are unpacked where they are used. The two are merged by their log-sum-exps.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.attention.combine import combine
from jaxinfer.pallas_kernels.attention.decode.api import attend
from jaxinfer.pallas_kernels.attention.decode.codes import Codes
from jaxinfer.pallas_kernels.attention.decode.options import Options, checked_slopes
from jaxinfer.pallas_kernels.attention.tree import ref

MOST = 64


def tree(
    q: jax.Array,
    k: jax.Array | Codes,
    v: jax.Array | Codes,
    node_k: jax.Array,
    node_v: jax.Array,
    ancestors: jax.Array,
    lengths: jax.Array,
    *,
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
    """Attention of tree nodes `q[B, H, N, d]`, N up to 64: `(out[B, H, N, d], lse f32[B, H, N])`.

    `k, v [B, G, C, d]` are the cache, of which `lengths i32[B]` tokens are live, as in `decode` (arrays or `Codes`,
    keys transposed or not); `node_k, node_v [B, G, N, d]` are the nodes' own keys and values.
    `ancestors uint32[B or 1, N, ceil(N / 32)]`: bit `j % 32` of word `j // 32` of node `i` says that node `i` sees node
    `j`, which is so for `i` itself and for its ancestors (`pack_ancestors`). A node's depth is one less than its bits,
    its position `lengths + depth`; a node without bits is padding: out = 0, lse = -inf. `window`, `softcap`, `alibi`,
    `scale`, `invariant` and `block` are as in `decode`. Differentiable in every float. `impl`: "blocked", "tpu", "gpu"
    or "ref".

    Raises ArgumentError for shapes, dtypes, options or known lengths that do not fit, before anything is traced;
    UnsupportedError where the form named by `impl` cannot serve.
    """
    sizes = check.shapes(
        "tree", q=(q, "B H N d"), node_k=(node_k, "B G N d"), node_v=(node_v, "B G N d"), lengths=(lengths, "B")
    )
    options = Options(scale, window, softcap, transposed, invariant, impl, block, interpret).checked("tree", sizes["d"])
    batch, heads, groups, nodes = (sizes[n] for n in "BHGN")
    if nodes > MOST:
        raise argument_error("tree", "q", f"{nodes} nodes", f"at most {MOST}")
    if heads % groups:
        raise argument_error("tree", "q", f"{heads} heads", f"a multiple of the nodes' {groups}")
    check.dtypes("tree", q=q, node_k=node_k, node_v=node_v)
    shared = ancestors.shape[:1] == (1,)
    check.shapes("tree", ancestors=(ancestors, f"{1 if shared else batch} {nodes} {-(-nodes // 32)}"))
    check.dtypes("tree", ("uint32",), ancestors=ancestors)
    slopes = checked_slopes("tree", alibi, heads)
    depths = jnp.broadcast_to(jax.lax.population_count(ancestors).sum(-1).astype(jnp.int32) - 1, (batch, nodes))
    if impl == "ref":
        visible = jnp.broadcast_to(unpack_ancestors(ancestors), (batch, nodes, nodes))
        return ref.attend(q, k, v, node_k, node_v, visible, lengths, depths, slopes, options)
    positions = jnp.where(depths < 0, -1, lengths[:, None] + depths).astype(jnp.int32)
    cached = attend("tree", q, k, v, lengths, positions, slopes, options)
    return combine([cached, _among_nodes(q, node_k, node_v, ancestors, depths, options, slopes)])


def pack_ancestors(visible: jax.Array) -> jax.Array:
    """`bool[..., N, N]`, whether a node (row) sees another (column), as bits `uint32[..., N, ceil(N / 32)]`."""
    *lead, nodes = visible.shape
    words = -(-nodes // 32)
    bits = jnp.pad(visible, [(0, 0)] * len(lead) + [(0, 32 * words - nodes)]).reshape(*lead, words, 32)
    return (bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def unpack_ancestors(bits: jax.Array) -> jax.Array:
    """The inverse of `pack_ancestors`: `uint32[..., N, ceil(N / 32)]` as `bool[..., N, N]`."""
    nodes = bits.shape[-2]
    seen = (bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return seen.reshape(*bits.shape[:-1], -1)[..., :nodes] == 1


def _among_nodes(q, k, v, ancestors, depths, options: Options, slopes) -> tuple[jax.Array, jax.Array]:
    """Nodes among themselves: scores of at most 64 by 64 a head, in float32."""
    assert options.scale is not None  # filled in where options are checked
    batch, heads, nodes, dim = q.shape
    groups = k.shape[1]
    grouped = q.reshape(batch, groups, heads // groups, nodes, dim)
    score = jnp.einsum("bgrnd,bgmd->bgrnm", grouped, k, preferred_element_type=jnp.float32) * options.scale
    if options.softcap is not None:
        score = options.softcap * jnp.tanh(score / options.softcap)
    distance = (depths[:, :, None] - depths[:, None])[:, None, None]
    seen = unpack_ancestors(ancestors)[:, None, None]
    if options.window is not None:
        seen &= distance < options.window
    if slopes is not None:
        score -= slopes.reshape(groups, -1, 1, 1) * distance
    seen = jnp.broadcast_to(seen, score.shape)
    lse = jax.nn.logsumexp(score, -1, where=seen)
    weight = jnp.where(seen, jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    out = jnp.einsum("bgrnm,bgmd->bgrnd", weight, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, heads, nodes)
