"""Beam search: the best-scored continuations, by K beams a prompt that share the loop's step and row selection.

Score: the sum of log-probabilities divided by (number of generated tokens, end token included) ** length_penalty, as
`transformers` has it. A hypothesis ends where an end token is among the K best extensions of its prompt, or at
`max_tokens`. Guarantee: an approximate search; exact where K covers every prefix.

Departure: a prompt stops when no running beam can still beat its worst finished hypothesis at any length up to the
limit (what `transformers` calls `early_stopping="never"`), or at K finished ones with `early_stopping=True`.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.config import end_tokens
from jaxinfer.decode.loop import check_prompts
from jaxinfer.decode.prefill import notes_of, prefill
from jaxinfer.decode.types import Sequence, Step
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Static part of a beam search. `n_best` hypotheses are returned, at most `beams`; `eos` None: the model's own."""

    max_tokens: int = 128
    beams: int = 4
    n_best: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    eos: tuple[int, ...] | None = None
    prefill_chunk: int = 256

    def __post_init__(self):
        for name in ("max_tokens", "beams", "n_best", "prefill_chunk"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, accepts an integer of 1 or more")
        if self.n_best > self.beams:
            raise ConfigError(f"n_best: got {self.n_best}, accepts at most beams = {self.beams}")


@struct.dataclass
class BeamResult:
    """Best first: `tokens i32[B, n_best, max_tokens]` (0 after `lengths i32[B, n_best]`), `scores f32[B, n_best]`
    (-inf where there is no such hypothesis)."""

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@struct.dataclass
class _Beams:
    """B prompts of K beams. Running: `tokens i32[B, K, M]`, `root i32[B, K]`, `score f32[B, K]`; finished alike."""

    cache: kv.Cache
    tokens: jax.Array
    root: jax.Array
    score: jax.Array
    finished: jax.Array
    finished_length: jax.Array
    finished_score: jax.Array
    done: jax.Array
    count: jax.Array


def beam_search(step: Step, params: Any, tokens: jax.Array, lengths: jax.Array, *, config: BeamConfig) -> BeamResult:
    """Search continuations of `tokens i32[B, P]` (right-padded, `lengths i32[B]`). A step copies the cache's rows."""
    batch, width = tokens.shape
    capacity = width + config.max_tokens
    check_prompts(tokens, lengths, capacity)
    eos = end_tokens(step) if config.eos is None else config.eos
    length = jnp.clip(jnp.asarray(lengths, jnp.int32), 1, width)
    zeros = jnp.zeros(batch, jnp.int32)
    seq = Sequence(jnp.asarray(tokens, jnp.int32), length, length, length, zeros > 0, zeros, zeros)
    cache, _, _ = prefill(
        step, params, step.new_cache(batch, capacity), seq, width=width, chunk=config.prefill_chunk,
        drafter=Autoregressive(), draft_params=None, state=(),
    )  # fmt: skip
    k, room = config.beams, config.max_tokens
    empty = jnp.zeros((batch, k, room), jnp.int32)
    nothing = jnp.full((batch, k), -jnp.inf)
    beams = _Beams(
        kv.select(cache, jnp.repeat(jnp.arange(batch), k)),
        empty, jnp.repeat(seq.root[:, None], k, 1), nothing.at[:, 0].set(0.0),
        empty, jnp.zeros((batch, k), jnp.int32), nothing, zeros > 0, jnp.int32(0),
    )  # fmt: skip
    beams = jax.lax.while_loop(
        lambda b: (b.count < room) & ~b.done.all(),
        lambda b: _extend(step, params, b, length, config, eos),
        beams,
    )
    best = slice(0, config.n_best)
    mask = jnp.arange(room) < beams.finished_length[:, best, None]
    return BeamResult(
        jnp.where(mask, beams.finished[:, best], 0), beams.finished_length[:, best], beams.finished_score[:, best]
    )


def _extend(step: Step, params, beams: _Beams, length: jax.Array, config: BeamConfig, eos: tuple[int, ...]) -> _Beams:
    """One token for every running beam: score, sort out what ended, and move the beams to their parents' rows."""
    batch, k, room = beams.tokens.shape
    logp, cache = _score(step, params, beams, length)
    vocab = logp.shape[-1]
    total = (beams.score[..., None] + logp).reshape(batch, k * vocab)
    keep = min((len(eos) + 1) * k, k * vocab)
    score, flat = jax.lax.top_k(total, keep)
    parent, token = flat // vocab, flat % vocab
    count = beams.count + 1
    text = jnp.take_along_axis(beams.tokens, parent[..., None], 1)
    text = jnp.where(jnp.arange(room) == beams.count, token[..., None], text)
    ends = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(token, bool)
    ends |= count == room

    eligible = ends & (jnp.arange(keep) < k) & ~beams.done[:, None]
    final = jnp.where(eligible, score / count.astype(jnp.float32) ** config.length_penalty, -jnp.inf)
    finished_score, order = jax.lax.top_k(jnp.concatenate([beams.finished_score, final], 1), k)
    lengths = jnp.where(final > -jnp.inf, count, 0)
    finished_length = jnp.take_along_axis(jnp.concatenate([beams.finished_length, lengths], 1), order, 1)
    finished = jnp.take_along_axis(jnp.concatenate([beams.finished, text], 1), order[..., None], 1)

    running, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), min(k, keep))
    missing = k - running.shape[1]
    running = jnp.pad(running, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    chosen = jnp.pad(chosen, ((0, 0), (0, missing)))
    rows = (jnp.arange(batch)[:, None] * k + jnp.take_along_axis(parent, chosen, 1)).reshape(-1)
    return _Beams(
        kv.select(cache, rows),
        jnp.take_along_axis(text, chosen[..., None], 1),
        jnp.take_along_axis(token, chosen, 1),
        running,
        finished,
        finished_length,
        finished_score,
        beams.done | _settled(finished_score, running[:, 0], count, room, config),
        count,
    )


def _score(step: Step, params, beams: _Beams, length: jax.Array) -> tuple[jax.Array, kv.Cache]:
    """Log-softmax f32[B, K, V] after each beam's last token, which is committed."""
    batch, k = beams.root.shape
    positions = jnp.broadcast_to((length - 1 + beams.count)[:, None], (batch, k))
    positions = jnp.where(beams.done[:, None], -1, positions).reshape(-1, 1)
    blocks = kv.new_blocks(beams.cache, 1)
    output, blocks = step(params, beams.root.reshape(-1, 1), positions, beams.cache, blocks)
    logits = step.head(params, output.hidden)[:, 0]
    peak = logits.max(-1)
    n = (jnp.isfinite(peak) & (positions[:, 0] >= 0)).astype(jnp.int32)
    cache = kv.commit(beams.cache, blocks, jnp.zeros_like(positions), n, notes_of(output))
    logp = jax.nn.log_softmax(logits, -1).reshape(batch, k, -1)
    return jnp.where(jnp.isnan(logp), -jnp.inf, logp), cache


def _settled(finished: jax.Array, best: jax.Array, count: jax.Array, room: int, config: BeamConfig) -> jax.Array:
    """Whether a prompt's K finished hypotheses can no longer change: bool[B]."""
    full = finished[:, -1] > -jnp.inf
    if config.early_stopping:
        return full | (best == -jnp.inf)
    longest = jnp.float32(room) if config.length_penalty > 0 else count.astype(jnp.float32) + 1
    reachable = best / longest**config.length_penalty
    return (full & (finished[:, -1] >= reachable)) | (best == -jnp.inf)
