"""Transformers for blockwise flow matching: a feature network, small velocity blocks that it guides, a residual one.

Put together from the parts of `dit`: every velocity block of Park et al. 2025 (arXiv:2510.21167) is modulated, token by
token, by the condition and the feature network's tokens side by side.

Stability: experimental.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer.models.declare import Declared
from jaxinfer.models.dit import GAIN, Block, Conditioner, DitConfig, Patches


class Stem(nn.Module):
    """`(x[B,H,W,C], t f32[B], labels, image) -> (tokens [B,N,D], condition [B,D])`."""

    config: DitConfig

    @nn.compact
    def __call__(self, x, t, labels=None, image=None) -> tuple[jax.Array, jax.Array]:
        h = Patches(self.config, name="patches")(x, image)
        return h, Conditioner(self.config, name="conditioner")(t, t, labels)


class Trunk(nn.Module):
    """`num_layers` blocks on tokens [B,N,D] under a condition [B,D]."""

    config: DitConfig

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        for i in range(self.config.num_layers):
            h = Block(self.config, name=f"block_{i}")(h, condition)
        return h


class GuidedTrunk(Declared):
    """Blocks on tokens [B,N,D], modulated by a condition [B,D] and features [B,N,D]: the tokens, and the modulation of
    each, [B,N,D], which the last layer is under as well."""

    config: DitConfig

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        beside = jnp.broadcast_to(condition[:, None], features.shape)
        both = jnp.concatenate([beside, features], -1)
        each = self.affine("guidance", both, self.config.hidden_size, ("embed", "embed"), gain=GAIN)
        return Trunk(self.config, name="trunk")(h, each), each


class Projector(Declared):
    """Tokens [B,N,D] -> [B,N,size], through two hidden layers of `hidden`."""

    hidden: int
    size: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        for name in ("first", "second"):
            h = jax.nn.silu(self.affine(name, h, self.hidden, ("embed", "mlp")))
        return self.affine("last", h, self.size, ("mlp", None))
