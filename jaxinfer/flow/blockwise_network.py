"""The parts of blockwise flow matching as functions of params: frozen, hashable, static under `jax.jit`.

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
from jaxinfer.models.blockwise import GuidedTrunk, Projector, Stem, Trunk
from jaxinfer.models.dit import DitConfig, Final


@dataclasses.dataclass(frozen=True)
class BlockwiseNetwork:
    """`blockwise.Parts`. config: of each part but its number of layers (that of the feature network); semantic_size: of
    a token of the encoder that features are aligned to. Labels and images are conditions, tokens are not.

    Raises ConfigError for counts under 1, or a configuration with condition tokens.
    """

    config: DitConfig
    segments: int = 6
    velocity_layers: int = 2
    residual_layers: int = 1
    semantic_size: int = 64

    def __post_init__(self):
        if min(self.segments, self.velocity_layers, self.residual_layers, self.semantic_size) < 1:
            raise ConfigError(f"the sizes of a blockwise network are at least 1, got {self}")
        if self.config.token_size:
            raise ConfigError("a blockwise network has no condition tokens: token_size must be 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[h, w, c] of a row of x."""
        return self.config.height, self.config.width, self.config.channels

    def _layers(self, count: int) -> DitConfig:
        return dataclasses.replace(self.config, num_layers=count)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random params; velocity and residual are zero at first, and so is each block's modulation."""
        return jax.jit(self._init)(key)

    def _init(self, key: jax.Array) -> dict[str, Any]:
        c, keys = self.config, jax.random.split(key, 7)
        labels = jnp.zeros((1,), jnp.int32) if c.classes else None
        image = jnp.zeros((1, c.height, c.width, c.image_channels)) if c.image_channels else None
        x, t = jnp.zeros((1, *self.shape)), jnp.zeros((1,))
        h, vector = jnp.zeros((1, c.num_patches, c.hidden_size)), jnp.zeros((1, c.hidden_size))
        made = lambda module, key, *inputs: nn.unbox(module.init(key, *inputs)["params"])  # noqa: E731
        guided = GuidedTrunk(self._layers(self.velocity_layers))
        stem = Stem(c)
        return {
            "features": {"stem": made(stem, keys[0], x, t, labels, image), "trunk": made(Trunk(c), keys[1], h, vector)},
            "stem": made(stem, keys[2], x, t, labels, image),
            "blocks": jax.vmap(lambda key: made(guided, key, h, vector, h))(jax.random.split(keys[3], self.segments)),
            "final": made(Final(c), keys[4], h, h),
            "project": made(self._projector, keys[5], h),
            "residual": self._init_residual(keys[6]),
        }

    def init_residual(self, key: jax.Array) -> dict[str, Any]:
        """Random params of the residual network alone."""
        return jax.jit(self._init_residual)(key)

    def _init_residual(self, key: jax.Array) -> dict[str, Any]:
        c = self.config
        h, vector = jnp.zeros((1, c.num_patches, c.hidden_size)), jnp.zeros((1, c.hidden_size))
        return nn.unbox(Trunk(self._layers(self.residual_layers)).init(key, h, vector)["params"])

    @property
    def _projector(self) -> Projector:
        return Projector(2 * self.config.hidden_size, self.semantic_size)

    def _stem(self, params: Any, x: jax.Array, t: jax.Array, cond: Condition | None) -> tuple[jax.Array, jax.Array]:
        cond = Condition() if cond is None else cond
        h, vector = Stem(self.config).apply({"params": params}, x, t, cond.labels, cond.image)
        return jnp.asarray(h), jnp.asarray(vector)

    def features(self, params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        """h[B,N,D]."""
        h, vector = self._stem(params["features"]["stem"], x, t, cond)
        return jnp.asarray(Trunk(self.config).apply({"params": params["features"]["trunk"]}, h, vector))

    def velocity(self, params: Any, block: Any, x: jax.Array, t: jax.Array, cond: Any, h: jax.Array) -> jax.Array:
        """v like x; patch embedding, condition and last layer are shared by all segments."""
        tokens, vector = self._stem(params["stem"], x, t, cond)
        tokens, each = GuidedTrunk(self._layers(self.velocity_layers)).apply({"params": block}, tokens, vector, h)
        return jnp.asarray(Final(self.config).apply({"params": params["final"]}, tokens, each))

    def residual(self, params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        """r[B,N,D], from the frozen feature network's patch embedding and condition; its start is what it was given,
        so that a new residual network says nothing."""
        h, vector = self._stem(params["features"]["stem"], x, t, cond)
        trunk = Trunk(self._layers(self.residual_layers))
        return jnp.asarray(trunk.apply({"params": params["residual"]}, h, vector)) - h

    def project(self, params: Any, h: jax.Array) -> jax.Array:
        """[B,N,E]."""
        return jnp.asarray(self._projector.apply({"params": params["project"]}, h))
