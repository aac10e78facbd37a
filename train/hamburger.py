"""The HAMburger recipe: text cut into groups by the base model's own entropy, and one loss over base and added parts.

Liu and Zhang 2025 (arXiv:2505.20438). A token joins the group before it where the base model's entropy for it is below
0.05 nats, or below 0.3 times the largest in the group; groups have at most four tokens. Loss: cross-entropy of every
token, and half the binary cross-entropy of "this is the group's last". Paper: Adam at 5e-5 for the base and 1e-4 for
the new parts; here Muon, as for `jaxinfer.train.lm`, with rates of the same proportion.

Each window begins with a stretch that is fed token by token, as prompts are in generation. Departures: that stretch is
trained too (published code trains answers alone), so that the base stays a model of single tokens; a document's end is
a group of its own, and the stop of a full group, which nobody reads, has no loss. As in published training a group
stands at the position of its last token (published generation is one off, ours is not).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer.errors import ConfigError
from jaxinfer.models.hamburger import Hamburger
from jaxinfer.ops.attention import Segments
from jaxinfer.train import lm
from jaxinfer.train.data import Stream
from jaxinfer.train.loop import Recipe, fingerprint

LOW, RATIO = 0.05, 0.3  # nats; share of the group's largest entropy
STOP_WEIGHT = 0.5


def first_of_group(
    entropy: np.ndarray, alone: np.ndarray, *, size: int = 4, low: float = LOW, ratio: float = RATIO
) -> np.ndarray:
    """Which tokens begin a group, bool[B, T], from `entropy f[B, T]` (of the law that each was read from, in nats).

    `alone bool[B, T]`: tokens that neither join a group nor are joined.
    """
    begins = np.ones(entropy.shape, bool)
    count, largest = np.full(len(entropy), size), np.zeros(len(entropy))
    for t in range(entropy.shape[1]):
        h = entropy[:, t]
        joins = ((h < low) | (h < ratio * largest)) & (count < size) & ~alone[:, t]
        begins[:, t] = ~joins
        count = np.where(alone[:, t], size, np.where(joins, count + 1, 1))
        largest = np.where(joins, np.maximum(largest, h), h)
    return begins


def group(
    windows: np.ndarray, begins: np.ndarray, trained: np.ndarray, *, size: int, steps: int, micro: int, end: int = 0
) -> dict[str, np.ndarray]:
    """Windows i[B, T] and where their groups begin -> a batch of `steps` macro steps, the rest of a window dropped.

    Macro step m reads group m and is to write group m + 1. i32 each: `tokens [B, M, S]`, `sizes`, `positions` (of the
    last token, counted from the document's start; -1 past the end) and `segments [B, M]`; `targets [B, M, S]`,
    `target_sizes [B, M]` (0: none); `stops [B, M]`: 1 where the end of the target group is learned, that is where
    `trained bool[B, T]` holds for its first token. `several [B, K]`: the steps, of the first `micro` a row, whose
    targets have more than one token (M past the end).
    """
    batch, length = windows.shape
    rows = np.arange(batch)[:, None]
    number = np.cumsum(begins, 1) - 1
    first = np.maximum.accumulate(np.where(begins, np.arange(length), 0), 1)
    place = np.arange(length) - first
    segment = np.cumsum(windows == end, 1)
    opened = np.maximum.accumulate(np.where(windows == end, np.arange(length), 0), 1)
    width = max(length, steps) + 1
    whole = np.zeros((batch, width, size), np.int32)
    whole[rows, number, place] = windows
    sizes, last = np.zeros((2, batch, width), np.int32)
    np.maximum.at(sizes, (rows, number), place + 1)
    np.maximum.at(last, (rows, number), np.arange(length))
    sizes = np.where(np.arange(width) < number[:, -1:], sizes, 0)  # the window may have cut its last group short
    position, segments = (last - opened[rows, last])[:, :steps], segment[rows, last][:, :steps]
    live = (sizes[:, :steps] > 0) & (sizes[:, 1 : steps + 1] > 0)
    target_sizes = np.where(live, sizes[:, 1 : steps + 1], 0)
    starts = last[:, 1 : steps + 1] - target_sizes + 1
    several = np.sort(np.where(target_sizes > 1, np.arange(steps), steps), 1)[:, :micro]
    return {
        "tokens": whole[:, :steps], "sizes": np.where(live, sizes[:, :steps], 0),
        "positions": np.where(live, position, -1), "segments": segments,
        "targets": whole[:, 1 : steps + 1], "target_sizes": target_sizes,
        "stops": (live & trained[rows, np.minimum(starts, length - 1)]).astype(np.int32), "several": several,
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames="step")
def entropies(step: Any, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The entropy f32[B, T] in nats of the law of each target of a packed batch."""
    output, _ = step(params, batch["ids"], batch["positions"], mask=Segments(batch["segments"]))
    logp = jax.nn.log_softmax(step.head(params, output.hidden))
    return -(jnp.exp(logp) * logp).sum(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Batches of grouped windows of a stream: a pure function of the step and of the base as it was before training.

    `step`, `params`: that base. A row has `density` macro steps a token at most, and at most `several` of them write
    more than one token: what a window holds beyond is dropped. Its first part, up to a half, is fed token by token.
    """

    stream: Stream
    step: Any
    params: Any
    size: int = 4
    low: float = LOW
    ratio: float = RATIO
    density: float = 0.9
    several: float = 0.2

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of the update that follows `step` completed ones, as `group` has it."""
        packed = self.stream(step)
        windows = np.concatenate([packed["ids"], packed["targets"][:, -1:]], 1)
        batch, length = windows.shape
        entropy = np.asarray(entropies(self.step, self.params, packed), np.float64)
        entropy = np.concatenate([np.zeros((batch, 1)), entropy], 1)  # the first token is read from nothing
        rng = np.random.default_rng((self.stream.seed, step, 2))
        prompt = rng.integers(1, length // 2, batch)
        trained = np.arange(length) >= prompt[:, None]
        alone = ~trained | (windows == self.stream.end)
        begins = first_of_group(entropy, alone, size=self.size, low=self.low, ratio=self.ratio)
        steps, micro = round((length - 1) * self.density), round((length - 1) * self.several)
        return group(windows, begins, trained, size=self.size, steps=steps, micro=micro, end=self.stream.end)


@dataclasses.dataclass(frozen=True)
class Smash:
    """The objective `(params, batch, key) -> (loss, metrics)` of grouped text.

    The metrics have the mean loss in nats of a group's first token (`first`) and of the others (`later`), the stop's
    (`stop`), the share of others that would be taken right (`later_right`) and tokens a macro step (`tokens_a_step`).
    """

    model: Hamburger

    def __call__(self, params, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        model, sizes = self.model, batch["target_sizes"]
        output, _ = model.macro(
            params, batch["tokens"], batch["sizes"], batch["positions"], mask=Segments(batch["segments"])
        )
        first, _ = _losses(model.head(params, output.hidden), batch["targets"][..., 0])
        live = sizes > 0
        stop = _stop_loss(model.stop(params, output.hidden), sizes == 1)
        stops, stop_sum = (live & (batch["stops"] > 0)), 0.0
        stop_sum = jnp.where(stops, stop, 0.0).sum()

        rows, steps = jnp.arange(sizes.shape[0])[:, None], batch["several"]
        at = jnp.minimum(steps, sizes.shape[1] - 1)
        targets = batch["targets"][rows, at].reshape(-1, model.size)
        count = jnp.where(steps < sizes.shape[1], sizes[rows, at], 0).reshape(-1, 1)
        features = model.features(params, output)[rows, at]
        hidden = model.micro_hidden(params, features.reshape(-1, *features.shape[2:]), targets)
        later, right = _losses(model.head(params, hidden), targets[:, 1:])
        place = jnp.arange(2, model.size + 1)
        inside = place <= count
        decided = inside & (place < model.size) & (batch["stops"][rows, at].reshape(-1, 1) > 0)
        stop_sum += jnp.where(decided, _stop_loss(model.stop(params, hidden), place == count), 0.0).sum()

        n_first, n_later = live.sum(), inside.sum()
        first_sum, later_sum = jnp.where(live, first, 0.0).sum(), jnp.where(inside, later, 0.0).sum()
        weight = jnp.maximum(n_first + n_later, 1).astype(jnp.float32)
        stop_loss = stop_sum / jnp.maximum(stops.sum() + decided.sum(), 1)
        written = jnp.where(stops, sizes, 0).sum() / jnp.maximum(stops.sum(), 1)
        return (first_sum + later_sum) / weight + STOP_WEIGHT * stop_loss, {
            "weight": weight,
            "first": first_sum / jnp.maximum(n_first, 1),
            "later": later_sum / jnp.maximum(n_later, 1),
            "later_right": (inside & right).sum() / jnp.maximum(n_later, 1),
            "stop": stop_loss,
            "tokens_a_step": written,
        }


def _losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log p of each target, and whether it is the likeliest token."""
    gold = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - gold, gold >= logits.max(-1)


def _stop_loss(logit: jax.Array, is_last: jax.Array) -> jax.Array:
    return jax.nn.softplus(jnp.where(is_last, -logit, logit))


def optimizer(schedule: optax.Schedule, *, base_rate: float = 0.5) -> optax.GradientTransformation:
    """Muon and Adam as for language models, with the rate of the base `base_rate` times that of the new parts."""
    if not 0 <= base_rate:
        raise ConfigError(f"base_rate: got {base_rate!r}, accepts 0 or more")
    parts: dict[Hashable, optax.GradientTransformation] = {
        "base": lm.muon(lambda count: base_rate * schedule(count)),
        "new": lm.muon(schedule),
    }
    return optax.partition(parts, lambda params: {name: "base" if name == "base" else "new" for name in params})


def recipe(
    model: Hamburger,
    base: Any,
    stream: Stream,
    *,
    schedule: optax.Schedule,
    base_rate: float = 0.5,
    low: float = LOW,
    ratio: float = RATIO,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    identity: dict[str, Any] | None = None,
) -> Recipe:
    """Training of a model around `base`, params of its base Step, which also cuts the text into groups: whoever resumes
    a run hands over the same ones. `identity`: what else tells one run from another."""
    return Recipe(
        objective=Smash(model),
        data=Groups(stream, model.base, jax.tree.map(jnp.array, base), model.size, low, ratio),  # a copy is kept
        optimizer=optimizer(schedule, base_rate=base_rate),
        schedule=schedule,
        evaluate=evaluate,
        tokens=lambda batch: int(batch["sizes"].sum()),
        identity={
            "recipe": "hamburger", "base": fingerprint(base), "seed": stream.seed, "base_rate": base_rate,
            "size": model.size, "low": low, "ratio": ratio, **(identity or {}),
        },
    )  # fmt: skip
