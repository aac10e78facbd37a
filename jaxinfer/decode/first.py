"""FiRST: small routers read the prompt and choose the layers that a row runs, once and for the whole of its answer.

Jain et al. 2024 (arXiv:2410.12513). Before each layer a router reads the mean h of the prompt's hidden states and gives
rho = sigmoid(w . h + b); where rho < 1/2 the row skips the layer, in the prompt and in all that follows, so its keys
and values are never missing: a skipped layer stores none. `jaxinfer.train.first` trains the routers, and LoRA adapters
that make up for skipped layers; the paper skips a quarter of the layers of an 8B model.

Guarantee: a different model. Where all routers say yes it is the base model, bit for bit. It decodes like any other,
under every drafter and verifier, in ragged batches, over any cache and any weights.
State: `runs bool[B]` beside each layer's cache (and `t i32[B]`, the row's length, which the cache of a skipped layer
does not tell), so that a decision moves with its row through `select`, `place`, `reorder` and batch jobs.
Params: those of the base model and `first`: `{"router": f[L, D], "bias": f[L]}`.

Time is saved where every live row skips a layer (always, at batch 1): then its branch is not run. Where some run it,
the others are only masked. The decisions take a forward over the prompt of their own, before it is prefilled, because
they need the whole prompt and prefill comes in chunks; `window` bounds it to the prompt's first tokens.

Departures: the paper prints a mixture rho phi(h) + (1 - rho) phi(h), in which rho cancels; here, as it must have been
meant, a layer h + f(h) becomes h + rho f(h), rho rounded. A bias `b`, so that all layers run before training. `window`.

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
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.cache.base import Block, SpecBase, View
from jaxinfer.checkpoint.safetensors_io import open_weights
from jaxinfer.checkpoint.safetensors_save import Entry, write_file
from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models import ModelConfig, Output, Step, WrappedStep
from jaxinfer.models.adapters import holds_adapter, load_adapter
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.heads.files import embedding_digest
from jaxinfer.ops.attention import AttentionSpec, Part

ROUTERS = "first.safetensors"
OPEN = 2.0  # the bias before training: rho = 0.88


@struct.dataclass
class GatedState:
    """`inner`: the layer's own State, of no tokens in rows that skip it; `runs bool[B]`; `t i32[B]`: tokens a row."""

    inner: Any
    runs: jax.Array
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Gated(SpecBase):
    """The cache `inner` of a layer that some rows skip: commit keeps nothing of theirs."""

    inner: Any

    @property
    def attention(self) -> AttentionSpec:  # pyright: ignore[reportIncompatibleVariableOverride] - read only in both
        """The layer's attention."""
        return self.inner.attention

    @property
    def supports(self) -> frozenset[str]:
        """What the layer's cache supports and this one hands on."""
        return self.inner.supports & {"truncate"}

    def init(self, batch: int) -> GatedState:
        """An empty State in which every row runs the layer."""
        return GatedState(self.inner.init(batch), jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32))

    def new_block(self, batch: int, slots: int) -> Block:
        """The layer's own Block."""
        return self.inner.new_block(batch, slots)

    def attend(self, state: GatedState, block, q, positions, mask, table=None) -> tuple[Part, Any]:
        """Attention over the layer's own State."""
        return self.inner.attend(state.inner, block, q, positions, mask, table)

    def commit(self, state: GatedState, block, path, n, notes=None) -> GatedState:
        """Append to the rows that run the layer; `t` counts for all."""
        inner = self.inner.commit(state.inner, block, path, jnp.where(state.runs, n, 0), notes)
        return GatedState(inner, state.runs, state.t + n)

    def truncate(self, state: GatedState, t: jax.Array) -> GatedState:
        """Forget the tokens at positions `t i32[B]` and beyond."""
        return GatedState(self.inner.truncate(state.inner, t), state.runs, jnp.minimum(state.t, t))

    def dense_view(self, state: GatedState, positions: jax.Array) -> View:
        """What the layer's queries see."""
        return self.inner.dense_view(state.inner, positions)


@dataclasses.dataclass(frozen=True)
class First(WrappedStep):
    """`step` with routers: a Step for every loop, its params with `first` among them (`open_routers` to begin with).

    `window`: how many of a prompt's tokens the routers read (None, as the paper: all). Without a cache every layer
    runs; `routed` runs the routers there.
    """

    step: Step
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ConfigError(f"window: got {self.window!r}, accepts None or a whole number of 1 or more")

    def new_cache(self, batch: int, capacity: int) -> kv.Cache:
        """The base model's cache, with room for the rows' decisions; until `read_prompt` every layer runs."""
        inner = self.step.new_cache(batch, capacity)
        runs = jnp.ones(batch, bool)
        states = tuple(GatedState(state, runs, jnp.zeros_like(inner.t)) for state in inner.states)
        return kv.Cache(states, tuple(Gated(spec) for spec in inner.specs))

    def read_prompt(self, params, cache: kv.Cache, tokens: jax.Array, lengths: jax.Array) -> kv.Cache:
        """The cache with the decisions for the prompts `tokens i32[B, P]`, `lengths i32[B]`: called before prefill."""
        runs = self.route(params, tokens, lengths) >= 0.5
        states = [dataclasses.replace(state, runs=runs[:, i]) for i, state in enumerate(cache.states)]
        return dataclasses.replace(cache, states=tuple(states))

    def route(self, params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """rho f32[B, L] of the prompts `tokens i32[B, P]`, `lengths i32[B]`."""
        tokens = tokens[:, : self.window]
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        prompt = index < lengths[:, None]
        return routed(self.step, params, tokens, jnp.where(prompt, index, -1), prompt=prompt)[1]

    def __call__(
        self, params, inputs, positions, cache: kv.Cache | None = None, block=None, at: jax.Array | int = 0, mask=None,
        *, taps=(),
    ) -> tuple[Output, tuple[Any, ...] | None]:  # fmt: skip
        """As `models.Step`; rows skip the layers that their cache says."""
        if cache is None:
            return self.step(params, inputs, positions, mask=mask, taps=taps)

        def around(i: int, run, x, positions, block):
            return _where_it_runs(cache.states[i].runs, run, x, positions, block)

        return _apply(self.step, params, inputs, positions, cache, block, at, mask, taps, around)


def open_routers(config: ModelConfig) -> dict[str, jax.Array]:
    """Routers before training, for `params["first"]`: every layer runs for every prompt."""
    layers, size = config.num_layers, config.hidden_size
    return {"router": jnp.zeros((layers, size)), "bias": jnp.full(layers, OPEN)}


def routed(
    step: Step, params, inputs, positions, *, prompt: jax.Array, mask=None, gates: jax.Array | None = None
) -> tuple[Output, jax.Array]:
    """The model of whole texts without a cache, as training needs it, and rho f32[B, L].

    The routers read the mean over the tokens of `prompt bool[B, T]`; a layer is run or skipped whole, and the gradient
    reaches rho as if a layer h + f(h) were h + rho f(h) (straight-through). `gates f[B, L]`, 0 or 1, decides in their
    place.
    """
    found: list[jax.Array] = []
    share = prompt / jnp.maximum(prompt.sum(1, keepdims=True), 1)

    def around(i: int, run, x, positions, block):
        if gates is None:
            mean = jnp.einsum("bt,btd->bd", share.astype(jnp.float32), x.astype(jnp.float32))
            rho = jax.nn.sigmoid(mean @ routers["router"][i] + routers["bias"][i])
        else:
            rho = gates[:, i].astype(jnp.float32)
        found.append(rho)
        y, block, note = run(x, positions, block=block)
        rest = (rho - jax.lax.stop_gradient(rho))[:, None, None].astype(x.dtype)
        return jnp.where((rho >= 0.5)[:, None, None], y, x) + rest * (y - x), block, note

    routers = _routers(step.config, params) if gates is None else {}
    output, _ = _apply(step, params, inputs, positions, None, None, 0, mask, (), around)
    return output, jnp.stack(found, 1)


def save_routers(directory: str | os.PathLike[str], params: Any) -> Path:
    """Writes the routers of `params` as `first.safetensors`, with a digest of the base model's embedding."""
    path = Path(directory) / ROUTERS
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in params["first"].items()}
    entries = [Entry(name, a.shape, a.dtype, functools.partial(np.asarray, a)) for name, a in arrays.items()]
    digest = embedding_digest(params)
    write_file(path, entries, metadata={"format": "pt"} | ({} if digest is None else {"embedding": digest}))
    return path


def load_first(step: Step, params: Any, directory: str | os.PathLike[str]) -> tuple[First, Any]:
    """The model of `step` and `params` with the routers of a folder, over its adapter where it holds one (`adapter/`).

    Raises CheckpointError where there are no routers, ConfigError where they are another model's.
    """
    path = Path(directory) / ROUTERS
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {ROUTERS}, so there are no routers in this folder")
    weights = open_weights(path)
    digest, own = weights.metadata.get("embedding"), embedding_digest(params)
    if None not in (digest, own) and digest != own:
        raise ConfigError(f"{path}: the routers were trained on another model (its embedding differs)")
    if holds_adapter(path.parent / "adapter"):
        params = load_adapter(step.config, params, path.parent / "adapter")
    params = {**params, "first": {name: jnp.asarray(weights.read(name)) for name in weights}}
    _routers(step.config, params)
    return First(step), params


def _routers(config: ModelConfig, params) -> dict[str, jax.Array]:
    shapes = {"router": (config.num_layers, config.hidden_size), "bias": (config.num_layers,)}
    found = params.get("first") or {}
    got = {name: tuple(leaf.shape) for name, leaf in found.items()}
    if got != shapes:
        raise InputError(f"params/first: got {got or 'none'}, accepts routers of {shapes} (see open_routers)")
    return found


def _apply(step: Step, params, *arguments) -> Any:
    return Decoder(step.config).apply({"params": params}, *arguments)


def _where_it_runs(runs: jax.Array, run, x: jax.Array, positions: jax.Array, block) -> tuple[jax.Array, Any, Any]:
    """One layer over `x[B, T, D]` in the rows `runs bool[B]`; not at all where no live row is among them."""
    positions = jnp.where(runs[:, None], positions, -1)

    def go():
        y, new, note = run(x, positions, block=block)
        return jnp.where(runs[:, None, None], y, x), new, note

    def skip():
        return x, block, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), notes)

    notes = jax.eval_shape(go)[2]
    return jax.lax.cond((positions >= 0).any(), go, skip)
