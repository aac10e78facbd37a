"""The static side of a decode call, and the arithmetic that every form shares: who sees whom, and what a score is.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.decode.codes import Codes, halves

# Finite stand-ins for -inf inside a softmax, so that an empty row stays free of NaN, forward and backward. A running
# maximum starts between the masked scores and all real ones: exp(MASKED - FLOOR) is 0, with no second mask.
MASKED, FLOOR = -1e30, -5e29


@dataclasses.dataclass(frozen=True)
class Store:
    """How keys or values are kept: "float32", ..., "int8", "int4"; tokens and channels of a group; offsets or none."""

    kind: str
    tokens: int = 0
    channels: int = 0
    offset: bool = False

    @property
    def coded(self) -> bool:
        """Whether this holds codes."""
        return self.kind in ("int8", "int4")

    def per_token(self, dim: int) -> bool:
        """Whether all channels of a token share their constants, which can then be taken out of a product."""
        return self.coded and self.channels == dim


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about a call: sizes, options, how the cache is kept."""

    batch: int
    heads: int
    groups: int
    queries: int
    capacity: int
    dim: int
    dtype: str
    keys: Store
    values: Store
    transposed: bool
    scale: float
    window: int | None
    softcap: float | None
    alibi: bool
    unified_max: float | None
    invariant: bool
    block: int | None
    interpret: bool

    @property
    def repeat(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.groups

    @property
    def numbers(self) -> int:
        """How many numbers the keys are."""
        return self.batch * self.groups * self.capacity * self.dim

    def block_near(self, tokens: int) -> int:
        """A block of about so many tokens that cuts no group of codes, or is cut by none; the caller's own if given."""
        if self.block is not None:
            return min(self.block, self.capacity)
        unit = math.lcm(*(s.tokens if s.coded and s.tokens < self.capacity else 1 for s in (self.keys, self.values)))
        if unit <= tokens:
            return min(tokens // unit * unit, self.capacity)
        return max(size for size in range(1, tokens + 1) if unit % size == 0)


def cuts_groups(call: Call, block: int) -> str | None:
    """Why blocks of that many tokens do not fit the groups of codes, or None."""
    for name, store in (("keys", call.keys), ("values", call.values)):
        if store.coded and store.tokens < call.capacity and block < call.capacity:
            if block % store.tokens and store.tokens % block:
                return f"{name} have groups of {store.tokens} tokens, which blocks of {block} cut"
    return None


def visible(call: Call, at: jax.Array, lengths: jax.Array, positions: jax.Array) -> jax.Array:
    """Who sees whom: key positions `at`, live lengths and query positions broadcast to `bool[..., T, C]`."""
    seen = at <= jnp.minimum(positions, lengths - 1)
    return seen if call.window is None else seen & (at > positions - call.window)


def finish_scores(call: Call, raw: jax.Array, seen: jax.Array, distance: jax.Array, slopes: jax.Array | None):
    """Products of queries and keys to masked scores: scale, soft-cap, ALiBi, mask; all broadcast against `raw`."""
    score = raw * call.scale
    if call.softcap is not None:
        score = call.softcap * jnp.tanh(score / call.softcap)
    if slopes is not None:
        score = score - slopes * distance.astype(jnp.float32)
    return jnp.where(seen, score, MASKED)


def normalize(peak: jax.Array, total: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unnormalized sums to `(out, lse)`; where nothing was seen, zeros and -inf."""
    live = total > 0
    divisor = jnp.where(live, total, 1.0)
    return out / divisor[..., None], jnp.where(live, peak + jnp.log(divisor), -jnp.inf)


def key_products(q: jax.Array, k: jax.Array | Codes, transposed: bool) -> jax.Array:
    """Queries `[..., M, d]` times keys `[..., c, d]` (`[..., d, c]` if transposed), float32 `[..., M, c]`."""
    product = "...md,...dc->...mc" if transposed else "...md,...cd->...mc"
    parts = _as_they_lie(k, -2 if transposed else -1)
    raw = [jnp.einsum(product, x, part) for x, part in zip(jnp.split(q, len(parts), -1), parts, strict=True)]
    return sum(raw[1:], raw[0])


def value_products(weight: jax.Array, v: jax.Array | Codes) -> jax.Array:
    """Weights `[..., M, c]` times values `[..., c, d]`, float32 `[..., M, d]`."""
    return jnp.concatenate([jnp.einsum("...mc,...cd->...md", weight, part) for part in _as_they_lie(v, -1)], -1)


def _as_they_lie(x: jax.Array | Codes, channel_axis: int) -> list[jax.Array]:
    """Keys or values as float32 numbers, in halves of the channels if two share a byte."""
    return halves(x, channel_axis) if isinstance(x, Codes) else [x.astype(jnp.float32)]
