"""The decoder: one Linen module that declares the weights of every supported family and applies them.

Layers are a Python loop, so each may have its own weight format and cache. Everything that touches a weight goes
through `jaxinfer.ops`; everything positional lives in the layer's `AttentionSpec`.

Stability: experimental.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxinfer import ops
from jaxinfer.cache.base import Block, Cache, new_blocks, write_block
from jaxinfer.cache.dense import block_segment
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.declare import Declared
from jaxinfer.models.moe import route

# Runs layer i in its own way, or not at all: `around(i, run, x, positions, block) -> (x, block, notes)`, where
# `run(x, positions, block=block)` is the layer.
Around = Callable[[int, Callable[..., Any], jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]]

ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@struct.dataclass
class Output:
    """`hidden[B, T, D]` after the final norm; `taps`: residual streams after the asked layers; `notes` for commit."""

    hidden: jax.Array
    taps: tuple[jax.Array, ...] = ()
    notes: tuple[Any, ...] = ()


class Layer(Declared):
    """A module of a decoder; its weights may be arrays or any registered leaf type."""

    config: ModelConfig

    def norm(self, name: str, x: jax.Array, size: int) -> jax.Array:
        """Root-mean-square norm over the last axis, in float32 or wider."""
        offset = self.config.norm_offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        axis = "embed" if size == self.config.hidden_size else None
        weight = ops.widen(ops.materialize(self.weight(name, (size,), (axis,), init)))
        y = ops.widen(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.config.norm_eps)
        return (y * (weight + offset)).astype(x.dtype)

    def linear(self, name: str, x: jax.Array, shape, axes, *, bias: bool = False) -> jax.Array:
        """`x @ w` and, where the family has one, a bias named `<name>_bias`."""
        y = ops.dot(x, self.weight(name, shape, axes))
        if bias:
            b = self.weight(f"{name}_bias", (shape[1],), (axes[1],), nn.initializers.zeros)
            y = y + ops.materialize(b).astype(y.dtype)
        return y


class Attention(Layer):
    """Grouped-query attention over a cache, or within the call when there is none."""

    layer: int = 0

    @nn.compact
    def __call__(self, x, positions, spec, state, block, at, mask, table):
        c, attention = self.config, self.config.attention(self.layer)
        heads, groups, dim = c.num_heads, c.num_kv_heads, c.head_dim
        q = self._heads("q", x, heads, ("embed", "heads"))
        k = self._heads("k", x, groups, ("embed", "kv_heads"))
        v = self._heads("v", x, groups, ("embed", "kv_heads"))
        if c.qk_norm:
            q, k = self.norm("q_norm", q, dim), self.norm("k_norm", k, dim)
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))
        notes = None
        if spec is None:
            own = block_segment(attention, Block(k, v, positions), positions, mask, table)
            part = ops.attend(attention, attention.rotate(q, jnp.maximum(positions, 0)), [own])
        else:
            block = write_block(block, k, v, positions, at)
            part, notes = spec.attend(state, block, q, positions, mask, table)
        out = jnp.swapaxes(part.out, 1, 2)
        out = checkpoint_name(out.reshape(*out.shape[:2], heads * dim), "attention")
        out = self.linear("o", out, (heads * dim, c.hidden_size), ("heads", "embed"), bias=c.output_bias)
        return out, block, notes

    def _heads(self, name: str, x: jax.Array, heads: int, axes) -> jax.Array:
        c = self.config
        y = self.linear(name, x, (c.hidden_size, heads * c.head_dim), axes, bias=c.qkv_bias)
        return y.reshape(*y.shape[:2], heads, c.head_dim)  # a weight may gather tokens: y's axes, not x's


class Mlp(Layer):
    """Gated MLP."""

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = self.linear("gate", x, (c.hidden_size, c.mlp_size), ("embed", "mlp"), bias=c.mlp_bias)
        up = self.linear("up", x, (c.hidden_size, c.mlp_size), ("embed", "mlp"), bias=c.mlp_bias)
        hidden = checkpoint_name(ACTIVATION[c.activation](gate) * up, "mlp")
        return self.linear("down", hidden, (c.mlp_size, c.hidden_size), ("mlp", "embed"), bias=c.mlp_bias)


class Experts(Layer):
    """Mixture of gated MLPs: each token goes through its top experts (`jax.lax.ragged_dot`)."""

    @nn.compact
    def __call__(self, x):
        c = self.config
        experts, size = c.num_experts, c.expert_size
        router = self.weight("router", (c.hidden_size, experts), ("embed", None))
        wide, narrow = (experts, c.hidden_size, size), (experts, size, c.hidden_size)
        gate = self.weight("gate", wide, ("experts", "embed", "mlp"))
        up = self.weight("up", wide, ("experts", "embed", "mlp"))
        down = self.weight("down", narrow, ("experts", "mlp", "embed"))
        flat = x.reshape(-1, c.hidden_size)
        routing = route(ops.dot(flat, router), c.experts_per_token, normalize=c.normalize_experts)
        rows = flat[routing.token]
        hidden = ACTIVATION[c.activation](ops.ragged_dot(rows, gate, routing.group_sizes))
        hidden = hidden * ops.ragged_dot(rows, up, routing.group_sizes)
        return routing.gather(ops.ragged_dot(hidden, down, routing.group_sizes)).reshape(x.shape)


class DecoderLayer(Layer):
    """Attention and MLP with residuals; Gemma's family norms the outputs too."""

    layer: int = 0

    @nn.compact
    def __call__(self, x, positions, spec, state, block, at, mask, table):
        c = self.config
        attention = Attention(c, layer=self.layer, name="attention")
        mlp = Experts(c, name="mlp") if c.is_sparse(self.layer) else Mlp(c, name="mlp")
        y = self.norm("input_norm", x, c.hidden_size)
        y, block, notes = attention(y, positions, spec, state, block, at, mask, table)
        if c.sandwich_norms:
            x = x + self.norm("post_attention_norm", y, c.hidden_size)
            y = self.norm("post_mlp_norm", mlp(self.norm("pre_mlp_norm", x, c.hidden_size)), c.hidden_size)
            return x + y, block, notes
        x = x + y
        return x + mlp(self.norm("post_attention_norm", x, c.hidden_size)), block, notes


class Decoder(Layer):
    """The whole model up to the final norm; logits are `Step.head`."""

    @nn.compact
    def __call__(
        self,
        inputs,
        positions,
        cache: Cache | None = None,
        block=None,
        at: jax.Array | int = 0,
        mask=None,
        taps=(),
        around: Around | None = None,
    ):
        c = self.config
        embedding = self.weight("embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        if not c.tie_embeddings:
            self.weight("head", (c.hidden_size, c.vocab_size), ("embed", "vocab"))
        x = self._embed(embedding, inputs) if inputs.ndim == 2 else inputs
        x = self._add_positions(x, positions)
        table = None
        if c.position == "t5":
            table = ops.materialize(self.weight("position_table", (32, c.num_heads), (None, "heads")))
        if cache is not None and block is None:
            block = new_blocks(cache, inputs.shape[1])
        nothing = (None,) * c.num_layers
        specs, states, pending = (nothing,) * 3 if cache is None else (cache.specs, cache.states, block or nothing)
        blocks, notes, tapped = [], [], {}
        for i in range(c.num_layers):
            layer = DecoderLayer(c, layer=i, name=f"layers_{i}")
            run = functools.partial(layer, spec=specs[i], state=states[i], at=at, mask=mask, table=table)
            own = pending[i]
            x, own, note = run(x, positions, block=own) if around is None else around(i, run, x, positions, own)
            blocks.append(own)
            notes.append(note)
            if i in taps:
                tapped[i] = x
        hidden = self.norm("final_norm", x, c.hidden_size)
        output = Output(hidden, tuple(tapped[i] for i in taps), tuple(notes))
        return output, None if cache is None else tuple(blocks)

    def _embed(self, embedding, ids: jax.Array) -> jax.Array:
        x = ops.take(embedding, ids)
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def _add_positions(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
        match c.position:
            case "learned":
                table = self.weight("position_embedding", (c.max_length, c.hidden_size), (None, "embed"))
                return x + ops.take(table, jnp.maximum(positions, 0)).astype(x.dtype)
            case "sinusoidal":
                return x + ops.sinusoid(jnp.maximum(positions, 0), c.hidden_size).astype(x.dtype)
            case _:
                return x
