"""Training of draft heads on a frozen target: the target's features and logits are made on the fly, the head follows.

One recipe for every kind of head. A batch of text goes through the frozen target once (`look`); the kind's objective
compares what its head makes of the features with the next tokens and with the target's own law:

    loss = (1 - distill) * cross-entropy on the text + distill * KL(target || head) [+ features * smooth L1]

Cross-entropy on text is what Medusa (arXiv:2401.10774) and Chimera (arXiv:2402.15758) train on, a soft cross-entropy
(the KL up to a constant) plus smooth L1 on features what EAGLE does (arXiv:2401.15077). A draft is accepted where the
target agrees, whatever the text says, so `distill` is 1 by default here.

A new kind joins with a function `(step, head, params, seen, losses) -> (loss, metrics)` in OBJECTIVES.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.errors import ConfigError
from jaxinfer.models.heads import Head, TargetShape
from jaxinfer.models.heads.ppd import PPDHead
from jaxinfer.ops.attention import Segments
from jaxinfer.ops.weights import materialize
from jaxinfer.train import data, lm, loop, ppd


@struct.dataclass
class Seen:
    """What the frozen target made of a batch: `hidden f[B, T, D]` after the final norm, `taps` of inner layers,
    `logits f32[B, T, V]`; the batch's `ids`, `targets`, `segments`, `positions i32[B, T]`; the target's `params`."""

    hidden: jax.Array
    taps: tuple[jax.Array, ...]
    logits: jax.Array
    ids: jax.Array
    targets: jax.Array
    segments: jax.Array
    positions: jax.Array
    params: Any


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights. `distill`: of the KL to the target's law, 0 to 1, the rest is cross-entropy on the text; `features`: of
    the smooth L1 on features, for heads that predict them, and `logits` of all the rest beside it; `decay`: of each
    further token, once more a token; `rounds`: how often a head that drafts token by token is run on what it made
    itself (EAGLE-1: 1, which is none)."""

    distill: float = 1.0
    features: float = 1.0
    decay: float = 0.8
    rounds: int = 4
    logits: float = 1.0

    def __post_init__(self):
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill: got {self.distill}, accepts 0 to 1")
        for name in ("features", "logits"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 0 or more")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay: got {self.decay}, accepts above 0 and up to 1")
        if self.rounds < 1:
            raise ConfigError(f"rounds: got {self.rounds}, accepts 1 or more")


def look(step: Any, target_params: Any, batch: Any, taps: tuple[int, ...] = ()) -> Seen:
    """The frozen target over a batch of `data.Stream`."""
    output, _ = step(target_params, batch["ids"], batch["positions"], mask=Segments(batch["segments"]), taps=taps)
    logits = step.head(target_params, output.hidden)
    given = {name: batch[name] for name in ("ids", "targets", "segments", "positions")}
    return Seen(hidden=output.hidden, taps=output.taps, logits=logits, params=target_params, **given)


def shifted(x: jax.Array, by: int) -> jax.Array:
    """`x[B, T, ...]` moved so that place t holds what stood at t + by; rubbish (the last) after the end."""
    return jnp.concatenate([x[:, by:], jnp.repeat(x[:, -1:], by, 1)], 1) if by else x


def within(seen: Seen, by: int) -> jax.Array:
    """Whether place t + by is in the window and in t's document, bool[B, T]."""
    inside = jnp.arange(seen.ids.shape[1]) < seen.ids.shape[1] - by
    return inside & (shifted(seen.segments, by) == seen.segments)


def mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of `x f32[B, T]` where it counts."""
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(where.sum(), 1)


def token_loss(logits: jax.Array, targets: jax.Array, teacher: jax.Array, distill: float) -> jax.Array:
    """`(1 - distill) * -log p(target) + distill * KL(teacher || p)`, f32[...], of `logits`, `teacher f32[..., V]`."""
    logp = jax.nn.log_softmax(logits)
    loss = jnp.zeros(logits.shape[:-1])
    if distill < 1:
        loss += (1 - distill) * -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    if distill > 0:
        theirs = jax.nn.log_softmax(teacher)
        loss += distill * jnp.sum(jnp.exp(theirs) * (theirs - logp), -1)
    return loss


def smooth_l1(x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the last axis of d**2 / 2 where |d| < 1 and |d| - 1/2 elsewhere."""
    d = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
    return jnp.where(d < 1, d * d / 2, d - 0.5).mean(-1)


def guesses(parts: list[tuple[jax.Array, int]], seen: Seen, losses: Losses) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of several guesses about the token after place t + by: `parts` are `(logits f32[B, T, V], by)`, nearest
    first. Metrics: each depth's `agree_k`, the share of places where head and target choose the same token."""
    total, weights, metrics = jnp.zeros(()), 0.0, {}
    for depth, (logits, by) in enumerate(parts, 1):
        teacher, where = shifted(seen.logits, by), within(seen, by)
        loss = token_loss(logits, shifted(seen.targets, by), teacher, losses.distill)
        weight = losses.decay ** (depth - 1)
        total, weights = total + weight * mean(loss, where), weights + weight
        agree = (logits.argmax(-1) == teacher.argmax(-1)).astype(jnp.float32)
        metrics[f"agree_{depth}"] = mean(agree, where)
    return total / weights, metrics


def medusa(step, head, params, seen: Seen, losses: Losses, key):
    """Head k at place t guesses the token after place t + k (k from 1): further than the target's own logits."""
    found = head.logits(params, seen.hidden, step, seen.params)
    return guesses([(logits, k) for k, logits in enumerate(found, 1)], seen, losses)


def eagle(step, head, params, seen: Seen, losses: Losses, key):
    """Entry t predicts feature t + 1, and with it the token after; smooth L1 where features are the target's last."""
    total, metrics, where = jnp.zeros(()), {}, within(seen, 1)
    for s, made in enumerate(eagle_rounds(step, head, params, seen, losses.rounds)):
        loss, found = guesses([(step.head(seen.params, made), 1)], seen, losses)
        loss *= losses.logits
        if losses.features > 0 and not head.layers:
            loss += losses.features * mean(smooth_l1(made, shifted(seen.hidden, 1)), where)
        total += losses.decay**s * loss
        metrics[f"agree_{s + 1}"] = found["agree_1"]
    return total / sum(losses.decay**s for s in range(losses.rounds)), metrics


def eagle_rounds(step, head, params, seen: Seen, rounds: int) -> list[jax.Array]:
    """What the head makes of each entry, f[B, T, D]: first of the target's features, then round by round of its own in
    their place, as in decoding. Round s reads true entries up to t - s and its own after them (EAGLE-3)."""
    batch, length = seen.ids.shape
    feature, embedding = head.features(params, seen), step.embed(seen.params, shifted(seen.ids, 1))
    cache = head.new_cache(batch, 1, str(feature.dtype))
    blocks = kv.new_blocks(cache, rounds * length)
    t, same = jnp.arange(length), seen.segments[:, :, None] == seen.segments[:, None, :]
    ahead, found = t[:, None] - t[None], []
    for s in range(rounds):
        # The true entries, then one of each round, ever nearer, and the round's own.
        masks = [same & (ahead == s - r if r else ahead >= s) for r in range(s + 1)]
        later = jnp.zeros((batch, length, (rounds - s - 1) * length), bool)
        mask = jnp.concatenate([*masks, later], -1)
        made, blocks = head(params, feature, embedding, seen.positions, cache, blocks, s * length, mask)
        found.append(made)
        feature = jnp.concatenate([feature[:, :1], made[:, :-1]], 1)
    return found


def chimera(step, head, params, seen: Seen, losses: Losses, key):
    """Iteration s at place t guesses the token after t, which the target's own logits at t are about."""
    total, metrics = jnp.zeros(()), {}
    for s, logits in enumerate(chimera_rounds(step, head, params, seen, losses.rounds), 1):
        loss, where = token_loss(logits, seen.targets, seen.logits, losses.distill), seen.positions >= s
        total += losses.decay ** (s - 1) * mean(loss, where)
        agree = (logits.argmax(-1) == seen.logits.argmax(-1)).astype(jnp.float32)
        metrics[f"agree_{s}"] = mean(agree, where)
    return total / sum(losses.decay**s for s in range(losses.rounds)), metrics


def chimera_rounds(step, head, params, seen: Seen, rounds: int) -> list[jax.Array]:
    """Logits f32[B, T, V] of iterations s = 1, 2, ..., which have read hidden states up to t - s, and trigram states
    from there up to t. Places t < s of a document have no such hidden state."""
    batch, length = seen.ids.shape
    before = [jnp.where(seen.positions >= by, jnp.roll(seen.ids, by, 1), -1) for by in (2, 1, 0)]
    trigrams = jnp.stack(before, -1)
    embeddings = step.embed(seen.params, jnp.maximum(trigrams, 0))
    states = head.encode(params, jnp.where(trigrams[..., None] < 0, jnp.zeros((), embeddings.dtype), embeddings))
    cache = head.new_cache(batch, 1, str(states.dtype))
    blocks, nobody = kv.new_blocks(cache, 2 * length), jnp.zeros((batch, length, 2 * length), bool)
    _, blocks = head(params, seen.hidden, seen.positions, cache, blocks, 0, nobody)
    t, same = jnp.arange(length), seen.segments[:, :, None] == seen.segments[:, None, :]
    ahead, found = t[:, None] - t[None], []
    for s in range(1, rounds + 1):
        mask = jnp.concatenate([same & (ahead >= s), same & (ahead >= 0) & (ahead < s)], -1)
        made, _ = head(params, states, seen.positions, cache, blocks, length, mask)
        found.append(head.logits(params, jnp.roll(seen.hidden, s, 1), made, step, seen.params))
    return found


# Kind of head to `(step, head, params, seen, losses, key) -> (loss, metrics)`.
OBJECTIVES: Mapping[str, Callable[..., tuple[jax.Array, dict[str, jax.Array]]]] = {
    "medusa": medusa,
    "ppd": ppd.prompt_tokens,
    "eagle": eagle,
    "chimera": chimera,
}


@dataclasses.dataclass(frozen=True)
class HeadObjective:
    """The objective `(params, batch, key, target_params) -> (loss, metrics)` of a head, for `loop.Recipe`."""

    step: Any
    head: Head
    losses: Losses = Losses()

    def __call__(self, params, batch, key, frozen) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen = look(self.step, frozen, batch, self.head.taps)
        loss, metrics = OBJECTIVES[self.head.kind](self.step, self.head, params, seen, self.losses, key)
        return loss, {**metrics, "weight": jnp.asarray(batch["ids"].size, jnp.float32)}


def measured(step: Any, target_params: Any, head: Head, params: Any, documents: Sequence[np.ndarray]) -> Head:
    """The trained head with what its drafter must know of it, measured on the target's own output after `documents`:
    PPD's acceptance; other kinds as they are."""
    if not isinstance(head, PPDHead):
        return head
    prompts = ppd.prompts_of(documents, count=32, length=64)
    found = ppd.measure_acceptance(step, target_params, head, params, prompts)
    return dataclasses.replace(head, acceptance=found)


def held_out_batch(documents: Sequence[np.ndarray], *, length: int, end: int, rows: int = 16) -> dict[str, np.ndarray]:
    """One batch of windows from the middles of `rows` held-out documents (fewer where there are no more)."""
    found = [d for d in documents if len(d) > length]
    if not found:  # a little text: one window over all of it, again and again where it is too short
        found = [np.resize(data.concatenate(documents, end=end), length + 1)]
    found = found[:: max(1, len(found) // rows)][:rows]
    starts = [(len(d) - length - 1) // 2 for d in found]
    return data.pack(np.stack([d[at : at + length + 1] for d, at in zip(found, starts, strict=True)]), end=end)


def output_matrix(step: Any, params: Any) -> jax.Array:
    """The target's output matrix, f32[D, V]."""
    name, tied = ("embedding", True) if step.config.tie_embeddings else ("head", False)
    matrix = materialize(params[name]).astype(jnp.float32)
    return matrix.T if tied else matrix


def recipe(
    step: Any,
    target_params: Any,
    head: Head,
    stream: Callable[[int], Any],
    *,
    steps: int,
    rate: float = 3e-3,
    losses: Losses = Losses(),  # noqa: B008 - immutable
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = lm.muon,
    schedule: optax.Schedule | None = None,
    held_out: Any = None,
    identity: Mapping[str, Any] | None = None,
) -> loop.Recipe:
    """The recipe of a head: `stream` gives batches as `data.Stream` does; `held_out` is a batch whose `agree_k` the
    evaluation reports. Muon on its matrices, warm-up, constant, linear decay, unless told otherwise. ConfigError where
    the head does not fit.
    """
    if head.target != TargetShape.of(step.config):
        raise ConfigError(f"the head is for a target of {head.target}, this one has {TargetShape.of(step.config)}")
    objective = HeadObjective(step, head, losses)
    if schedule is None:
        schedule = lm.warmup_stable_decay(rate, steps=steps, warmup=max(1, min(50, steps // 4)), decay=0.5)
    measure = jax.jit(lambda params, batch, frozen: objective(params, batch, jax.random.key(0), frozen))

    def evaluate(params):
        loss, metrics = measure(params, held_out, target_params)
        return {"loss": float(loss), **{name: float(value) for name, value in metrics.items() if name != "weight"}}

    return loop.Recipe(
        objective=objective,
        data=stream,
        optimizer=optimizer(schedule),
        schedule=schedule,
        evaluate=None if held_out is None else evaluate,
        tokens=lambda batch: batch["ids"].size,
        frozen=target_params,
        identity={
            "recipe": "heads",
            "kind": head.kind,
            "settings": head.settings(),
            "losses": dataclasses.asdict(losses),
            "rate": rate,
            **(identity or {}),
        },
    )


def init_state(step: Any, target_params: Any, head: Head, which: loop.Recipe, key: jax.Array) -> loop.TrainState:
    """The state before the first update: a head that begins as its method says, from the target's output matrix."""
    first, second = jax.random.split(key)
    params = jax.jit(head.init)(first, output_matrix(step, target_params))
    return loop.init_state(params, which, second)
