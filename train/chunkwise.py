"""SeCO and SpaCO: training on long sequences in the memory of one chunk, and SpaCO in the time of a forward pass.

Li et al. (2025), "Training Long-Context LLMs Efficiently via Chunk-wise Optimization", arXiv 2505.16710 (ACL Findings
2025). A first pass over the chunks keeps their keys and values and nothing else. A second one, from the last chunk to
the first, runs a chunk again, with its graph, and differentiates it: what it sends back to earlier keys and values is
kept until those chunks' turn, and what later chunks sent to its own joins its loss. Then the graph is dropped.

Guarantee: SeCO's gradient is exact, that of the whole sequence in one piece (1e-12 in float64). SpaCO's second pass
visits a random few of the chunks; it is unbiased or a different estimator by its `Sampling`. State: keys and values of
the sequence and their gradients (linear in the length); activations, logits and graph of one chunk.

Paper's defaults: chunks of 128, of which SpaCO visits 8. Departures, all of them savings: the first pass makes no
logits, and ends before the last chunk that the second one visits; the loss of an update is that of the visited chunks,
weighted as the gradient is (`seen_loss` is their plain mean).

A model's routing is the same in both passes, since each token is routed by itself; auxiliary losses of a batch of
tokens would have to be defined for chunks and are not part of the objective. Under data parallelism XLA sums gradients
over devices once a chunk.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxinfer.cache.base import Cache
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.ops import Segments, sum_dtype
from jaxinfer.quant.adapter import join
from jaxinfer.train.chunkwise_cache import RelayCache, RelayState
from jaxinfer.train.chunkwise_sampling import Draw, Sampling, every
from jaxinfer.train.lm import next_token_losses


def assemble(params: Any, frozen: Any) -> Any:
    """The model's params: `params` themselves, or, of adapters, the two parts of `quant.split` joined."""
    return params if frozen is None else join(params, frozen)


@dataclasses.dataclass(frozen=True)
class Chunkwise:
    """The objective of `lm.NextToken`, `(params, batch, key[, frozen]) -> (mean loss in nats, metrics)`, by chunks.

    The batch is that of `lm`: ids, targets, segments and positions i32[B, T], all rows cut at the same places, and
    `counted bool[B, T]` where not every target counts. `jax.grad` of it runs both passes and is exact for SeCO; the
    call alone is the loss of the whole sequence. A last chunk may be shorter.

    step: as in `jaxinfer.models.step`, with a cache policy to replace: layers hand over their `AttentionSpec`.
    sampling: None for SeCO. combine: `(params, frozen) -> the model's params`, differentiated for the former.
    rows, panel: the blocks of attention (`jaxinfer.train.chunkwise_cache`).
    Raises ConfigError for a chunk below 1, InputError for a batch that lacks a part.
    """

    step: Any
    chunk: int = 128
    sampling: Sampling | None = None
    combine: Any = assemble
    rows: int = 128
    panel: int = 512

    def __post_init__(self):
        if type(self.chunk) is not int or self.chunk < 1:
            raise ConfigError(f"chunk: got {self.chunk!r}, accepts a number of tokens, 1 or more")

    def __call__(self, params, batch, key, frozen=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens = cut(batch, self.chunk, self.panel)
        draw = every(tokens.chunks) if self.sampling is None else self.sampling.draw(key, tokens.chunks)
        return _loss(self, params, frozen, tokens, draw)


@struct.dataclass
class Tokens:
    """A batch in k chunks, `[k, B, C]` each; positions and segments of a cache of all of it, `[B, capacity]`."""

    ids: jax.Array
    targets: jax.Array
    positions: jax.Array
    segments: jax.Array
    counted: jax.Array
    all_positions: jax.Array
    all_segments: jax.Array

    @property
    def chunks(self) -> int:
        """How many chunks, k."""
        return self.ids.shape[0]

    @property
    def size(self) -> int:
        """Tokens of a chunk, C."""
        return self.ids.shape[2]

    def chunk(self, i: jax.Array) -> Tokens:
        """Chunk i: `[B, C]` each."""
        names = ("ids", "targets", "positions", "segments", "counted")
        own = {n: lax.dynamic_index_in_dim(getattr(self, n), i, keepdims=False) for n in names}
        return dataclasses.replace(self, **own)


def cut(batch: dict[str, Any], size: int, panel: int) -> Tokens:
    """The batch in chunks, for a cache in panels; behind its end are tokens at position -1, which count for nothing."""
    missing = sorted({"ids", "targets", "positions", "segments"} - set(batch))
    if missing:
        raise InputError(f"batch: got no {', '.join(missing)}; accepts ids, targets, positions and segments i32[B, T]")
    rows, length = batch["ids"].shape
    chunks = -(-length // min(size, length))
    size = min(size, length)
    panel = min(panel, chunks * size)
    capacity = -(-chunks * size // panel) * panel
    whole = {**batch, "counted": batch.get("counted", np.ones((rows, length), bool))}
    empty = {"ids": 0, "targets": 0, "positions": -1, "segments": -1, "counted": False}
    padded = {
        name: jnp.pad(jnp.asarray(whole[name]), ((0, 0), (0, capacity - length)), constant_values=value)
        for name, value in empty.items()
    }
    parts = {n: jnp.moveaxis(x[:, : chunks * size].reshape(rows, chunks, size), 1, 0) for n, x in padded.items()}
    return Tokens(**parts, all_positions=padded["positions"], all_segments=padded["segments"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(objective: Chunkwise, params, frozen, tokens: Tokens, draw: Draw) -> Any:
    """`(loss, metrics)` where no gradient is asked for: one pass with logits over all chunks."""
    whole = objective.combine(params, frozen)

    def visit(keys, i):
        total, keys, _ = _run(objective, whole, tokens, keys, None, i)
        return keys, total

    _, totals = lax.scan(visit, _empty(objective, tokens, relays=False), jnp.arange(tokens.chunks))
    return _told(objective, tokens, every(tokens.chunks), totals)


def _loss_forward(objective: Chunkwise, params, frozen, tokens: Tokens, draw: Draw) -> Any:
    return value_and_grad(objective, params, frozen, tokens, draw)


def _loss_backward(objective: Chunkwise, grads, cotangents) -> Any:
    return jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), grads), None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def value_and_grad(objective: Chunkwise, params, frozen, tokens: Tokens, draw: Draw) -> tuple[Any, Any]:
    """`((loss, metrics), gradients)` by the two passes, for a given choice of chunks."""
    order = jnp.argsort(jnp.where(draw.chosen, -jnp.arange(tokens.chunks), tokens.chunks))
    visits = draw.chosen.sum()  # of chunks order[:visits], from the last of them to the first
    zeros = functools.partial(_empty, objective, tokens)

    def keep(i, keys):
        return _run(objective, objective.combine(params, frozen), tokens, keys, None, i)[1]

    # What comes after the last chosen chunk is read by no loss; the chunk itself is run in the second pass.
    keys = lax.fori_loop(0, jnp.where(visits > 0, order[0], 0), keep, zeros(relays=False))

    def visit(number, carry):
        keys, relays, grads, totals = carry
        i = order[number]
        # The relays are zeros that nobody reads: it is their cotangents that hold what chunks send to earlier ones.
        run = functools.partial(_differentiable, objective, frozen, tokens, keys, i)
        (total, _), pull, keys = jax.vjp(run, params, zeros(relays=True), has_aux=True)
        if objective.sampling is not None:
            relays = jax.tree.map(lambda x: _scale(x, draw.relay[i], i * tokens.size, tokens.size), relays)
        share = draw.loss[i] / _count(tokens)
        more, relays = pull((share.astype(total.dtype), relays))
        grads = jax.tree.map(lambda old, new: old + new.astype(old.dtype), grads, more)
        return keys, relays, grads, totals.at[i].set(total)

    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, sum_dtype(x.dtype)), params)
    totals = jnp.zeros(tokens.chunks, sum_dtype(jnp.dtype(objective.step.dtype)))
    _, _, grads, totals = lax.fori_loop(0, visits, visit, (keys, zeros(relays=True), grads, totals))
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, params)
    return _told(objective, tokens, draw, totals), grads


def whole_loss(objective: Chunkwise, params, batch) -> jax.Array:
    """The same loss in one piece, with the same attention and nothing run twice: what chunks are compared with."""
    tokens = cut(batch, batch["ids"].shape[1], objective.panel)
    keys, relays = (_empty(objective, tokens, relays=relays) for relays in (False, True))
    return _run(objective, params, tokens, keys, relays, jnp.zeros((), jnp.int32))[0] / _count(tokens)


def _differentiable(objective: Chunkwise, frozen, tokens: Tokens, keys, i, params, relays) -> Any:
    """`_run` as a function of what is differentiated: `((summed loss, relays), keys)`."""
    total, keys, relays = _run(objective, objective.combine(params, frozen), tokens, keys, relays, i)
    return (total, relays), keys


def _run(objective: Chunkwise, params, tokens: Tokens, keys, relays, i) -> Any:
    """Chunk i over what is before it: `(summed loss, keys with its own, relays)`, the last two a list of pairs."""
    step, own = _step(objective), tokens.chunk(i)
    at = (i * tokens.size).astype(jnp.int32)
    relays = _empty(objective, tokens, relays=True) if relays is None else relays
    states = tuple(
        RelayState(k, v, relay_k, relay_v, tokens.all_positions, tokens.all_segments, at)
        for (k, v), (relay_k, relay_v) in zip(keys, relays, strict=True)
    )
    cache = Cache(states, _cache(objective, tokens).specs)
    output, _ = step(params, own.ids, own.positions, cache, mask=Segments(own.segments))
    losses = next_token_losses(step, params, output.hidden, own.targets)
    total = jnp.sum(jnp.where(own.counted, losses, 0.0))
    return total, [(s.k, s.v) for s in output.notes], [(s.relay_k, s.relay_v) for s in output.notes]


def _step(objective: Chunkwise) -> Any:
    return dataclasses.replace(objective.step, cache=RelayCache(objective.rows, objective.panel))


def _cache(objective: Chunkwise, tokens: Tokens) -> Cache:
    """Shapes and Specs of the cache."""
    rows, capacity = tokens.all_positions.shape
    return jax.eval_shape(lambda: _step(objective).new_cache(rows, capacity))


def _empty(objective: Chunkwise, tokens: Tokens, *, relays: bool) -> list[tuple[jax.Array, jax.Array]]:
    """No keys and values, or no gradients of them, of every layer."""
    states = _cache(objective, tokens).states
    pairs = [(s.relay_k, s.relay_v) if relays else (s.k, s.v) for s in states]
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), pairs)


def _scale(x: jax.Array, factor: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """`x[B, G, C, d]` with `size` slots from `at` on multiplied."""
    own = lax.dynamic_slice_in_dim(x, at, size, 2) * factor.astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, own, at, 2)


def _count(tokens: Tokens) -> jax.Array:
    return jnp.maximum(tokens.counted.sum(), 1)


def _told(objective: Chunkwise, tokens: Tokens, draw: Draw, totals: jax.Array) -> Any:
    """`(loss, metrics)` of the summed losses of chunks."""
    count = _count(tokens)
    metrics = {"weight": count.astype(jnp.float32)}
    if objective.sampling is not None:
        seen = jnp.where(draw.chosen, tokens.counted.sum((1, 2)), 0).sum()
        metrics["seen_loss"] = jnp.sum(jnp.where(draw.chosen, totals, 0.0)) / jnp.maximum(seen, 1)
        metrics["chunks"] = draw.chosen.sum().astype(jnp.float32)
        metrics["biased"] = jnp.float32(objective.sampling.biased(tokens.chunks))
    return jnp.sum(draw.loss.astype(totals.dtype) * totals) / count, metrics
