"""The diffusion transformer in two parts, for caching: what its middle layers add to the tokens, and the rest.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.flow.types import Condition
from jaxinfer.models.dit import Block, Conditioner, Context, DitConfig, Final, Patches


class DitParts(nn.Module):
    """`Dit`'s layers under their own names, so that they read its params: with `deep`, what layers [start, end) add to
    the tokens, [B,N,D]; else the velocity from that."""

    config: DitConfig
    start: int
    end: int

    @nn.compact
    def __call__(self, x, t, s, labels=None, tokens=None, keep=None, image=None, *, added=None) -> jax.Array:
        c = self.config
        h = Patches(c, name="patches")(x, image)
        if tokens is not None:
            h = jnp.concatenate([h, Context(c, name="context")(tokens, keep)], 1)
        condition = Conditioner(c, name="conditioner")(t, s, labels)
        for i in range(self.start):
            h = Block(c, name=f"block_{i}")(h, condition)
        if added is None:
            before = h
            for i in range(self.start, self.end):
                h = Block(c, name=f"block_{i}")(h, condition)
            return h - before
        h = h + added
        for i in range(self.end, c.num_layers):
            h = Block(c, name=f"block_{i}")(h, condition)
        return Final(c, name="final")(h[:, : c.num_patches], condition)


@dataclasses.dataclass(frozen=True)
class SplitNetwork:
    """`cachequant.Split` of a `Network` of the same configuration and params: layers [start, end) are deep. A full
    step runs the first `start` layers twice. Raises ConfigError unless 0 <= start < end <= num_layers."""

    config: DitConfig
    start: int
    end: int

    def __post_init__(self):
        if not 0 <= self.start < self.end <= self.config.num_layers:
            got = f"[{self.start}, {self.end})"
            raise ConfigError(f"deep layers: got {got}, accepts a range within the model's {self.config.num_layers}")

    def _apply(self, params: Any, x: jax.Array, t: jax.Array, cond: Condition | None, added: Any) -> jax.Array:
        cond = Condition() if cond is None else cond
        given = (cond.labels, cond.tokens, cond.keep, cond.image)
        found = DitParts(self.config, self.start, self.end).apply({"params": params}, x, t, t, *given, added=added)
        return jnp.asarray(found)

    def deep(self, params: Any, x: jax.Array, t: jax.Array, cond: Condition | None) -> jax.Array:
        """What the deep layers add, [B,N,D]."""
        return self._apply(params, x, t, cond, None)

    def shallow(
        self, params: Any, x: jax.Array, t: jax.Array, cond: Condition | None, features: jax.Array
    ) -> jax.Array:
        """v[B,H,W,C]."""
        return self._apply(params, x, t, cond, features)
