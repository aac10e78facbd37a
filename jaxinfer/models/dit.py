"""A diffusion transformer: patches of a latent image, adaptive layer norm on times and class, tokens in context.

Peebles and Xie 2022 (arXiv:2212.09748), adaLN-zero: each block's shift, scale and gate come from the condition and are
zero at first, so that a new model is the identity. Departures: a second time, the interval s - t to which a mean
velocity belongs (Geng et al. 2025, arXiv:2505.13447); the condition of a block may differ from token to token, as
blockwise models need (arXiv:2510.21167); token conditions join the sequence, since they are few here; classes begin
with variance 1, not 0.0004; angular frequencies of time end at 10, since the derivative in time that MeanFlow trains on
grows with them. The parts (`Patches`, `Conditioner`, `Block`, `Final`) may be put together in other ways. Attention is
plain XLA, which has the forward derivatives that MeanFlow takes.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.declare import Declared, layer_norm

FREQUENCIES = 32
# The variance of first weights, times the number of their inputs. At 1, the usual choice, fewer samples of a short run
# are of their class (0.78 against 0.83 after 1,800 updates on 32x32 glyphs).
GAIN = 1 / 3


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """`height`, `width`, `channels` of x; `hidden_size` of a token. 0 `classes`, `token_size` (channels of a
    condition's tokens) or `image_channels` (of an image beside x): no such condition."""

    height: int
    width: int
    channels: int
    patch: int = 2
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    classes: int = 0
    token_size: int = 0
    image_channels: int = 0
    max_frequency: float = 10.0

    def __post_init__(self):
        if min(self.height, self.width, self.channels, self.patch, self.hidden_size, self.num_layers) < 1:
            raise ConfigError(f"the sizes of a diffusion transformer are at least 1, got {self}")
        if self.height % self.patch or self.width % self.patch:
            raise ConfigError(f"patch {self.patch} does not divide the {self.height}x{self.width} image")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ConfigError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        if self.hidden_size % 4:
            raise ConfigError(f"hidden_size must be a multiple of 4 for two-dimensional positions: {self.hidden_size}")

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.height // self.patch) * (self.width // self.patch)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """x[B,H,W,C] -> [B, H W / patch^2, patch^2 C], row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """The inverse of `patchify`: [B, N, patch^2 C] -> [B, height, width, C]."""
    h, w = height // patch, width // patch
    x = x.reshape(x.shape[0], h, w, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)


@functools.cache
def _positions(rows: int, columns: int, size: int) -> tuple[tuple[float, ...], ...]:
    """Sines and cosines of row and column, [rows * columns, size]."""
    quarter = size // 4
    rates = [10000.0 ** (-i / quarter) for i in range(quarter)]
    wave = lambda p: [f(p * rate) for f in (math.sin, math.cos) for rate in rates]  # noqa: E731
    return tuple(tuple(wave(i) + wave(j)) for i in range(rows) for j in range(columns))


def time_features(t: jax.Array, max_frequency: float) -> jax.Array:
    """cos and sin of t f32[B] at frequencies from 1 to `max_frequency` radians a unit: f32[B, 2 FREQUENCIES]."""
    rates = max_frequency ** jnp.linspace(0.0, 1.0, FREQUENCIES)
    angles = t[:, None] * rates[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Patches(Declared):
    """x[B,H,W,C], with an image beside it or not -> tokens [B,N,D] with their positions."""

    config: DitConfig

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array | None = None) -> jax.Array:
        c = self.config
        if x.shape[1:] != (c.height, c.width, c.channels):
            raise InputError(f"x is {x.shape[1:]} a row, the model's is {(c.height, c.width, c.channels)}")
        beside = None if image is None else image.shape[1:]
        wanted = (c.height, c.width, c.image_channels) if c.image_channels else None
        if beside != wanted:
            raise InputError(f"the image condition is {beside} a row, the model's is {wanted}")
        if image is not None:
            x = jnp.concatenate([x, image.astype(x.dtype)], -1)
        h = self.affine("patches", patchify(x, c.patch), c.hidden_size, (None, "embed"), gain=GAIN)
        table = jnp.asarray(_positions(c.height // c.patch, c.width // c.patch, c.hidden_size), h.dtype)
        return h + table[None]


class Conditioner(Declared):
    """Times t, s f32[B] and labels i32[B] (-1: the null class) -> the vector [B,D] that the blocks are modulated by."""

    config: DitConfig

    @nn.compact
    def __call__(self, t: jax.Array, s: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        c = self.config
        if (labels is not None) != bool(c.classes):
            got = "none" if labels is None else "some"
            raise InputError(f"labels: got {got}, the model has {c.classes} classes")
        vector = self._time("time", t) + self._time("interval", s - t)
        if labels is not None:
            # As strong as the time from the start: at DiT's 0.02 short runs do not learn what a class looks like.
            init = nn.initializers.normal(1.0)
            table = self.weight("labels", (c.classes + 1, c.hidden_size), ("classes", "embed"), init)
            rows = ops.take(table, jnp.where(labels < 0, c.classes, labels))
            vector = vector + rows.astype(vector.dtype)
        return vector

    def _time(self, name: str, t: jax.Array) -> jax.Array:
        size = self.config.hidden_size
        h = self.affine(f"{name}_in", time_features(t, self.config.max_frequency), size, (None, "embed"), gain=GAIN)
        return self.affine(f"{name}_out", jax.nn.silu(h), size, ("embed", "embed"), gain=GAIN)


class Context(Declared):
    """Condition tokens [B,L,C] -> [B,L,D]; rows whose `keep` bool[B] is False have the learned null token instead."""

    config: DitConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        size = self.config.hidden_size
        if tokens.shape[-1] != self.config.token_size:
            raise InputError(f"tokens have {tokens.shape[-1]} channels, the model's {self.config.token_size}")
        h = self.affine("tokens", tokens, size, (None, "embed"), gain=GAIN)
        missing = ops.materialize(self.weight("null_token", (size,), ("embed",))).astype(h.dtype)
        return h if keep is None else jnp.where(keep[:, None, None], h, missing[None, None])


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """The normed x[B,N,D], scaled by 1 + scale and shifted."""
    return layer_norm(x) * (1 + scale) + shift


class Block(Declared):
    """Attention and MLP on tokens [B,N,D], each modulated and gated by a condition [B,C] or, a token each, [B,N,C]."""

    config: DitConfig

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        d = self.config.hidden_size
        m = self.affine("modulation", jax.nn.silu(condition), 6 * d, ("embed", "mlp"), gain=0.0)
        m = m[:, None] if m.ndim == 2 else m
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(m, 6, -1)
        x = x + gate * self._attend(modulate(x, shift, scale))
        h = self.affine("up", modulate(x, mlp_shift, mlp_scale), self.config.mlp_ratio * d, ("embed", "mlp"), gain=GAIN)
        return x + mlp_gate * self.affine("down", jax.nn.gelu(h), d, ("mlp", "embed"), gain=GAIN)

    def _attend(self, x: jax.Array) -> jax.Array:
        d, heads = self.config.hidden_size, self.config.num_heads
        # Split before the heads are: the split's transpose is a concatenation, an index's a padded sum.
        q, k, v = jnp.split(self.affine("qkv", x, 3 * d, ("embed", "heads"), gain=GAIN), 3, -1)
        heads = (*x.shape[:2], heads, d // heads)
        out = jax.nn.dot_product_attention(q.reshape(heads), k.reshape(heads), v.reshape(heads))
        return self.affine("o", out.reshape(x.shape), d, ("heads", "embed"), gain=GAIN)


class Final(Declared):
    """Tokens [B,N,D] of an image and the condition -> x's shape [B,H,W,C]; zero at first."""

    config: DitConfig

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        c = self.config
        m = self.affine("modulation", jax.nn.silu(condition), 2 * c.hidden_size, ("embed", "mlp"), gain=0.0)
        shift, scale = jnp.split(m[:, None] if m.ndim == 2 else m, 2, -1)
        out = self.affine("out", modulate(h, shift, scale), c.patch**2 * c.channels, ("embed", None), gain=0.0)
        return unpatchify(out, c.patch, c.height, c.width)


class Dit(nn.Module):
    """`(x[B,H,W,C], t f32[B], s f32[B], labels, tokens, keep, image) -> (v[B,H,W,C], taps)`.

    `taps`: the image's tokens [B,N,D] after each of the asked layers (0 is the first). Raises `InputError` where a
    condition that the model has is missing, or one that it has not is given.
    """

    config: DitConfig

    @nn.compact
    def __call__(self, x, t, s, labels=None, tokens=None, keep=None, image=None, taps: tuple[int, ...] = ()):
        c = self.config
        if (tokens is not None) != bool(c.token_size):
            raise InputError(f"tokens: got {'some' if tokens is not None else 'none'}, token_size is {c.token_size}")
        h = Patches(c, name="patches")(x, image)
        if tokens is not None:  # behind the image, so that its tokens keep their places
            h = jnp.concatenate([h, Context(c, name="context")(tokens, keep)], 1)
        condition = Conditioner(c, name="conditioner")(t, s, labels)
        found = {}
        for i in range(c.num_layers):
            h = Block(c, name=f"block_{i}")(h, condition)
            found[i] = h[:, : c.num_patches]
        v = Final(c, name="final")(h[:, : c.num_patches], condition)
        return v, tuple(found[i] for i in taps)
