"""Superposed decoding: several drafts of an answer in one forward a step, fed as a weighted sum of their last tokens.

Shen et al. 2024 (arXiv:2405.18400); paper: 3 drafts, alpha 0.54 for n-grams of contexts of 1 to 5 tokens, temperature
0.06, the 9 likeliest tokens. The model sees one mixed row; what tells the drafts apart is an n-gram model of each one's
own text (`NGrams.of` a corpus): without it they drift into each other. Guarantee: approximate; with one draft and no
n-grams the output is plain greedy's.

State: one cache row a prompt, whatever the number of drafts, and the drafts' texts and scores. A draft that ended stays
with its score among the candidates and no longer weighs on the mixture. The first step takes the model's own likeliest
tokens.

Departures: the n-gram counts are kept under 32-bit hashes in sorted arrays and read inside the compiled loop, where
published code asks a server on disk; two n-grams of one hash (about one in 4000 of a million) share a count.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.config import end_tokens
from jaxinfer.decode.loop import check_prompts
from jaxinfer.decode.prefill import notes_of, prefill
from jaxinfer.decode.types import EmbeddingStep, Sequence
from jaxinfer.errors import ConfigError

WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)  # of contexts of 1 to 5 tokens
ORDER = len(WEIGHTS)
UNSUPPORTED = -200.0  # added for a token that no n-gram supports


@struct.dataclass
class Counts:
    """How often each n-gram of one length was seen: `keys u32[n]` (hashes, sorted), `counts i32[n]`."""

    keys: jax.Array
    counts: jax.Array

    @classmethod
    def of(cls, hashes: np.ndarray) -> Counts:
        """The counts of hashes as they occurred."""
        keys, counts = np.unique(hashes, return_counts=True)
        keys, counts = (keys, counts) if len(keys) else (np.zeros(1, np.uint32), np.zeros(1, np.int64))
        return cls(jnp.asarray(keys), jnp.asarray(counts, jnp.int32))

    def look(self, hashes: jax.Array) -> jax.Array:
        """Counts of `hashes u32[...]`, 0 where never seen: f32[...]."""
        at = jnp.minimum(jnp.searchsorted(self.keys, hashes), self.keys.shape[0] - 1)
        return jnp.where(self.keys[at] == hashes, self.counts[at], 0).astype(jnp.float32)


@struct.dataclass
class NGrams:
    """For contexts of 1 to 5 tokens: how often each was followed by anything, and by each token."""

    contexts: tuple[Counts, ...]
    grams: tuple[Counts, ...]

    @classmethod
    def of(cls, texts: Iterable[np.ndarray]) -> NGrams:
        """The counts of a corpus, an array of token ids a text; on the host."""
        texts = [np.asarray(text, np.int32) for text in texts]
        contexts, grams = [], []
        for n in range(1, ORDER + 1):
            windows = [np.lib.stride_tricks.sliding_window_view(t, n + 1) for t in texts if len(t) > n]
            whole = np.concatenate(windows) if windows else np.zeros((0, n + 1), np.int32)
            contexts.append(Counts.of(_hash(whole[:, :-1])))
            grams.append(Counts.of(_hash(whole)))
        return cls(tuple(contexts), tuple(grams))

    def probability(self, tail: jax.Array, tokens: jax.Array) -> jax.Array:
        """The interpolated probability f32[..., C] of `tokens i32[..., C]` after `tail i32[..., 5]` (-1: no token)."""
        total = jnp.zeros(tokens.shape)
        for n, (weight, contexts, grams) in enumerate(zip(WEIGHTS, self.contexts, self.grams, strict=True), 1):
            context = tail[..., ORDER - n :]
            seen = contexts.look(_hash(context)) * (context[..., 0] >= 0)
            repeated = jnp.broadcast_to(context[..., None, :], (*tokens.shape, n))
            followed = grams.look(_hash(jnp.concatenate([repeated, tokens[..., None]], -1)))
            total += weight * jnp.where(seen[..., None] > 0, followed / jnp.maximum(seen[..., None], 1.0), 0.0)
        return total


def _hash(grams: Any) -> Any:
    """u32[...] of `grams i32[..., n]`, for numpy and jax arrays alike."""
    xp = np if isinstance(grams, np.ndarray) else jnp
    mixed = xp.full(grams.shape[:-1], grams.shape[-1], xp.uint32)
    for i in range(grams.shape[-1]):
        mixed = (mixed ^ grams[..., i].astype(xp.uint32)) * xp.uint32(0x9E3779B1)
        mixed = mixed ^ (mixed >> xp.uint32(15))
    return mixed


@dataclasses.dataclass(frozen=True)
class SuperposedConfig:
    """Static part of a run. `drafts` a prompt; `alpha`: the n-grams' share of a token's score; `temperature` of the
    model's law and `top` tokens of it; `eos` None: the model's own."""

    max_tokens: int = 128
    drafts: int = 3
    alpha: float = 0.54
    temperature: float = 0.06
    top: int = 9
    eos: tuple[int, ...] | None = None
    prefill_chunk: int = 256

    def __post_init__(self):
        for name in ("max_tokens", "drafts", "top", "prefill_chunk"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, accepts an integer of 1 or more")
        if not 0 <= self.alpha < 1:
            raise ConfigError(f"alpha: got {self.alpha}, accepts 0 or more, below 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature}, accepts more than 0")
        if self.top < self.drafts:
            raise ConfigError(f"top: got {self.top}, accepts at least drafts = {self.drafts}")


@struct.dataclass
class SuperposedResult:
    """Best first: `tokens i32[B, drafts, max_tokens]` (0 after `lengths i32[B, drafts]`), `scores f32[B, drafts]`."""

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@struct.dataclass
class _Drafts:
    """B prompts of K drafts: `tokens i32[B, K, M]`, `tail i32[B, K, 5]` (the last tokens, prompt included), `length`,
    `ended [B, K]`, `score f32[B, K]`; `failed bool[B]`: the model's output was not finite."""

    cache: kv.Cache
    tokens: jax.Array
    tail: jax.Array
    length: jax.Array
    ended: jax.Array
    score: jax.Array
    failed: jax.Array
    count: jax.Array


def superpose(
    step: EmbeddingStep,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: SuperposedConfig,
    ngrams: NGrams | None = None,
) -> SuperposedResult:
    """Draft continuations of `tokens i32[B, P]` (right-padded, `lengths i32[B]`). `ngrams` None: the model alone."""
    batch, width = tokens.shape
    check_prompts(tokens, lengths, width + config.max_tokens)
    length = jnp.clip(jnp.asarray(lengths, jnp.int32), 1, width)
    zeros = jnp.zeros(batch, jnp.int32)
    seq = Sequence(jnp.asarray(tokens, jnp.int32), length, length, length, zeros > 0, zeros, zeros)
    cache, _, finite = prefill(
        step, params, step.new_cache(batch, width + config.max_tokens), seq, width=width, chunk=config.prefill_chunk,
        drafter=Autoregressive(), draft_params=None, state=(),
    )  # fmt: skip
    eos = end_tokens(step) if config.eos is None else config.eos
    drafts = jax.lax.while_loop(
        lambda d: (d.count < config.max_tokens) & ~(d.ended.all(1) | d.failed).all(),
        lambda d: _extend(step, params, d, length, config, ngrams, eos),
        _first(cache, seq, ~finite, config),
    )
    mask = jnp.arange(config.max_tokens) < drafts.length[..., None]
    return SuperposedResult(jnp.where(mask, drafts.tokens, 0), drafts.length, drafts.score)


def _first(cache: kv.Cache, seq: Sequence, failed: jax.Array, config: SuperposedConfig) -> _Drafts:
    """One draft without a token, and room for the others."""
    batch, k = seq.length.shape[0], config.drafts
    at = seq.length[:, None] - ORDER + jnp.arange(ORDER, dtype=jnp.int32)
    tail = jnp.where(at >= 0, jnp.take_along_axis(seq.tokens, at, 1, mode="clip"), -1)
    none = jnp.zeros((batch, k), jnp.int32)
    score = jnp.full((batch, k), -jnp.inf).at[:, 0].set(0.0)
    return _Drafts(
        cache, jnp.zeros((batch, k, config.max_tokens), jnp.int32), jnp.repeat(tail[:, None], k, 1), none, none > 0,
        score, failed, jnp.int32(0),
    )  # fmt: skip


def _extend(step, params, drafts: _Drafts, length, config: SuperposedConfig, ngrams: NGrams | None, eos) -> _Drafts:
    """One token for every draft that runs, from one forward; then the K best of all extensions."""
    likely, logp, cache, failed = _score(step, params, drafts, length, config)
    (batch, k), top = drafts.score.shape, likely.shape[1]
    gain = jnp.broadcast_to(logp[:, None], (batch, k, top))
    candidates = jnp.broadcast_to(likely[:, None], gain.shape)
    if ngrams is not None and config.alpha > 0:
        support = ngrams.probability(drafts.tail, candidates)
        rest = jnp.where(support > 0, config.alpha * jnp.log(jnp.where(support > 0, support, 1.0)), UNSUPPORTED)
        gain = jnp.where(drafts.count > 0, (1 - config.alpha) * gain + rest, gain)
    only = jnp.arange(top) == 0  # an ended draft goes on as itself, once
    gain = jnp.where(drafts.ended[..., None], jnp.where(only, 0.0, -jnp.inf), gain)
    score, flat = jax.lax.top_k((drafts.score[..., None] + gain).reshape(batch, -1), k)
    parent = flat // top
    token = jnp.take_along_axis(candidates.reshape(batch, -1), flat, 1)

    def moved(x):
        return jnp.take_along_axis(x, parent.reshape(*parent.shape, *[1] * (x.ndim - 2)), 1)

    ended, text, tail, lengths = (moved(x) for x in (drafts.ended, drafts.tokens, drafts.tail, drafts.length))
    here = (jnp.arange(text.shape[2]) == drafts.count) & ~ended[..., None]
    text = jnp.where(here, token[..., None], text)
    tail = jnp.where(ended[..., None], tail, jnp.concatenate([tail[..., 1:], token[..., None]], -1))
    lengths = lengths + ~ended
    if eos:
        ended |= jnp.isin(token, jnp.asarray(eos, jnp.int32))
    new = _Drafts(cache, text, tail, lengths, ended, score, failed, drafts.count + 1)
    # A row that failed keeps the text that it had.
    kept = drafts.failed | failed
    fields = ("tokens", "tail", "length", "ended", "score")
    rows = {f: jnp.where(kept.reshape(-1, *[1] * (getattr(new, f).ndim - 1)), getattr(drafts, f), getattr(new, f))
            for f in fields}  # fmt: skip
    return dataclasses.replace(new, **rows)


def _score(step, params, drafts: _Drafts, length: jax.Array, config: SuperposedConfig):
    """The likeliest tokens `i32[B, top]` after the mixture and their log-probabilities, the cache, what failed."""
    weight = jax.nn.softmax(jnp.where(drafts.ended, -jnp.inf, drafts.score), -1, where=~drafts.ended)
    each = step.embed(params, jnp.maximum(drafts.tail[..., -1], 0))
    mixed = jnp.einsum("bk,bkd->bd", weight.astype(each.dtype), each)[:, None]
    live = ~(drafts.ended.all(1) | drafts.failed)
    positions = jnp.where(live, length - 1 + drafts.count, -1)[:, None]
    blocks = kv.new_blocks(drafts.cache, 1)
    output, blocks = step(params, mixed, positions, drafts.cache, blocks)
    logits = step.head(params, output.hidden)[:, 0]
    finite = jnp.isfinite(logits.max(-1))
    cache = kv.commit(
        drafts.cache, blocks, jnp.zeros_like(positions), (finite & live).astype(jnp.int32), notes_of(output)
    )
    logp, likely = jax.lax.top_k(jax.nn.log_softmax(logits / config.temperature, -1), min(config.top, logits.shape[1]))
    return likely, logp, cache, drafts.failed | (live & ~finite)
