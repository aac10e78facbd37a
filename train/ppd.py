"""PPD's objective: prompt-token embeddings that guess what a frozen target says one, two and three tokens further on.

Chen et al. 2024 (arXiv:2405.18628). After random points of a text stand the prompt tokens; each is to say what the
target itself says at the place of the real token that it stands for (Kullback-Leibler divergence from the target's law,
weight 0.8**i for prompt token i). Paper: learning rate 1e-2 with a cosine, one epoch of the target's own greedy
continuations. Guarantee: the target stays as it is. Trained by `train.heads.recipe`, as every head.

Departures: the paper truncates a text at one point; here many points share one forward through a mask, in which a
prompt token sees the text up to its point and the earlier ones of its own chain (`models.heads.ppd`). Text is what the
recipe is given, the schedule that of the other heads.

`measure_acceptance` is what the trees are chosen by: how often a guess of each rank is what the target then says, on
its own greedy continuations.

Stability: experimental.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import decode
from jaxinfer.errors import InputError
from jaxinfer.models.heads.ppd import PPDHead
from jaxinfer.train import data

EVERY = 4  # tokens of text for one point of training
RANKS = 10  # guesses of a prompt token that are counted, as in the paper


def prompt_tokens(step, head: PPDHead, params, seen, losses, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective, for `train.heads.OBJECTIVES`: KL of the guesses, one point in `EVERY`, from the target's law."""
    text = {"ids": seen.ids, "positions": seen.positions, "segments": seen.segments}
    points = choose_points(seen.ids.shape, head.prompts, key)
    logits, hidden = head.guesses(params, step, seen.params, text, points)
    rows = jnp.arange(points.shape[0])[:, None, None]
    place = points[..., None] + jnp.arange(1, head.prompts + 1, dtype=jnp.int32)
    # The target's law from this pass: what `look` computed is then read by nobody, and the compiler leaves it out.
    law = jax.nn.log_softmax(step.head(seen.params, hidden[rows, place]))
    gap = (jnp.exp(law) * (law - jax.nn.log_softmax(logits))).sum(-1)
    inside = seen.segments[rows, place] == jnp.take_along_axis(seen.segments, points, 1)[..., None]
    weight = inside * losses.decay ** jnp.arange(head.prompts)
    right = (law.argmax(-1) == logits.argmax(-1)) & inside
    share = right.sum((0, 1)) / jnp.maximum(inside.sum((0, 1)), 1)
    metrics = {f"agree_{i + 1}": share[i] for i in range(head.prompts)}
    return (weight * gap).sum() / jnp.maximum(weight.sum(), 1e-9), metrics


def choose_points(shape: tuple[int, ...], prompts: int, key: jax.Array) -> jax.Array:
    """Distinct random points i32[B, I] of rows of a batch of `shape`, with room for what `prompts` tokens guess."""
    rows, length = shape
    if length <= prompts:
        raise InputError(f"rows of {length} tokens have no room for {prompts} prompt tokens; give longer ones")
    count = max(1, min(length // EVERY, length - prompts))
    return jax.lax.top_k(jax.random.uniform(key, (rows, length - prompts)), count)[1]


def measure_acceptance(
    step: Any, target_params: Any, head: PPDHead, params: Any, prompts: Sequence[np.ndarray], *, tokens: int = 128,
    ranks: int = RANKS, batch: int = 8,
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """The share of places of the target's greedy continuations at which guess r of prompt token d is right, for each d
    and r; on the host. `prompts`: token ids, all of one length; `tokens` are continued; `batch` rows at a time."""
    counts, total = np.zeros((head.prompts, ranks)), 0
    for at in range(0, len(prompts), batch):
        ids = jnp.asarray(np.stack(prompts[at : at + batch]), jnp.int32)
        hits = _hits(step, target_params, head, params, ids, tokens=tokens, ranks=min(ranks, step.vocab_size))
        counts[:, : hits.shape[-1]] += np.asarray(hits.sum((0, 1)))
        total += hits.shape[0] * hits.shape[1]
    return tuple(tuple(round(float(x), 5) for x in row) for row in counts / max(total, 1))


@functools.partial(jax.jit, static_argnames=("step", "head", "tokens", "ranks"))
def _hits(step, target_params, head: PPDHead, params, ids: jax.Array, *, tokens: int, ranks: int) -> jax.Array:
    """Which guess was right, after each place of the continuation that has its tokens: bool[B, I, prompts, ranks]."""
    batch, width = ids.shape
    config = decode.Config(max_tokens=tokens, eos=())
    lengths = jnp.full(batch, width, jnp.int32)
    out = decode.generate(step, target_params, ids, lengths, config=config, key=jax.random.key(0))
    text = jnp.concatenate([ids, out.tokens], 1)
    where = jnp.broadcast_to(jnp.arange(text.shape[1], dtype=jnp.int32), text.shape)
    points = jnp.broadcast_to(
        jnp.arange(width - 1, text.shape[1] - head.prompts - 1, dtype=jnp.int32), (batch, tokens - head.prompts)
    )
    seen = {"ids": text, "positions": where, "segments": jnp.zeros_like(text)}
    logits, _ = head.guesses(params, step, target_params, seen, points)
    likely = jax.lax.top_k(logits, ranks)[1]
    place = points[..., None] + jnp.arange(2, head.prompts + 2, dtype=jnp.int32)
    return likely == text[jnp.arange(batch)[:, None, None], place][..., None]


def prompts_of(documents: Sequence[np.ndarray], *, count: int, length: int) -> list[np.ndarray]:
    """`count` stretches of `length` tokens at most, from the middles of the documents that are long enough."""
    found = [d for d in documents if len(d) >= length] or [np.resize(data.concatenate(documents), length)]
    found = found[:: max(1, len(found) // count)][:count]
    return [d[(len(d) - length) // 2 :][:length].astype(np.int32) for d in found]
