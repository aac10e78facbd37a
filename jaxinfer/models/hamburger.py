"""HAMburger's model: a base decoder that reads several tokens as one entry, and a small decoder that writes several.

Liu and Zhang 2025 (arXiv:2505.20438). A macro step feeds the last group of up to `size` tokens as one merged embedding,
so that they share one cache entry, and the base model's head gives the first token of the next group; a micro-step
decoder of a few layers, over features of the base and the tokens of the group so far, gives the others, and says at
each token whether it is the group's last. `jaxinfer.decode.hamburger` generates, `jaxinfer.train.hamburger` trains.

Paper: 4 tokens a group, 4 micro layers over a base of 16, features of its layers 3, 7, 11 and of its final hidden
state, 64 merging heads. Departures: features and tokens are normed, and features
marked by what they are; the position table is added to the
embeddings where published code concatenates a half-sized one (the same function of them, one matrix less); the stop
head has one hidden layer, not two.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import ops
from jaxinfer.checkpoint.safetensors_io import open_weights, read_json
from jaxinfer.checkpoint.safetensors_save import Entry, write_file, write_json
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Output
from jaxinfer.models.heads.base import normal, rescaled
from jaxinfer.models.heads.files import embedding_digest
from jaxinfer.models.step import Step
from jaxinfer.quant.tree import build, leaves

# Tokens enter the micro decoder small: its head is the embedding, so a token that stays in the residual stream predicts
# itself, and what the layers write has to outweigh it first.
TOKEN_SCALE = 0.1
DESCRIPTION, ARRAYS = "hamburger.json", "hamburger.safetensors"
ADDED = ("embedder", "micro", "stop")


@dataclasses.dataclass(frozen=True)
class Hamburger:
    """A base `Step` with what is added to it. Params: `{"base", "embedder", "micro", "stop"}`, each a nested dict.

    `taps`: base layers whose outputs the micro decoder reads beside the final hidden state (None: the first three
    quarters). `size`: the most tokens a group. `layers`, `mlp_size` (None: twice the width) of the micro decoder, whose
    attention has the base's shape; `merge_heads` of the embedder.
    """

    base: Step
    taps: tuple[int, ...] | None = None
    size: int = 4
    layers: int = 2
    mlp_size: int | None = None
    merge_heads: int = 8

    def __post_init__(self):
        for name, low in (("size", 2), ("layers", 1), ("merge_heads", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}: got {value!r}, accepts an integer of {low} or more")
        if self.width % self.merge_heads:
            raise ConfigError(f"merge_heads: got {self.merge_heads}, accepts a divisor of the width {self.width}")
        last = self.base.config.num_layers - 1
        if self.taps is not None and (
            list(self.taps) != sorted({*self.taps}) or not {*self.taps} <= {*range(last + 1)}
        ):
            raise ConfigError(f"taps: got {self.taps!r}, accepts ascending layers of 0 to {last}")

    @property
    def width(self) -> int:
        """D."""
        return self.base.config.hidden_size

    @property
    def layers_read(self) -> tuple[int, ...]:
        """The base layers that are tapped."""
        if self.taps is not None:
            return self.taps
        n = self.base.config.num_layers
        return tuple(sorted({n * quarter // 4 - 1 for quarter in (1, 2, 3)} - {-1}))

    @property
    def num_features(self) -> int:
        """F: what the micro decoder reads of a macro step."""
        return len(self.layers_read) + 1

    @property
    def micro(self) -> Step:
        """The micro-step decoder, a Step on embeddings; row f of its table marks feature f."""
        c = self.base.config
        return Step(
            ModelConfig(
                vocab_size=self.num_features, hidden_size=c.hidden_size, num_layers=self.layers, num_heads=c.num_heads,
                num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, mlp_size=self.mlp_size or 2 * c.hidden_size,
                max_length=self.num_features + self.size, norm_eps=c.norm_eps, tie_embeddings=True,
            ),
            dtype=self.base.dtype,
        )  # fmt: skip

    def init(self, key: jax.Array, base: Any) -> dict[str, Any]:
        """Params around those of a `base`. At first merged embeddings are means, and micro layers write nothing."""
        keys = jax.random.split(key, 6)
        d = self.width
        q, k, v, hidden = (normal(key, (d, d)) for key in keys[:4])
        table = 0.02 * jax.random.normal(keys[4], (self.size, d))
        return {
            "base": base,
            "embedder": {"q": q, "k": k, "v": v, "o": jnp.zeros((d, d)), "position_table": table},
            "micro": rescaled(self.micro.init(keys[5])),
            "stop": {
                "hidden": hidden, "hidden_bias": jnp.zeros(d), "head": jnp.zeros((d, 1)), "head_bias": jnp.zeros(1),
            },
        }  # fmt: skip

    def merge(self, params: Any, tokens: jax.Array, n: jax.Array) -> jax.Array:
        """One embedding f[..., D] for the first `n i32[...]` of `tokens i32[..., S]`: that of the token itself where n
        is 1, else their mean and what attention from the mean finds in them."""
        p, heads = params["embedder"], self.merge_heads
        each = self.base.embed(params["base"], tokens)
        live = jnp.arange(tokens.shape[-1]) < n[..., None]
        count = jnp.maximum(n, 1)[..., None].astype(each.dtype)
        mean = jnp.where(live[..., None], each, 0).sum(-2) / count
        placed = _normed(each) + ops.take(p["position_table"], jnp.arange(tokens.shape[-1])).astype(each.dtype)

        def split(x):
            return x.reshape(*x.shape[:-1], heads, self.width // heads)

        q, k, v = split(ops.dot(_normed(mean), p["q"])), split(ops.dot(placed, p["k"])), split(ops.dot(placed, p["v"]))
        scores = jnp.einsum("...hd,...shd->...hs", q, k).astype(jnp.float32) * (self.width // heads) ** -0.5
        weight = jax.nn.softmax(jnp.where(live[..., None, :], scores, -1e30), -1).astype(v.dtype)
        found = jnp.einsum("...hs,...shd->...hd", weight, v)
        merged = mean + ops.dot(found.reshape(mean.shape), p["o"])
        return jnp.where(n[..., None] > 1, merged, each[..., 0, :])

    def macro(
        self, params: Any, tokens: jax.Array, n: jax.Array, positions: jax.Array, cache=None, block=None, mask=None
    ) -> tuple[Output, Any]:
        """The base over groups `tokens i32[B, M, S]`, `n i32[B, M]`, each at the position of its last token
        `positions i32[B, M]` (-1: none); as `Step`, and the output has the taps."""
        inputs = self.merge(params, tokens, n)
        return self.base(params["base"], inputs, positions, cache, block, 0, mask, taps=self.layers_read)

    def features(self, params: Any, output: Output) -> jax.Array:
        """What the micro decoder reads of each macro step, f[B, M, F, D]."""
        found = _normed(jnp.stack([*output.taps, output.hidden], -2))
        marks = self.micro.embed(params["micro"], jnp.arange(self.num_features))
        return found + marks.astype(found.dtype)

    def micro_inputs(self, params: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
        """What the micro decoder reads of `tokens i32[N, T]` of a group, f[N, T, D]."""
        return (TOKEN_SCALE * _normed(self.base.embed(params["base"], tokens))).astype(dtype)

    def micro_hidden(self, params: Any, features: jax.Array, tokens: jax.Array) -> jax.Array:
        """Hidden states f[N, S - 1, D] that give tokens 2 to S of groups `tokens i32[N, S]`, in one forward."""
        inputs = jnp.concatenate([features, self.micro_inputs(params, tokens[:, :-1], features.dtype)], 1)
        at = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape[:2])
        return self.micro(params["micro"], inputs, at)[0].hidden[:, self.num_features :]

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V], of the base's head for macro and micro hidden states alike."""
        return self.base.head(params["base"], hidden)

    def stop(self, params: Any, hidden: jax.Array) -> jax.Array:
        """The logit f32[...] that the token which `hidden[..., D]` gives is the last of its group."""
        p = params["stop"]
        x = jax.nn.silu(ops.dot(hidden, p["hidden"]) + ops.materialize(p["hidden_bias"]).astype(hidden.dtype))
        x = ops.dot(x, p["head"]).astype(jnp.float32)
        return (x + ops.materialize(p["head_bias"]).astype(jnp.float32))[..., 0]


def _normed(x: jax.Array) -> jax.Array:
    """Unit root-mean-square over the last axis."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def save_parts(directory: str | os.PathLike[str], model: Hamburger, params: Any, *, dtype: str = "bfloat16") -> None:
    """Writes what is added to the base, with a digest of the base it was trained with."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.asarray(jnp.asarray(leaf, dtype)) for name in ADDED for path, leaf in leaves(params[name], name)}
    entries = [Entry(name, x.shape, x.dtype, functools.partial(lambda x: x, x)) for name, x in arrays.items()]
    temporary = directory / f".{ARRAYS}.{os.getpid()}.tmp"
    try:
        write_file(temporary, entries, metadata={"format": "jaxinfer-hamburger"})
        os.replace(temporary, directory / ARRAYS)
    finally:
        temporary.unlink(missing_ok=True)
    settings = {name: getattr(model, name) for name in ("taps", "size", "layers", "mlp_size", "merge_heads")}
    write_json(directory / DESCRIPTION, {"settings": settings, "base": embedding_digest(params["base"])})


def load_parts(directory: str | os.PathLike[str], base: Step, params: Any) -> tuple[Hamburger, dict[str, Any]]:
    """The model around `base` and its `params`, and all params; raises CheckpointError or ConfigError, naming the file
    and what does not fit."""
    directory = Path(directory)
    record = read_json(directory / DESCRIPTION)
    try:
        settings, digest = dict(record["settings"]), record["base"]
        settings["taps"] = None if settings["taps"] is None else tuple(settings["taps"])
        model = Hamburger(base, **settings)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory / DESCRIPTION}: not the description of a HAMburger: {type(error).__name__} {error}"
        ) from None
    own = embedding_digest(params)
    if None not in (own, digest) and own != digest:
        raise ConfigError(f"{directory / DESCRIPTION}: trained with another base; accepted: the base saved with it")
    weights = open_weights(directory / ARRAYS)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), {}))
    pairs = []
    for path, leaf in (pair for name in ADDED for pair in leaves(shapes[name], name)):
        found = weights.tensors.get(path)
        if found is None or tuple(found.shape) != leaf.shape:
            got = None if found is None else tuple(found.shape)
            raise CheckpointError(f"{directory / ARRAYS}: {path}: got shape {got}, the description needs {leaf.shape}")
        pairs.append((path, jnp.asarray(weights.read(path), base.dtype)))
    return model, {"base": params, **build(pairs)}
