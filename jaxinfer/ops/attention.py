"""Attention over parts: one joint softmax over any number of key segments, exact merging, and the naive oracle.

A segment is a set of keys with its own visibility (a cache's state, the step's own block, sinks, quantized groups).
Shapes: queries `[B, H, T, d]`, keys and values `[B, G, C, d]` with `H` a multiple of `G`; query head `h` reads
key head `h // (H / G)`.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import InputError
from jaxinfer.ops.position import Alibi, Rope, T5Bias
from jaxinfer.ops.precision import sum_dtype, widen
from jaxinfer.pallas_kernels.attention.decode import Codes, decode

NEGATIVE = -1e30  # finite stand-in for -inf inside a softmax: an empty row stays free of NaN, forward and backward
FEW = 64  # query rows of a key head up to which a long cache is read as decoding reads it
# Measured on two cores, whole decoding steps: int8 keys of more numbers than LARGE, in rows of LONG slots or more, took
# 0.9 of the time block by block where all were live and 0.55 to 0.65 where half were; smaller ones took the same.
# Float32 caches gain where less than two thirds is live and lose half as much again where all is; bfloat16 caches lost
# up to a sixth. Both are read by blocks only where that is asked for.
LARGE, LONG = 2**20, 1024


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static arithmetic of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    position: Rope | Alibi | T5Bias | None = None
    window: int | None = None
    softcap: float | None = None

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate queries or keys where the layer uses RoPE; the identity otherwise."""
        return self.position.rotate(x, positions) if isinstance(self.position, Rope) else x

    def bias(self, distance: jax.Array, table: jax.Array | None) -> jax.Array | None:
        """The additive score bias f32[B, H, T, C] at `distance = query - key position`, or None."""
        match self.position:
            case Alibi():
                return self.position.bias(distance)
            case T5Bias():
                if table is None:
                    raise InputError("T5Bias needs the learned table [buckets, heads]")
                return self.position.bias(distance, table)
            case _:
                return None

    def within_window(self, distance: jax.Array) -> jax.Array | bool:
        """Whether a key at `distance` behind its query is inside the sliding window."""
        return True if self.window is None else distance < self.window


@struct.dataclass
class Bidirectional:
    """Mask kind: every real token sees every other real token of the call."""


@struct.dataclass
class Segments:
    """Mask kind: causal, within equal ids only. `ids i32[B, T]` (packed documents)."""

    ids: jax.Array


@struct.dataclass
class Part:
    """Attention over one set of keys: `out[B, H, T, d]` and `lse f32[B, H, T]` (-inf and zeros where empty)."""

    out: jax.Array
    lse: jax.Array


class Segment(NamedTuple):
    """Keys with their visibility: `k, v [B, G, C, d]`, `visible bool[B, 1 or G, T, C]`, `bias f32[B, H, T, C]`.

    `q`, when given, replaces the call's queries for this segment (sinks are seen from another position).
    `transposed` keys are `[B, G, d, C]`: the order in which a few queries read a long state fastest on CPU (three
    times, measured at 64 rows of 512 tokens).
    """

    k: jax.Array
    v: jax.Array
    visible: jax.Array
    bias: jax.Array | None = None
    q: jax.Array | None = None
    transposed: bool = False


def block_visibility(spec: AttentionSpec, q_positions: jax.Array, k_positions: jax.Array, mask) -> jax.Array:
    """Who sees whom among the tokens of one call: `q_positions[B, T]`, `k_positions[B, R] -> bool[B, 1, T, R]`.

    `mask` is None (causal by position), `Bidirectional()`, `Segments(ids)` or an explicit `bool[B, T, R]`;
    empty slots (position -1) and keys outside the window are never seen.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    visible = (k_positions[:, None, :] >= 0) & (q_positions[:, :, None] >= 0)
    if isinstance(mask, Bidirectional):
        near = True if spec.window is None else jnp.abs(distance) < spec.window
        return (visible & near)[:, None]
    visible &= spec.within_window(distance)
    match mask:
        case None:
            visible &= distance >= 0
        case Segments(ids):
            visible &= (distance >= 0) & (ids[:, :, None] == ids[:, None, :])
        case _:
            visible &= mask
    return visible[:, None]


def attend(spec: AttentionSpec, q: jax.Array, segments: Sequence[Segment]) -> Part:
    """Softmax attention of `q[B, H, T, d]` over the union of the segments, summed in float32 or wider."""
    scores = [_scores(spec, segment.q if segment.q is not None else q, segment) for segment in segments]
    # The peak cancels from output and lse. Its own gradient, which compares scores with it, is not only needless: where
    # the compiler computes the two differently, no score equals the peak and the gradient is 0 / 0.
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [x.max(-1, initial=NEGATIVE) for x in scores]))
    total, out = jnp.zeros_like(peak), 0.0
    for score, segment in zip(scores, segments, strict=True):
        weight = jnp.exp(score - peak[..., None])
        weight = jnp.where(score > NEGATIVE / 2, weight, 0.0)
        total += weight.sum(-1)
        out += jnp.einsum(
            "bgntc,bgcd->bgntd",
            weight.astype(segment.v.dtype),
            segment.v,
            preferred_element_type=sum_dtype(segment.v.dtype),
        )
    batch, heads, length, _ = q.shape
    live = total > 0
    divisor = jnp.where(live, total, 1.0)
    out = (out / divisor[..., None]).astype(q.dtype)
    lse = jnp.where(live, peak + jnp.log(divisor), -jnp.inf)
    return Part(out.reshape(batch, heads, length, -1), lse.reshape(batch, heads, length))


def reads_blocks(spec: AttentionSpec, queries: int, keys: jax.Array | Codes, asked: bool | None) -> bool:
    """Whether a cache of keys `[B, G, d, C]`, slot c at position c, is to be read by `attend_blocks`: as `asked`, or
    where that was measured to pay. Never for many queries, nor where the scores depend on more than who sees whom."""
    values = keys.values if isinstance(keys, Codes) else keys
    few = spec.num_heads // spec.num_kv_heads * queries <= FEW
    if not few or spec.window is not None or isinstance(spec.position, Alibi | T5Bias):
        return False
    if asked is not None:
        return asked
    # Several devices: a loop over rows would gather a sharded cache.
    alone = jax.default_backend() == "cpu" and jax.local_device_count() == 1
    return alone and values.dtype == jnp.int8 and values.size > LARGE and values.shape[3] >= LONG


def attend_blocks(spec: AttentionSpec, q, k, v, lengths, positions) -> Part:
    """Attention of few queries `q[B, H, T, d]` to a cache `k [B, G, d, C]`, `v [B, G, C, d]` of arrays or codes, whose
    blocks are read as they are kept and only where they are live: `lengths i32[B]` slots, of which a query sees those
    up to its `positions i32[B, T]`. A row's bits depend on nothing in the other rows."""
    return Part(
        *decode(
            q,
            k,
            v,
            lengths,
            positions=positions,
            scale=spec.scale,
            softcap=spec.softcap,
            transposed=True,
            invariant=True,
        )
    )


def _scores(spec: AttentionSpec, q: jax.Array, segment: Segment) -> jax.Array:
    """Masked scores f32[B, G, H/G, T, C] of one segment."""
    batch, heads, length, dim = q.shape
    groups = spec.num_kv_heads
    grouped = q.reshape(batch, groups, heads // groups, length, dim)
    product = "bgntd,bgdc->bgntc" if segment.transposed else "bgntd,bgcd->bgntc"
    score = jnp.einsum(product, grouped, segment.k.astype(q.dtype), preferred_element_type=sum_dtype(q.dtype))
    score = score * spec.scale
    if spec.softcap is not None:
        score = spec.softcap * jnp.tanh(score / spec.softcap)
    if segment.bias is not None:
        score += segment.bias.reshape(batch, groups, heads // groups, length, -1)
    return jnp.where(segment.visible[:, :, None], score, NEGATIVE)


def combine(parts: Sequence[Part]) -> Part:
    """Merge attention over disjoint key sets exactly: softmax weights of the parts' log-sum-exps."""
    lse = jnp.stack([part.lse for part in parts])
    peak = jax.lax.stop_gradient(lse.max(0))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weight = jnp.exp(lse - peak)
    total = weight.sum(0)
    live = total > 0
    divisor = jnp.where(live, total, 1.0)
    out = sum(w[..., None] * widen(part.out) for w, part in zip(weight, parts, strict=True))
    out = (out / divisor[..., None]).astype(parts[0].out.dtype)
    return Part(out, jnp.where(live, peak + jnp.log(divisor), -jnp.inf))


def attend_naive(spec: AttentionSpec, q, k, v, distance, visible, table=None) -> Part:
    """The oracle: unrotated `q[B, H, T, d]`, `k, v [B, G, C, d]`, and each pair's `distance[B, 1 or G, T, C]`.

    Rotates every query once per key by their distance, so it shares no positional code path with `attend`.
    """
    repeat = spec.num_heads // spec.num_kv_heads
    k, v = (jnp.repeat(widen(x), repeat, 1) for x in (k, v))
    spread = [jnp.repeat(x, repeat, 1) if x.shape[1] > 1 else x for x in (distance, visible)]
    distance, visible = spread
    q = widen(q)[..., None, :]
    if isinstance(spec.position, Rope):
        q = spec.position.rotate_pairwise(q, distance)
    score = jnp.einsum("bhtcd,bhcd->bhtc", jnp.broadcast_to(q, (*q.shape[:3], k.shape[2], q.shape[-1])), k) * spec.scale
    if spec.softcap is not None:
        score = spec.softcap * jnp.tanh(score / spec.softcap)
    bias = spec.bias(distance, table)
    score = jnp.where(visible, score if bias is None else score + bias, -jnp.inf)
    lse = jax.nn.logsumexp(score, -1)
    weight = jnp.where(visible, jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return Part(jnp.einsum("bhtc,bhcd->bhtd", weight, v), lse)
