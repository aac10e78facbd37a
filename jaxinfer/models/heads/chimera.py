"""Chimera's head: trigram states of the newest tokens and one layer over all that the target has read before them.

Zeng et al. 2024 (arXiv:2402.15758). A token whose hidden state the target has not yet computed enters as a trigram
state, made of its own embedding and those of the two tokens before it; older tokens enter as the target's last hidden
states. One full decoder layer runs over both, and the output sees the target's newest hidden state beside the layer's:
Linear(2 D -> V) on their concatenation, which begins as the target's output matrix twice, so that at first logits are
those of the sum of the two states. That sum, through the target's own matrix, is also the tied form (`own_output` off),
which leaves the 2 D V numbers out. Iterated, as each drafted token is the next to enter as a trigram state.

Departures: tied by default; the layer has few key heads and a narrow MLP, since the head is shipped beside a model of
7 M parameters; embeddings before a text's beginning are zero.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import DecoderLayer
from jaxinfer.models.heads.base import Head, check_count, layer_config, normal, rescaled


@dataclasses.dataclass(frozen=True)
class ChimeraHead(Head):
    """`num_heads`, `num_kv_heads`, `mlp_size` of its layer (head_dim is D / num_heads); `own_output`: see above."""

    num_heads: int = 8
    num_kv_heads: int = 1
    mlp_size: int = 48
    own_output: bool = False
    kind: ClassVar[str] = "chimera"

    def __post_init__(self):
        check_count("mlp_size", self.mlp_size)
        _ = self.config

    @property
    def config(self) -> ModelConfig:
        """Its layer as a model of one layer."""
        return layer_config(self.target, self.num_heads, self.num_kv_heads, self.mlp_size)

    def new_cache(self, batch: int, capacity: int, dtype: str) -> kv.Cache:
        """An empty cache of its layer."""
        return kv.init((kv.Dense(self.config.attention(0), capacity, dtype),), batch)

    def init(self, key: jax.Array, output: jax.Array | None = None) -> Any:
        """Matrices of variance 1 / fan-in, zero where they write to a residual stream; `head f[2 D, V]`, the target's
        `output` twice."""
        size = self.target.hidden_size
        first, second = jax.random.split(key)
        x, at = jnp.zeros((1, 1, size)), jnp.zeros((1, 1), jnp.int32)
        module = DecoderLayer(self.config, layer=0)
        layer = nn.unbox(module.init(second, x, at, None, None, None, 0, None, None)["params"])
        params = {
            "trigram": normal(first, (3 * size, size)),
            "block": jnp.zeros((size, size)),
            "layer": rescaled(layer),
        }
        if self.own_output:
            params["head"] = jnp.concatenate([self.output_or_zeros(output)] * 2)
        return params

    def encode(self, params: Any, embeddings: jax.Array) -> jax.Array:
        """Trigram states f[..., D] from `embeddings f[..., 3, D]`, oldest first."""
        x = embeddings.reshape(*embeddings.shape[:-2], -1)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        x = x @ params["trigram"].astype(x.dtype)
        return x + jax.nn.silu(x @ params["block"].astype(x.dtype))

    def __call__(
        self, params: Any, x: jax.Array, positions: jax.Array, cache: kv.Cache, blocks: Any,
        at: jax.Array | int = 0, mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """The layer over hidden or trigram states `x f[B, T, D]` at `positions i32[B, T]` (-1: none): its states
        f[B, T, D] and the Blocks that hold them. `mask`: None (causal) or `bool[B, T, R]` over the Block's slots."""
        layer = DecoderLayer(self.config, layer=0)
        result: Any = layer.apply(
            {"params": params["layer"]}, x, positions, cache.specs[0], cache.states[0], blocks[0], at, mask, None
        )
        return result[0], (result[1],)

    def logits(self, params: Any, hidden: jax.Array, state: jax.Array, step: Any, target_params: Any) -> jax.Array:
        """f32[..., V] from the target's newest `hidden` and the layer's `state`, f[..., D] both."""
        if not self.own_output:
            return step.head(target_params, hidden + state)
        both = jnp.concatenate([jnp.broadcast_to(hidden, state.shape), state], -1)
        return (both @ params["head"].astype(both.dtype)).astype(jnp.float32)
