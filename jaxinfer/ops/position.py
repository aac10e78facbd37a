"""Position encodings as static data: RoPE with its scalings, ALiBi, T5 relative buckets, sinusoids.

Frequencies are fixed by the dataclass, never by the batch: a row's arithmetic cannot depend on its neighbours.
Angles are good to float32 at any position (1e-6 at a hundred million): a float32 product `position * frequency` is
wrong by 0.003 at 128K and by 0.1 at 8M, so frequencies are fixed-point turns and the product wraps around in integers.

Sources: RoPE (Su et al. 2021, 2104.09864); ALiBi (Press et al. 2021, 2108.12409); T5 (Raffel et al. 2019,
1910.10683); YaRN (Peng et al. 2023, 2309.00071); LongRoPE (Ding et al. 2024, 2402.13753); the comparison in "The
Impact of Positional Encoding on Length Generalization" (Kazemnejad et al. 2023, 2305.19466).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.ops.precision import widen

SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `rotary_dim` entries of a head, in half-split pairs (or interleaved ones).

    `length` is the longest position range that this instance serves; `dynamic` and `longrope` choose their
    frequencies by it once, where other libraries let the current batch decide.
    """

    rotary_dim: int
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_length: int = 0
    length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    interleaved: bool = False

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ConfigError(f"RoPE scaling {self.scaling!r} is not known; known: {', '.join(SCALINGS)}")
        if self.rotary_dim % 2:
            raise ConfigError(f"RoPE needs an even rotary_dim, got {self.rotary_dim}")

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate `x[B, H, T, d]` by `positions i32[B, T]`; entries from `rotary_dim` on pass unchanged."""
        cos, sin = self._table(positions)
        return self._turn(x, cos[:, None], sin[:, None])

    def rotate_pairwise(self, x: jax.Array, distance: jax.Array) -> jax.Array:
        """Rotate `x[B, H, T, 1, d]` by each entry of `distance[B, 1 or H, T, C] -> [B, H, T, C, d]` (oracles)."""
        frequency, scale = frequencies(self)
        angle = angles(frequency, distance)
        return self._turn(x, jnp.cos(angle) * scale**2, jnp.sin(angle) * scale**2)

    def _table(self, positions):
        """Scaled cosines and sines f32[..., rotary_dim / 2], one for all heads, both halves and all layers.

        The product with the identity changes nothing: it is what XLA does not fuse. Without it every layer's rotation
        evaluates sines anew for each head and half, which was 5 to 9 % of a decoding step on CPU at 8 to 64 rows.
        """
        frequency, scale = frequencies(self)
        angle = angles(frequency, positions)
        table = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1) * scale
        table = jnp.matmul(table, np.eye(self.rotary_dim, dtype=np.float32), precision=jax.lax.Precision.HIGHEST)
        cos, sin = jnp.split(table, 2, -1)
        return cos, sin

    def _turn(self, x, cos, sin):
        turned, rest = widen(x[..., : self.rotary_dim]), x[..., self.rotary_dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
            out = out.reshape(*out.shape[:-2], self.rotary_dim)
        else:
            a, b = jnp.split(turned, 2, -1)
            out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        out = out.astype(x.dtype)
        if not rest.shape[-1]:
            return out
        rest = jnp.broadcast_to(rest, (*out.shape[:-1], rest.shape[-1]))
        return jnp.concatenate([out, rest], -1)


@functools.lru_cache(maxsize=256)
def frequencies(rope: Rope) -> tuple[np.ndarray, float]:
    """`(inverse frequencies float64[rotary_dim / 2], attention factor)` of a Rope."""
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    scale = 1.0
    if rope.scaling == "dynamic":
        inverse = rope.theta**-exponent
        longest, original = rope.length, rope.original_length
        if longest > original:
            grown = rope.factor * longest / original - (rope.factor - 1)
            inverse = (rope.theta * grown ** (rope.rotary_dim / (rope.rotary_dim - 2))) ** -exponent
    elif rope.scaling == "linear":
        inverse = rope.theta**-exponent / rope.factor
    elif rope.scaling == "llama3":
        inverse = _llama3(rope, rope.theta**-exponent)
    elif rope.scaling == "yarn":
        inverse, scale = _yarn(rope, exponent)
    elif rope.scaling == "longrope":
        inverse, scale = _longrope(rope, exponent)
    else:
        inverse = rope.theta**-exponent
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    return np.asarray(inverse, np.float64), float(scale)


def angles(frequency: np.ndarray, positions: jax.Array) -> jax.Array:
    """`position * frequency` less whole turns, in [-pi, pi]: `frequency[n]`, `positions i32[...] -> f32[..., n]`.

    A frequency is `high + low / 2^16` in units of 2^-32 turns. Unsigned products drop whole turns and nothing else; the
    low half is multiplied in two 16-bit pieces. Negative positions turn backwards.
    """
    turns = np.round(frequency / (2 * math.pi) * 2.0**48).astype(np.uint64)
    high = (turns >> np.uint64(16)).astype(np.uint32)
    low = (turns & np.uint64(0xFFFF)).astype(np.uint32)
    position = positions[..., None].astype(jnp.int32)
    upper, lower = (position >> 16).astype(jnp.uint32), (position & 0xFFFF).astype(jnp.uint32)
    phase = position.astype(jnp.uint32) * high + upper * low + ((lower * low) >> 16)
    return phase.astype(jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2.0**32)


def _llama3(rope: Rope, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: keep short wavelengths, divide long ones by `factor`, interpolate smoothly between."""
    wavelength = 2 * math.pi / inverse
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_length / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = np.where(wavelength > rope.original_length / low, inverse / rope.factor, inverse)
    middle = (wavelength <= rope.original_length / low) & (wavelength >= rope.original_length / high)
    return np.where(middle, blended, scaled)


def _yarn(rope: Rope, exponent: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN: interpolate low frequencies, keep high ones, ramp between the two correction dimensions."""
    dim, base = rope.rotary_dim, rope.theta

    def correction(rotations: float) -> float:
        return dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high if high != low else high + 0.001
    keep = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    inverse = base**-exponent
    if rope.mscale and rope.mscale_all_dim:
        scale = _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    else:
        scale = _yarn_scale(rope.factor, 1.0)
    return inverse / rope.factor * (1 - keep) + inverse * keep, scale


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: Rope, exponent: np.ndarray) -> tuple[np.ndarray, float]:
    """LongRoPE: per-frequency factors, the long table once `length` passes the original one."""
    table = rope.long_factor if rope.length > rope.original_length else rope.short_factor
    if len(table) != len(exponent):
        raise ConfigError(f"longrope needs {len(exponent)} factors, got {len(table)}")
    scale = 1.0
    if rope.factor > 1:
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    return 1.0 / (np.asarray(table, np.float64) * rope.theta**exponent), scale


@dataclasses.dataclass(frozen=True)
class Alibi:
    """A linear bias `-slope * distance` for each query head."""

    num_heads: int

    def bias(self, distance: jax.Array) -> jax.Array:
        """`distance i32[B, 1 or H, T, C] -> f32[B, H, T, C]`."""
        return -jnp.asarray(alibi_slopes(self.num_heads))[:, None, None] * distance.astype(jnp.float32)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes f32[num_heads]; for other than powers of two, every second slope of the next power fills up."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    extra = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power) + 1, 2))
    return np.concatenate([slopes, extra]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class T5Bias:
    """T5's causal relative buckets; the learned table f32[buckets, H] is a weight that the model hands over."""

    num_heads: int
    buckets: int = 32
    max_distance: int = 128

    def bias(self, distance: jax.Array, table: jax.Array) -> jax.Array:
        """`distance i32[B, 1 or H, T, C] -> f32[B, H, T, C]` (an axis of one head broadcasts)."""
        bias = jnp.moveaxis(jnp.take(widen(table), self.bucket(distance), axis=0, mode="clip"), -1, 1)
        if distance.shape[1] == 1:
            return bias[:, :, 0]
        return jnp.moveaxis(jnp.diagonal(bias, axis1=1, axis2=2), -1, 1)

    def bucket(self, distance: jax.Array) -> jax.Array:
        """Half of the buckets are exact distances, the other half grow logarithmically to `max_distance`."""
        exact = self.buckets // 2
        near = jnp.maximum(distance, 0)
        ratio = jnp.log(jnp.maximum(near, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = exact + (ratio * (self.buckets - exact)).astype(jnp.int32)
        return jnp.where(near < exact, near, jnp.minimum(far, self.buckets - 1))


def sinusoid(positions: jax.Array, dim: int) -> jax.Array:
    """Absolute sinusoidal embedding (Vaswani et al. 2017, 1706.03762): `positions[...] -> f32[..., dim]`."""
    inverse = 10000.0 ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = angles(inverse, positions)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
