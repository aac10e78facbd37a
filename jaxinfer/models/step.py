"""`Step`: a decoder as the frozen, hashable value that every loop takes as its static argument.

A loop needs only what `Step` offers, so any model can be brought: write a frozen dataclass with `__call__`, `head`,
`new_cache` and `vocab_size` (README: "Bring your own model"). Never a lambda or a bound method: those retrace.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Decoder, Output
from jaxinfer.ops import weights, widen
from jaxinfer.ops.attention import AttentionSpec


class CachePolicy(Protocol):
    """Chooses the cache of each layer; frozen and hashable."""

    def spec(self, attention: AttentionSpec, capacity: int, dtype: str) -> Any: ...


@dataclasses.dataclass(frozen=True)
class AutoCache:
    """A ring where the layer has a sliding window shorter than the capacity, a dense cache elsewhere."""

    def spec(self, attention: AttentionSpec, capacity: int, dtype: str) -> kv.Dense:
        """The Spec of one layer."""
        if attention.window is not None and attention.window - 1 < capacity:
            return kv.ring(attention, dtype=dtype)
        return kv.Dense(attention, capacity, dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """A configured decoder with the caches that it decodes with. Arrays never live here: params are an argument."""

    config: ModelConfig
    cache: CachePolicy = AutoCache()
    dtype: str = "float32"

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.config.vocab_size

    @property
    def eos(self) -> tuple[int, ...]:
        """Token ids that end an output."""
        return self.config.eos

    def __call__(
        self,
        params,
        inputs,
        positions,
        cache: kv.Cache | None = None,
        block=None,
        at: jax.Array | int = 0,
        mask=None,
        *,
        taps=(),
    ) -> tuple[Output, tuple[Any, ...] | None]:
        """Run the model over `inputs` (ids `i32[B, T]` or embeddings `[B, T, D]`) at `positions i32[B, T]`.

        Position -1 is neither written nor seen. Without a cache this is training: attention within the call.
        With one, the call's keys and values go to `block` (made here when None) from slot `at` on; nothing is
        committed. `mask`: None (causal), `ops.Bidirectional()`, `ops.Segments(ids)` or `bool[B, T, R]`.
        """
        variables = {"params": params}
        # Linen types `apply` as if every call could also return variables.
        result: Any = Decoder(self.config).apply(variables, inputs, positions, cache, block, at, mask, taps)
        return result

    def embed(self, params, ids: jax.Array) -> jax.Array:
        """The embeddings f[..., D] of `ids i32[...]` as `__call__` accepts them in place of ids."""
        x, scale = weights.take(params["embedding"], ids), self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def head(self, params, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V] (f64 of such params) of `hidden[..., D]`."""
        if self.config.tie_embeddings:
            logits = weights.dot_transposed(hidden, params["embedding"])
        else:
            logits = weights.dot(hidden, params["head"])
        logits = widen(logits)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def new_cache(self, batch: int, capacity: int) -> kv.Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        layers = range(self.config.num_layers)
        specs = tuple(self.cache.spec(self.config.attention(i), capacity, self.dtype) for i in layers)
        return kv.init(specs, batch)

    def abstract(self, dtype: str | None = None) -> Any:
        """Shapes, dtypes and logical axes of the params: a tree of boxed `jax.ShapeDtypeStruct`."""
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        tree = jax.eval_shape(Decoder(self.config).init, jax.random.key(0), token, token)["params"]
        if dtype is None:
            return tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)

    def init(self, key: jax.Array) -> Any:
        """Random params: a nested dict of float32 arrays."""
        token = jnp.zeros((1, 1), jnp.int32)
        return nn.unbox(Decoder(self.config).init(key, token, token)["params"])


class WrappedStep:
    """Base of a frozen dataclass around another Step, its field `step`: what is not overridden is that step's."""

    step: Any

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.step.config

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.step.vocab_size

    @property
    def eos(self) -> tuple[int, ...]:
        """Token ids that end an output."""
        return self.step.eos

    @property
    def dtype(self) -> str:
        """Of the caches."""
        return self.step.dtype

    def embed(self, params, ids: jax.Array) -> jax.Array:
        """As the step."""
        return self.step.embed(params, ids)

    def head(self, params, hidden: jax.Array) -> jax.Array:
        """As the step."""
        return self.step.head(params, hidden)

    def new_cache(self, batch: int, capacity: int) -> kv.Cache:
        """As the step."""
        return self.step.new_cache(batch, capacity)
