"""EAGLE's head: one decoder layer that predicts the target's next feature, from the last feature and the next token.

Li et al. 2024 (arXiv:2401.15077), trees in arXiv:2406.16858, fused inner layers and training on the head's own outputs
in arXiv:2503.01840. A feature is the target's last hidden state; entry t of the head reads feature t beside the
embedding of token t + 1 and gives feature t + 1, from which the target's own output matrix makes logits. With `layers`
(EAGLE-3) features are a learned mix of the residual streams after these layers of the target.

Departures: both inputs and the output are normed (EAGLE-3 norms the inputs; EAGLE-1 norms nothing and trains 2 days on
four large devices, where this is to be trained in minutes); the MLP may be narrow, since the head is shipped beside a
model of 7 M parameters; no draft vocabulary of its own.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import DecoderLayer, Layer
from jaxinfer.models.heads.base import Head, check_count, layer_config, normal, rescaled


class FeatureLayer(Layer):
    """`(feature, embedding f[B, T, D]) -> (next feature f[B, T, D], block)`; `spec`, `state`: the head's cache."""

    @nn.compact
    def __call__(self, feature, embedding, positions, spec, state, block, at, mask):
        size = self.config.hidden_size
        parts = [self.norm("feature_norm", feature, size), self.norm("embedding_norm", embedding, size)]
        x = self.linear("fuse", jnp.concatenate(parts, -1), (2 * size, size), (None, "embed"))
        layer = DecoderLayer(self.config, layer=0, name="layer")
        x, block, _ = layer(x, positions, spec, state, block, at, mask, None)
        return self.norm("norm", x, size), block


@dataclasses.dataclass(frozen=True)
class EagleHead(Head):
    """`num_heads`, `num_kv_heads`, `mlp_size` of its layer (head_dim is D / num_heads); `layers`: inner layers of the
    target that it reads, none for EAGLE-1 and 2."""

    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_size: int = 192
    layers: tuple[int, ...] = ()
    kind: ClassVar[str] = "eagle"

    def __post_init__(self):
        check_count("mlp_size", self.mlp_size)
        if any(not isinstance(layer, int) or layer < 0 for layer in self.layers):
            raise ConfigError(f"layers: got {self.layers!r}, accepts numbers of layers from 0 on")
        _ = self.config

    @property
    def config(self) -> ModelConfig:
        """Its layer as a model of one layer."""
        return layer_config(self.target, self.num_heads, self.num_kv_heads, self.mlp_size)

    @property
    def taps(self) -> tuple[int, ...]:
        """The inner layers that it reads."""
        return self.layers

    def new_cache(self, batch: int, capacity: int, dtype: str) -> kv.Cache:
        """An empty cache of its layer."""
        return kv.init((kv.Dense(self.config.attention(0), capacity, dtype),), batch)

    def init(self, key: jax.Array, output: jax.Array | None = None) -> Any:
        """Matrices of variance 1 / fan-in; those that write to the residual stream begin at zero."""
        x, at = jnp.zeros((1, 1, self.target.hidden_size)), jnp.zeros((1, 1), jnp.int32)
        first, second = jax.random.split(key)
        module = FeatureLayer(self.config)
        params = rescaled(nn.unbox(module.init(first, x, x, at, None, None, None, 0, None)["params"]))
        if self.layers:
            size = self.target.hidden_size
            params["taps"] = normal(second, (len(self.layers) * size, size))
        return params

    def features(self, params: Any, output: Any) -> jax.Array:
        """What an entry reads of the target, f[B, T, D], from its `Output` (`hidden` and `taps`)."""
        if not self.layers:
            return output.hidden
        streams = jnp.concatenate(output.taps, -1)
        return streams @ params["taps"].astype(streams.dtype)

    def __call__(
        self, params: Any, feature: jax.Array, embedding: jax.Array, positions: jax.Array, cache: kv.Cache,
        blocks: Any, at: jax.Array | int = 0, mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """The next features f[B, T, D] of entries at `positions i32[B, T]` (-1: none), and the Blocks that hold them.

        `mask`: None (causal) or `bool[B, T, R]` over the Block's slots.
        """
        own = {name: value for name, value in params.items() if name not in ("taps", "embedding")}
        result: Any = FeatureLayer(self.config).apply(
            {"params": own}, feature, embedding, positions, cache.specs[0], cache.states[0], blocks[0], at, mask
        )
        return result[0], (result[1],)
